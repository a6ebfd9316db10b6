"""What a check finds: a verdict, a sentence, JSON and tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from nanochin.base.console import digits
from nanochin.laws import NotIdentified


@dataclass(frozen=True)
class Table:
    """For the report. A cell is a text, with exponents after ^; or a number and its interval; or a text, its small
    print and the class of that in report.css; or the reason why the rest of the row is missing."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | tuple[str, ...] | NotIdentified]]
    note: str = ""
    figure: str = ""  # the figure that it belongs to; "": the sensitivity tables
    mark: int | None = None  # the row to highlight


@dataclass(frozen=True)
class CheckResult:
    status: str = "ok"  # or "doubt", "not checked", or "note", which has no verdict
    sentence: str = ""  # "" where there is nothing to say
    json: object = None  # stored in laws.json under the check's name; None: nothing
    tables: tuple[Table, ...] = ()
    found: object = None  # the result of nanochin.laws, for the figures


Results = dict[str, CheckResult]  # by the name of the check


def judged(good: bool, sentence: str, *rest) -> CheckResult:
    return CheckResult("ok" if good else "doubt", sentence, *rest)


def doubt_if(bad: bool, sentence: str) -> CheckResult:
    """Without a doubt there is no sentence."""
    return judged(not bad, sentence if bad else "")


three, four = partial(digits, figures=3), partial(digits, figures=4)


def with_interval(text: str, ends: tuple[float, float], show: Callable[[float], str]) -> tuple[str, str]:
    """A number and its interval; a fixed number has none."""
    low, high = ends
    return text, f"{show(low)} – {show(high)}" if low < high else ""


def plus(E: float) -> str:
    """The first term of a formula; none if it is 0."""
    return f"{four(E)} + " if E else ""


def bracketed(ends: tuple[float, float]) -> str:
    low, high = ends
    return f" [{low:.3f}, {high:.3f}]" if np.isfinite(low) else ""
