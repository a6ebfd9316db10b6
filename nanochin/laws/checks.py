"""What would change the answer, and how far it may be trusted."""

from dataclasses import dataclass

import numpy as np

from nanochin.laws.bootstrap import Bootstrap
from nanochin.laws.isoflop import IsoflopFit
from nanochin.laws.parametric import ParametricFit


def leave_out_highest(fit: ParametricFit, counts=(0, 1, 3, 5, 8, 15)) -> list[tuple[int, ParametricFit | None]]:
    """(k, the same fit without the k rows of highest loss, or None where that is not identified)."""
    raise NotImplementedError


def delta_sensitivity(fit: ParametricFit, deltas=(1e-6, 1e-4, 1e-3, 1e-2, 1e-1, np.inf)) -> list[ParametricFit]:
    """The same fit with other deltas."""
    raise NotImplementedError


def profile_e(fit: ParametricFit, points: int = 41) -> tuple[np.ndarray, np.ndarray]:
    """(E (points,), objective (points,)): everything else optimised with E held fixed, from 0 to the lowest loss."""
    raise NotImplementedError


def residuals_by_compute(fit: ParametricFit, bins: int = 3) -> list[dict]:
    """For each quantile bin of C = 6 N D: flops_low, flops_high, n, median (bias of log predicted - log observed) and
    sd (robust: 1.4826 MAD)."""
    raise NotImplementedError


@dataclass(frozen=True)
class HoldOut:
    """The law fitted without the largest budget(s), asked about them."""

    fit: ParametricFit  # on the rest
    bootstrap: Bootstrap | None
    rows: np.ndarray  # (m,) indices held out
    predicted: np.ndarray  # (m,) loss
    low: np.ndarray  # (m,) 95% interval of the law's prediction; nan without bootstrap
    high: np.ndarray
    observed: np.ndarray
    bias: float  # median of log predicted - log observed
    error: float  # median of its absolute value
    in_sample_error: float  # the same on the rows that were fitted
    reach: float  # largest C held out over largest C fitted
    # For each held-out budget with a bracketed minimum: (C, N_opt measured, N_opt predicted, (low, high) of it).
    optima: tuple[tuple[float, float, float, tuple[float, float]], ...]


def hold_out(N, D, loss, C=None, *, budgets: int = 1, budget=None, above: float | None = None, runs=None,
             replicates: int = 1000, seed: int = 0, **options) -> HoldOut:  # fmt: skip
    """Hold out the `budgets` largest budgets (a column, or clustered C), or every row with C > `above`; `options` go to
    fit_parametric. replicates=0: no intervals. Raises NotIdentified if the rest cannot be fitted."""
    raise NotImplementedError


@dataclass(frozen=True)
class Curvature:
    """log N_opt = c + a log C + q (log C)^2: q < 0 is the concave frontier of the paper's Appendix E."""

    quadratic: float
    intervals: dict[int, tuple[float, float]]  # {80: ..., 95: ...}
    slopes: tuple[float, ...]  # local exponent a in the first, middle and last third of the budgets
    significant: bool  # the 95% interval excludes 0


def frontier_curvature(fit: IsoflopFit, *, replicates: int = 1000, seed: int = 0) -> Curvature:
    """Quadratic term of the frontier with a bootstrap interval. Raises NotIdentified below 4 bracketed budgets."""
    raise NotImplementedError


@dataclass(frozen=True)
class KaplanProcedure:
    """The exponent that the procedure of Kaplan et al. gives on these runs, and on the same grid without noise."""

    a: float
    simulated: float  # with the losses replaced by the fitted law's
    flops: np.ndarray  # C_kaplan of the points that were used
    params: np.ndarray  # N_opt (non-embedding) there


def kaplan_procedure(params_non_embedding, D, loss, law_loss, *, budget=None) -> KaplanProcedure:
    """At equal C_kaplan = 6 N_non_embedding D interpolate each size's loss, take the minimum over sizes, regress
    log N on log C. `law_loss` (n,) is the fitted law's loss of every row. Raises NotIdentified if fewer than 2 of the
    budgets have a bracketed minimum."""
    raise NotImplementedError
