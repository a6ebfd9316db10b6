"""Newton's method on many small problems at once: thousands of bootstrap replicates in one batch of numpy calls.

The objective is a sum of Huber functions, so its Hessian jumps where a residual crosses delta and may be indefinite
away from the optimum. So each problem has its own damping mu: 0 is the exact Newton step; as mu grows, the Hessian is
blended with that of iteratively reweighted least squares, which majorises the objective, and its diagonal is raised.
Steps that do not descend are never taken. A problem has converged only if the predicted gain of an exact Newton step is
less than `TOLERANCE` of the objective.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TOLERANCE = 1e-13  # predicted gain of the next step, relative to the objective
FLOOR = 1e-30  # rounding error in the objective of noise-free data, relative to the summed weights
MAX_STEPS = 300

# Damping starts at the first number when a step fails, and ends below the second. Problems not converged after 10 steps
# are in a long, flat, curved valley, with eigenvalues 1e-6 of the largest: damping by 0.02 would nearly stop them.
DAMPING, FINE_DAMPING, FINE_FROM = (0.02, 1e-3), (1e-5, 1e-5), 10

# (theta (K, p), mu (K,), rows (K,): which problems) -> objective (K,), gradient (K, p), Hessian (K, p, p)
Evaluate = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass
class Optimum:
    """Optima of K problems."""

    theta: np.ndarray  # (K, p)
    objective: np.ndarray  # (K,)
    converged: np.ndarray  # (K,) bool
    gradient_norm: np.ndarray | None = None  # (K,), see Surface.gradient_norm


def minimise(
    evaluate: Evaluate, theta, lower, upper, weight, tolerance: float = TOLERANCE, damping=0.0, most: int = MAX_STEPS
) -> Optimum:
    """Minimise K problems of p unknowns from theta (K, p), each within lower <= theta <= upper, (p,) or (K, p); weight
    (K,) is the sum of the weights in each objective. A coordinate with lower == upper is fixed. Problems that have not
    converged stop after `most` steps."""
    theta = np.clip(theta, lower, upper)
    K = len(theta)
    lower, upper = np.broadcast_to(lower, theta.shape), np.broadcast_to(upper, theta.shape)
    mu = np.full(K, float(damping))
    result = Optimum(theta.copy(), np.full(K, np.inf), np.zeros(K, bool))
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
