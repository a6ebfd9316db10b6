"""What several benches share: workers in processes of their own, and how results are written."""

import contextlib
import json
import os
import platform
import queue
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nanochin.base.cli import UserError
from nanochin.base.files import versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
LATE = "not measured: out of time"


class Worker:
    """`python -m MODULE --worker SPEC` in a process group of its own. It answers each line of JSON with another one."""

    def __init__(self, module: str, spec: dict, checkout: Path | None = None, environment: dict | None = None):
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--worker", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout,
            env=os.environ | (environment or {}),
            start_new_session=True,
        )

    def ask(self, message, timeout: float | None = None):
        """Its answer. Raises UserError if the worker has ended, TimeoutError if it takes over `timeout` seconds."""
        with contextlib.suppress(OSError):  # it has ended, and the empty line below says so
            print(json.dumps(message), file=self.process.stdin, flush=True)
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            raise TimeoutError("no answer in time")
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"its process ended early with exit code {self.process.wait()} (see above)")
        return json.loads(line)

    def close(self, patience: float | None = None) -> None:
        """End it, by force if it takes longer than `patience` seconds."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        kill_group(self.process)


def kill_group(process: subprocess.Popen) -> None:
    """Kill what is left of a process that leads a group, and of those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def messages() -> Iterator[tuple[object, Callable[[object], None]]]:
    """In a worker: (message, function that answers it). The worker ends when there are no more, or whoever asked has
    died, also in the middle of its work: it must not keep a device busy. Whatever else prints to the standard output
    goes to the standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(lines.get()), lambda answer: print(json.dumps(answer), file=answers)


def nanogpt_folder(path: str) -> str:
    """The full path of a checkout of nanoGPT. Raises UserError if it is none."""
    if not (Path(path) / "model.py").exists():
        raise UserError(f"--nanogpt {path}: no model.py there; name a checkout of karpathy/nanoGPT")
    return str(Path(path).resolve())


def error_text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def write_report(path: str, module: str, note: str, text: str, record: dict) -> None:
    """Write `record` with command, processor, date and versions as JSON, and beside it `text` as .md."""
    arguments = (Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:])  # folders of a machine say nothing
    about = {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "cpu": cpu_name(),
        "load": os.getloadavg()[0],  # running programs over the last minute: above the threads, others disturbed it
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
    }
    Path(path).write_text(json.dumps(about | record, indent=1) + "\n")
    note = f"{about['cpu']}, torch {about['versions']['torch']}, {about['date']}; {note}"
    Path(path).with_suffix(".md").write_text(f"`{about['command']}`\n\n{note}\n\n```\n{text}\n```\n")


def cpu_name() -> str:
    """The processor as Linux names it, else as Python does."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()
