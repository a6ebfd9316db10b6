"""The worker pool of a sweep: processes that train one run after the other, so that start-up, imports and the tokenised
corpus are paid once a process and not once a run.

    pool = Pool(load, device, log)      start the workers
    pool.submit(config)                 train a run, where fewer than `pool.size` are in training
    pool.wait(seconds)                  the runs that have ended meanwhile, as Answers
    pool.close()                        save what is in training, and end the workers

All are on this machine; a launcher for a cluster has to offer the same. Python's ProcessPoolExecutor will not do: when
a worker dies it stops all the others, does not say whose run it was, and takes no more; nor can it stop a run.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

from nanochin.config import Config, RunError, UserError
from nanochin.files import DiskError
from nanochin.runs import BusyError

READY = "ready"  # what a worker says when it has loaded all it needs
GRACE = 20.0  # seconds that a worker has to save its run when it is to end

Train = Callable[[Config], object]


@dataclass(frozen=True)
class Answer:
    """How a run ended: finished, failed (for the record), busy (another process has it) or died (its worker did)."""

    run: str
    end: str
    reason: str = ""


@dataclass(frozen=True)
class Hello:
    """What a worker runs on: cpu, mps or cuda, and how many GPUs it may choose from."""

    device: str
    gpus: int


# ---------------------------------------------------------------------------------------------------------------------
# In the sweep


@dataclass
class Worker:
    number: int
    process: multiprocessing.Process
    pipe: connection.Connection
    ready: bool = False  # to train
    run: str | None = None  # in training

    def end(self) -> str:
        """Wait for the end of its process, GRACE seconds at most -> how it ended, in words."""
        self.process.join(GRACE)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        return f"signal {-code}" if code < 0 else f"exit code {code}"


class Pool:
    """`size` workers. Several GPUs are shared out among them in turn."""

    def __init__(self, load: Callable[[], Train], device: str, log: Path, workers: int | None = None, most: int = 1000):
        """load: called once in each worker, returns the function that trains; pickled, so at the top level of a module.
        device: as the option of train.py. log: the file that takes what workers print. workers: how many; None: one a
        GPU, else one a CPU core. most: more would have nothing to do.

        Raises UserError for a device that is not there, RunError for a worker that dies before it begins."""
        self.load, self.device, self.log, self.hello = load, device, log, None
        self.workers = [self._start(0)]
        while not self.hello:  # the first worker tells what there is
            self.wait()
        default = {"cpu": cores(), "mps": 1, "cuda": self.hello.gpus}[self.hello.device]
        size = max(1, min(workers or default, most))
        self.workers += [self._start(number) for number in range(1, size)]

    @property
    def size(self) -> int:
        return len(self.workers)

    def __str__(self) -> str:
        gpus = self.hello.gpus
        return f"{self.size} workers on {f'{gpus} GPUs' if gpus > 1 else self.hello.device}"

    def submit(self, config: Config) -> None:
        """Train `config` in a worker without a run; there must be one."""
        worker = next(worker for worker in self.workers if worker.run is None)
        worker.run = config.name
        with contextlib.suppress(OSError):  # it has died, as `wait` will find
            worker.pipe.send(config)

    def wait(self, seconds: float | None = None) -> list[Answer]:
        """The runs that have ended; waits for one up to `seconds` (None: without end). A worker that died is replaced.

        Raises UserError for what should stop the sweep: an unsuitable option, a full disk, no start of a worker."""
        answers = []
        for pipe in connection.wait([worker.pipe for worker in self.workers], seconds):
            worker = next(worker for worker in self.workers if worker.pipe is pipe)
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                message = self._replace(worker)
            match message:
                case UserError():
                    raise message
                case Hello():
                    self.hello = self.hello or message
                case str():  # READY
                    worker.ready = True
                case Answer():
                    worker.run = None
                    answers.append(message)
        return answers

    def close(self) -> None:
        """End the workers; runs in training are saved first."""
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.end()

    def _start(self, number: int) -> Worker:
        environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if self.hello and self.hello.gpus > 1:  # the very first sees all GPUs, and takes the first of them
            environment["CUDA_VISIBLE_DEVICES"] = one_gpu(number, self.hello.gpus)
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        # A daemon is ended with the sweep, however that ends, as long as it is not killed.
        process = spawn.Process(target=work, args=(theirs, self.load, self.device, self.log), daemon=True)
        with _inherited(environment):
            process.start()
        theirs.close()  # so that it closes when the worker dies
        return Worker(number, process, ours)

    def _replace(self, dead: Worker) -> Answer | None:
        how = dead.end()
        if not dead.ready:
            raise RunError(f"a worker ended before it began ({how}); see {self.log}")
        self.workers[self.workers.index(dead)] = self._start(dead.number)
        return Answer(dead.run, "died", how) if dead.run else None


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_gpu(number: int, gpus: int) -> str:
    """CUDA_VISIBLE_DEVICES of worker `number`, out of the `gpus` that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    return visible.split(",")[number % gpus]


