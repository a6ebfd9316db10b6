"""A law of one variable, for runs that identify no law of N and D.

    L(x) = E + K x^-c      x: compute C, tokens D of one model size, or sizes N at one D

Fitted as in Approach 3: the sum of Huber_delta over the residuals of log loss, by the same solver.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np

from nanochin.laws.bootstrap import resample
from nanochin.laws.forms import SCORED
from nanochin.laws.law import FormError, NotIdentified, distinct, interval, line
from nanochin.laws.parametric import best_of
from nanochin.laws.solver import BATCH, SCALE, Surface

MIN_POINTS = 4  # one more than the law's constants
SAME = 1.25  # values of x within this factor are one point of the hold-out
STARTS = (0, 0.3, 0.6, 0.8, 0.9, 0.96, 0.99)  # E over the lowest loss
CHANCE = 0.05  # significance level at which a loss depends on anything, as for 95% intervals


@dataclass(frozen=True)
class SingleLaw:
    """L(x) = E + K x^-c. Constants may be arrays (bootstrap replicates); `loss` then returns an array."""

    E: float
    K: float
    c: float

    def loss(self, x: float) -> float:
        """Predicted loss in nats per token."""
        return self.E + self.K * x**-self.c

    def reaching(self, loss: float) -> float:
        """The x of this loss. Raises NotIdentified if it is E or less."""
        if loss <= self.E:
            raise NotIdentified(f"loss {loss:g}: never reached; the law falls to E = {self.E:.6g}")
        return math.exp(min(math.log(self.K / (loss - self.E)) / self.c, 700))


@dataclass(frozen=True)
class HeldOut:
    """A point predicted from those below it."""

    x: float
    step: float  # over the largest x below
    error: float  # median |log predicted - log observed loss|


@dataclass(frozen=True)
class SingleFit:
    """The law of all rows, its replicates, and how well it predicts."""

    law: SingleLaw
    objective: float  # the SUM of Huber_delta over rows
    x: np.ndarray  # (n,)
    residuals: np.ndarray  # (n,) log predicted - log observed loss
    free: int  # their degrees of freedom
    hold_out: tuple[HeldOut, ...]  # up to SCORED points, then the largest
    replicates: SingleLaw | None  # constants (k,); None: no intervals

    @property
    def noise(self) -> float:
        """Standard deviation of a run's log loss about the law."""
        return math.sqrt(np.sum(self.residuals**2) / self.free)

    @property
    def form_error(self) -> FormError | None:
        """What the law may get wrong beyond the data, in units of x: the root mean square of the errors, without the
        noise of single runs, which does not grow. None: nothing was predicted."""
        if not self.hold_out:
            return None
        errors, steps = np.array([(one.error, one.step) for one in self.hold_out]).T
        sd = math.sqrt(max(np.mean(errors**2) - self.noise**2, 0))
        return FormError(sd, float(np.exp(np.log(steps).mean())), float(self.x.max()))

    def is_tested(self, x: float) -> bool:
        """Whether hold-out has tested the law this far beyond the data."""
        return bool(self.form_error.is_tested(x) if self.form_error else x <= self.x.max())

    def forecast(self, x: float) -> tuple[float, float] | None:
        """95% prediction interval for the loss of a new run at x: the replicates, with the noise of a single run and
        what the law may get wrong there. Few rows tell both: hence Student's t. None without replicates."""
        from scipy.special import stdtrit  # fit.py --help needs no scipy

        if self.replicates is None:
            return None
        sd = math.hypot(self.noise, self.form_error.at(x) if self.form_error else 0)
        scatter = np.exp(sd * stdtrit(self.free, (np.arange(200) + 0.5) / 200))
        return interval(self.replicates.loss(x)[:, None] * scatter, 95)

    def to_json(self) -> dict:
        """`single` of laws.json, without answers."""
        law, error, drawn = asdict(self.law), self.form_error, self.replicates
        ends = {key: interval(getattr(drawn, key), 95) for key in law} if drawn else {}
        out = law | {"ci": ends, "objective": self.objective, "n": len(self.x), "noise": self.noise}
        return out | {"hold_out": [asdict(one) for one in self.hold_out], "form_error": error and asdict(error)}


