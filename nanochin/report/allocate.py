"""What to train: answers of a fitted law, computed once for terminal, laws.json and report.

answers = answer(analysis.best, Questions((1e20, 1e21), target_loss=2.1))
answers.optima[1].found["params"].value, answers.optima[1].found["params"].intervals[95]
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from nanochin import laws
from nanochin.base.cli import UserError
from nanochin.base.console import count, three
from nanochin.base.files import read_json
from nanochin.laws import LEVELS, DataConstrained, Law, NotIdentified, PowerLaw
from nanochin.report.analysis import Approach, attempt

SHOWN = {  # quantity: (column title, format)
    "flops": ("C", "{:g} FLOPs".format),
    "target_loss": ("loss", "{:g}".format),
    "inference_tokens": ("tokens served", count),
    "unique_tokens": ("unique tokens", count),
    "least_flops": ("lowest C", "{:.3g}".format),
    "params": ("N", count),
    "tokens": ("D", count),
    "tokens_per_param": ("D/N", three),
    "epochs": ("epochs", three),
    "loss": ("loss", "{:.4f}".format),
    "compute_saved": ("compute saved", "{:.1%}".format),
}


@dataclass(frozen=True)
class Questions:
    """The questions; None: not asked."""

    budgets: tuple[float, ...]  # training FLOPs in the convention of the analysis
    target_loss: float | None = None
    inference_tokens: float | None = None
    unique_tokens: float | None = None


@dataclass(frozen=True)
class Estimate:
    """A number and its intervals {80: (low, high), 95: ...}, or {} without intervals."""

    value: float
    intervals: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def ends(self) -> tuple[float, float]:
        """Of the 95% interval; nan if there is none."""
        return self.intervals.get(95, (math.nan, math.nan))


@dataclass(frozen=True)
class Answer:
    """The answer to one question. Quantities are named as in SHOWN."""

    asked: dict[str, float]
    found: dict[str, Estimate]  # empty if the law has no answer;
    why: str = ""  # then the reason

    def to_json(self) -> dict:
        out = dict(self.asked) | {name: _finite(estimate.value) for name, estimate in self.found.items()}
        for key, level in (("ci", 95), ("ci80", 80)):
            ends = {name: e.intervals[level] for name, e in self.found.items() if level in e.intervals}
            if ends:
                out[key] = {name: [_finite(end) for end in both] for name, both in ends.items()}
        return out | ({"reason": self.why} if self.why else {})


@dataclass(frozen=True)
class Answers:
    """The answers to all questions; lists of questions not asked are empty."""

    optima: list[Answer]
    to_reach: list[Answer]
    to_serve: list[Answer]
    with_text: list[Answer]

    def to_json(self) -> dict:
        """The object `answers` of laws.json; `optima` are stored with their approach."""
        lists = {name: found for name, found in vars(self).items() if found and name != "optima"}
        return {name: [one.to_json() for one in found] for name, found in lists.items()}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def answer(best: Approach, questions: Questions) -> Answers:
    """Optima of the budgets, and answers to the other questions, for each budget if they need one."""
    target, served, unique = questions.target_loss, questions.inference_tokens, questions.unique_tokens
    return Answers(
        optima=[optimum(best, C) for C in questions.budgets],
        to_reach=[] if target is None else [to_reach(best, target)],
        to_serve=[] if served is None else [to_serve(best, C, served) for C in questions.budgets],
        with_text=[] if unique is None else [with_text(best, C, unique) for C in questions.budgets],
    )


# ---------------------------------------------------------------------------------------------------------------------
# The questions


def optimum(approach: Approach, C: float) -> Answer:
    """The compute-optimal run for C FLOPs, in the convention of the analysis."""

    def run(law: Law | PowerLaw) -> tuple:
        N, D = law.optimal(C)
        return N, D, D / N, *([law.loss(N, D)] if isinstance(law, Law) else [])

    names = ("params", "tokens", "tokens_per_param", "loss")
    return Answer({"flops": C}, dict(zip(names, estimates(approach, run), strict=False)))


def to_reach(approach: Approach, loss: float) -> Answer:
    """The lowest compute that reaches a loss, and the run."""

    def need(law: Law) -> tuple:
        C = laws.compute_for_loss(law, loss)
        return C, *law.optimal(C)

    return _answer(approach, {"target_loss": loss}, need, ("least_flops", "params", "tokens"))


def to_serve(approach: Approach, C: float, tokens: float) -> Answer:
    """The run with the loss of the optimum of C and the lowest compute for training plus serving `tokens` tokens
    (Sardana and Frankle 2023), and the share of compute that it saves."""

    def plan(law: Law) -> tuple:
        N, D = law.optimal(C)
        n, d = laws.inference_optimal(law, law.loss(N, D), tokens)
        saved = 1 - law.cost.flops(n, d + tokens / 3) / law.cost.flops(N, D + tokens / 3)
        return n, d, d / n, np.maximum(saved, 0)

    names = ("params", "tokens", "tokens_per_param", "compute_saved")
    return _answer(approach, {"flops": C, "inference_tokens": tokens}, plan, names)


def with_text(approach: Approach, C: float, unique: float) -> Answer:
    """The best run for C when only `unique` tokens exist. The decaying value of repeated tokens is that of Muennighoff
    et al. 2023, fitted on C4; hence no intervals."""

    def plan(law: Law) -> tuple:
        limited = DataConstrained(law)
        n, d = limited.optimal(C, unique)
        return n, d, max(d / unique, 1.0), limited.loss(n, d, unique)

    names = ("params", "tokens", "epochs", "loss")
    return _answer(replace(approach, boot=None), {"flops": C, "unique_tokens": unique}, plan, names)


def _answer(approach: Approach, asked: dict, quantities: Callable, names: tuple) -> Answer:
    if not isinstance(approach.law, Law):
        return Answer(asked, {}, "this needs a law that predicts the loss: Approach 3")
    found = attempt(estimates, approach, quantities)
    if isinstance(found, NotIdentified):
        return Answer(asked, {}, str(found))
    return Answer(asked, dict(zip(names, found, strict=True)))


def estimates(approach: Approach, quantities: Callable) -> list[Estimate]:
    """The numbers that quantities(law) returns, with intervals from the same numbers of all replicates. Raises
    NotIdentified if `quantities` does for the law itself."""
    values, boot = quantities(approach.law), approach.boot
    if boot is None:
        return [Estimate(float(value)) for value in values]
    drawn = np.stack(np.broadcast_arrays(*quantities(boot.law)))
    drawn = np.where(np.isnan(drawn), np.inf, drawn)  # the cost of a loss that a replicate cannot reach
    method = "linear" if np.isfinite(drawn).all() else "nearest"
    ends = {level: np.percentile(drawn, (50 - level / 2, 50 + level / 2), axis=1, method=method) for level in LEVELS}
    return [
        Estimate(float(value), {level: (float(low[j]), float(high[j])) for level, (low, high) in ends.items()})
        for j, value in enumerate(values)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Pre-registered predictions: runs whose loss a law predicted before they were trained


@dataclass(frozen=True)
class Trial:
    """One run of train.py with a law. Losses in nats per token; low and high end the predicted 95% interval."""

    run: str
    params: float
    tokens: float
    flops: float  # physical
    predicted: float
    low: float
    high: float
    loss: float  # actual

    @property
    def off(self) -> float:
        """Actual loss / predicted loss - 1."""
        return self.loss / self.predicted - 1

    @property
    def inside(self) -> bool:
        return self.low <= self.loss <= self.high

    def __str__(self) -> str:
        return (
            f"{self.run}, {self.flops:.3g} FLOPs: predicted {self.predicted:.4f} (95%: {self.low:.4f} to "
            f"{self.high:.4f}), actual {self.loss:.4f}, {100 * self.off:+.2f}%, "
            f"{'inside' if self.inside else 'OUTSIDE'}"
        )

    def to_json(self) -> dict:
        return asdict(self) | {"off": self.off, "inside": self.inside}


def read_trial(folder: str | Path) -> Trial:
    """The trial of a finished run, with the prediction that was written to its config.json before training.

    Raises UserError if there is no finished run in the folder, or no prediction with an interval."""
    folder = Path(folder)
    if not (folder / "summary.json").exists():
        raise UserError(f"`trials` {folder}: no finished run")
    row, before = read_json(folder / "summary.json"), read_json(folder / "config.json").get("predicted") or {}
    found = {key: before.get(f"predicted_{key}") for key in ("loss", "low", "high")}
    if not all(isinstance(value, float) and math.isfinite(value) for value in found.values()):
        raise UserError(
            f"`trials` {folder}: no law predicted its loss with an interval; train it with `law` laws.json "
            "from a fit on the same text"
        )
    return Trial(
        row["name"], row["params"], row["tokens"], row["flops"], found["loss"], found["low"], found["high"], row["loss"]
    )
