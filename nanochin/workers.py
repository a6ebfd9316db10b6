"""The processes of a sweep: each trains one run after the other, so that start-up, imports and the tokenised corpus are
paid once a process and not once a run.

A worker is `python sweep.py --worker DEVICE`. It reads a job a line from its standard input (the fields of a
train.Config as JSON) and answers with one line on its standard output. When its input ends, for instance because the
sweep was killed, it saves what it is training, and ends.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO

from nanochin.config import Config, RunError, UserError

SWEEP = Path(__file__).resolve().parents[1] / "sweep.py"
GRACE = 20.0  # seconds that a worker without a sweep has to save its run


# ---------------------------------------------------------------------------------------------------------------------
# In the worker


def work(device: str) -> None:
    """Say which device there is, then answer jobs until the input ends, which arrives as a SIGTERM from `_listen`."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else prints
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin, jobs), daemon=True).start()

    import torch

    import train
    from nanochin.console import Progress
    from nanochin.device import pick_device

    corpus = functools.cache(lambda config: train.read_corpus(config, Progress(quiet=True)))
    try:
        kind = pick_device(device).type
    except UserError as error:
        return _say(answers, {"reason": str(error)})
    _say(answers, {"device": kind, "gpus": torch.cuda.device_count()})
    while True:
        line = jobs.get()
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(line).items()}
        config = Config(**options)
        text = Config(**{key: value for key, value in options.items() if key in TEXT})
        started = time.process_time()
        answer = _attempt(lambda config=config, text=text: train.train(config, quiet=True, corpus=corpus(text)))
        spent = time.process_time() - started
        if kind == "cuda":  # what this run has held may be what another worker needs
            gc.collect()
            torch.cuda.empty_cache()
        _note(f"worker {os.getpid()}: {config.name} {answer['end']}, {spent:.2f} s of CPU")
        _say(answers, answer)


TEXT = ("data", "val", "val_bytes", "tokenizer", "vocab_size", "max_tokens", "skip_bad", "cache", "device")


def _attempt(run) -> dict:
    """How a run ended: finished, failed (for the record), full (failed for lack of the GPU's memory), busy (another
    process has it) or stop (for the user)."""
    from nanochin.files import DiskError
    from nanochin.runs import BusyError
    from nanochin.step import out_of_memory

    try:
        return {"end": "finished", "summary": run()}
    except BusyError:
        return {"end": "busy"}
    except UserError as error:
        if getattr(error, "code", 1) > 128:  # a signal: saved, and there is nobody to answer
            sys.exit(error.code)
        for_record = isinstance(error, RunError) and not isinstance(error, DiskError)
        full = for_record and "does not fit" in str(error)  # TrainingStep, with one sequence at a time
        return {"end": "full" if full else "failed" if for_record else "stop", "reason": str(error), "code": error.code}
    except Exception as error:  # whatever is wrong with one run, the others go on
        _note(traceback.format_exc())
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return {"end": "full" if out_of_memory(error) else "failed", "reason": reason}


def _note(text: str) -> None:
    """A line for workers.log, for which a full disk may have no room: that is no reason to lose an answer."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def _say(answers: IO[str], answer: dict) -> None:
    try:
        answers.write(json.dumps(answer) + "\n")
    except BrokenPipeError:
        os._exit(1)


def _listen(lines: IO[str], jobs: queue.SimpleQueue) -> None:
    """In a thread: pass jobs on. At the end of the input stop the run as a signal would, then the process for sure."""
    for line in lines:
        jobs.put(line)
    timer = threading.Timer(GRACE, os._exit, (1,))
    timer.daemon = True
    timer.start()
    os.kill(os.getpid(), signal.SIGTERM)


# ---------------------------------------------------------------------------------------------------------------------
# In the sweep


class WorkerDied(Exception):
    """The process is gone; its exit code, negative for a signal."""

    def __init__(self, code: int):
        super().__init__(f"signal {-code}" if code < 0 else f"exit code {code}")


class Worker:
    """One process, to be greeted first. `number` chooses its GPU where there are several (`gpus`) that it may use."""

    def __init__(self, number: int, log: IO, device: str = "auto", gpus: int = 0):
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
            env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % gpus]
        self.process = subprocess.Popen(
            [sys.executable, str(SWEEP), "--worker", device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=env,
            start_new_session=True,
        )
        # start_new_session: Ctrl-C reaches the sweep alone, which closes the pipes.

    def greet(self) -> None:
        """Wait until it has begun; `hello` says on what. Raises WorkerDied, UserError if there is no such device."""
        self.hello = self._answer()
        if reason := self.hello.get("reason"):
            raise UserError(reason)

    def do(self, config: Config) -> dict:
        """Train `config` and return how it ended. Raises WorkerDied."""
        try:
            self.process.stdin.write(json.dumps(dataclasses.asdict(config)) + "\n")
            self.process.stdin.flush()
        except (OSError, ValueError):  # a broken pipe, or one that `close` has closed
            raise WorkerDied(self.process.wait()) from None
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            raise WorkerDied(self.process.wait())
        return json.loads(line)

    def close(self) -> None:
        """End it; a run in progress is saved first."""
        if self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()

    def wait(self) -> None:
        try:
            self.process.wait(GRACE + 10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
