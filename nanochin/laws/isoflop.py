"""Approach 2: at each budget the loss against log N has a minimum; the minima follow power laws in C.

As in the paper, the minimum is the vertex of a parabola. A parabola is the second-order expansion of the true curve: if
alpha and beta differ, its vertex is biased by a factor that grows with the width of the window but not with C, so the
constant is biased and the exponent is not. The interpolating spline has no such bias, but more noise.
"""

import math
from dataclasses import dataclass

import numpy as np

from nanochin.laws.law import NotIdentified, PowerLaw

MIN_ROWS, MIN_SIZES, MIN_BUDGETS = 6, 3, 2
MAX_BUDGETS = 100  # found by clustering C
FINE = 25  # points of the spline in each gap between two sizes


@dataclass(frozen=True)
class Budget:
    """One isoFLOP curve."""

    flops: float  # geometric mean of its runs' C
    rows: np.ndarray  # indices of the fitted rows, sorted by N
    bracketed: bool  # convex, and its minimum inside the sampled sizes: only then is there an optimum
    reason: str  # why it is not bracketed, else ""
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
    budgets: tuple[Budget, ...]  # by increasing flops, also those without optimum
    noise: float  # sd of the log-loss about the curves (parabola), pooled over budgets; nan without degrees of freedom
    left_out: np.ndarray  # indices of rows that belong to no budget (a group of fewer than 3 runs)
    N: np.ndarray  # (n,) the rows as given
    D: np.ndarray
    loss: np.ndarray
    C: np.ndarray

    def to_json(self, bootstrap=None) -> dict:
        """The object `approach2` of laws.json; `bootstrap` adds a_ci, b_ci and its to_json()."""
        out = self.law.constants() | {"method": self.method, "noise": _null(self.noise)}
        if bootstrap is not None:
            out |= {"a_ci": list(bootstrap.interval("a")), "b_ci": list(bootstrap.interval("b"))} | bootstrap.to_json()
        out["budgets"] = [
            {"flops": b.flops, "params_opt": _null(b.params_opt), "tokens_opt": _null(b.tokens_opt),
             "loss_opt": _null(b.loss_opt), "bracketed": b.bracketed, "n_runs": b.n_runs, "reason": b.reason,
             "width": b.width, "off_centre": _null(b.off_centre)}
            | ({"ci": found} if bootstrap and (found := bootstrap.at_budget(i)) else {})
            for i, b in enumerate(self.budgets)]  # fmt: skip
        return out

    def without(self, left_out) -> PowerLaw:
        """Power laws through the minima of the other budgets. Raises NotIdentified with fewer than 2 of them."""
        good = [b for b in self.budgets if b.bracketed and b not in left_out]
        if len(good) < MIN_BUDGETS:
            raise NotIdentified(f"Approach 2 needs at least {MIN_BUDGETS} budgets, but has {len(good)}")
        return _power_laws(good, self.law.name, self.law.params_convention, self.law.flops_convention)


