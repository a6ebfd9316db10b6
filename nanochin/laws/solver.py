"""The solver of Approach 3: Newton's method for thousands of problems at once, since a bootstrap has one per replicate
(`minimise`), the objective with its gradient and Hessian (`Surface`), and starts (`projected_starts`).

    sum_i w_i Huber_delta(r_i),   r_i = log(u1 + u2 + E) - log L_i,   u1 = A N_i^-alpha,   u2 = B D_i^-beta

log N and log D are centred: otherwise A trades off against alpha, B against beta, and every optimiser is slow.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from nanochin.laws.law import Law, NotIdentified, distinct

# ---------------------------------------------------------------------------------------------------------------------
# Newton's method
#
# The objective is a sum of Huber functions: its Hessian jumps where a residual crosses delta and may be indefinite away
# from the optimum. So each problem has its own damping mu. 0 is the exact Newton step; as mu grows, the Hessian is
# blended with that of iteratively reweighted least squares, which majorises the objective, and its diagonal is raised.
# Steps that do not descend are never taken. A problem has converged only if the predicted gain of an exact Newton step
# is less than TOLERANCE of the objective.

TOLERANCE = 1e-13  # predicted gain of the next step, relative to the objective
FLOOR = 1e-30  # rounding error in the objective of noise-free data, relative to the summed weights
MAX_STEPS = 300

# Damping starts at the first number when a step fails, and ends below the second. Problems not converged after 10 steps
# are in a long, flat, curved valley, with eigenvalues 1e-6 of the largest: damping by 0.02 would nearly stop them.
DAMPING, FINE_DAMPING, FINE_FROM = (0.02, 1e-3), (1e-5, 1e-5), 10

# (theta (K, p), mu (K,), rows (K,): which problems) -> objective (K,), gradient (K, p), Hessian (K, p, p)
Evaluate = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass
class Solution:
    """Optima of K problems."""

    theta: np.ndarray  # (K, p)
    objective: np.ndarray  # (K,)
    converged: np.ndarray  # (K,) bool
    gradient_norm: np.ndarray | None = None  # (K,), see Surface.gradient_norm


def minimise(
    evaluate: Evaluate, theta, lower, upper, weight, tolerance: float = TOLERANCE, damping=0.0, most: int = MAX_STEPS
) -> Solution:
    """Minimise K problems of p unknowns from theta (K, p), each within lower <= theta <= upper, (p,) or (K, p); weight
    (K,) is the sum of the weights in each objective. A coordinate with lower == upper is fixed. Problems that have not
    converged stop after `most` steps."""
    theta = np.clip(theta, lower, upper)
    K = len(theta)
    lower, upper = np.broadcast_to(lower, theta.shape), np.broadcast_to(upper, theta.shape)
    mu = np.full(K, float(damping))
    result = Solution(theta.copy(), np.full(K, np.inf), np.zeros(K, bool))
    rows = np.arange(K)  # problems not finished; all arrays below are of these
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        F, g, H = evaluate(theta, mu, rows)
        for taken in range(most + 1):
            step, gain = _step(theta, g, H, mu, lower, upper)
            # An exact Newton step would gain nothing. `gain` is negative for an indefinite Hessian.
            rounding = FLOOR * weight[rows]
            done = (mu == 0) & (gain >= 0) & (gain <= tolerance * F + rounding) | (rounding >= F)
            result.converged[rows[done]] = True
            done |= taken == most
            if done.any():
                at, left = rows[done], ~done
                result.theta[at], result.objective[at] = theta[done], F[done]
                rows, theta, F, g, H, mu = (v[left] for v in (rows, theta, F, g, H, mu))
                lower, upper = lower[left], upper[left]
                step, gain = step[left], gain[left]
                if not len(rows):
                    break
            trial = np.clip(theta + step, lower, upper)
            least, last = DAMPING if taken < FINE_FROM else FINE_DAMPING
            softer = np.where(mu > last, mu / 10, 0.0)
            F_new, g_new, H_new = evaluate(trial, softer, rows)
            # The last digits of two nearly equal sums are rounding errors.
            better = (F_new <= F * (1 + 1e-15)) & (gain >= 0) & np.isfinite(g_new).all(1)
            theta = np.where(better[:, None], trial, theta)
            F, g = np.where(better, F_new, F), np.where(better[:, None], g_new, g)
            H, mu = np.where(better[:, None, None], H_new, H), np.where(better, softer, np.maximum(4 * mu, least))
            if not better.all():
                worse = ~better
                H[worse] = evaluate(theta[worse], mu[worse], rows[worse])[2]
    return result


def _step(theta, g, H, mu, lower, upper) -> tuple[np.ndarray, np.ndarray]:
    """Damped Newton step (K, p) on the coordinates that are not held by a bound, and its predicted gain (K,)."""
    p = theta.shape[1]
    free = ~(((theta <= lower) & (g >= 0)) | ((theta >= upper) & (g <= 0)) | (lower == upper))
    g = g * free
    H = H * (free[:, :, None] & free[:, None, :])
    diagonal = np.einsum("kii->ki", H)  # a view
    # Raised by about rounding error even at mu = 0, so that flat directions stay solvable.
    diagonal += (mu[:, None] + 1e-14) * np.abs(diagonal) + ~free + 1e-300
    bad = ~np.isfinite(H).all((1, 2))
    if bad.any():
        H[bad], g[bad] = np.eye(p), 0
    try:
        step = -np.linalg.solve(H, g[:, :, None])[:, :, 0]
    except np.linalg.LinAlgError:  # one of them is exactly singular
        step = -np.linalg.solve(H + 1e-9 * np.abs(H).max((1, 2))[:, None, None] * np.eye(p), g[:, :, None])[:, :, 0]
    gain = -np.einsum("ki,ki->k", g, step)
    gain[bad] = -1
    return step, gain


# ---------------------------------------------------------------------------------------------------------------------
# The objective

MIN_ROWS, MIN_SIZES = 6, 3  # one more than the law's constants; three points of a curve
EXPONENTS = (1e-3, 4.0)  # bounds of alpha and beta
SCALE = 40.0  # bound of |log u1| and |log u2| at the mean of log N and log D
BLOCK = 24_576  # numbers in an intermediate array: 192 KiB, so that arrays stay in cache and covered by the TLB
BATCH = 2**22  # numbers in the weights of a batch of replicates: 32 MiB
NARROW = np.log(1.3)  # budgets or ratios D/N within this factor count as one
CORNERS = 5e-5  # delta on log loss below which fits start with larger deltas
FLAT = 1e-4  # largest gradient norm of an optimum
ROUNDING = 1e-12  # eigenvalues of a Hessian with unit diagonal that count as 0
EPS = np.finfo(float).eps

# The unknowns: log u1 at the centre (it holds A), alpha, log u2 at the centre (it holds B), beta, E.
NAMES = ("A", "alpha", "B", "beta", "E")


@dataclass(frozen=True)
class Surface:
    """The rows and the objective over them."""

    N: np.ndarray  # (n,)
    D: np.ndarray
    loss: np.ndarray
    options: dict  # delta, space, E, tied and gamma, as given
    target: np.ndarray  # (n,) log loss or loss
    centre: tuple[float, float]  # means of log N and log D
    bases: tuple[np.ndarray, ...]  # columns of x = log N - mean and y = log D - mean, see `_block`
    free: np.ndarray  # (5, p): theta = free z for the unknowns z; p = 4 if alpha = beta, else 5
    lower: np.ndarray  # (p,)
    upper: np.ndarray

    @classmethod
    def of(
        cls, N, D, loss, *, delta: float = 1e-3, space: str = "log", E: float | None = None, tied: bool = False
    ) -> "Surface":
        """delta=math.inf is least squares; `space` of the residuals: "log" loss or the loss itself, "linear"; `E` fixes
        the irreducible loss; `tied` forces alpha = beta. Raises NotIdentified for rows that cannot identify the law,
        ValueError for rows that are not positive numbers."""
        N, D, loss = (np.asarray(v, np.float64) for v in (N, D, loss))
        for label, v in (("N", N), ("D", D), ("loss", loss)):
            if v.shape != N.shape or not (np.isfinite(v) & (v > 0)).all():
                raise ValueError(f"{label}: needs one finite number above 0 per row")
        if loss.size and not np.exp(-SCALE) < loss.min() <= loss.max() < np.exp(SCALE):
            raise NotIdentified(f"Approach 3: losses from {loss.min():.3g} to {loss.max():.3g} are not nats per token")
        if E is not None and not 0 <= E < (lowest := loss.min(initial=np.inf)):
            raise NotIdentified(f"Approach 3: E is fixed at {E:g}, but must be below the lowest loss, {lowest:.6g}")
        if len(N) < MIN_ROWS:
            raise NotIdentified(f"Approach 3 needs at least {MIN_ROWS} usable rows, but has {len(N)}")
        for what, v in (("model sizes", N), ("token counts", D)):
            if distinct(v) < MIN_SIZES:
                raise NotIdentified(f"Approach 3 needs at least {MIN_SIZES} different {what}, but has {distinct(v)}")
        x, y = np.log(N), np.log(D)
        centre = (float(x.mean()), float(y.mean()))
        x, y = x - centre[0], y - centre[1]
        cannot = "Approach 3 cannot separate N and D: all runs are"
        for what, v in (("one budget (6 N D)", x + y), ("one ratio D/N", y - x)):
            if (span := np.ptp(v)) < NARROW:
                raise NotIdentified(f"{cannot} at {what}, within {np.exp(span):.3g}x")
        spread = np.linalg.svd(np.stack([x, y]), compute_uv=False)
        if spread[1] < 1e-3 * spread[0]:
            raise NotIdentified(f"{cannot} on one line in log N and log D")
        low, high = EXPONENTS
        lower = np.array([-SCALE, low, -SCALE, low, 0 if E is None else E])
        upper = np.array([SCALE, high, SCALE, high, loss.max() if E is None else E])
        free = np.eye(5)
        if tied:
            free = np.delete(free, 3, 1)
            free[3, 1] = 1
        unknowns = [0, 1, 2, 4] if tied else slice(None)
        options = {"delta": delta, "space": space, "E": E, "tied": tied, "gamma": 1.0}
        target = np.log(loss) if space == "log" else loss
        return cls(N, D, loss, options, target, centre, _bases(x, y), free, lower[unknowns], upper[unknowns])

    @classmethod
    def of_one(cls, x, loss, *, delta: float = 1e-3, E: float | None = None) -> "Surface":
        """Of E + A / x^alpha, for a law of one variable: N = D = x, and the second term is fixed at nothing."""
        centred, centre = np.log(x) - np.log(x).mean(), float(np.log(x).mean())
        lower = np.array([-SCALE, EXPONENTS[0], -SCALE, 0, 0 if E is None else E])
        upper = np.array([SCALE, EXPONENTS[1], -SCALE, 0, loss.max() if E is None else E])
        options = {"delta": delta, "space": "log", "E": E, "tied": False, "gamma": 1.0}
        bases = _bases(centred, centred)
        return cls(x, x, loss, options, np.log(loss), (centre, centre), bases, np.eye(5), lower, upper)

    def law(self, z) -> Law:
        """The law at z (p,), or the law of K replicates at z (K, p)."""
        u1, alpha, u2, beta, E = np.moveaxis(np.asarray(z) @ self.free.T, -1, 0)
        A, B = np.exp(u1 + alpha * self.centre[0]), np.exp(u2 + beta * self.centre[1])
        return Law("Approach 3", *(v if np.ndim(v) else float(v) for v in (E, A, B, alpha, beta)))

    def z(self, law: Law) -> np.ndarray:
        """(p,), the inverse of `law`."""
        u1, u2 = np.log(law.A) - law.alpha * self.centre[0], np.log(law.B) - law.beta * self.centre[1]
        theta = np.array([u1, law.alpha, u2, law.beta, law.E])
        return theta[[0, 1, 2, 4]] if self.options["tied"] else theta

    def at_bound(self, z) -> np.ndarray:
        """(K, 5) bool, in the order of NAMES: constants at a bound, except a fixed E."""
        near = ((z <= self.lower + 1e-9) | (z >= self.upper - 1e-9)) & (self.lower < self.upper)
        return near @ self.free.T > 0

    def minimise(self, z, weights=None, *, E=None, cold: bool = False) -> Solution:
        """Optima from K starts z (K, p), with weights (n,) or (K, n) (default: 1); `E` (K,) fixes the E of each. `cold`
        starts, far from the optimum, first use larger deltas, for which the objective is smoother."""
        weights = np.ones(len(self.N)) if weights is None else weights
        lower, upper, delta = self.lower, self.upper, self.options["delta"]
        if E is not None:
            lower, upper = (np.tile(v, (len(E), 1)) for v in (lower, upper))
            lower[:, -1] = upper[:, -1] = E

        def objective(delta: float):
            return lambda z, mu, rows: self(z, mu, weights, delta, rows)

        total = np.broadcast_to(weights.sum(-1), len(z))
        for larger, tolerance in self._larger_deltas(cold):
            z = minimise(objective(larger), z, lower, upper, total, tolerance, damping=0.1, most=50).theta
        found = minimise(objective(delta), z, lower, upper, total)
        # A predicted gain of 0 is not enough: it may be a plateau, where a term of the law has vanished and all terms
        # of the gradient have the same sign, or a saddle, where the Hessian is not positive definite.
        held = (found.theta <= lower) | (found.theta >= upper)
        norm = self.gradient_norm(found.theta, weights, held)
        proven = (norm < FLAT) & self.curves_up(found.theta, weights, held)
        return replace(found, converged=found.converged & proven, gradient_norm=norm)

    def _larger_deltas(self, cold: bool) -> list[tuple[float, float]]:
        """(delta, tolerance) to minimise with first. With a small delta the objective has a corner at nearly every row
        and Newton steps wander: there delta is divided by 3 at a time, each optimum the start of the next."""
        delta = self.options["delta"]
        typical = 1.0 if self.options["space"] == "log" else float(np.median(self.loss))  # scale of the residuals
        path = [(3e-3, 1e-2)] if cold else []
        if delta < CORNERS * typical:
            path += [(3.0**-k, TOLERANCE) for k in range(6, 13)]  # 1.4e-3 to 1.9e-6
        return [(d * typical, tolerance) for d, tolerance in path if d * typical > 2 * delta]

    def _blocks(self, K: int) -> list[slice]:
        size = max(1, BLOCK // len(self.N))
        return [slice(k, k + size) for k in range(0, K, size)]

    def __call__(self, z, mu, weights, delta: float, rows=None):
        """Objective (K,), gradient (K, p) and Hessian (K, p, p) of K problems z (K, p) with weights (n,) or
        weights[rows]. The Hessian is blended by mu (K,) with that of reweighted least squares (see `minimise`)."""
        rows = np.arange(len(z)) if rows is None else rows
        K, m = len(z), len(self.free)
        F, g, H = np.empty(K), np.empty((K, m)), np.empty((K, m, m))
        theta = z @ self.free.T
        for k in self._blocks(len(z)):
            F[k] = self._block(theta[k], mu[k], weights if weights.ndim == 1 else weights[rows[k]], delta, g[k], H[k])
        return (F, g @ self.free, self.free.T @ H @ self.free) if self.options["tied"] else (F, g, H)

    def _block(self, theta, mu, weights, delta: float, g, H) -> np.ndarray:
        """Objective (K,) at theta (K, 5); writes the gradient to g and the Hessian to H.

        The gradient of log(u1 + u2 + E) is (p1, -x p1, p2, -y p2, f) with p = u / (u1 + u2 + E), f = 1 / (u1 + u2 + E);
        its Hessian is blockdiag(p1 [1 -x; -x x^2], p2 [1 -y; -y y^2], 0) minus the outer product of the gradient.
        For linear residuals p = u and f = 1, and that outer product is absent."""
        r, p1, p2, f = self._residuals(theta)  # each (K, n)
        squares_n, squares_d, products, linear_n, linear_d = self.bases
        F, s, q, blend, kept = huber(r, mu, weights, delta)
        s1, s2 = s * p1, s * p2
        g[:, 0:2], g[:, 2:4], g[:, 4] = s1 @ linear_n, s2 @ linear_d, np.einsum("kn,kn->k", s, f)
        for v in (s, s1, s2):  # only the second derivatives of the law still use these
            v[blend] *= kept
        if self.options["space"] == "log":
            q -= s
        q1, q2 = q * p1, q * p2
        H[:, 0:2, 0:2] = ((q1 * p1 + s1) @ squares_n)[:, [0, 1, 1, 2]].reshape(-1, 2, 2)
        H[:, 2:4, 2:4] = ((q2 * p2 + s2) @ squares_d)[:, [0, 1, 1, 2]].reshape(-1, 2, 2)
        H[:, 0:2, 2:4] = ((q1 * p2) @ products)[:, [0, 2, 1, 3]].reshape(-1, 2, 2)
        H[:, 0:2, 4], H[:, 2:4, 4] = (q1 * f) @ linear_n, (q2 * f) @ linear_d
        H[:, 4, 4] = np.einsum("kn,kn,kn->k", q, f, f)
        H[:, 2:4, 0:2] = H[:, 0:2, 2:4].transpose(0, 2, 1)
        H[:, 4, 0:4] = H[:, 0:4, 4]
        return F

    def _residuals(self, theta):
        """r, p1, p2, f of `_block`."""
        u1 = theta[:, 0:2] @ self.bases[3].T
        u2 = theta[:, 2:4] @ self.bases[4].T
        np.exp(u1, out=u1)
        np.exp(u2, out=u2)
        total = u1 + u2
        total += theta[:, 4:5]
        if self.options["space"] == "linear":
            total -= self.target
            return total, u1, u2, np.ones_like(u1)
        f = 1 / total
        u1 *= f
        u2 *= f
        np.log(total, out=total)
        total -= self.target
        return total, u1, u2, f

    def gradient_norm(self, z, weights, held) -> np.ndarray:
        """(K,): the largest component of the gradient over the sum of its absolute terms, without `held` coordinates
        (K, p). Dimensionless: 0 at an exact optimum, 1 where all terms have the same sign."""
        linear_n, linear_d, delta = *self.bases[3:], self.options["delta"]
        # With noise-free rows the residuals are only rounding errors.
        rounding = 1e8 * EPS * np.abs(self.target).max()
        g, size = np.empty((2, len(z), len(self.free)))
        for k in self._blocks(len(z)):
            r, p1, p2, *others = self._residuals(z[k] @ self.free.T)
            w = weights if weights.ndim == 1 else weights[k]
            s = w * np.clip(r, -delta, delta)
            terms = (g, s, linear_n, linear_d), (size, np.abs(s) + rounding * w, np.abs(linear_n), np.abs(linear_d))
            for out, v, n, d in terms:
                out[k, 0:2], out[k, 2:4] = (v * p1) @ n, (v * p2) @ d
                for i, other in enumerate(others, start=4):
                    out[k, i] = np.einsum("kn,kn->k", v, other)
        return np.where(held, 0, np.abs(g @ self.free) / (size @ self.free)).max(1)

    def curves_up(self, z, weights, held) -> np.ndarray:
        """(K,) bool: whether the Hessian at z (K, p), without `held` coordinates (K, p), is positive definite."""
        H = self(z, np.zeros(len(z)), weights, self.options["delta"])[2]
        free = ~held
        H = np.where(free[:, :, None] & free[:, None, :], H, np.eye(z.shape[1]))
        scale = np.sqrt(np.maximum(np.einsum("kii->ki", H), 1e-300))  # for a unit diagonal, dimensionless
        H = H / (scale[:, :, None] * scale[:, None, :])
        finite = np.isfinite(H).all((1, 2))
        return finite & (np.linalg.eigvalsh(np.where(finite[:, None, None], H, 0)).min(1) > ROUNDING)


def _bases(x, y) -> tuple[np.ndarray, ...]:
    one = np.ones(len(x))
    columns = ((one, -x, x * x), (one, -y, y * y), (one, -x, -y, x * y), (one, -x), (one, -y))
    return tuple(np.stack(c, 1) for c in columns)


def huber(r, mu, weights, delta: float) -> tuple[np.ndarray, ...]:
    """The sum of weights times Huber(r) (K,); weights times Huber' and Huber'' (K, n), the latter blended by mu (K,)
    with the weights of reweighted least squares; the problems with mu > 0, and what the second derivatives of the law
    keep there, (problems, 1)."""
    psi = np.clip(r, -delta, delta)  # Huber'; Huber = psi (r - psi / 2)
    s = weights * psi
    F = np.einsum("kn,kn->k", s, r) - 0.5 * np.einsum("kn,kn->k", s, psi)
    q = weights * (psi == r)
    blend = mu > 0
    t = (mu / (1 + mu))[blend, None]
    if len(t):
        w = weights[blend] if weights.ndim == 2 else weights
        q[blend] = (1 - t) * q[blend] + t * w * np.minimum(1, delta / np.maximum(np.abs(r[blend]), 1e-300))
    return F, s, q, blend, 1 - t


# ---------------------------------------------------------------------------------------------------------------------
# Starts


def projected_starts(surface: Surface, count: int) -> np.ndarray:
    """(count, p) starts by variable projection: for given exponents E, A and B are a linear least-squares problem
    (weights 1 / L^2 imitate log residuals). It is solved on a grid of (alpha, beta); the starts are the best cells, no
    two of them neighbours, so that agreement on one optimum is evidence for it."""
    pick = slice(None, None, max(1, len(surface.N) // 2000))  # starts need no more rows than that
    x, y, L = surface.bases[3][pick, 1], surface.bases[4][pick, 1], surface.loss[pick]
    w = 1 / L**2
    exponents = np.geomspace(0.03, 2.0, 24)
    v1, v2 = np.exp(np.outer(exponents, x)), np.exp(np.outer(exponents, y))  # (24, n); x and y are negated columns
    i, j = (v.ravel() for v in np.indices((24, 24)))
    normal, right = np.empty((576, 3, 3)), np.empty((576, 3))
    normal[:, 0, 0], normal[:, 1, 1] = ((v1 * v1) @ w)[i], ((v2 * v2) @ w)[j]
    normal[:, 0, 1] = normal[:, 1, 0] = ((v1 * w) @ v2.T).ravel()
    normal[:, 0, 2] = normal[:, 2, 0] = (v1 @ w)[i]
    normal[:, 1, 2] = normal[:, 2, 1] = (v2 @ w)[j]
    normal[:, 2, 2] = w.sum()
    right[:, 0], right[:, 1], right[:, 2] = (v1 @ (w * L))[i], (v2 @ (w * L))[j], w @ L
    fixed = surface.lower[-1] == surface.upper[-1]
    best = np.full((576, 3), np.nan)
    left = np.ones(576, bool)
    # E from least squares where it is not negative, else 0.
    for E in (surface.lower[-1],) if fixed else (None, 0.0):
        k = 3 if E is None else 2
        ridge = 1e-12 * np.einsum("kii->ki", normal)[:, :k, None] * np.eye(k)
        solved = np.linalg.solve(normal[:, :k, :k] + ridge, (right[:, :k] - (E or 0) * normal[:, :k, 2])[:, :, None])
        solved = np.concatenate([solved[:, :, 0], np.full((576, 3 - k), E or 0)], 1)
        usable = left & (solved[:, :2] > 1e-12).all(1) & (solved[:, 2] >= 0)
        best[usable], left = solved[usable], left & ~usable
    cells = np.flatnonzero(~left & (i == j) if surface.options["tied"] else ~left)
    i, j, (A, B, E) = i[cells], j[cells], best[cells].T
    misfit = np.abs(A[:, None] * v1[i] + B[:, None] * v2[j] + E[:, None] - L) @ (w * L)
    theta = np.stack([np.log(A), exponents[i], np.log(B), exponents[j], E], 1)
    return theta[apart(np.stack([i, j], 1), misfit, count)][:, [0, 1, 2, 4] if surface.options["tied"] else slice(None)]


def apart(cells, misfit, count: int) -> list[int]:
    """Indices of up to `count` cells (m, axes) of a grid with the lowest misfit (m,), no two of them neighbours."""
    chosen: list[int] = []
    for k in np.argsort(misfit, kind="stable"):
        if all(np.abs(cells[k] - cells[c]).max() > 1 for c in chosen):
            chosen.append(k)
        if len(chosen) == count:
            break
    return chosen
