"""What to train: the answers of a fitted law, for terminal, laws.json and report.

answers = answer(analysis.best, Questions((1e20, 1e21), target_loss=2.1))
answers.optima[1].found["params"].value, answers.optima[1].found["params"].intervals[95]
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from nanochin import laws
from nanochin.base.cli import UserError
from nanochin.base.console import above, count, three
from nanochin.base.files import NUMBER, read_json
from nanochin.laws import LEVELS, DataConstrained, Law, NotIdentified, PowerLaw
from nanochin.report.analysis import Approach, attempt
from nanochin.run.folder import read_record

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
    """What to ask of a law; None: not asked."""

    budgets: tuple[float, ...]  # training FLOPs in the convention of the analysis
    target_loss: float | None = None
    inference_tokens: float | None = None
    unique_tokens: float | None = None
    loss_at: tuple[float, ...] = ()  # parameters and tokens in turn


@dataclass(frozen=True)
class Estimate:
    """A number and its intervals {80: (low, high), 95: ...}, or {} without intervals."""

    value: float
    intervals: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def ends(self) -> tuple[float, float]:
        """The 95% interval; nan if there is none."""
        return self.intervals.get(95, (math.nan, math.nan))


@dataclass(frozen=True)
class Answer:
    """The answer to one question. Quantities are named as in SHOWN."""

    asked: dict[str, float]
    found: dict[str, Estimate]  # empty if the law has no answer
    why: str = ""  # the reason if there is no answer

    def to_json(self) -> dict:
        out = self.asked | {name: estimate.value for name, estimate in self.found.items()}
        for key, level in (("ci", 95), ("ci80", 80)):
            if ends := {name: e.intervals[level] for name, e in self.found.items() if level in e.intervals}:
                out[key] = ends
        return out | ({"reason": self.why} if self.why else {})


@dataclass(frozen=True)
class Answers:
    """The answers to all questions; a list is empty if its question was not asked. `trials`: finished runs whose loss a
    law predicted."""

    budgets: tuple[float, ...]
    optima: list[Answer]
    to_reach: list[Answer]
    to_serve: list[Answer]
    with_text: list[Answer]
    at: list[Answer]
    trials: "Sequence[Prediction]" = ()

    def to_json(self) -> dict:
        """`answers` of laws.json; the optima are stored with each approach."""
        lists = {"to_reach": self.to_reach, "to_serve": self.to_serve, "with_text": self.with_text, "loss_at": self.at}
        return {name: [one.to_json() for one in found] for name, found in lists.items() if found}


def answer(best: Approach, questions: Questions, trials: "Sequence[Prediction]" = ()) -> Answers:
    """The optimum of each budget, and the answers to the other questions, for each budget if they need one."""
    budgets, target = questions.budgets, questions.target_loss
    served, unique = questions.inference_tokens, questions.unique_tokens
    return Answers(
        budgets,
        optima=[optimum(best, C) for C in budgets],
        to_reach=[] if target is None else [to_reach(best, target)],
        to_serve=[] if served is None else [to_serve(best, C, served) for C in budgets],
        with_text=[] if unique is None else [with_text(best, C, unique) for C in budgets],
        at=[loss_at(best, N, D) for N, D in zip(questions.loss_at[::2], questions.loss_at[1::2], strict=True)],
        trials=trials,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The questions


def optimum(approach: Approach, C: float) -> Answer:
    """The compute-optimal run for C FLOPs, in the convention of the analysis."""

    def run(law: Law | PowerLaw) -> dict:
        N, D = law.optimal(C)
        return _run(N, D) | ({"loss": law.loss(N, D) * law.off(C)} if isinstance(law, Law) else {})

    return Answer({"flops": C}, estimates(approach, run))


def to_reach(approach: Approach, loss: float) -> Answer:
    """The run of lowest compute that reaches a loss."""

    def run(law: Law) -> dict:
        C = laws.compute_for_loss(law, loss)
        if law.form_error:  # a law that is off there by a factor reaches the loss where it predicts loss / factor
            C = laws.compute_for_loss(law, loss / law.off(C))
        N, D = law.optimal(C)
        return {"least_flops": C, "params": N, "tokens": D}

    return _answer(approach, {"target_loss": loss}, run)


def to_serve(approach: Approach, C: float, tokens: float) -> Answer:
    """The run that reaches the optimal loss of C at the lowest compute for training and serving `tokens` tokens
    (Sardana and Frankle 2023), and the share of compute saved."""

    def run(law: Law) -> dict:
        N, D = law.optimal(C)
        n, d = laws.inference_optimal(law, law.loss(N, D), tokens)
        saved = 1 - law.cost.flops(n, d + tokens / 3) / law.cost.flops(N, D + tokens / 3)
        return _run(n, d) | {"compute_saved": np.maximum(saved, 0)}

    return _answer(approach, {"flops": C, "inference_tokens": tokens}, run)


def with_text(approach: Approach, C: float, unique: float) -> Answer:
    """The best run for C on `unique` tokens. The value of repeated tokens is that of Muennighoff et al. 2023, fitted on
    C4; hence no intervals."""

    def run(law: Law) -> dict:
        limited = DataConstrained(law)
        n, d = limited.optimal(C, unique)
        return {"params": n, "tokens": d, "epochs": max(d / unique, 1.0), "loss": limited.loss(n, d, unique)}

    return _answer(replace(approach, boot=None), {"flops": C, "unique_tokens": unique}, run)


def loss_at(approach: Approach, N: float, D: float) -> Answer:
    """The loss of N parameters, counted as in the analysis, on D tokens."""

    def predicted(law: Law) -> dict:
        return {"loss": law.loss(N, D) * law.off(law.cost.flops(N, D))}

    return _answer(approach, {"params": N, "tokens": D}, predicted)


def _run(N, D) -> dict:
    return {"params": N, "tokens": D, "tokens_per_param": D / N}


def _answer(approach: Approach, asked: dict, quantities: Callable[[Law], dict]) -> Answer:
    if not isinstance(approach.law, Law):
        return Answer(asked, {}, "this needs a law that predicts the loss: Approach 3")
    found = attempt(estimates, approach, quantities)
    return Answer(asked, {}, str(found)) if isinstance(found, NotIdentified) else Answer(asked, found)


def frontier(approach: Approach, eq4: bool = False) -> dict[str, Estimate]:
    """a and b of the optimum in the FLOPs of the analysis, over the runs; or by Eq. 4, for 6ND."""

    def both(law: Law | PowerLaw) -> dict:
        return dict(zip("ab", (law.a, law.b) if eq4 else laws.exponents(law, *approach.flops_range), strict=True))

    return estimates(approach, both)


def frontier_loss(approach: Approach) -> dict[str, Estimate]:
    """E, K and c of the loss of the optimum, E + K C^-c: for 6ND exactly, otherwise over the runs."""

    def constants(law: Law) -> dict:
        return dict(zip(("E", "K", "c"), laws.loss_of_compute(law, *approach.flops_range), strict=True))

    return estimates(approach, constants)


def estimates(approach: Approach, quantities: Callable[[Law | PowerLaw], dict]) -> dict[str, Estimate]:
    """The numbers of quantities(law) by name, with intervals from those of the bootstrap replicates. Raises
    NotIdentified if `quantities` does for the law itself."""
    values, boot = quantities(approach.law), approach.boot
    if boot is None:
        return {name: Estimate(float(value)) for name, value in values.items()}
    drawn = np.stack(np.broadcast_arrays(*quantities(boot.law).values()))
    drawn = np.where(np.isnan(drawn), np.inf, drawn)  # the cost of a loss that a replicate cannot reach
    method = "linear" if np.isfinite(drawn).all() else "nearest"
    ends = {level: np.percentile(drawn, (50 - level / 2, 50 + level / 2), axis=1, method=method) for level in LEVELS}
    return {
        name: Estimate(float(value), {level: tuple(both[:, j].tolist()) for level, both in ends.items()})
        for j, (name, value) in enumerate(values.items())
    }


# ---------------------------------------------------------------------------------------------------------------------
# Pre-registered predictions

RESULT = {"name": str, **dict.fromkeys(("params", "tokens", "flops", "loss"), NUMBER)}  # of summary.json


@dataclass(frozen=True)
class Prediction:
    """A run whose loss a law predicted before training. Losses in nats per token; low to high is the 95% interval."""

    run: str
    params: float
    tokens: float
    flops: float  # physical
    predicted: float
    low: float
    high: float
    loss: float  # actual

    @classmethod
    def read(cls, folder: str | Path) -> "Prediction":
        """The prediction that config.json recorded before training, and the loss of the finished run.

        Raises UserError if there is no finished run in the folder, no prediction with an interval, or a damaged file.
        """
        folder = Path(folder)
        if not (folder / "summary.json").exists():
            raise UserError(f"`trials` {folder}: no finished run")
        row = read_json(folder / "summary.json", RESULT, "delete that folder to train the run again")
        before = read_record(folder).get("predicted") or {}
        predicted = [before.get(f"predicted_{key}") or 0.0 for key in ("loss", "low", "high")]
        if min(predicted) <= 0:
            why = "no law predicted its loss with an interval; train with `law` laws.json from a fit on the same text"
            raise UserError(f"`trials` {folder}: {why}")
        return cls(row["name"], row["params"], row["tokens"], row["flops"], *predicted, row["loss"])

    @property
    def error(self) -> float:
        """Predicted loss / actual loss - 1, the sign of all errors here."""
        return self.predicted / self.loss - 1

    @property
    def inside(self) -> bool:
        return self.low <= self.loss <= self.high

    def __str__(self) -> str:
        predicted = f"predicted {self.predicted:.4f} (95%: {self.low:.4f} to {self.high:.4f})"
        actual = f"{above(self.error)} the actual {self.loss:.4f}, {'inside' if self.inside else 'OUTSIDE'}"
        return f"{self.run}, {self.flops:.3g} FLOPs: {predicted}, {actual}"

    def to_json(self) -> dict:
        return asdict(self) | {"error": self.error, "inside": self.inside}
