"""What changes the answer, and how well the law extrapolates."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from nanochin.laws.bootstrap import LEVELS, Bootstrap, bootstrap, resample
from nanochin.laws.cost import Cost
from nanochin.laws.gamma import cold_starts, make_surface
from nanochin.laws.isoflop import (
    IsoflopFit,
    akima_minimum,
    compute_groups,
    fit_budget,
    fit_parabola,
    group_budgets,
    replicate_optima,
)
from nanochin.laws.law import NotIdentified, interval, line
from nanochin.laws.parametric import ParametricFit, fit_parametric
from nanochin.laws.solver import BATCH, NAMES

MIN_CURVATURE = 4  # a parabola fits any three budgets
BETWEEN = 33  # levels of C_kaplan if the budgets have too few optima


@dataclass(frozen=True)
class Refit:
    """The same runs fitted with one change."""

    change: object  # k runs left out, delta, or a description
    fit: ParametricFit | NotIdentified
    boot: Bootstrap | None = None

    def interval(self, quantity: str | Callable) -> tuple[float, float]:
        """95% interval as Bootstrap.interval; nan without a Bootstrap."""
        return self.boot.interval(quantity) if self.boot else (np.nan, np.nan)

    def to_json(self) -> dict:
        """Constants, objective and 95% intervals, or the reason why there is no fit."""
        if isinstance(self.fit, NotIdentified):
            return {"change": str(self.change), "reason": str(self.fit)}
        names = ("a", "alpha", "beta", "E", "A", "B")
        ends = {"ci": {name: self.interval(name) for name in names}} if self.boot else {}
        constants = {name: getattr(self.fit.law, name) for name in names}
        return {"change": str(self.change)} | constants | {"objective": self.fit.objective} | ends


def refit(change, fit: ParametricFit, rows=slice(None), *, runs=None, replicates=0, seed=0, **changes) -> Refit:
    """The same fit on some of its rows, or with another delta, space, E or tied, and `replicates` (0: none) resamples;
    `runs` (n,) as in bootstrap."""
    options = fit.options | {"params_convention": fit.law.params_convention, "cost": fit.law.cost} | changes
    try:
        other = fit_parametric(fit.N[rows], fit.D[rows], fit.loss[rows], **options)
    except NotIdentified as error:
        return Refit(change, error)
    boot, runs = None, None if runs is None else runs[rows]
    if replicates:
        with suppress(NotIdentified):
            boot = bootstrap(other, runs=runs, replicates=replicates, seed=seed, verify=0)
    return Refit(change, other, boot)


def leave_out_highest(fit: ParametricFit, counts=(0, 1, 3, 5, 8, 15), **resampling) -> list[Refit]:
    """For each k of `counts` the same fit without the k rows of highest loss; runs, replicates and seed as in
    refit."""
    order = np.argsort(fit.loss, kind="stable")
    return [refit(k, fit, np.sort(order[: max(0, fit.n - k)]), **resampling) for k in counts]


def near_minimum(fit: ParametricFit, isoflop: IsoflopFit, factors=(4.0, 2.7, 2.0), **resampling) -> list[Refit]:
    """For each of `factors` the same fit on only the rows whose N is within that factor of the minimum of their budget
    in `isoflop`, a fit of the same rows. E is driven by models far from compute-optimal: if the ends of the isoFLOP
    curves bend more than the form allows, E and the exponents change without them."""
    distance = np.full(fit.n, np.inf)  # |log N - log N of the minimum|
    for budget in isoflop.budgets:
        if budget.bracketed:
            distance[budget.rows] = np.abs(np.log(fit.N[budget.rows] / budget.params_opt))
    near = [(factor, np.flatnonzero(distance <= math.log(factor))) for factor in factors]
    return [refit((factor, len(rows)), fit, rows, allow_bound=NAMES, **resampling) for factor, rows in near]


def delta_sensitivity(fit: ParametricFit, deltas=(1e-6, 1e-4, 1e-3, 1e-2, 1e-1, np.inf), **resampling) -> list[Refit]:
    """The same fit with each of `deltas`. As delta goes to 0, the objective gets a corner at every row, and with few
    noisy rows possibly no start converges."""
    return [refit(delta, fit, delta=delta, allow_bound=NAMES, **resampling) for delta in deltas]


def profile_e(fit: ParametricFit, points: int = 41) -> tuple[np.ndarray, np.ndarray]:
    """Profile of E: (E (points,), objective (points,)), everything else optimised at fixed E from 0 to the lowest loss;
    nan where no optimum was found. The flatter it is, the less the data say about E."""
    grid = np.linspace(0, fit.loss.min() * (1 - 1e-3), points)
    surface = make_surface(fit.N, fit.D, fit.loss, **fit.options | {"E": None})
    best = np.full(points, np.inf)
    for start in (surface.z(fit.law), *cold_starts(surface, 12)[3::4]):
        found = surface.minimise(np.tile(start, (points, 1)), E=grid, cold=True)
        best = np.where(found.converged, np.minimum(best, found.objective), best)
    return grid, np.where(np.isfinite(best), best, np.nan)


def residuals_by_compute(fit: ParametricFit) -> list[dict]:
    """For each third of the runs by C = 6 N D: flops_low, flops_high, n, median (bias of log predicted - log observed)
    and sd (robust: 1.4826 MAD)."""
    C, table = 6 * fit.N * fit.D, []
    for rows in np.array_split(np.argsort(C, kind="stable"), 3):
        r, middle = fit.residuals[rows], float(np.median(fit.residuals[rows]))
        ends = {"flops_low": float(C[rows].min()), "flops_high": float(C[rows].max()), "n": len(rows)}
        table.append(ends | {"median": middle, "sd": float(1.4826 * np.median(np.abs(r - middle)))})
    return table


@dataclass(frozen=True)
class HoldOut:
    """A law fitted without the largest budgets and tested on them."""

    fit: ParametricFit  # on the rest
    bootstrap: Bootstrap | None
    rows: np.ndarray  # (m,) indices held out
    predicted: np.ndarray  # (m,) loss
    low: np.ndarray  # (m,) 95% prediction interval: uncertainty of the law plus scatter of the fitted rows;
    high: np.ndarray  # nan without bootstrap
    observed: np.ndarray
    bias: float  # median of log predicted - log observed
    error: float  # median of its absolute value
    in_sample_error: float  # the same on the fitted rows
    reach: float  # largest C held out over largest C fitted
    # For each held-out budget with a bracketed minimum: (C, N_opt measured, N_opt predicted, (low, high) of it).
    optima: tuple[tuple[float, float, float, tuple[float, float]], ...]
    why: str = ""  # why there are no intervals, if requested

    @property
    def outside(self) -> int:
        """How many observed losses fall outside their interval."""
        return int(((self.observed < self.low) | (self.observed > self.high)).sum())

    def to_json(self) -> dict:
        out = {name: getattr(self, name) for name in ("bias", "error", "in_sample_error", "reach")}
        arrays = ("rows", "predicted", "observed", *(("low", "high") if self.bootstrap else ()))
        out |= {name: getattr(self, name).tolist() for name in arrays}
        out["minima"] = [
            {"flops": C, "params_measured": measured, "params_predicted": predicted}
            | ({"ci": ends} if math.isfinite(ends[0]) else {})
            for C, measured, predicted, ends in self.optima
        ]
        return out | ({"outside": self.outside} if self.bootstrap else {})


def hold_out(
    N, D, loss, C=None, *, budget=None, runs=None, replicates: int = 1000, seed: int = 0, form_error=None, **options
) -> HoldOut:
    """Hold out the largest group of compute_groups. `options` go to fit_parametric; E = 0 is an answer. A FormError
    widens the intervals. replicates=0: no intervals.
    Raises NotIdentified if the rest cannot be fitted; if it cannot be resampled, `why` gives the reason."""
    N, D, loss = (np.asarray(v, np.float64) for v in (N, D, loss))
    C = 6 * N * D if C is None else np.asarray(C, np.float64)
    group = compute_groups(C, budget=budget)
    held = group == group.max()
    if held.all():
        raise NotIdentified("hold-out: there is no budget below the largest")
    rows, rest = np.flatnonzero(held), np.flatnonzero(~held)
    try:
        cost = Cost.of(N[rest], D[rest], C[rest])
        fit = fit_parametric(N[rest], D[rest], loss[rest], cost=cost, allow_bound=("E",), **options)
    except NotIdentified as error:
        raise NotIdentified(f"hold-out: without {len(rows)} runs, {error}") from None
    predicted = fit.law.loss(N[rows], D[rows])
    low = high = np.full(len(rows), np.nan)
    boot, why = None, ""
    if replicates:
        runs = None if runs is None else np.asarray(runs)[rest]
        try:
            boot = bootstrap(fit, runs=runs, replicates=replicates, seed=seed, verify=50)
            sd = form_error.at(C[rows]) if form_error else np.zeros(len(rows))
            low, high = _prediction_interval(fit, boot, N[rows], D[rows], sd, np.random.default_rng(seed))
        except NotIdentified as error:
            why = str(error)
    miss = np.log(predicted / loss[rows])
    bias, *errors = (float(np.median(v)) for v in (miss, np.abs(miss), np.abs(fit.residuals)))
    nominal = group_budgets(C, budget=budget)
    reach, optima = float(C[rows].max() / C[rest].max()), _held_optima(fit, boot, N, D, loss, nominal, rows)
    return HoldOut(fit, boot, rows, predicted, low, high, loss[rows], bias, *errors, reach, optima, why)


def _prediction_interval(fit: ParametricFit, boot: Bootstrap, N, D, sd, rng) -> tuple[np.ndarray, np.ndarray]:
    """Low and high (m,): predictions of each replicate times the scatter of a random fitted row and normal scatter of
    `sd` (m,) of the log loss."""
    constants = {name: getattr(boot.law, name)[:, None] for name in boot.law.constants}
    law, K, parts = replace(boot.law, **constants), len(boot.law.E), []
    for at in np.array_split(np.arange(len(N)), -(-len(N) * K // BATCH)):
        scatter = np.exp(sd[at] * rng.standard_normal((K, len(at))) - rng.choice(fit.residuals, (K, len(at))))
        parts.append(np.percentile(law.loss(N[at], D[at]) * scatter, (2.5, 97.5), axis=0))
    low, high = np.concatenate(parts, 1)
    return low, high


def _held_optima(fit, boot, N, D, loss, nominal, rows) -> tuple:
    """Measured and predicted N_opt at each held-out budget with a bracketed minimum."""
    optima = []
    for c in np.unique(nominal[rows][np.isfinite(nominal[rows])]):
        at = rows[nominal[rows] == c]
        budget = fit_budget(at[np.argsort(N[at], kind="stable")], N, D, loss, float(c), window=math.inf)
        if budget.bracketed:
            ends = (np.nan, np.nan) if boot is None else boot.interval(lambda law, C=c: law.optimal(C)[0])
            optima.append((float(c), budget.params_opt, float(fit.law.optimal(c)[0]), ends))
    return tuple(optima)


@dataclass(frozen=True)
class Curvature:
    """log N_opt = c + a log C + q (log C)^2: q < 0 is the concave frontier of the paper's Appendix E."""

    quadratic: float
    intervals: dict[int, tuple[float, float]]  # {80: ..., 95: ...}
    significant: bool  # the 95% interval excludes 0


