"""Approach 2: at each budget the loss against log N has a minimum; the minima follow power laws in C.

As in the paper, the minimum is the vertex of a parabola, the second-order expansion of the true curve. If alpha and
beta differ, the vertex is biased by a factor that grows with the width of the window but not with C: the constant is
biased, the exponent is not. Hence only sizes near the minimum are fitted. The interpolating spline has no such bias,
but more noise.
"""

import math
from dataclasses import dataclass

import numpy as np

from nanochin.laws.law import NotIdentified, PowerLaw, constants, distinct, fit_power_laws

MIN_ROWS, MIN_SIZES, MIN_BUDGETS = 6, 3, 2
MAX_BUDGETS, TOLERANCE = 100, 0.1  # of budgets found by clustering: at most, and their width in log C
BINS, LEAST = 6, 4  # of log C, for runs without budgets; fewest runs of the largest group
MISTUNED = 0.06  # of the loss; shapes of one size differ by less (5.8% in Gemstones)
WINDOW = 8.0  # times the size of the minimum, either way: the sizes that the parabola is fitted to
FINE = 25  # points of the spline in each gap between two sizes


@dataclass(frozen=True)
class Budget:
    """One isoFLOP curve."""

    flops: float  # geometric mean of its runs' C
    rows: np.ndarray  # indices of its rows, sorted by N
    fitted: np.ndarray  # those of the rows within the window
    width: float  # N_max / N_min of its sizes
    parabola: tuple[float, float, float] = 3 * (math.nan,)  # p x^2 + q x + r, x = ln N; nan with fewer than 3 sizes
    reason: str = ""  # why it is not bracketed
    params_opt: float = math.nan  # nan where not bracketed
    tokens_opt: float = math.nan
    loss_opt: float = math.nan
    off_centre: float = math.nan  # params_opt over the middle of the window, sqrt(N_max N_min): 1 is centred

    @property
    def bracketed(self) -> bool:
        """Convex, with its minimum inside the sampled sizes: only then is there an optimum."""
        return not self.reason

    @property
    def mistuned(self) -> bool:
        """One of its runs is above its neighbours, so that no curve is fitted."""
        return not len(self.fitted)

    @property
    def n_runs(self) -> int:
        return len(self.rows)

    def to_json(self) -> dict:
        known, optimum = ("flops", "bracketed", "n_runs", "reason", "width"), ("params_opt", "tokens_opt", "loss_opt")
        return {name: getattr(self, name) for name in (*known, *optimum, "off_centre")}


@dataclass(frozen=True)
class IsoflopFit:
    """Power laws through the minima."""

    law: PowerLaw  # a and b fitted separately: a + b need not be 1
    method: str  # "parabola" or "akima"
    budgets: tuple[Budget, ...]  # by increasing flops, also those without optimum
    noise: float  # sd of the log-loss about the curves (parabola), pooled over budgets; nan without degrees of freedom
    N: np.ndarray  # (n,) the rows as given
    D: np.ndarray
    loss: np.ndarray
    C: np.ndarray
    window: float  # rows of sizes up to this factor from the minimum are fitted

    def to_json(self, bootstrap=None) -> dict:
        """The object `approach2` of laws.json; `bootstrap` adds its to_json(), and `ci` to its budgets."""
        budgets = [budget.to_json() for budget in self.budgets]
        for i, budget in enumerate(budgets if bootstrap else ()):
            if ci := bootstrap.at_budget(i):
                budget["ci"] = ci
        own = {"method": self.method, "noise": self.noise, "window": self.window, "budgets": budgets}
        return constants(self.law) | own | (bootstrap.to_json() if bootstrap else {})

    def without(self, left_out) -> PowerLaw:
        """Power laws through the minima of the other budgets. Raises NotIdentified with fewer than 2 of them."""
        good = [b for b in self.budgets if b.bracketed and b not in left_out]
        if len(good) < MIN_BUDGETS:
            raise NotIdentified(f"Approach 2 needs at least {MIN_BUDGETS} budgets, but has {len(good)}")
        return _law(good, params_convention=self.law.params_convention, flops_convention=self.law.flops_convention)


def equal_rows(values) -> list[np.ndarray]:
    """Indices of the rows of each finite value, by increasing value, in one sort for any number of values."""
    order = np.argsort(values, kind="stable")
    order = order[np.isfinite(values[order])]
    return np.split(order, np.flatnonzero(np.diff(values[order])) + 1) if len(order) else []