def fit_single(x, loss, *, runs=None, replicates: int = 2000, seed: int = 0, **options) -> SingleFit:
    """Fit the law to rows (n,). Replicates resample `runs` (n,), ids; default: each row is its own run. `options`:
    delta, and a fixed E. Raises NotIdentified: fewer than 4 different x, a fixed E not below the lowest loss, a loss
    that does not fall significantly, or fewer than 3 runs to resample."""
    x, loss = (np.asarray(v, np.float64) for v in (x, loss))
    if distinct(x) >= MIN_POINTS and not falls(x, loss):
        raise NotIdentified(f"the loss does not fall significantly (rank correlation, p > {CHANCE})")
    surface, z, objective = _optimum(x, loss, options)
    law, drawn = _law(surface, z), None
    if replicates:
        _, batches = resample(np.arange(len(x)) if runs is None else runs, replicates, seed)
        known = (w[(w > 0).sum(1) >= 3] for w in batches(max(1, BATCH // len(x))))  # fewer rows identify no law
        with np.errstate(invalid="ignore"):  # nor do rows of one x: such replicates do not converge
            found = [surface.minimise(np.tile(z, (len(w), 1)), w) for w in known]
        drawn = _law(surface, np.concatenate([one.theta[one.converged] for one in found]))
    free = len(x) - 3 + (options.get("E") is not None)
    return SingleFit(law, objective, x, np.log(law.loss(x) / loss), free, hold_out(x, loss, **options), drawn)


def hold_out(x, loss, **options) -> tuple[HeldOut, ...]:
    """The largest point and up to SCORED before it, each predicted by the law of the rows below it, if that can be
    fitted. Rows up to SAME times larger than the first of a point belong to it."""
    point, first, last = np.zeros(len(x), int), x.min(), 0
    for i in np.argsort(x, kind="stable"):
        if x[i] > SAME * first:
            first, last = x[i], last + 1
        point[i] = last
    found = []
    for k in range(max(1, last - SCORED), last + 1):
        below, at = point < k, point == k
        try:
            surface, z, _ = _optimum(x[below], loss[below], options)
        except NotIdentified:
            continue
        error = np.median(np.abs(np.log(_law(surface, z).loss(x[at]) / loss[at])))
        found.append(HeldOut(float(x[at].max()), float(x[at].max() / x[below].max()), float(error)))
    return tuple(found)


def falls(x, loss) -> bool:
    """Whether the loss falls with x by more than chance, by Spearman's rank correlation: outliers change it little."""
    from scipy.special import stdtr

    r = np.corrcoef(*(np.argsort(np.argsort(v)) for v in (x, loss)))[0, 1]
    return bool(stdtr(len(x) - 2, r * math.sqrt((len(x) - 2) / max(1 - r * r, 1e-12))) < CHANCE)


def _optimum(x, loss, options: dict) -> tuple[Surface, np.ndarray, float]:
    """The objective, its optimum and its value there."""
    if (points := distinct(x)) < MIN_POINTS:
        raise NotIdentified(f"only {points} different values; a law of three constants needs at least {MIN_POINTS}")
    fixed = options.get("E")
    if fixed is not None and fixed >= loss.min():
        raise NotIdentified(f"E is fixed at {fixed:g}, but must be below the lowest loss, {loss.min():g}")
    surface = Surface.of_one(x, loss, **options)
    E = loss.min() * np.array(STARTS) if fixed is None else np.array([fixed])
    t = surface.bases[3][:, 1]
    log_u, slope = line(t, np.log(loss - E[:, None]))
    misfit = np.abs(np.log(E[:, None] + np.exp(log_u[:, None] + np.outer(slope, t))) - np.log(loss)).sum(1)
    starts = np.stack([log_u, slope, np.full(len(E), -SCALE), np.zeros(len(E)), E], 1)
    starts = starts[np.argsort(misfit, kind="stable")[:3]]  # others take 5 times longer
    found = surface.minimise(starts, cold=True)
    best, _ = best_of(found, len(x), "L(x) = E + K x^-c")
    z = found.theta[best]
    *others, zero = surface.at_bound(z[None])[0]
    if any(others):
        raise NotIdentified("the loss does not fall as a power law: the best constants are at their bounds")
    return surface, np.append(z[:4], 0 if zero else z[4]), float(found.objective[best])


def _law(surface: Surface, z) -> SingleLaw:
    law = surface.law(z)
    return SingleLaw(law.E, law.A, law.alpha)
