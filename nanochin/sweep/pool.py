"""The worker pool of a sweep: processes that train one run after another, so that start-up, imports and loading the
corpus happen once per process.

    pool = Pool(load, device, log)      start the workers
    pool.submit(config)                 train a run; fewer than `pool.size` must be in training
    pool.wait(seconds)                  runs that have ended, as Replies
    pool.close()                        save the runs in training and stop the workers

Python's ProcessPoolExecutor is not enough: it cannot stop a run, and when a worker dies it stops all others and does
not say which run was lost.
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

from nanochin.base.cli import RunError, UserError, brief
from nanochin.base.files import DiskError, cores
from nanochin.config import Config
from nanochin.run.folder import BusyError

READY = "ready"  # message from a worker that has loaded
GRACE = 20.0  # seconds for a worker to save its run before it is killed
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # environment of a worker
RESTARTS = 3  # of a worker that is killed while it starts, which the kernel does when memory is short

Train = Callable[[Config], object]


@dataclass(frozen=True)
class Reply:
    """How a run ended: finished, failed (to be recorded), busy (in another process) or died (with its worker)."""

    run: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class Devices:
    """A worker's device type (cpu, mps or cuda) and the number of GPUs that it sees."""

    kind: str
    gpus: int


# ---------------------------------------------------------------------------------------------------------------------
# In the sweep's process


@dataclass
class Worker:
    number: int
    process: multiprocessing.Process
    pipe: connection.Connection
    ready: bool = False
    run: Config | None = None  # in training
    restarts: int = 0

    def end(self) -> str:
        """Wait up to GRACE seconds for the process to exit, then kill it -> "signal N" or "exit code N"."""
        self.process.join(GRACE)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        return f"signal {-code}" if code < 0 else f"exit code {code}"


class Pool:
    """`size` workers, assigned to GPUs round-robin."""

    def __init__(self, load: Callable[[], Train], device: str, log: Path, workers: int | None = None, most: int = 1000):
        """load: called once in each worker, returns the training function; must be picklable. device: as in train.py.
        log: file for the output of workers. workers: how many, at most `most`; None: one per GPU, else one per core.

        Raises UserError if the device is not available, RunError if a worker dies before it is ready."""
        self.load, self.device, self.log, self.devices = load, device, log, None
        self.workers = [self._start(0)]
        while not self.devices:  # the first worker reports the device
            self.wait()
        default = {"cpu": cores(), "mps": 1, "cuda": self.devices.gpus}[self.devices.kind]
        self.size = max(1, min(workers or default, most))
        self.workers += [self._start(number) for number in range(1, self.size)]

    def __str__(self) -> str:
        gpus = self.devices.gpus
        return f"{self.size} workers on {f'{gpus} GPUs' if gpus > 1 else self.devices.kind}"

    def submit(self, config: Config) -> None:
        """Train `config` in an idle worker."""
        self._assign(next(worker for worker in self.workers if worker.run is None), config)

    def _assign(self, worker: Worker, config: Config) -> None:
        worker.run = config
        with contextlib.suppress(OSError):  # the worker has died; `wait` handles that
            worker.pipe.send(config)

    def wait(self, seconds: float | None = None) -> list[Reply]:
        """Wait up to `seconds` (None: no limit) for runs to end, and replace workers that died. Raises UserError if the
        sweep should stop: an invalid option, a full disk, a worker that cannot start."""
        replies = []
        for pipe in connection.wait([worker.pipe for worker in self.workers], seconds):
            worker = next(worker for worker in self.workers if worker.pipe is pipe)
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                message = self._replace(worker)
            match message:
                case UserError():
                    raise message
                case Devices():
                    self.devices = self.devices or message
                case str():  # READY
                    worker.ready = True
                case Reply():
                    worker.run = None
                    replies.append(message)
        return replies

    def close(self) -> None:
        """Stop the workers, which save their runs first."""
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.end()

    def _start(self, number: int) -> Worker:
        environment = dict(ONE_THREAD)
        if self.devices and self.devices.gpus > 1:  # the first worker sees all GPUs and uses the first
            environment["CUDA_VISIBLE_DEVICES"] = one_gpu(number, self.devices.gpus)
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        # A daemon ends with the sweep, unless the sweep is killed.
        process = spawn.Process(target=work, args=(theirs, self.load, self.device, self.log), daemon=True)
        with _environment(environment):
            process.start()
        theirs.close()  # so that the pipe closes when the worker dies
        return Worker(number, process, ours)

    def _replace(self, dead: Worker) -> Reply | None:
        how, run, killed = dead.end(), dead.run, dead.process.exitcode < 0
        if not dead.ready and not (killed and (run or dead.restarts < RESTARTS)):
            raise RunError(f"a worker died before it was ready ({how}); see {self.log}")
        new = self.workers[self.workers.index(dead)] = self._start(dead.number)
        if dead.ready:
            return Reply(run.name, "died", how) if run else None
        if dead.restarts == RESTARTS:
            reason = f"its worker was killed {1 + RESTARTS} times while it started ({how}); try fewer workers"
            return Reply(run.name, "failed", reason)
        new.restarts = dead.restarts + 1
        if run:
            self._assign(new, run)
        return None


