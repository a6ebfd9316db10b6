"""The objective of Approach 3 with a sixth constant, gamma, over the same rows and by the same Newton's method.

    L(N, D) = E + (A / N^alpha + B / D^beta)^gamma

gamma = 1 is the form of Hoffmann et al. 2022; E = 0 contains the joint law of Kaplan et al. 2020 (his Eq. 1.5). The
unknowns are chosen so that a small gamma is harmless: with v1 = (A N^-alpha)^gamma and v2 = (B D^-beta)^gamma,

    L - E = exp(s),   s = gamma log(v1^(1/gamma) + v2^(1/gamma)),   ds/d log v_i = w_i,   ds/d gamma = h

where w_i are the shares of the two terms in the bracket and h = -w1 log w1 - w2 log w2 is their entropy. As gamma goes
to 0, s goes to the larger of log v1 and log v2.
"""

from dataclasses import dataclass

import numpy as np

from nanochin.laws.law import Law
from nanochin.laws.solver import Surface, apart, huber, projected_starts

GAMMA = (0.05, 5.0)  # bounds
GRID, SLOPES = (0.15, 0.3, 0.6, 1.0, 2.0), 12  # of the starts


@dataclass(frozen=True)
class GammaSurface(Surface):
    """`Surface` with gamma free. The unknowns: log v1 at the centre, alpha gamma, log v2 at the centre, beta gamma, E,
    log gamma."""

    def law(self, z) -> Law:
        v1, p, v2, q, E, log_gamma = np.moveaxis(np.asarray(z), -1, 0)
        gamma = np.exp(log_gamma)
        with np.errstate(over="ignore"):
            A, B = np.exp((v1 + p * self.centre[0]) / gamma), np.exp((v2 + q * self.centre[1]) / gamma)
        constants = (E, A, B, p / gamma, q / gamma, gamma)
        return Law("Approach 3 with gamma", *(v if np.ndim(v) else float(v) for v in constants))

    def z(self, law: Law) -> np.ndarray:
        p, q = law.alpha * law.gamma, law.beta * law.gamma
        v1, v2 = law.gamma * np.log(law.A) - p * self.centre[0], law.gamma * np.log(law.B) - q * self.centre[1]
        return np.array([v1, p, v2, q, law.E, np.log(law.gamma)])

    def _terms(self, theta):
        """Each (K, n): residual r; share of L - E in L; w1, w2; gamma h; w1 w2; log(w1 / w2); 1 / L. And gamma."""
        gamma = np.exp(theta[:, 5:6])
        log_v1, log_v2 = theta[:, 0:2] @ self.bases[3].T, theta[:, 2:4] @ self.bases[4].T
        odds = (log_v1 - log_v2) / gamma
        ratio = np.exp(-np.abs(odds))  # of the smaller term to the larger
        larger, smaller = 1 / (1 + ratio), ratio / (1 + ratio)
        tail = np.log1p(ratio)
        reducible = np.exp(np.maximum(log_v1, log_v2) + gamma * tail)  # L - E
        f = 1 / (reducible + theta[:, 4:5])
        w1, w2 = np.where(odds < 0, (smaller, larger), (larger, smaller))
        entropy = gamma * (tail + smaller * np.abs(odds))
        return -np.log(f) - self.target, reducible * f, w1, w2, entropy, larger * smaller, odds, f, gamma

    def _residuals(self, theta):
        """The residual and the derivatives of log L by log v1, log v2, E and log gamma."""
        r, share, w1, w2, entropy, _, _, f, _ = self._terms(theta)
        return r, share * w1, share * w2, f, share * entropy

    def _block(self, theta, mu, weights, delta: float, g, H) -> np.ndarray:
        """As `Surface._block`, at theta (K, 6). With share = (L - E) / L, the Hessian of log L is share (ds ds' + d2s)
        less the outer product of its gradient. By (log v1, log v2, log gamma): ds = (w1, w2, gamma h), and d2s is
        w1 w2 / gamma times the outer product of (1, -1, -gamma log(w1 / w2)), plus gamma h for log gamma twice."""
        r, share, w1, w2, entropy, product, odds, f, gamma = self._terms(theta)
        squares_n, squares_d, products, linear_n, linear_d = self.bases
        F, s, q, blend, kept = huber(r, mu, weights, delta)
        p1, p2, p3 = share * w1, share * w2, share * entropy
        g[:, 0:2], g[:, 2:4] = (s * p1) @ linear_n, (s * p2) @ linear_d
        g[:, 4], g[:, 5] = np.einsum("kn,kn->k", s, f), np.einsum("kn,kn->k", s, p3)
        s[blend] *= kept
        q -= s
        q1, q2, q3 = q * p1, q * p2, q * p3
        s1, s2, s3 = s * p1, s * p2, s * p3
        mixed = s * share * product / gamma
        by_gamma = gamma * odds
        H[:, 0:2, 0:2] = ((q1 * p1 + s1 * w1 + mixed) @ squares_n)[:, [0, 1, 1, 2]].reshape(-1, 2, 2)
        H[:, 2:4, 2:4] = ((q2 * p2 + s2 * w2 + mixed) @ squares_d)[:, [0, 1, 1, 2]].reshape(-1, 2, 2)
        H[:, 0:2, 2:4] = ((q1 * p2 + s1 * w2 - mixed) @ products)[:, [0, 2, 1, 3]].reshape(-1, 2, 2)
        H[:, 0:2, 4], H[:, 2:4, 4] = (q1 * f) @ linear_n, (q2 * f) @ linear_d
        H[:, 0:2, 5] = (q1 * p3 + s1 * entropy - mixed * by_gamma) @ linear_n
        H[:, 2:4, 5] = (q2 * p3 + s2 * entropy + mixed * by_gamma) @ linear_d
        H[:, 4, 4], H[:, 4, 5] = np.einsum("kn,kn,kn->k", q, f, f), np.einsum("kn,kn->k", q3, f)
        H[:, 5, 5] = (q3 * p3 + s3 * (entropy + 1) + mixed * by_gamma**2).sum(1)
        H[:, 2:4, 0:2] = H[:, 0:2, 2:4].transpose(0, 2, 1)
        H[:, 4, 0:4], H[:, 5, 0:5] = H[:, 0:4, 4], H[:, 0:5, 5]
        return F