def group_budgets(C, *, budget=None) -> np.ndarray:
    """(n,) nominal budget of each row, the geometric mean of its group's C, or nan for rows of no group.

    Rows with equal numbers in the column `budget` (n,), in any unit, are a group (nan: none). Without it, a group is a
    window in log C of width TOLERANCE. The fullest is taken first; windows with fewer than 3 rows, or less than a
    third of the fullest, are between budgets and no group."""
    log_c = np.log(np.asarray(C, np.float64))
    nominal = np.full(len(log_c), np.nan)
    if budget is not None:
        for rows in equal_rows(np.asarray(budget, np.float64)):
            nominal[rows] = math.exp(log_c[rows].mean())
        return nominal
    left = np.argsort(log_c, kind="stable")
    fewest = 3.0
    for _ in range(MAX_BUDGETS):
        x = log_c[left]
        start, end = np.arange(len(x)), np.searchsorted(x, x + TOLERANCE, side="right")
        if not len(x) or (end - start).max() < fewest:
            break
        fewest = max(fewest, (end - start).max() / 3)
        best = int(np.argmax(end - start - (x[end - 1] - x) / (2 * TOLERANCE)))  # the tightest of equally full ones
        rows = left[best : end[best]]
        nominal[rows] = math.exp(log_c[rows].mean())
        left = np.delete(left, slice(best, end[best]))
    return nominal


def compute_groups(C, *, budget=None) -> np.ndarray:
    """(n,) index of each run's group by compute, 0 the lowest: its budget by the column `budget` (nan: the next larger
    one) or by clusters of C if these hold all runs, else one of BINS equal bins of log C. The largest groups are merged
    until they have LEAST runs."""
    C = np.asarray(C, np.float64)
    nominal = group_budgets(C, budget=budget)
    if budget is None and np.isnan(nominal).any():
        log_c = np.log(C)
        nominal = np.floor(BINS * (log_c - log_c.min()) / (np.ptp(log_c) * (1 + 1e-9) + 1e-300))
    else:
        known = np.unique(nominal[np.isfinite(nominal)])
        next_one = known[np.minimum(np.searchsorted(known, C), len(known) - 1)]
        nominal = np.where(np.isnan(nominal), next_one, nominal)
    _, group, sizes = np.unique(nominal, return_inverse=True, return_counts=True)
    largest = len(sizes) - 1 - int(np.searchsorted(np.cumsum(sizes[::-1]), LEAST))
    return np.minimum(group, max(largest, 0))


def fit_isoflop(
    N, D, loss, C=None, *, budget=None, method: str = "parabola", window: float = WINDOW, **conventions
) -> IsoflopFit:
    """Minimum of each budget's curve, then log N and log D against log C by least squares.

    C defaults to 6 N D; the laws are in units of C. The column `budget` (n,) only groups the rows (nan: none);
    without it C is clustered. method "parabola": vertex of a quadratic in log N (the paper) through the sizes up to
    `window` times larger or smaller (math.inf: all); "akima": minimum of the interpolating spline through all sizes
    (Porian et al. 2024), which takes the mean loss of rows of one size. `conventions` are those of PowerLaw.
    Raises NotIdentified with fewer than 6 rows, fewer than 3 sizes, or fewer than 2 budgets with bracketed minimum."""
    N, D, loss = (np.asarray(v, np.float64) for v in (N, D, loss))
    C = 6 * N * D if C is None else np.asarray(C, np.float64)
    if len(N) < MIN_ROWS:
        raise NotIdentified(f"Approach 2 needs at least {MIN_ROWS} usable rows, but has {len(N)}")
    if distinct(N) < MIN_SIZES:
        raise NotIdentified(f"Approach 2 needs at least {MIN_SIZES} different model sizes, but has {distinct(N)}")
    nominal = group_budgets(C, budget=budget)
    groups = [rows[np.argsort(N[rows], kind="stable")] for rows in equal_rows(nominal) if len(rows) >= 3]
    window = math.inf if method == "akima" else window
    how = {"method": method, "window": window}
    budgets = tuple(fit_budget(rows, N, D, loss, float(nominal[rows[0]]), **how) for rows in groups)
    good = [b for b in budgets if b.bracketed]
    if len(good) < MIN_BUDGETS:
        has = f"{len(good)} of {len(budgets)}{_reasons(budgets)}"
        raise NotIdentified(f"Approach 2 needs at least {MIN_BUDGETS} budgets with a bracketed minimum, but has {has}")
    return IsoflopFit(_law(good, **conventions), method, budgets, _noise(budgets, N, loss), N, D, loss, C, window)


