"""Approach 3: the parametric loss, L(N, D) = E + (A / N^alpha + B / D^beta)^gamma, by default with gamma = 1.

`reference_fit` is the procedure of the paper. `fit_parametric` finds the same optimum from nearly every start, in
milliseconds instead of minutes (solver.py): starts by variable projection, which solves for the other three constants
linearly at given exponents, then Newton steps with the exact Hessian for all starts at once.
"""

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from nanochin.laws.cost import SIX_ND, Cost
from nanochin.laws.gamma import cold_starts, make_surface
from nanochin.laws.law import Law, NotIdentified, constants
from nanochin.laws.solver import NAMES, Solution, minimise

STARTS = 12
AGREE = 1e-9  # relative difference of objectives up to which starts agree
# log A, log B, log E, alpha, beta: the starts of Hoffmann et al. 2022, Appendix D.2.
GRID = list(itertools.product(range(0, 30, 5), range(0, 30, 5), (-1, -0.5, 0, 0.5, 1), *2 * [(0, 0.5, 1, 1.5, 2)]))


def reference_objective(theta, log_n, log_d, log_loss, delta: float = 1e-3, weights=1.0) -> tuple[float, np.ndarray]:
    """The sum of Huber_delta(LSE(a - alpha log N, b - beta log D, e) - log L) over rows (n,), and its gradient (5,) in
    theta = (a, b, e, alpha, beta) with a = log A, b = log B, e = log E (Hoffmann et al. 2022, Eq. 3). With a sixth
    unknown, log gamma, the first two terms are raised to gamma."""
    a, b, e, alpha, beta, *log_gamma = theta
    gamma = np.exp(log_gamma[0]) if log_gamma else 1.0
    of_n, of_d = a - alpha * log_n, b - beta * log_d
    bracket = np.logaddexp(of_n, of_d)
    log_sum = np.logaddexp(gamma * bracket, e)
    residual = log_sum - log_loss
    psi = np.clip(residual, -delta, delta)  # the derivative of Huber_delta, which is psi (r - psi / 2)
    powered = weights * psi * np.exp(gamma * bracket - log_sum)  # by gamma log(A / N^alpha + B / D^beta)
    of_a, of_b = gamma * powered * np.exp(of_n - bracket), gamma * powered * np.exp(of_d - bracket)
    gradient = [of_a.sum(), of_b.sum(), np.sum(weights * psi * np.exp(e - log_sum)), -of_a @ log_n, -of_b @ log_d]
    gradient += [gamma * powered @ bracket] if log_gamma else []
    return float(np.sum(weights * psi * (residual - psi / 2))), np.array(gradient)


def reference_fit(N, D, loss, *, starts=GRID) -> tuple[Law, float]:
    """(law, objective) of the lowest optimum of L-BFGS from every start, as in the paper. Slow: a minute or two for
    240 rows. Tests compare `fit_parametric` with it; python -m bench.fit times both."""
    from scipy.optimize import minimize

    rows, tight = np.log([N, D, loss]), {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 10_000}
    found = (minimize(reference_objective, start, (*rows,), "L-BFGS-B", jac=True, options=tight) for start in starts)
    best = min(found, key=lambda one: one.fun)
    (A, B, E), (alpha, beta) = np.exp(best.x[:3]), best.x[3:]
    return Law("Approach 3, reference", float(E), float(A), float(B), float(alpha), float(beta)), float(best.fun)


# ---------------------------------------------------------------------------------------------------------------------
# The fast fit


@dataclass(frozen=True)
class ParametricFit:
    """The global optimum of the sum of Huber_delta over residuals, and how it was verified."""

    law: Law
    objective: float  # the SUM over rows, at the optimum
    options: dict  # delta, space, E, tied and gamma, as in make_surface
    starts: int  # number of starts, all minimised
    starts_agreeing: int  # how many of them reached the optimum (1e-9 relative)
    gradient_norm: float  # largest gradient component over the sum of its absolute terms: 0 at an exact optimum
    at_bound: tuple[str, ...]  # constants at their bounds: not identified by the data
    N: np.ndarray  # (n,) the fitted rows
    D: np.ndarray
    loss: np.ndarray
    residuals: np.ndarray  # (n,) log predicted - log observed loss, in either space

    @property
    def n(self) -> int:
        return len(self.N)

    def to_json(self, bootstrap=None) -> dict:
        """The object `approach3` or `law` of laws.json; `bootstrap` (a Bootstrap of this fit) adds its to_json()."""
        names = ("objective", "n", "starts", "starts_agreeing", "gradient_norm")
        out = constants(self.law) | {name: getattr(self, name) for name in names}
        out |= {name: self.options[name] for name in ("delta", "space", "tied")} | {"fixed_E": self.options["E"]}
        out |= {"cost": vars(self.law.cost), "at_bound": self.at_bound}
        out |= {"form_error": vars(self.law.form_error)} if self.law.form_error else {}
        if bootstrap is not None:
            out |= bootstrap.to_json() | {"noise": self.noise, "replicates": bootstrap.sample(200)}  # for Law.forecast
        return out

    @property
    def noise(self) -> float | None:
        """Standard deviation of a run's log loss about the law; None without more runs than constants."""
        fixed = self.options["tied"] + (self.options["E"] is not None) + (self.options["gamma"] is not None)
        free = self.n - 6 + fixed
        return math.sqrt(np.sum(self.residuals**2) / free) if free > 0 else None