def _null(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def equal_rows(values) -> list[np.ndarray]:
    """Indices of the rows of each finite value, by increasing value, in one sort for any number of values."""
    order = np.argsort(values, kind="stable")
    order = order[np.isfinite(values[order])]
    return np.split(order, np.flatnonzero(np.diff(values[order])) + 1) if len(order) else []


def group_budgets(C, tolerance: float = 0.1, *, budget=None) -> np.ndarray:
    """(n,) nominal budget of each row, the geometric mean of its group's C, or nan for rows of no group.

    Rows with equal numbers in the column `budget` (n,), in any unit, are a group (nan: none). Without it, a group is a
    window in log C of width `tolerance`. The fullest is taken first; windows with fewer than 3 rows, or less than a
    third of the fullest, are between budgets and no group."""
    log_c = np.log(np.asarray(C, np.float64))
    nominal = np.full(len(log_c), np.nan)
    if budget is not None:
        budget = np.asarray(budget, np.float64)
        for rows in equal_rows(budget):
            nominal[rows] = math.exp(log_c[rows].mean())
        return nominal
    left = np.argsort(log_c, kind="stable")
    least = 3.0
    for _ in range(MAX_BUDGETS):
        x = log_c[left]
        start, end = np.arange(len(x)), np.searchsorted(x, x + tolerance, side="right")
        if not len(x) or (end - start).max() < least:
            break
        least = max(least, (end - start).max() / 3)
        best = int(np.argmax(end - start - (x[end - 1] - x) / (2 * tolerance)))  # the tightest of equally full ones
        rows = left[best : end[best]]
        nominal[rows] = math.exp(log_c[rows].mean())
        left = np.delete(left, slice(best, end[best]))
    return nominal


def fit_isoflop(N, D, loss, C=None, *, budget=None, tolerance: float = 0.1, method: str = "parabola",
                name: str = "Approach 2", params_convention: str = "total",
                flops_convention: str = "6nd") -> IsoflopFit:  # fmt: skip
    """Minimum of each budget's curve, then log N and log D against log C by least squares.

    C defaults to 6 N D; the laws are in units of C. The column `budget` (n,) only groups the rows (nan: none);
    without it C is clustered. method "parabola": vertex of a quadratic in log N (the paper); "akima": minimum of the
    interpolating spline (Porian et al. 2024), which takes the mean loss of rows of one size.
    Raises NotIdentified with fewer than 6 rows, fewer than 3 sizes, or fewer than 2 budgets with bracketed minimum."""
    N, D, loss = (np.asarray(v, np.float64) for v in (N, D, loss))
    C = 6 * N * D if C is None else np.asarray(C, np.float64)
    if method not in ("parabola", "akima"):
        raise ValueError(f"method {method!r}: must be parabola or akima")
    if len(N) < MIN_ROWS:
        raise NotIdentified(f"Approach 2 needs at least {MIN_ROWS} usable rows, but has {len(N)}")
    if _sizes(N) < MIN_SIZES:
        raise NotIdentified(f"Approach 2 needs at least {MIN_SIZES} different model sizes, but has {_sizes(N)}")
    nominal = group_budgets(C, tolerance, budget=budget)
    groups = [rows[np.argsort(N[rows], kind="stable")] for rows in equal_rows(nominal) if len(rows) >= 3]
    left_out = np.setdiff1d(np.arange(len(N)), np.concatenate([np.empty(0, int), *groups]))
    budgets = tuple(_budget(rows, N, D, loss, float(nominal[rows[0]]), method) for rows in groups)
    good = [b for b in budgets if b.bracketed]
    if len(good) < MIN_BUDGETS:
        of = {}
        for b in budgets:
            of.setdefault(b.reason, []).extend([] if b.bracketed else [f"{b.flops:.3g}"])
        reasons = "; ".join(
            f"{', '.join(at[:3])}{f' and {len(at) - 3} more' * (len(at) > 3)} FLOPs: {reason}"
            for reason, at in of.items()
            if at
        )
        raise NotIdentified(
            f"Approach 2 needs at least {MIN_BUDGETS} budgets with a bracketed minimum, but has "
            f"{len(good)} of {len(budgets)}{f' ({reasons})' if reasons else ''}"
        )
    law = _power_laws(good, name, params_convention, flops_convention)
    return IsoflopFit(law, method, budgets, _noise(budgets, N, loss), left_out, N, D, loss, C)


def _sizes(N) -> int:
    return len(np.unique(np.round(np.log(N), 6)))


def _power_laws(budgets, name: str, params_convention: str, flops_convention: str) -> PowerLaw:
    log_c = np.log([b.flops for b in budgets])
    k_N, a = line(log_c, np.log([b.params_opt for b in budgets]))
    k_D, b = line(log_c, np.log([b.tokens_opt for b in budgets]))
    return PowerLaw(
        name,
        float(np.exp(k_N)),
        float(a),
        float(np.exp(k_D)),
        float(b),
        params_convention=params_convention,
        flops_convention=flops_convention,
    )


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


# ---------------------------------------------------------------------------------------------------------------------
# One budget


def _budget(rows, N, D, loss, flops: float, method: str) -> Budget:
    curve = Curve.of(N[rows], D[rows])
    window = math.exp(curve.x[-1] - curve.x[0])
    nan = math.nan
    coefficients = (nan, nan, nan)
    if len(curve.sizes) < MIN_SIZES:
        few = f"{len(curve.sizes)} different sizes, but it needs {MIN_SIZES}"
        return Budget(flops, rows, False, few, nan, nan, nan, coefficients, window, nan)
    p, q, r = curve.parabola(loss[rows][None])
    u, lowest, reason = curve.minimum(loss[rows][None], method=method)
    # Back from u = x - mean to x = ln N.
    m = curve.mean
    coefficients = (float(p[0]), float(q[0] - 2 * p[0] * m), float(r[0] - q[0] * m + p[0] * m * m))
    if reason[0]:
        return Budget(flops, rows, False, REASONS[reason[0]], nan, nan, nan, coefficients, window, nan)
    params = math.exp(u[0] + m)
    middle = math.exp((curve.x[0] + curve.x[-1]) / 2)
    return Budget(flops, rows, True, "", params, float(curve.tokens(u)[0]), float(lowest[0]), coefficients, window,
                  params / middle)  # fmt: skip


REASONS = ("", "its curve is concave", "its minimum is at or beyond the smallest or largest size")


@dataclass(frozen=True)
class Curve:
    """Rows of one budget, sorted by N. Losses are (K, m): K variants of the m rows."""

    x: np.ndarray  # (m,) log N
    mean: float
    sizes: np.ndarray  # (s,) distinct log N
    size_of_row: np.ndarray  # (m,)
    log_d: np.ndarray  # (s,) mean log D of each size

    @classmethod
    def of(cls, N, D) -> "Curve":
        x = np.log(N)
        rounded, size_of_row, count = np.unique(np.round(x, 6), return_inverse=True, return_counts=True)
        sizes, log_d = (np.bincount(size_of_row, v) / count for v in (x, np.log(D)))
        return cls(x, float(x.mean()), sizes, size_of_row, log_d)

    def by_size(self, values) -> np.ndarray:
        """(K, s): values (K, m) of the rows, summed for each size."""
        return np.add.reduceat(values, np.searchsorted(self.size_of_row, np.arange(len(self.sizes))), axis=1)

    def tokens(self, u) -> np.ndarray:
        """D at ln N = u + mean, interpolated linearly in logs: N D hardly varies along an isoFLOP curve."""
        return np.exp(np.interp(u + self.mean, self.sizes, self.log_d))

    def parabola(self, loss, weights=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """p, q, r (K,) of loss = p u^2 + q u + r, u = ln N - mean; weights (K, m). nan with fewer than 3 sizes."""
        u = self.x - self.mean
        basis = np.stack([u * u, u, np.ones_like(u)], 1)  # (m, 3)
        if weights is None:
            return tuple(np.linalg.lstsq(basis, loss.T, rcond=None)[0])
        normal = np.einsum("km,mi,mj->kij", weights, basis, basis, optimize=True)
        right = (weights * loss) @ basis
        enough = (self.by_size(weights) > 0).sum(1) >= MIN_SIZES
        normal[~enough] = np.eye(3)
        out = np.linalg.solve(normal, right[:, :, None])[:, :, 0]
        out[~enough] = np.nan
        return tuple(out.T)

    def minimum(self, loss, weights=None, method: str = "parabola") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """u (K,) of the minimum, the loss there, and an index into REASONS, 0 if bracketed."""
        if method == "akima":
            return self._spline_minimum(loss, weights)
        p, q, r = self.parabola(loss, weights)
        u = self.x - self.mean
        there = np.ones(loss.shape, bool) if weights is None else weights > 0
        low, high = np.where(there, u, np.inf).min(1), np.where(there, u, -np.inf).max(1)
        lowest = u[np.where(there, loss, np.inf).argmin(1)]
        with np.errstate(divide="ignore", invalid="ignore"):
            vertex = -q / (2 * p)
        # If all runs are too large, the vertex may still be just inside: the lowest run decides.
        inside = (vertex > low) & (vertex < high) & (lowest > low) & (lowest < high)
        return vertex, r - p * vertex * vertex, np.where(~(p > 0), 1, np.where(inside, 0, 2))

    def _spline_minimum(self, loss, weights):
        """As `minimum`, of the Akima spline of log loss through the mean of each size, at FINE points per gap."""
        if weights is not None:
            raise ValueError("resampling leaves gaps in the spline: use the noise bootstrap")
        s = len(self.sizes)
        log_loss = self.by_size(np.log(loss)) / np.bincount(self.size_of_row)
        fine = np.interp(np.arange((s - 1) * FINE + 1) / FINE, np.arange(s), self.sizes)
        curve = akima(self.sizes, log_loss, fine)
        best = curve.argmin(1)
        edge = (best == 0) | (best == len(fine) - 1)
        return fine[best] - self.mean, np.exp(curve.min(1)), np.where(edge, 2, 0)


def akima(x, y, at) -> np.ndarray:
    """Akima's spline (1970) through x (s,), y (K, s), at points (t,): (K, t)."""
    from scipy.interpolate import Akima1DInterpolator

    return Akima1DInterpolator(x, y, axis=1)(at)


def _noise(budgets, N, loss) -> float:
    """Standard deviation of log loss about the parabolas: their residuals, pooled over budgets."""
    square, freedom = 0.0, 0
    for b in budgets:
        if len(b.rows) > 3 and math.isfinite(b.parabola[0]):
            fitted = np.polyval(b.parabola, np.log(N[b.rows]))
            square += float((((loss[b.rows] - fitted) / loss[b.rows]) ** 2).sum())
            freedom += len(b.rows) - 3
    return math.sqrt(square / freedom) if freedom else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# Replicates


def refit_isoflop(fit: IsoflopFit, batches) -> tuple[dict[str, np.ndarray], tuple]:
    """Constants (replicates,) of the power laws, nan if fewer than 2 budgets are bracketed, and the optima of
    replicate_optima. `batches(size)` yields weights (k, n). Always fits parabolas, also if the method is the spline,
    which would only skip the runs missing from a resample."""
    N, D = replicate_optima(fit, batches)
    return _lines([b.flops for b in fit.budgets], N, D), (N, D)


def replicate_optima(fit: IsoflopFit, batches) -> tuple[np.ndarray, np.ndarray]:
    """N_opt and D_opt (replicates, budgets) of the parabolas of resampled rows; nan where not bracketed."""
    optima = []
    for weights in batches(max(1, 2**22 // len(fit.N))):
        pairs = [_replicates(fit, b, weights=weights[:, b.rows]) for b in fit.budgets]
        optima.append(tuple(np.stack(v, 1) for v in zip(*pairs, strict=True)))
    N, D = (np.concatenate(v) for v in zip(*optima, strict=True))
    return N, D


def seed_noise(fit: IsoflopFit, noise: float, replicates: int, rng) -> tuple[dict[str, np.ndarray], tuple]:
    """Constants and optima, as in refit_isoflop, with Gaussian noise on log loss (Porian et al. 2024). Replicates are
    fitted like the point estimate: the same budgets with equal weights, less those not bracketed in this draw.
    (Porian et al. weight by 1 / variance, which is the interval of another estimate.)"""
    used = np.array([b.bracketed for b in fit.budgets])
    size, optima = max(1, 2**22 // (FINE * len(fit.N))), []
    for start in range(0, replicates, size):
        draws = fit.loss * np.exp(noise * rng.standard_normal((min(size, replicates - start), len(fit.N))))
        pairs = [_replicates(fit, b, loss=draws[:, b.rows], method=fit.method) for b in fit.budgets]
        optima.append(tuple(np.stack(v, 1) for v in zip(*pairs, strict=True)))
    N, D = (np.where(used, np.concatenate(v), np.nan) for v in zip(*optima, strict=True))
    return _lines([b.flops for b in fit.budgets], N, D), (N, D)


def _replicates(fit: IsoflopFit, budget: Budget, *, loss=None, weights=None, method: str = "parabola"):
    """N_opt, D_opt (K,) of one budget; nan where not bracketed."""
    curve = Curve.of(fit.N[budget.rows], fit.D[budget.rows])
    if len(curve.sizes) < MIN_SIZES:
        K = len(weights if loss is None else loss)
        return np.full(K, np.nan), np.full(K, np.nan)
    u, _, reason = curve.minimum(fit.loss[budget.rows][None] if loss is None else loss, weights, method)
    good = reason == 0
    u = np.where(good, u, 0)
    return np.where(good, np.exp(u + curve.mean), np.nan), np.where(good, curve.tokens(u), np.nan)


def _lines(flops, N, D) -> dict[str, np.ndarray]:
    """Power laws through (K, budgets) optima, without those that are nan."""
    good = np.isfinite(N)
    w = good.astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_c = np.broadcast_to(np.log(flops), N.shape)
        fits = [line(log_c, np.log(np.where(good, v, 1)), w) for v in (N, D)]
    enough = good.sum(1) >= MIN_BUDGETS
    names = (("k_N", "a"), ("k_D", "b"))
    return {
        name: np.where(enough, np.exp(v) if name[0] == "k" else v, np.nan)
        for pair, both in zip(fits, names, strict=True)
        for v, name in zip(pair, both, strict=True)
    }
