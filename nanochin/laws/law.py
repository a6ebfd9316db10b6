"""Fitted laws, the optima that they predict, and laws.json.

    L(N, D) = E + (A / N^alpha + B / D^beta)^gamma  gamma = 1: Approach 3 of Hoffmann et al. 2022 (Eq. 2): `Law`
    N_opt = k_N C^a,  D_opt = k_D C^b               Approaches 1 and 2: `PowerLaw`

N parameters, D training tokens, C training FLOPs, L validation loss in nats per token. The constants are specific to
the tokenizer and the corpus of the fit; only a, b and (roughly) D/N are meant to transfer.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist

import numpy as np

from nanochin.base.cli import UserError
from nanochin.base.files import NUMBER, has_type, read_json
from nanochin.config import FLOP_CONVENTIONS, PARAM_CONVENTIONS
from nanochin.laws.cost import SIX_ND, Cost


class NotIdentified(UserError):
    """The data cannot support this fit; the message says in one line what is missing."""


CONSTANTS = ("E", "A", "B", "alpha", "beta")  # of Approach 3
Z = 1.96  # 95% of a normal distribution


@dataclass(frozen=True)
class FormError:
    """What the form of a law may get wrong beyond its runs, by rolling hold-out (nanochin/laws/forms.py)."""

    sd: float  # of the log loss, `tested` times beyond the runs
    tested: float  # ratio of compute
    largest: float  # FLOPs of the largest run

    def at(self, C):
        """Its standard deviation at C FLOPs: 0 up to the largest run, then linear in log C."""
        return self.sd * np.maximum(np.log(C / self.largest), 0) / math.log(self.tested)

    def is_tested(self, C: float) -> bool:
        return C <= 1.01 * self.tested * self.largest


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + (A / N^alpha + B / D^beta)^gamma, with N counted by `params_convention`.

    Constants may be arrays (bootstrap replicates); methods then return arrays."""

    name: str
    E: float
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float = 1.0  # changes the loss of an optimum, not where it is
    params_convention: str = "total"
    cost: Cost = SIX_ND  # FLOPs per token: affects the optimum, not the loss
    meta: dict = field(default_factory=dict, compare=False)
    replicates: "Law | None" = field(default=None, compare=False, repr=False)  # bootstrap replicates, constants (k,)
    noise: float | None = field(default=None, compare=False)  # standard deviation of a run's log loss about the law
    form_error: FormError | None = field(default=None, compare=False)
    draw: float = field(default=0.0, compare=False, repr=False)  # of replicates (k,): normal draws of that error

    def loss(self, N: float, D: float) -> float:
        """Predicted loss in nats per token."""
        if self.is_sum:
            return self.E + self.A * N**-self.alpha + self.B * D**-self.beta
        of_n, of_d = np.log(self.A) - self.alpha * np.log(N), np.log(self.B) - self.beta * np.log(D)
        return self.E + np.exp(self.gamma * np.logaddexp(of_n, of_d))

    def bracket(self, loss: float) -> float:
        """A / N^alpha + B / D^beta where the law has this loss, above E."""
        return loss - self.E if self.is_sum else (loss - self.E) ** (1 / self.gamma)

    def off(self, C: float) -> float:
        """Factor of the loss at C FLOPs by which the form may be off: 1, or for each of replicates its draw."""
        return 1.0 if self.form_error is None else np.exp(self.draw * self.form_error.at(C))

    @property
    def is_sum(self) -> bool:
        """Whether gamma is 1."""
        return np.ndim(self.gamma) == 0 and self.gamma == 1

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the constants; gamma only where it is not 1."""
        return CONSTANTS if self.is_sum else (*CONSTANTS, "gamma")

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of all that get an interval."""
        return (*self.constants, "a", "b", "G")

    def forecast(self, N: float, D: float) -> tuple[float, float] | None:
        """95% prediction interval for the loss of a new run: the replicates (uncertainty of the law), with a normal
        scatter of the log loss (noise of a single run, and what the form may get wrong there). None without them."""
        if self.replicates is None or self.noise is None:
            return None
        form = self.form_error.at(self.cost.flops(N, D)) if self.form_error else 0.0
        scatter = np.exp(math.hypot(self.noise, form) * normal_quantiles(200))
        return interval(self.replicates.loss(N, D)[:, None] * scatter, 95)

    # Minimising L under C = 6 N R(N) D gives alpha A N^-alpha = p beta B D^-beta with p = d log(N R) / d log N. For
    # R = p = 1 this is Eq. 4 of the paper, N_opt = G (C/6)^a and D_opt = (C/6)^b / G, with these constants.

    @property
    def a(self) -> float:
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        return self.alpha / (self.alpha + self.beta)

    @property
    def G(self) -> float:  # noqa: N802
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def optimal(self, C: float) -> tuple[float, float]:
        """(N, D) of lowest loss for C training FLOPs, counted by `cost`."""
        G, a, power = self.G, self.a, -1 / (self.alpha + self.beta)
        N = self._fixed_point(lambda R, p: G * p**power * (C / (6 * R)) ** a)
        return N, self.cost.tokens(N, C)

    def tokens_for(self, N: float) -> float:
        """The D for which N parameters are optimal."""
        p = self.cost.at(N)[1]
        return (p * self.beta * self.B / (self.alpha * self.A) * N**self.alpha) ** (1 / self.beta)

    def params_for(self, D: float) -> float:
        """The N for which D tokens are optimal."""
        scale = self.alpha * self.A / (self.beta * self.B) * D**self.beta
        return self._fixed_point(lambda R, p: (scale / p) ** (1 / self.alpha))

    def params_reaching(self, loss: float) -> float:
        """The N whose optimum has this loss, above E."""
        terms = self.bracket(loss)
        return self._fixed_point(lambda R, p: (self.A * (1 + self.alpha / (p * self.beta)) / terms) ** (1 / self.alpha))

    def _fixed_point(self, size: Callable) -> float:
        """N = size(R(N), p(N)), by iteration; each round reduces the error about tenfold."""
        N = size(1.0, 1.0)
        for _ in range(0 if self.cost.is_6nd else 200):
            before, N = N, size(*self.cost.at(N))
            if not np.any(np.abs(N - before) > 1e-12 * N):
                break
        return N