def frontier_curvature(fit: IsoflopFit, *, runs=None, replicates: int = 1000, seed: int = 0) -> Curvature:
    """Quadratic term of the frontier, with intervals from resampled runs (ids `runs` (n,) if rows share them). Raises
    NotIdentified with fewer than 4 bracketed budgets."""
    good = [b for b in fit.budgets if b.bracketed]
    if len(good) < MIN_CURVATURE:
        raise NotIdentified(f"curvature needs {MIN_CURVATURE} budgets with a bracketed minimum, but has {len(good)}")
    log_c, log_n = np.log([b.flops for b in good]), np.log([b.params_opt for b in good])
    x = log_c - log_c.mean()
    _, batches = resample(np.arange(len(fit.N)) if runs is None else runs, replicates, seed)
    replicas = replicate_optima(replace(fit, budgets=tuple(good)), batches)[0]
    there = np.isfinite(replicas)
    enough = there.sum(1) >= MIN_CURVATURE
    values = fit_parabola(x, np.log(np.where(there, replicas, 1)), there.astype(float), enough)[0][enough]
    if len(values) < replicates / 2:
        raise NotIdentified(f"curvature: {replicates - len(values)} of {replicates} replicates have too few optima")
    intervals = {level: interval(values, level) for level in LEVELS}
    low, high = intervals[95]
    return Curvature(float(np.polyfit(x, log_n, 2)[0]), intervals, not low <= 0 <= high)