@contextlib.contextmanager
def _inherited(environment: dict[str, str]) -> Iterator[None]:
    """A process started inside the block has these variables before it loads a library, and never sees Ctrl-C."""
    before, on_interrupt = dict(os.environ), signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        signal.signal(signal.SIGINT, on_interrupt)


# ---------------------------------------------------------------------------------------------------------------------
# In a worker


def work(pipe: connection.Connection, load: Callable[[], Train], device: str, log: Path) -> None:
    """Say hello, load, say READY (or why not), then train what comes. Ends by a SIGTERM; a run in training is saved."""
    if hasattr(os, "setsid"):
        os.setsid()  # a terminal that is closed reaches the sweep alone
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    threading.Thread(target=_watch_the_sweep, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):  # the sweep has died
        try:
            pipe.send(look_around(device))  # before what takes longer, so that the others can start
            train = load()
            pipe.send(READY)
        except UserError as error:
            return pipe.send(UserError(str(error)))
        while True:
            config, started = pipe.recv(), time.process_time()
            answer = attempt(train, config)
            end, spent = getattr(answer, "end", "stops the sweep"), time.process_time() - started
            _note(f"worker {os.getpid()}: {config.name} {end}, {spent:.2f} s of CPU")
            pipe.send(answer)


def look_around(device: str) -> Hello:
    """What `device` is here. Raises UserError if it is not there."""
    import torch

    from nanochin.device import pick_device

    kind = pick_device(device).type
    return Hello(kind, torch.cuda.device_count() if kind == "cuda" and ":" not in device else 1)  # cuda:1 is one


def attempt(train: Train, config: Config) -> Answer | UserError:
    """Train -> how it ended, or the error for which the sweep should stop. Exits if a signal ended it."""
    import torch

    from nanochin.step import out_of_memory

    try:
        train(config)
        return Answer(config.name, "finished")
    except BusyError:
        return Answer(config.name, "busy")
    except UserError as error:
        if error.code > 128:  # a signal: saved, and there is nobody to answer
            sys.exit(error.code)
        if isinstance(error, DiskError) or not isinstance(error, RunError):
            return (RunError if error.code == 1 else UserError)(str(error))  # of a class that any process can unpickle
        reason, full = str(error), "does not fit" in str(error)  # TrainingStep, with one sequence at a time
    except Exception as error:  # whatever is wrong with one run, the others go on
        _note(traceback.format_exc())
        reason, full = " ".join(f"{type(error).__name__}: {error}".split())[:300], out_of_memory(error)
    finally:
        if torch.cuda.is_initialized():  # what this run has held may be what another worker needs
            gc.collect()
            torch.cuda.empty_cache()
    return Answer(config.name, "failed", reason + ("; fewer workers leave more memory to each" if full else ""))


def _watch_the_sweep() -> None:
    """In a thread: when the sweep has died, stop the run as `close` would, then the process for sure."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def _note(text: str) -> None:
    """A line for the log, for which a full disk may have no room: that is no reason to lose an answer."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)
