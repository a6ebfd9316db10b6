"""Intervals for all three approaches: resample the independent units (runs, not rows), refit, take percentiles.

A replicate is a vector of counts: how often each run was drawn. Counts are weights on the same rows, so nothing is
copied and a batch of replicates is optimised at once. Rows of one run (checkpoints, repeated evaluations) are not
independent: resampling rows would give intervals that are several times too narrow.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np

from nanochin.laws.envelope import EnvelopeFit, refit_envelope
from nanochin.laws.gamma import GammaSurface, cold_starts, make_surface
from nanochin.laws.isoflop import IsoflopFit, laws_through, noisy_optima, replicate_optima
from nanochin.laws.law import Law, NotIdentified, PowerLaw, interval
from nanochin.laws.parametric import ParametricFit, agree
from nanochin.laws.solver import BATCH, Solution, Surface

LEVELS = (80, 95)  # percent
FEW = 10  # independent runs; fewer give a warning


@dataclass(frozen=True)
class Bootstrap:
    """Laws of all replicates. Those without an optimum (`failed`) are excluded from every interval."""

    law: Law | PowerLaw  # its constants are arrays (replicates - failed,)
    unit: str  # what was resampled: "run", "row" or "seed noise"
    units: int  # number of units
    replicates: int  # requested
    failed: int  # without an optimum (Approach 2: fewer than 2 bracketed budgets); excluded
    warnings: tuple[str, ...]  # sentences for the report: rows that repeat a run, few units, failed replicates
    optima: tuple[np.ndarray, np.ndarray] | None = None  # Approach 2: N_opt, D_opt (replicates, budgets), nan: none
    # Approach 3:
    at_bound: int = 0  # with a constant at its bound (included: E = 0 belongs in the interval of E)
    verified: int = 0  # gradient at most FLAT and Hessian positive definite at the optimum
    gradient_norm: float = 0.0  # largest of all replicates, see ParametricFit.gradient_norm
    # Replicates also minimised from other starts: the first `verify`, or all if one of these has a lower optimum.
    checked: int = 0  # one of those starts reached the same optimum or a lower one
    worse: int = 0  # of `checked`: a lower optimum was found and is used instead
    unconfirmed: int = 0  # none of those starts reached the optimum; not in `checked`

    def at_budget(self, i: int) -> dict:
        """95% intervals of `params_opt` and `tokens_opt` of the fit's budget i over the replicates where its minimum is
        bracketed, and the `share` of these; {} if it is less than half."""
        there = np.isfinite(self.optima[0][:, i])
        if not 2 * there.sum() >= self.replicates:
            return {}
        params, tokens = (interval(v[there, i], 95) for v in self.optima)
        return {"params_opt": params, "tokens_opt": tokens, "share": float(there.mean())}

    def interval(self, quantity: str | Callable, level: float = 95) -> tuple[float, float]:
        """Percentile interval of an attribute of the law ("alpha", "a", "G", "k_N") or of any function of it:
        interval(lambda law: law.optimal(1e21)[0], 80)."""
        return interval(quantity(self.law) if callable(quantity) else getattr(self.law, quantity), level)

    def sample(self, count: int) -> dict[str, list[float]]:
        """{constant: values} of up to `count` replicates of a Law, evenly spaced, to eight digits."""
        every = len(self.law.a)
        chosen = np.unique(np.linspace(0, every - 1, count).astype(int))
        values = {name: np.broadcast_to(getattr(self.law, name), every)[chosen] for name in self.law.constants}
        return {name: [float(f"{x:.8g}") for x in v] for name, v in values.items()}

    def to_json(self) -> dict:
        """Entries of laws.json: intervals of the constants, `ci` (95%) and `ci80`, and `bootstrap`, the counts; for
        Approaches 1 and 2 also a_ci and b_ci."""
        ci, ci80 = ({name: self.interval(name, level) for name in self.law.quantities} for level in (95, 80))
        exponents = {} if isinstance(self.law, Law) else {"a_ci": ci["a"], "b_ci": ci["b"]}
        counts = {f.name: getattr(self, f.name) for f in fields(self) if f.type in (int, float, str)}
        return exponents | {"ci": ci, "ci80": ci80, "bootstrap": counts}


Progress = Callable[[int, int], None] | None  # called with (replicates done, replicates) after each batch


def bootstrap(
    fit, *, runs=None, replicates: int = 4000, seed: int = 0, verify: int = 200, progress: Progress = None
) -> Bootstrap:
    """Resample runs with replacement and fit each replicate to convergence. `fit` is a ParametricFit, IsoflopFit or
    EnvelopeFit; `runs` (n,) are the run ids of the rows (default: each row is its own run; an envelope has its runs).
    For Approach 3 each optimum is verified by gradient and Hessian, and `verify` replicates (0: none) are also
    minimised from other starts. If that finds a lower optimum for any, all are, from the starts that found it.
    Raises NotIdentified with fewer than 3 units or if most replicates fail."""
    if isinstance(fit, EnvelopeFit):
        runs = fit.runs
    elif runs is None:
        runs = np.arange(len(fit.N))
    units, batches = resample(runs, replicates, seed, progress)
    rows = len(runs)
    warnings = []
    if rows > units:
        warnings.append(f"{rows} rows belong to {units} runs: whole runs were resampled")
    if units < FEW:
        warnings.append(f"only {units} independent runs: percentile intervals are too narrow")
    counts, optima = {}, None
    if isinstance(fit, ParametricFit):
        constants, counts = _refit_parametric(fit, batches, min(verify, replicates))
    elif isinstance(fit, IsoflopFit):
        optima = replicate_optima(fit, batches)
        constants = laws_through(fit, *optima)
    else:
        constants = refit_envelope(fit, batches)
    unit = "run" if rows > units or isinstance(fit, EnvelopeFit) else "row"
    return _collect(fit, constants, warnings, unit=unit, units=units, replicates=replicates, optima=optima, **counts)


def resample(runs, replicates: int, seed: int, progress: Progress = None) -> tuple[int, Callable]:
    """(number of distinct ids in `runs` (n,), batches). batches(size) yields weights (k, n): how often the run of each
    row was drawn. Raises NotIdentified with fewer than 3 runs."""
    ids, run_of_row = np.unique(np.asarray(runs), return_inverse=True)
    m = len(ids)
    if m < 3:
        raise NotIdentified(f"bootstrap: {m} independent runs, but it needs at least 3")

    def batches(size: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        for start in range(0, replicates, size):
            counts = rng.multinomial(m, np.full(m, 1 / m), min(size, replicates - start))
            yield counts[:, run_of_row].astype(np.float64)
            if progress:
                progress(start + len(counts), replicates)

    return m, batches


def _refit_parametric(fit: ParametricFit, batches, verify: int) -> tuple[dict, dict]:
    """Minimise each replicate by Newton steps from the fit's optimum. Minimise the first `verify` (replicates are
    exchangeable), and those that fail, also from starts far from it and from each other. If that finds a lower optimum
    for any, minimise all of them from the starts that found it."""
    surface = make_surface(fit.N, fit.D, fit.loss, **fit.options)
    starts = cold_starts(surface, 12)
    warm, others = surface.z(fit.law), [starts[-1], *starts[::4]]
    if isinstance(surface, GammaSurface):
        others = starts[:2]  # far ones take ten times as long and find no more (LOG.md, 2026-11-28)
    size = max(1, BATCH // fit.n)
    counts = {"at_bound": 0, "verified": 0, "gradient_norm": 0.0, "checked": 0, "worse": 0, "unconfirmed": 0}
    optima, sampled = [], []  # per batch: its optima, and how many are in the sample
    better = set()  # starts that found a lower optimum

    def check(found: Solution, weights, rows, starts) -> None:
        worse, confirmed, best = _minimise_also(surface, found, weights, rows, starts)
        better.update(best[worse].tolist())
        counts["worse"] += int(worse.sum())
        counts["checked"] += int(confirmed.sum())
        counts["unconfirmed"] += int((found.converged[rows] & ~confirmed).sum())

    for weights in batches(size):
        found = surface.minimise(np.tile(warm, (len(weights), 1)), weights)
        sampled.append(min(len(weights), verify - sum(sampled)))
        check(found, weights, np.arange(sampled[-1]), others)
        if verify:
            _minimise_also(surface, found, weights, np.flatnonzero(~found.converged), others)
        optima.append(found)
    if better:
        others = [others[k] for k in sorted(better)]
        for weights, found, first in zip(batches(size), optima, sampled, strict=True):
            check(found, weights, np.arange(first, len(weights)), others)
    for found in optima:
        good = found.converged  # which includes the check of gradient and Hessian
        counts["verified"] += int(good.sum())
        counts["at_bound"] += int(surface.at_bound(found.theta[good]).any(1).sum())
        counts["gradient_norm"] = max(counts["gradient_norm"], float(found.gradient_norm[good].max(initial=0)))
    theta = np.concatenate([np.where(found.converged[:, None], found.theta, np.nan) for found in optima])
    law = surface.law(theta)
    return {name: getattr(law, name) for name in fit.law.constants}, counts


def _minimise_also(surface: Surface, found: Solution, weights, rows, starts) -> tuple[np.ndarray, ...]:
    """Minimise the problems `rows` also from each of `starts` and put the lowest optima into `found`. Returns for each
    whether it had converged to a higher one (worse), whether one of `starts` reached the lowest (confirmed), and the
    index of the start that found it."""
    winner = np.zeros(len(rows), int)
    if not len(rows):
        return winner > 0, winner > 0, winner
    total = weights[rows].sum(1)
    first = np.where(found.converged[rows], found.objective[rows], np.inf)
    best, lowest = first.copy(), np.full(len(rows), np.inf)  # of all, and of `starts`
    for i, start in enumerate(starts):
        other = surface.minimise(np.tile(start, (len(rows), 1)), weights[rows], cold=True)
        objective = np.where(other.converged, other.objective, np.inf)
        lowest = np.minimum(lowest, objective)
        for k in np.flatnonzero(~agree(best, objective, total)):
            for name in ("theta", "objective", "converged", "gradient_norm"):
                getattr(found, name)[rows[k]] = getattr(other, name)[k]
            best[k], winner[k] = objective[k], i
    there = np.isfinite(best)
    return np.isfinite(first) & ~agree(first, best, total), there & agree(lowest, best, total), winner


def bootstrap_seed_noise(
    fit: IsoflopFit, *, noise: float | None = None, replicates: int = 1000, seed: int = 0
) -> Bootstrap:
    """The noise-and-interpolate interval of Porian et al. 2024 for an IsoflopFit: add Gaussian noise of sd `noise` to
    log loss (default: `fit.noise`) and recompute all minima by the fit's method, with equal weights of the budgets as
    in the fit. Raises NotIdentified if the noise is unknown or most replicates fail."""
    noise = fit.noise if noise is None else noise
    if not noise >= 0:
        raise NotIdentified("seed noise: unknown, since no budget has more than 3 runs")
    optima = noisy_optima(fit, noise, replicates, np.random.default_rng(seed))
    known = {"unit": "seed noise", "units": len(fit.N), "replicates": replicates, "optima": optima}
    return _collect(fit, laws_through(fit, *optima), [], **known)


def _collect(fit, constants: dict, warnings: list[str], *, replicates: int, **known) -> Bootstrap:
    """The Bootstrap of the replicates' constants; `known`: its other fields."""
    good = np.isfinite(np.stack(list(constants.values()))).all(0)
    failed = int((~good).sum())
    if failed > replicates / 2:
        raise NotIdentified(f"bootstrap: {failed} of {replicates} replicates have no optimum")
    for number, problem in (
        (failed, "have no optimum and are not in the intervals"),
        (known.get("unconfirmed"), "have an optimum no other start reached"),
        (known.get("at_bound"), "have a constant at its bound"),
    ):
        if number:
            warnings.append(f"{number} of {replicates} replicates {problem}")
    law = replace(fit.law, **{name: v[good] for name, v in constants.items()})
    return Bootstrap(law, replicates=replicates, failed=failed, warnings=tuple(warnings), **known)