@dataclass(frozen=True)
class PowerLaw:
    """N_opt = k_N C^a and D_opt = k_D C^b, without a predicted loss. Constants may be arrays, as in `Law`."""

    quantities = ("k_N", "a", "k_D", "b")

    name: str
    k_N: float  # noqa: N815
    a: float
    k_D: float  # noqa: N815
    b: float
    params_convention: str = "total"
    flops_convention: str = "6nd"
    meta: dict = field(default_factory=dict, compare=False)

    @classmethod
    def through(cls, name: str, log_c, log_n, log_d, **conventions) -> "PowerLaw":
        """Least-squares power laws through optima, logs of C, N and D (points,)."""
        found = fit_power_laws(log_c, log_n, log_d)
        return cls(name, **{constant: float(v) for constant, v in found.items()}, **conventions)

    def optimal(self, C: float) -> tuple[float, float]:
        """(N, D) of lowest loss for C training FLOPs, counted by `flops_convention`."""
        return self.k_N * C**self.a, self.k_D * C**self.b

    def tokens_for(self, N: float) -> float:
        """The D for which N parameters are optimal."""
        return self.optimal((N / self.k_N) ** (1 / self.a))[1]

    def params_for(self, D: float) -> float:
        """The N for which D tokens are optimal."""
        return self.optimal((D / self.k_D) ** (1 / self.b))[0]


def line(x, y, weights=None):
    """Intercept and slope of y on x along the last axis, by (weighted) least squares; broadcasts. nan where all x
    with weight coincide."""
    w = np.ones_like(x) if weights is None else weights
    total = w.sum(-1)
    mean_x, mean_y = (w * x).sum(-1) / total, (w * y).sum(-1) / total
    dx = x - mean_x[..., None]
    spread = (w * dx * dx).sum(-1)
    slope = (w * dx * (y - mean_y[..., None])).sum(-1) / np.where(spread > 1e-12, spread, np.nan)
    return mean_y - slope * mean_x, slope


def fit_power_laws(log_c, log_n, log_d, weights=None) -> dict[str, np.ndarray]:
    """k_N, a, k_D, b (...,) of lines through the logs of optima (..., points); nan for a single point."""
    with np.errstate(divide="ignore", invalid="ignore"):
        (k_N, a), (k_D, b) = line(log_c, log_n, weights), line(log_c, log_d, weights)
    return {"k_N": np.exp(k_N), "a": a, "k_D": np.exp(k_D), "b": b}


def normal_quantiles(count: int) -> np.ndarray:
    """(count,) evenly spaced in probability, increasing."""
    return np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])


def constants(law: Law | PowerLaw) -> dict[str, float]:
    return {name: float(getattr(law, name)) for name in law.quantities}


def distinct(sizes) -> int:
    """How many of them differ by more than rounding."""
    return len(np.unique(np.round(np.log(sizes), 6)))


def interval(values, level: float) -> tuple[float, float]:
    """The central `level` percent of `values`."""
    low, high = np.percentile(values, (50 - level / 2, 50 + level / 2))
    return float(low), float(high)


def wilson(k: int, n: int) -> tuple[float, float]:
    """95% interval of a probability after k successes in n trials (Wilson 1927, J. Am. Stat. Assoc. 22, 209)."""
    if n == 0:
        return 0.0, 1.0
    p, z = k / n, Z * Z / n
    middle, half = (p + z / 2) / (1 + z), math.sqrt(z * p * (1 - p) + z * z / 4) / (1 + z)
    return max(0.0, middle - half), min(1.0, middle + half)


def exponents(law: Law | PowerLaw, low: float, high: float) -> tuple[float, float]:
    """Exponents of the optimal N and D in C between `low` and `high` FLOPs: a and b if C is 6ND."""
    (n, d), (N, D) = law.optimal(low), law.optimal(high)
    return np.log(N / n) / math.log(high / low), np.log(D / d) / math.log(high / low)


