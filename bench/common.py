"""What several benches share: worker processes, and how results are saved."""

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nanochin.base.cli import UserError
from nanochin.base.files import versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


class Worker:
    """`python -m MODULE --worker SPEC` as a process that answers each line of JSON with another one."""

    def __init__(self, module: str, spec: dict, checkout: Path | None = None):
        command = [sys.executable, "-m", module, "--worker", json.dumps(spec)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=checkout)

    def ask(self, message):
        """The answer. Raises UserError if the worker has ended."""
        with contextlib.suppress(OSError):  # it has ended: the line below is empty
            print(json.dumps(message), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"its process ended early with exit code {self.process.wait()} (see above)")
        return json.loads(line)

    def close(self) -> None:
        """End the worker and wait for it."""
        self.process.stdin.close()
        self.process.wait()


def messages() -> Iterator[tuple[object, Callable[[object], None]]]:
    """In a worker: (message, function that answers it) until there are no more. Other prints go to stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        yield json.loads(line), lambda answer: print(json.dumps(answer), file=answers)


def save(path: str, module: str, note: str, text: str) -> None:
    """Write a table as Markdown with its command, processor, versions and date."""
    arguments = (Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:])
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    head = f"`{shlex.join(['python', '-m', module, *arguments])}`\n\n{cpu_name()}, {time.strftime('%Y-%m-%d')}; {note}"
    Path(path).write_text(f"{head}; {known}\n\n```\n{text}\n```\n")


def cpu_name() -> str:
    """The processor as Linux names it, else as Python does."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()