def fit_parametric(
    N, D, loss, *, allow_bound: tuple[str, ...] = (), cost: Cost = SIX_ND, params_convention: str = "total", **options
) -> ParametricFit:
    """Minimise the sum of Huber_delta(r) over rows, r the residual of log loss, by default with delta = 1e-3. `options`
    (delta, space, E, tied, gamma) change the objective as in make_surface: least squares, residuals of the loss, a
    fixed E, alpha = beta, a free gamma (None). `cost` counts the FLOPs of the law's optima; the fit does not use it.

    Raises NotIdentified: fewer than 6 rows, fewer than 3 sizes or token counts, a constant at its bound (those named by
    `allow_bound` are only reported in `at_bound`), a fixed E not below the lowest loss, no start converges, no two
    starts agree on the lowest optimum."""
    surface = make_surface(N, D, loss, **options)
    z = cold_starts(surface, STARTS)
    if not len(z):
        raise NotIdentified("Approach 3: the loss does not fall with N and D")
    found = surface.minimise(z, cold=True)
    best, agreeing = best_of(found, len(surface.N), "Approach 3")
    if agreeing < 2 <= len(z):
        raise NotIdentified(f"Approach 3: only 1 of {len(z)} starts reaches the lowest optimum; add runs")
    optimum = found.theta[best]
    names = (*NAMES, "gamma")[: len(surface.free)]
    bounds = tuple(n for n, at in zip(names, surface.at_bound(optimum[None])[0], strict=True) if at)
    allowed = (*allow_bound, "E") if surface.options["gamma"] is None else allow_bound  # E = 0 contains Kaplan's law
    if bounds == ("E",) and "E" not in allowed:
        raise NotIdentified("Approach 3: E is not identified: the best E is 0; add larger or longer runs, or fix E")
    if not set(bounds) <= set(allowed):
        raise NotIdentified(f"Approach 3: {', '.join(bounds)} not identified: the best values are at their bounds")
    law = replace(surface.law(optimum), cost=cost, params_convention=params_convention)
    residuals = np.log(law.loss(surface.N, surface.D)) - np.log(surface.loss)
    objective, norm = float(found.objective[best]), float(found.gradient_norm[best])
    rows = surface.N, surface.D, surface.loss, residuals
    return ParametricFit(law, objective, surface.options, len(z), agreeing, norm, bounds, *rows)


def best_of(found: Solution, rows: float, what: str) -> tuple[int, int]:
    """(index of the lowest of the optima, how many starts reached it). Raises NotIdentified if none converged."""
    best = int(np.argmin(np.where(found.converged, found.objective, np.inf)))
    if not found.converged[best]:
        raise NotIdentified(f"{what}: none of {len(found.theta)} starts converged")
    return best, int((found.converged & agree(found.objective, found.objective[best], rows)).sum())


def agree(objective, best, weight):
    """Whether `objective` is not higher than `best`; `weight` is the sum of the weights. With noise-free rows all
    objectives are rounding errors, and all starts agree."""
    return objective <= best * (1 + AGREE) + 1e-24 * weight


@dataclass(frozen=True)
class KaplanForm:
    """L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D (Kaplan et al. 2020): no irreducible loss."""

    N_c: float
    D_c: float
    alpha_N: float  # noqa: N815
    alpha_D: float  # noqa: N815
    objective: float  # the same SUM of Huber_delta over log-loss residuals: compare with ParametricFit.objective


def fit_kaplan_form(N, D, loss, *, delta: float = 1e-3) -> KaplanForm:
    """Fit the form of Kaplan et al. to the same rows and objective, for comparison: the law with gamma, where E = 0 and
    beta = 1, with alpha_D = gamma and alpha_N = alpha gamma. Raises NotIdentified."""
    surface = make_surface(N, D, loss, delta=delta, E=0.0, gamma=None)
    ones = np.ones(len(surface.N))

    def evaluate(z, mu, _rows, delta=delta):
        """Objective, gradient and Hessian (K, ...) at z, the unknowns of `surface` without beta gamma and E."""
        gamma, change = np.exp(z[:, 3]), np.tile(np.eye(6)[:, [0, 1, 2, 5]], (len(z), 1, 1))
        change[:, 3, 3] = gamma  # beta gamma by log gamma
        theta = np.column_stack([z[:, :3], gamma, np.zeros(len(z)), z[:, 3]])
        objective, g, H = surface(theta, mu, ones, delta)
        H = change.transpose(0, 2, 1) @ H @ change
        H[:, 3, 3] += g[:, 3] * gamma / (1 + mu)
        return objective, np.einsum("ki,kij->kj", g, change), H

    level = float(np.median(surface.target))
    grid = itertools.product((0.05, 0.1, 0.3), (0.5, 1.0, 2.0), (-0.7, 0.7))  # gamma, alpha, how far terms are apart
    starts = np.array([(level - g * t, g * alpha, level + g * t, math.log(g)) for g, alpha, t in grid])
    lower, upper = np.append(surface.lower[:3], np.log(1e-3)), np.append(surface.upper[:3], np.log(10))
    weight = np.full(len(starts), float(len(surface.N)))
    wider = partial(evaluate, delta=max(delta, 3e-3))  # for which the objective is smoother
    starts = minimise(wider, starts, lower, upper, weight, 1e-2, damping=0.1, most=50).theta
    found = minimise(evaluate, starts, lower, upper, weight, damping=0.1)
    best, _ = best_of(found, len(surface.N), "Kaplan's form")
    v1, slope, v2, log_gamma = found.theta[best]
    gamma, (log_n, log_d) = np.exp(log_gamma), surface.centre
    with np.errstate(over="ignore"):
        N_c, D_c = np.exp(v1 / slope + log_n), np.exp(v2 / gamma + log_d)
    if not 0 < N_c < math.inf or not 0 < D_c < math.inf:
        raise NotIdentified("Kaplan's form: the loss hardly falls with N or with D")
    return KaplanForm(*map(float, (N_c, D_c, slope, gamma, found.objective[best])))