# ---------------------------------------------------------------------------------------------------------------------
# laws.json


def load_law(path: str | Path, approach: int | None = None) -> Law | PowerLaw:
    """The law in a laws.json, Approach 3 in files without one; or that of approach 1, 2 or 3. Raises UserError if the
    file cannot be read or is not a laws.json, if the law is missing or null, or if a constant is not a finite number
    above 0."""

    def bad(problem: str) -> UserError:
        return UserError(f"`law` {path}: {problem}")

    try:
        laws = read_json(Path(path), {"meta": {"reasons": dict | None}}, "give a laws.json of fit.py")
    except UserError as error:
        raise UserError(f"`law` {error}") from None
    key = "law" if approach is None and "law" in laws else f"approach{approach or 3}"
    fit, meta = laws.get(key), laws.get("meta")
    if "single" in laws and fit is None:
        raise bad("a law of one variable, not of N and D; fit runs of several sizes and token counts")
    if meta is None or key not in laws:
        raise bad(f"not a laws.json of fit.py: needs the keys {key} and meta")
    if not isinstance(fit, dict):
        reason = " ".join(str((meta.get("reasons") or {}).get(key, "no reason given")).split())
        raise bad(f"has no {key} ({reason})".replace("approach", "approach "))

    def constant(name: str) -> float:
        value = fit.get(name)
        if not has_type(value, NUMBER) or value < 0 or (value == 0 and name != "E"):
            raise bad(f"{key} needs {name}, a finite number above 0, but has {value!r:.40}")
        return float(value)

    def convention(name: str, known) -> dict[str, str]:
        if meta.get(name) not in list(known):  # a list: the value may not be hashable
            raise bad(f"meta needs {name}, one of {', '.join(known)}, but has {meta.get(name)!r:.40}")
        return {name: meta[name]}

    name = f"{Path(path).name}, {fit.get('form') or f'approach {key[-1]}'}"
    options = convention("params_convention", PARAM_CONVENTIONS) | {"meta": meta}
    if key in ("law", "approach3"):
        constants = {c: constant(c) for c in (*CONSTANTS, *(["gamma"] if "gamma" in fit else []))}
        try:
            cost = Cost(**fit.get("cost", {}))
            usable = all(has_type(value, NUMBER) for value in vars(cost).values())
            usable = usable and 0 <= cost.c and 0 <= cost.q <= 1 and cost.s in (1, -1)
        except TypeError:
            usable = False
        if not usable:
            raise bad(f"{key} needs a cost of c >= 0, q from 0 to 1 and s of 1 or -1, but has {fit['cost']!r:.80}")
        law = Law(name, **constants, **options, cost=cost, **_scatter(fit, tuple(constants)))
    else:
        constants = {c: constant(c) for c in PowerLaw.quantities}
        law = PowerLaw(name, **constants, **options, **convention("flops_convention", FLOP_CONVENTIONS))
    try:
        extremes = [n for x in (1e3, 1e24) for n in (*law.optimal(x), law.tokens_for(x), law.params_for(x))]
    except (OverflowError, ZeroDivisionError):
        extremes = [math.inf]
    if not all(0 < n < math.inf for n in extremes):
        raise bad(f"the constants of {key} are too extreme to plan with: {constants}")
    return law


def _scatter(fit: dict, names: tuple[str, ...]) -> dict:
    """`replicates`, `noise` and `form_error` of a law in laws.json; {} if they are missing or malformed."""
    try:
        constants = {name: np.array(fit["replicates"][name], float) for name in names}
        error = FormError(**fit["form_error"]) if fit.get("form_error") else None
        drawn, noise = np.stack([*constants.values()]), fit["noise"]
        usable = drawn.ndim == 2 and drawn.size and np.all((drawn >= 0) & (drawn < np.inf))
        usable = usable and has_type(noise, NUMBER) and noise >= 0
        if error is not None:
            usable = usable and all(has_type(value, NUMBER) for value in vars(error).values())
            usable = usable and error.sd >= 0 and error.tested > 1 and error.largest > 0
    except (KeyError, OverflowError, TypeError, ValueError):
        return {}
    replicates = Law("replicates", **constants)
    return {"replicates": replicates, "noise": float(noise), "form_error": error} if usable else {}


def laws_json(approach1, approach2, approach3, meta: dict, **more) -> dict:
    """The contents of laws.json. Each approach, and each law of `more`, is the dict of a fit's `to_json(bootstrap)`, or
    the NotIdentified that it raised, which becomes null with the reason under meta.reasons."""
    laws = {**more, "approach1": approach1, "approach2": approach2, "approach3": approach3}
    reasons = {key: str(found) for key, found in laws.items() if isinstance(found, Exception)}
    return laws | dict.fromkeys(reasons) | {"meta": meta | {"reasons": reasons}}


def laws_text(laws: dict) -> str:
    """laws.json at full precision, with each list of numbers on one line. A number that is not finite, such as an end
    of an interval without one, is null."""
    text = json.dumps(_finite(laws), indent=1, allow_nan=False) + "\n"
    return re.sub(r"\[\s+([^][{}\"]+?)\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