def make_surface(N, D, loss, *, gamma: float | None = 1.0, **options) -> Surface:
    """The Surface of these rows, options as in `Surface.of`. gamma: 1, another number, or None for a free one, which
    needs residuals of the log loss. Raises NotIdentified and ValueError as there."""
    surface = Surface.of(N, D, loss, **options)
    if gamma == 1:
        return surface
    if surface.options["space"] != "log" or surface.options["tied"]:
        raise ValueError("gamma: only for residuals of the log loss, without alpha = beta")
    low, high = np.log(GAMMA if gamma is None else (gamma, gamma))
    bounds = {"lower": np.append(surface.lower, low), "upper": np.append(surface.upper, high)}
    return GammaSurface(**vars(surface) | bounds | {"free": np.eye(6), "options": surface.options | {"gamma": gamma}})


def cold_starts(surface: Surface, count: int) -> np.ndarray:
    """(count, p) starts for `surface.minimise`, or fewer."""
    return gamma_starts(surface, count) if isinstance(surface, GammaSurface) else projected_starts(surface, count)


def gamma_starts(surface: GammaSurface, count: int) -> np.ndarray:
    """(count, 6) starts: for given gamma, E and exponents, A and B are a linear least-squares problem for (L -
    E)^(1/gamma). It is solved on a grid; the starts are its best cells, no two of them neighbours."""
    pick = slice(None, None, max(1, len(surface.N) // 2000))
    x, y, L = surface.bases[3][pick, 1], surface.bases[4][pick, 1], surface.loss[pick]
    slopes = np.geomspace(0.03, 1.0, SLOPES)  # of log v: alpha gamma, beta gamma
    fixed = surface.lower[4] == surface.upper[4]
    levels = surface.lower[4:5] if fixed else L.min() * np.array([0.0, 0.4, 0.7, 0.9])
    cells, starts, misfits = [], [], []
    i, j = (v.ravel() for v in np.indices((SLOPES, SLOPES)))
    fixed_gamma = surface.lower[5] == surface.upper[5]
    for g, gamma in enumerate(np.exp(surface.lower[5:6]) if fixed_gamma else GRID):
        v1, v2 = np.exp(np.outer(slopes / gamma, x)), np.exp(np.outer(slopes / gamma, y))  # (slopes, n); x, y negated
        for e, E in enumerate(levels):
            S = (L - E) ** (1 / gamma)
            w = (gamma * (L - E) / (L * S)) ** 2  # d log L / dS
            n11, n22, n12 = ((v1 * v1) @ w)[i], ((v2 * v2) @ w)[j], ((v1 * w) @ v2.T).ravel()
            r1, r2 = (v1 @ (w * S))[i], (v2 @ (w * S))[j]
            with np.errstate(divide="ignore", invalid="ignore"):
                det = n11 * n22 - n12 * n12
                A, B = (r1 * n22 - r2 * n12) / det, (r2 * n11 - r1 * n12) / det
                ok = np.flatnonzero((A > 0) & (B > 0) & np.isfinite(A) & np.isfinite(B) & (det > 1e-12 * n11 * n22))
            predicted = E + (A[ok, None] * v1[i[ok]] + B[ok, None] * v2[j[ok]]) ** gamma
            misfit = np.abs(np.log(predicted) - surface.target[pick]).sum(1)
            lowest = np.argsort(misfit, kind="stable")[:count]
            best = ok[lowest]
            misfits.append(misfit[lowest])
            cells.append(np.column_stack(np.broadcast_arrays(i[best], j[best], e, g)))
            v = gamma * np.log(A[best]), slopes[i[best]], gamma * np.log(B[best]), slopes[j[best]]
            starts.append(np.column_stack(np.broadcast_arrays(*v, E, np.log(gamma))))
    return np.concatenate(starts)[apart(np.concatenate(cells), np.concatenate(misfits), count)]
