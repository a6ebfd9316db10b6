"""Approach 2: at each budget the loss against log N has a minimum; the minima follow power laws in C."""

from dataclasses import dataclass

import numpy as np

from nanochin.laws.law import PowerLaw


@dataclass(frozen=True)
class Budget:
    """One isoFLOP curve."""

    flops: float  # geometric mean of its runs' C, or the nominal budget that was given
    rows: np.ndarray  # indices into the arrays that were fitted, sorted by N
    bracketed: bool  # convex, and its minimum inside the sampled sizes; if not, there is no optimum:
    reason: str  # why not, else ""
    params_opt: float  # nan where not bracketed
    tokens_opt: float
    loss_opt: float
    parabola: tuple[float, float, float]  # loss = p x^2 + q x + r, x = ln N; nan with fewer than 3 sizes
    width: float  # N_max / N_min of its sizes
    off_centre: float  # params_opt over the middle of the window, sqrt(N_max N_min): 1 is centred

    @property
    def n_runs(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class IsoflopFit:
    """Power laws through the minima."""

    law: PowerLaw  # a and b fitted separately: a + b need not be 1
    method: str  # "parabola" or "akima"
    budgets: tuple[Budget, ...]  # by rising flops, those without optimum too
    noise: float  # sd of the log-loss about the curves (parabola), pooled over budgets; nan without degrees of freedom
    left_out: np.ndarray  # indices of rows that belong to no budget (a group of fewer than 3 runs)
    N: np.ndarray  # (n,) the rows as given
    D: np.ndarray
    loss: np.ndarray
    C: np.ndarray

    def to_json(self, bootstrap=None) -> dict:
        """The object `approach2` of laws.json; `bootstrap` adds a_ci, b_ci."""
        raise NotImplementedError


def group_budgets(C, tolerance: float = 0.1) -> np.ndarray:
    """(n,) nominal budget of each row: clusters of C whose neighbours in log C lie within `tolerance`, named by
    their geometric mean."""
    raise NotImplementedError


def fit_isoflop(
    N,
    D,
    loss,
    C=None,
    *,
    budget=None,
    tolerance: float = 0.1,
    method: str = "parabola",
    name: str = "Approach 2",
    params_convention: str = "total",
    flops_convention: str = "6nd",
) -> IsoflopFit:
    """Minimum of each budget's curve, then log N and log D against log C by least squares.

    C defaults to 6 N D; `budget` (n,) groups the rows (nan: none), else C is clustered. method "parabola": vertex of a
    quadratic in log N (the paper); "akima": minimum of the interpolating spline (Porian et al. 2024).
    Raises NotIdentified with fewer than 6 rows, fewer than 3 sizes, or fewer than 2 budgets with bracketed minimum."""
    raise NotImplementedError


def refit_isoflop(fit, batches) -> dict:
    raise NotImplementedError


def seed_noise(fit) -> dict:
    raise NotImplementedError
