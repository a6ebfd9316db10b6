"""Where and how benches save their results."""

import contextlib
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nanochin.base.files import versions, writing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class NoOptions:
    """The options of a bench that has only --help."""


def save(path: str, module: str, note: str, text: str) -> None:
    """Write a table as Markdown with its command, processor, versions and date. Raises RunError if it cannot be
    written."""
    arguments = (Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:])
    known = ", ".join(f"{name} {versions()[name]}" for name in ("python", "torch", "triton", "numpy"))
    head = f"`{shlex.join(['python', '-m', module, *arguments])}`\n\n{cpu_name()}, {time.strftime('%Y-%m-%d')}; {note}"
    with writing(Path(path)):
        Path(path).write_text(f"{head}; {known}\n\n```\n{text}\n```\n")


def cpu_name() -> str:
    """The processor as Linux names it, else as Python does."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()