@dataclass(frozen=True)
class KaplanProcedure:
    """The exponent that the procedure of Kaplan et al. gives on these runs, and on the same grid without noise."""

    a: float
    simulated: float  # with the losses replaced by the fitted law's
    intervals: dict[int, tuple[float, float]]  # of a, {80: ..., 95: ...}, by noise on the losses; {} without
    between: bool  # `flops` are log-spaced over the runs, since too few of the budgets are bracketed
    levels: int  # number of C_kaplan tried; of these are bracketed:
    flops: np.ndarray
    params: np.ndarray  # N_opt (non-embedding) there
    slopes: np.ndarray  # (replicates,): a with each draw of noise, nan with fewer than 2 bracketed levels


def kaplan_procedure(
    N, D, loss, law_loss, *, budget=None, noise: float | None = None, replicates: int = 0, seed: int = 0
) -> KaplanProcedure:
    """At equal C_kaplan = 6 N D, N non-embedding parameters, interpolate each size's loss, take the minimum over sizes,
    regress log N on log C. `law_loss` (n,) is the fitted law's loss of every row. `budget` (n,) groups the rows, with
    one C_kaplan per budget, the geometric mean of its rows. If fewer than 3 of these have a bracketed minimum, BETWEEN
    levels over the whole range of C_kaplan are used instead. `replicates` add noise of sd `noise` to the log losses.
    Raises NotIdentified if fewer than 2 levels have a bracketed minimum."""
    N, D, loss, law_loss = (np.asarray(v, np.float64) for v in (N, D, loss, law_loss))
    C = 6 * N * D
    nominal = group_budgets(C, budget=budget)
    levels, both = np.log(np.unique(nominal[np.isfinite(nominal)])), np.log([loss, law_loss])
    optima = _kaplan_optima(N, C, both, levels)
    if between := bool(np.isfinite(optima).all(0).sum() < 3):
        few, levels = len(levels), np.linspace(np.log(C.min()), np.log(C.max()), BETWEEN)
        optima = _kaplan_optima(N, C, both, levels)
    there = np.isfinite(optima).all(0)
    if there.sum() < 2:
        raise NotIdentified(
            "Kaplan's procedure needs 2 levels of C_kaplan with a bracketed minimum over sizes, but "
            f"has {there.sum()}, tried at {few} budgets and at {BETWEEN} levels between"
        )
    x, intervals, slopes = levels[there], {}, np.full(replicates, np.nan)
    _, (a, simulated) = line(x, np.log(optima[:, there]))
    if replicates and noise is not None:
        draws = both[0] + noise * np.random.default_rng(seed).standard_normal((replicates, len(N)))
        drawn = _kaplan_optima(N, C, draws, x)
        good = np.isfinite(drawn)
        enough = good.sum(1) >= 2
        slopes[enough] = line(x, np.log(np.where(good, drawn, 1)[enough]), good[enough].astype(float))[1]
        if 2 * enough.sum() > replicates:
            intervals = {level: interval(slopes[enough], level) for level in LEVELS}
    flops, params = np.exp(x), optima[0, there]
    return KaplanProcedure(float(a), float(simulated), intervals, between, len(levels), flops, params, slopes)


