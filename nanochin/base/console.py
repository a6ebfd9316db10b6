"""Console output: streams that never end the work, tables, and progress as a bar with ETA on a terminal or as a line
every few seconds elsewhere."""

import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from typing import TextIO

SECONDS_BETWEEN_LINES = 5.0
# Control characters except newline and tab; separators and directions of text; what XML or UTF-8 lacks.
NOT_SHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def shown(text: str) -> str:
    """Text with control characters as \\x1b and so on: in names and samples they could change what a reader sees."""
    return NOT_SHOWN.sub(lambda found: ascii(found[0])[1:-1], text)


# ---------------------------------------------------------------------------------------------------------------------
# Standard streams


class Output:
    """A standard stream for text, which is written as `shown`. When it is full, closed or gone, `lost` is called with
    the reason, and from then on it goes nowhere."""

    def __init__(self, stream: TextIO | None, lost: Callable[[str], object], show: Callable[[str], str] = shown):
        self.stream, self.lost, self.show = stream, lost, show
        if stream is None:  # closed before Python started
            self._drop("closed")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    @cached_property
    def styled(self) -> "Output":
        """The same stream for rich, which writes escape codes."""
        return Output(self.stream, self.lost, show=str)

    def write(self, text: str) -> int:
        self._attempt("write", self.show(text))
        return len(text)

    def flush(self) -> None:
        self._attempt("flush")

    def _attempt(self, method: str, *args: str) -> None:
        try:
            getattr(self.stream, method)(*args)
        except (OSError, ValueError) as error:  # ValueError: closed
            self._drop(getattr(error, "strerror", None) or str(error))

    def _drop(self, reason: str) -> None:
        nowhere = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        with suppress(OSError, ValueError, AttributeError):  # without a descriptor, in tests and notebooks
            os.dup2(nowhere.fileno(), self.stream.fileno())  # also what is buffered, and child processes
        self.stream = nowhere
        self.lost(reason)


@contextmanager
def lasting_output(prog: str) -> Iterator[list[str]]:
    """In the block, sys.stdout and sys.stderr are of the class Output. If the former is lost, one line on the latter
    says so, and the list that is yielded has the reason."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # closed; a data file must not get its number
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    before, reasons = (sys.stdout, sys.stderr), []

    def lost(reason: str) -> None:
        if not reasons:
            print(f"{prog}: standard output: {reason}; nothing more is printed there", file=errors, flush=True)
        reasons.append(reason)

    sys.stderr = errors = Output(sys.stderr, lambda _: None)
    sys.stdout = Output(sys.stdout, lost)
    with suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may lack a character of a text
    try:
        yield reasons
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def rich_console(**options):
    """A console of rich on standard output that takes strings as they are: no markup, no names of emoji."""
    from rich.console import Console

    file = getattr(sys.stdout, "styled", sys.stdout)
    return Console(file=file, markup=False, emoji=False, highlight=False, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Tables and progress


def table(title: str, rows: list[tuple[str, str, str]]) -> None:
    """Print rows of (name, value, reason)."""
    from rich import box
    from rich.table import Table

    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    for style in ("dim", "bold", ""):
        grid.add_column(style=style, overflow="fold")
    for row in rows:
        grid.add_row(*map(shown, row))
    # Without a terminal rich assumes 80 columns; in a log file each row should be one line.
    rich_console(width=None if sys.stdout.isatty() else 130).print(grid)


def format_columns(rows: list[list[str]]) -> str:
    """Rows of text, heading first, as aligned columns: the first left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (" ".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)) for row in rows)
    return "\n".join(f"{row[0]:{widths[0]}} {line}" for row, line in zip(rows, lines, strict=True))


def markdown(rows: list[list[str]]) -> str:
    """Rows of text, heading first, as a table in Markdown with a blank line on either side."""
    lines = [f"| {' | '.join(cell.strip() for cell in row)} |" for row in rows]
    return "\n".join(["", lines[0], f"|{'---|' * len(rows[0])}", *lines[1:], ""])


class Progress(AbstractContextManager):
    """Progress display: call with (stage, done, total, note), from any thread. A new stage starts a new bar; `quiet`
    shows nothing (sweeps)."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.stage = self.bar = self.task = None

    def __call__(self, stage: str, done: float, total: float, note: str = "") -> None:
        if self.quiet:
            return
        if stage != self.stage:
            self.close()
            self._start(stage, total)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, note=note)
        else:
            self._line(done, total, note)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if not self.quiet:
            (self.bar.console.print if self.bar else print)(shown(text))

    def _start(self, stage: str, total: float) -> None:
        self.stage, self.first_done = stage, None
        self.began = self.last_line = time.monotonic()
        if sys.stdout.isatty():
            from rich import progress as rich

            columns = rich.BarColumn(bar_width=20), rich.TaskProgressColumn(), rich.TimeElapsedColumn()
            left = "ETA", rich.TimeRemainingColumn(), "{task.fields[note]}"
            self.bar = rich.Progress("{task.description}", *columns, *left, console=rich_console())
            self.task = self.bar.add_task(stage, total=total, note="")
            self.bar.start()

    def _line(self, done: float, total: float, note: str) -> None:
        now = time.monotonic()
        if self.first_done is None:
            self.first_done = done
        ended = done >= total and note  # a short stage without a note needs no line
        if now - self.last_line < SECONDS_BETWEEN_LINES and not ended:
            return
        self.last_line = now
        rate = (done - self.first_done) / max(now - self.began, 1e-9)
        eta = f"ETA {clock((total - done) / rate)}" if rate > 0 and done < total else ""
        text = f"{self.stage} {done / max(total, 1):4.0%} {clock(now - self.began)} {eta} {note}"
        print(" ".join(text.split()), flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.bar = self.task = self.stage = None

    def __exit__(self, *_) -> None:
        self.close()


def clock(seconds: float) -> str:
    """75 -> '1:15', 3700 -> '1:01:40'."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def count(number: float) -> str:
    """7_654_321 -> '7.65M', 1.432e15 -> '1430T': three significant digits and a suffix."""
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if 0.9995 * size <= abs(number) < 1e17:
            return f"{three(number / size)}{suffix}"
    return three(number)


def three(number: float) -> str:
    """3441.7 -> '3440': three significant digits, with an exponent only if very large or small."""
    return f"{float(f'{number:.3g}'):g}"


def powers(number: float, figures: int = 3) -> str:
    """5.76e23 -> '5.76×10^23', 1e18 -> '10^18': at most so many digits; a renderer raises what follows the ^."""
    if not math.isfinite(number):
        return "∞"
    mantissa, power = f"{number:.{figures - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return ("" if mantissa == "1" else f"{mantissa}×") + f"10^{int(power)}"


def above(error: float, decimals: int = 2) -> str:
    """A relative difference: 0.0328 -> '3.28% above'."""
    return f"{abs(error):.{decimals}%} {'below' if error < 0 else 'above'}"


def digits(number: float, figures: int) -> str:
    """3441.7, 3 -> '3442': at least that many digits, trailing zeros kept, an exponent only if very large or small."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    if 1e-4 <= abs(number) < 1e7:
        return f"{number:.{max(0, figures - 1 - math.floor(math.log10(abs(number))))}f}"
    return f"{number:.{figures - 1}e}"
