"""Approach 3: the parametric loss, L(N, D) = E + A / N^alpha + B / D^beta."""

from dataclasses import dataclass

import numpy as np

from nanochin.laws.law import Law


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
        raise NotImplementedError


def fit_parametric(N, D, loss, *, delta: float = 1e-3, space: str = "log", E: float | None = None, tied: bool = False,
                   weights=None, starts: int = 12, allow_bound: bool = False, name: str = "Approach 3",
                   params_convention: str = "total") -> ParametricFit:  # fmt: skip
    """Minimise sum_i w_i Huber_delta(r_i), r the residual of log loss (or of loss: space="linear").

    delta=math.inf is least squares; `E` fixes the irreducible loss; `tied` forces alpha = beta.
    Raises NotIdentified: fewer than 6 rows, fewer than 3 sizes or token counts, E or an exponent at its bound (unless
    `allow_bound`, which leaves that to `at_bound`), starts that do not agree."""
    raise NotImplementedError


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
        return ((self.N_c / N) ** (self.alpha_N / self.alpha_D) + self.D_c / D) ** self.alpha_D


def fit_kaplan_form(N, D, loss, *, delta: float = 1e-3) -> KaplanForm:
    """Fit the form of Kaplan et al. to the same rows and objective, for comparison. Raises NotIdentified."""
    raise NotImplementedError