def _kaplan_optima(N, C, log_loss, levels) -> np.ndarray:
    """(K, levels): N of lowest loss at each log C_kaplan of `levels`, from log losses (K, n); nan where not bracketed.
    The loss of each size with at least two runs is interpolated in logs (never extrapolated); the minimum over sizes
    is that of a spline."""
    sizes = [np.flatnonzero(n == N) for n in np.unique(N)]
    sizes = [rows[np.argsort(C[rows], kind="stable")] for rows in sizes if len(np.unique(C[rows])) >= 2]
    params = np.full((len(log_loss), len(levels)), np.nan)
    for i, level in enumerate(levels):
        x, y = [], []
        for rows in sizes:
            log_c = np.log(C[rows])
            if log_c[0] <= level <= log_c[-1]:
                k = min(int(np.searchsorted(log_c, level, side="right")), len(rows) - 1)
                share = (level - log_c[k - 1]) / max(log_c[k] - log_c[k - 1], 1e-12)
                x.append(np.log(N[rows[0]]))
                y.append((1 - share) * log_loss[:, rows[k - 1]] + share * log_loss[:, rows[k]])
        if len(x) >= 3:
            best, _, inside = akima_minimum(np.array(x), np.array(y).T)
            params[:, i] = np.where(inside, np.exp(best), np.nan)
    return params