def _reasons(budgets) -> str:
    """Why budgets are not bracketed, in brackets: at most three of them for each reason, the others counted."""
    said = []
    for reason in dict.fromkeys(b.reason for b in budgets if b.reason):
        at = [f"{b.flops:.3g}" for b in budgets if b.reason == reason]
        more = f" and {len(at) - 3} more" if len(at) > 3 else ""
        said.append(f"{', '.join(at[:3])}{more} FLOPs: {reason}")
    return f" ({'; '.join(said)})" if said else ""


def _law(budgets, **conventions) -> PowerLaw:
    optima = (np.log([getattr(b, name) for b in budgets]) for name in ("flops", "params_opt", "tokens_opt"))
    return PowerLaw.through("Approach 2", *optima, **conventions)


# ---------------------------------------------------------------------------------------------------------------------
# One budget


def fit_budget(rows, N, D, loss, flops: float, *, window: float, method: str = "parabola") -> Budget:
    """The curve through `rows`, sorted by N, of a budget; method and window as in `fit_isoflop`."""
    x = np.log(N[rows])
    width = math.exp(x[-1] - x[0])
    if (sizes := distinct(N[rows])) < MIN_SIZES:
        return Budget(flops, rows, rows, width, reason=f"{sizes} different sizes, but it needs {MIN_SIZES}")
    if (cell := mistuned_cell(N[rows], loss[rows])) is not None:
        reason = f"its run of N = {N[rows][cell]:.4g} is above its neighbours"
        return Budget(flops, rows, rows[:0], width, reason=reason)
    fitted, centre = rows, x[loss[rows] == loss[rows].min()].mean()
    for _ in range(2):  # around the lowest run, then around the vertex
        near = rows[np.abs(x - centre) <= math.log(window) + 1e-9]
        fitted = near if distinct(N[near]) > MIN_SIZES else fitted
        curve = Curve.of(N[fitted], D[fitted])
        (u,), (lowest,), (reason,) = curve.minimum(loss[fitted][None], method=method)
        if reason:
            break
        centre = u + curve.mean
    (p,), (q,), (r,) = curve.parabola(loss[fitted][None])
    m = curve.mean
    parabola = (float(p), float(q - 2 * p * m), float(r - q * m + p * m * m))  # from u = x - mean back to x = ln N
    if reason:
        return Budget(flops, rows, fitted, width, parabola, REASONS[reason])
    params, middle = math.exp(u + m), math.exp((x[0] + x[-1]) / 2)
    tokens = float(curve.tokens(u))
    return Budget(flops, rows, fitted, width, parabola, "", params, tokens, float(lowest), params / middle)


