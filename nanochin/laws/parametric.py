"""Approach 3: the parametric loss, L(N, D) = E + A / N^alpha + B / D^beta.

Three things find the optimum in milliseconds where a grid of 4500 L-BFGS starts takes minutes, and from nearly every
start: centred logs and the exact Hessian (surface.py), starts by variable projection, which for given exponents solves
the other three constants as a linear problem, and Newton steps for all starts in one batch (newton.py).
"""

import math
from dataclasses import dataclass

import numpy as np

from nanochin.laws.law import Law, NotIdentified
from nanochin.laws.surface import NAMES, Surface, projected_starts

AGREE = 1e-9  # starts agree when their objectives do, relative


@dataclass(frozen=True)
class ParametricFit:
    """The global optimum of the sum of Huber_delta over residuals, and how it was certified."""

    law: Law
    objective: float  # the SUM over rows, at the optimum
    delta: float  # math.inf: least squares
    space: str  # of the residuals, predicted minus observed: "log" loss or "linear" loss
    starts: int  # refined to the end,
    starts_agreeing: int  # of which these reached the optimum (1e-9 relative)
    gradient_norm: float  # largest component of the gradient over the sum of its terms' sizes: 0 is exact, 1 is none
    at_bound: tuple[str, ...]  # constants that ran into their bounds: they are not identified by the data
    fixed_e: float | None  # the E that was given, if any
    tied: bool  # alpha = beta
    N: np.ndarray  # (n,) the rows that were fitted
    D: np.ndarray
    loss: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray  # (n,) log predicted - log observed loss, in either space

    @property
    def n(self) -> int:
        return len(self.N)

    def to_json(self, bootstrap=None) -> dict:
        """The object `approach3` of laws.json; `bootstrap` (a Bootstrap of this fit) adds `ci`."""
        law = self.law
        out = {k: float(getattr(law, k)) for k in ("E", "A", "B", "alpha", "beta", "a", "b", "G")}
        out |= {"delta": None if math.isinf(self.delta) else self.delta, "space": self.space,
                "objective": self.objective, "n": self.n, "starts": self.starts,
                "starts_agreeing": self.starts_agreeing, "gradient_norm": self.gradient_norm,
                "at_bound": list(self.at_bound), "fixed_E": self.fixed_e, "tied": self.tied}  # fmt: skip
        if bootstrap is not None:
            quantities = ("E", "A", "B", "alpha", "beta", "a", "b", "G")
            out["ci"] = {q: list(bootstrap.interval(q, 95)) for q in quantities}
            out["ci80"] = {q: list(bootstrap.interval(q, 80)) for q in quantities}
        return out


def fit_parametric(N, D, loss, *, delta: float = 1e-3, space: str = "log", E: float | None = None, tied: bool = False,
                   weights=None, starts: int = 12, allow_bound: bool = False, name: str = "Approach 3",
                   params_convention: str = "total") -> ParametricFit:  # fmt: skip
    """Minimise sum_i w_i Huber_delta(r_i), r the residual of log loss (or of loss: space="linear").

    delta=math.inf is least squares; `E` fixes the irreducible loss; `tied` forces alpha = beta.
    Raises NotIdentified: fewer than 6 rows, fewer than 3 sizes or token counts, E or an exponent at its bound (unless
    `allow_bound`, which leaves that to `at_bound`), no start that converges."""
    surface = Surface.of(N, D, loss, delta=delta, space=space, E=E, tied=tied, weights=weights)
    z = projected_starts(surface, starts)
    if not len(z):
        raise NotIdentified("Approach 3: the loss does not fall with N and D")
    found = surface.minimise(z, cold=True)
    best = int(np.argmin(np.where(found.converged, found.objective, np.inf)))
    if not found.converged[best]:
        raise NotIdentified(f"Approach 3: none of {len(z)} starts converged")
    # Noise-free rows leave an objective of rounding errors only, in which all starts agree.
    agreeing = found.converged & (
        found.objective <= found.objective[best] * (1 + AGREE) + 1e-24 * surface.weights.sum()
    )
    z = found.theta[best : best + 1]
    bounds = tuple(n for n, at in zip(NAMES, surface.at_bound(z)[0], strict=True) if at)
    if bounds and not allow_bound:
        raise NotIdentified(_explain(bounds))
    law = surface.law(z[0], name, params_convention)
    residuals = np.log(law.loss(surface.N, surface.D)) - np.log(surface.loss)
    return ParametricFit(law, float(found.objective[best]), delta, space, len(found.theta), int(agreeing.sum()),
                         float(surface.gradient_norm(z)[0]), bounds, E, tied, surface.N, surface.D, surface.loss,
                         surface.weights, residuals)  # fmt: skip


def _explain(bounds: tuple[str, ...]) -> str:
    if bounds == ("E",):
        return "Approach 3: E is not identified: the best E is its bound, 0; add larger or longer runs, or fix E"
    return f"Approach 3: {', '.join(bounds)} not identified: the best values are at the bounds of the search"


@dataclass(frozen=True)
class KaplanForm:
    """L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D (Kaplan et al. 2020): no irreducible loss."""

    N_c: float
    D_c: float
    alpha_N: float  # noqa: N815
    alpha_D: float  # noqa: N815
    objective: float  # the same SUM of Huber_delta over log-loss residuals: compare with ParametricFit.objective
    delta: float
    starts: int
    starts_agreeing: int

    def loss(self, N, D):
        """Predicted loss in nats per token."""
        return ((self.N_c / N) ** (self.alpha_N / self.alpha_D) + self.D_c / D) ** self.alpha_D


def fit_kaplan_form(N, D, loss, *, delta: float = 1e-3) -> KaplanForm:
    """Fit the form of Kaplan et al. to the same rows and objective, for comparison. Raises NotIdentified."""
    raise NotImplementedError