def one_gpu(number: int, gpus: int) -> str:
    """CUDA_VISIBLE_DEVICES for worker `number`: one of the `gpus` that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    return visible.split(",")[number % gpus]


@contextlib.contextmanager
def _environment(environment: dict[str, str]) -> Iterator[None]:
    """Processes started in the block have these variables from the beginning, and ignore Ctrl-C."""
    before, on_interrupt = dict(os.environ), signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        signal.signal(signal.SIGINT, on_interrupt)


# ---------------------------------------------------------------------------------------------------------------------
# In the worker's process


def work(pipe: connection.Connection, load: Callable[[], Train], device: str, log: Path) -> None:
    """Send Devices, load, send READY (or the error), then train each config. On SIGTERM, save the run and exit."""
    if hasattr(os, "setsid"):
        os.setsid()  # a closed terminal signals only the sweep
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    threading.Thread(target=_watch_parent, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):  # the sweep has died
        try:
            pipe.send(find_devices(device))  # before loading, so that the other workers can start
            train = load()
            pipe.send(READY)
        except UserError as error:
            return pipe.send(UserError(str(error)))
        while True:
            config, started = pipe.recv(), time.process_time()
            reply = attempt(train, config)
            status, spent = getattr(reply, "status", "stops the sweep"), time.process_time() - started
            _log(f"worker {os.getpid()}: {config.name} {status}, {spent:.2f} s of CPU")
            pipe.send(reply)


def find_devices(device: str) -> Devices:
    """The Devices for `device`. Raises UserError if it is not available."""
    import torch

    from nanochin.run.device import pick_device

    kind = pick_device(device).type
    return Devices(kind, torch.cuda.device_count() if kind == "cuda" and ":" not in device else 1)  # cuda:1 is one GPU


def attempt(train: Train, config: Config) -> Reply | UserError:
    """Train -> how it ended, or an error that stops the sweep. Exits if a signal stopped the run."""
    import torch

    from nanochin.run.step import SequenceTooLarge, out_of_memory

    try:
        train(config)
        return Reply(config.name, "finished")
    except BusyError:
        return Reply(config.name, "busy")
    except UserError as error:
        if error.code > 128:  # a signal; the run is saved, and no reply is expected
            sys.exit(error.code)
        if isinstance(error, DiskError) or not isinstance(error, RunError):
            return (RunError if error.code == 1 else UserError)(str(error))  # a class that any process can unpickle
        reason, full = str(error), isinstance(error, SequenceTooLarge)
    except Exception as error:  # one failed run must not stop the others
        _log(traceback.format_exc())
        reason, full = brief(error), out_of_memory(error)
    finally:
        if torch.cuda.is_initialized():  # free memory for other workers
            gc.collect()
            torch.cuda.empty_cache()
    return Reply(config.name, "failed", reason + ("; with fewer workers each has more memory" if full else ""))


def _watch_parent() -> None:
    """In a thread: when the sweep dies, stop the run as `close` would; exit after GRACE seconds at the latest."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def _log(text: str) -> None:
    """Print a line to the log; a full disk must not lose a reply."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)