def mistuned_cell(N, loss) -> int | None:
    """Index of the run of a size whose lowest loss is more than MISTUNED above the line between its neighbours, None
    without one. A convex curve has none."""
    sizes, first = np.unique(N, return_inverse=True)
    x, y = np.log(sizes), np.log([loss[first == i].min() for i in range(len(sizes))])
    if len(x) < 4:
        return None
    share = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    above = y[1:-1] - ((1 - share) * y[:-2] + share * y[2:])
    worst = int(np.argmax(above))
    if above[worst] < MISTUNED:
        return None
    return int(np.flatnonzero(first == worst + 1)[0])


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

    def parabola(self, loss, weights=1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """p, q, r (K,) of loss = p u^2 + q u + r, u = ln N - mean; weights (K, m). nan with fewer than 3 sizes."""
        weights = np.broadcast_to(weights, np.broadcast_shapes(np.shape(weights), loss.shape))
        enough = (self.by_size(weights) > 0).sum(1) >= MIN_SIZES
        return fit_parabola(self.x - self.mean, loss, weights, enough)

    def minimum(self, loss, weights=1.0, method: str = "parabola") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """u (K,) of the minimum, the loss there, and an index into REASONS, 0 if bracketed. "akima" needs all rows: it
        is the spline of log loss through the mean of each size."""
        if method == "akima":
            log_loss = self.by_size(np.log(loss)) / np.bincount(self.size_of_row)
            x, lowest, inside = akima_minimum(self.sizes, log_loss)
            return x - self.mean, np.exp(lowest), np.where(inside, 0, 2)
        p, q, r = self.parabola(loss, weights)
        u, lowest = self.x - self.mean, np.where(weights > 0, loss, np.inf)
        there = np.isfinite(lowest)
        low, high = np.where(there, u, np.inf).min(1), np.where(there, u, -np.inf).max(1)
        ties = lowest == lowest.min(1)[:, None]  # of rounded losses: the middle of them counts
        lowest = (ties * u).sum(1) / ties.sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            vertex = -q / (2 * p)
        # If all runs are too large, the vertex may still be just inside: the lowest run decides.
        inside = (vertex > low) & (vertex < high) & (lowest > low) & (lowest < high)
        return vertex, r - p * vertex * vertex, np.where(~(p > 0), 1, np.where(inside, 0, 2))


def fit_parabola(x, y, weights, enough) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """p, q, r (K,) of y = p x^2 + q x + r, x (m,), y (K, m) or (1, m), weights (K, m); nan where not `enough` (K,)."""
    basis = np.stack([x * x, x, np.ones_like(x)], 1)  # (m, 3)
    normal = np.einsum("km,mi,mj->kij", weights, basis, basis, optimize=True)
    normal[~enough] = np.eye(3)
    out = np.linalg.solve(normal, ((weights * y) @ basis)[:, :, None])[:, :, 0]
    out[~enough] = np.nan
    return tuple(out.T)


def akima_minimum(x, y) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, value and whether it is inside (K,) of the minima of Akima's splines (1970) through x (s,), y (K, s), at FINE
    points per gap."""
    from scipy.interpolate import Akima1DInterpolator

    fine = np.interp(np.arange((len(x) - 1) * FINE + 1) / FINE, np.arange(len(x)), x)
    curve = Akima1DInterpolator(x, y, axis=1)(fine)
    best = curve.argmin(1)
    return fine[best], curve.min(1), (best > 0) & (best < len(fine) - 1)


def _noise(budgets, N, loss) -> float:
    """Standard deviation of log loss about the parabolas: their residuals, pooled over budgets."""
    square, freedom = 0.0, 0
    for b in budgets:
        if len(b.fitted) > 3 and math.isfinite(b.parabola[0]):
            fitted = np.polyval(b.parabola, np.log(N[b.fitted]))
            square += float((((loss[b.fitted] - fitted) / loss[b.fitted]) ** 2).sum())
            freedom += len(b.fitted) - 3
    return math.sqrt(square / freedom) if freedom else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# Replicates


def replicate_optima(fit: IsoflopFit, batches) -> tuple[np.ndarray, np.ndarray]:
    """N_opt and D_opt (replicates, budgets) of resampled rows; nan where not bracketed. `batches(size)` yields weights
    (k, n). Always fits parabolas, also if the method is the spline, which would only skip the runs missing from a
    resample."""
    return _optima(fit, ((fit.loss[None], weights, "parabola") for weights in batches(max(1, 2**22 // len(fit.N)))))


def noisy_optima(fit: IsoflopFit, noise: float, replicates: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """The same with Gaussian noise on log loss instead of resampling (Porian et al. 2024). Replicates are fitted like
    the point estimate: the same budgets with equal weights, less those not bracketed in this draw. (Porian et al.
    weight by 1 / variance, which is the interval of another estimate.)"""
    n, size = len(fit.N), max(1, 2**22 // (FINE * len(fit.N)))
    counts = (min(size, replicates - start) for start in range(0, replicates, size))
    losses = (fit.loss * np.exp(noise * rng.standard_normal((count, n))) for count in counts)
    draws = ((loss, np.ones_like(loss), fit.method) for loss in losses)
    used = np.array([b.bracketed for b in fit.budgets])
    return tuple(np.where(used, v, np.nan) for v in _optima(fit, draws))


def _optima(fit: IsoflopFit, batches) -> tuple[np.ndarray, np.ndarray]:
    """N_opt and D_opt (replicates, budgets), nan where not bracketed, of batches of loss (k, n) or (1, n), weights
    (k, n) and the method."""
    N, D = [], []
    for loss, weights, method in batches:
        found = np.full((2, len(weights), len(fit.budgets)), np.nan)
        for i, rows in enumerate(b.fitted for b in fit.budgets):
            if distinct(fit.N[rows]) >= MIN_SIZES:
                curve = Curve.of(fit.N[rows], fit.D[rows])
                u, _, reason = curve.minimum(loss[:, rows], weights[:, rows], method)
                good = reason == 0
                found[:, good, i] = np.exp(u[good] + curve.mean), curve.tokens(u[good])
        N.append(found[0])
        D.append(found[1])
    return np.concatenate(N), np.concatenate(D)


def laws_through(fit: IsoflopFit, N, D) -> dict[str, np.ndarray]:
    """Constants (K,) of the power laws through optima (K, budgets), without those that are nan; nan with fewer than
    2."""
    good = np.isfinite(N)
    log_n, log_d = (np.log(np.where(good, v, 1)) for v in (N, D))
    return fit_power_laws(np.log([b.flops for b in fit.budgets]), log_n, log_d, good.astype(float))
