"""What to train, beyond Eq. 4: for a target loss, for many inference tokens, with few unique tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from nanochin.laws.law import Law, NotIdentified
from nanochin.laws.published import MUENNIGHOFF


def compute_for_loss(law: Law, loss: float) -> float:
    """Training FLOPs (6 N D) at which the optimum reaches `loss`. Raises NotIdentified if loss <= E."""
    _reachable(law, loss)
    # On the frontier both terms fall as (C/6)^-gamma: A N^-alpha = A G^-alpha (C/6)^(-a alpha), likewise B D^-beta.
    gamma = law.alpha * law.beta / (law.alpha + law.beta)
    scale = law.A * law.G**-law.alpha + law.B * law.G**law.beta
    return 6 * (scale / (loss - law.E)) ** (1 / gamma)


def _reachable(law: Law, loss: float) -> None:
    if not loss > law.E:
        raise NotIdentified(f"loss {loss:g}: no compute reaches it, since this law's irreducible loss E is {law.E:.6g}")


@dataclass(frozen=True)
class OffOptimum:
    """What (N, C / 6N) costs against the optimum of the same budget."""

    N: float
    D: float
    loss: float
    best_loss: float  # of the optimum at the same C
    compute_factor: float  # C over the compute that the optimum needs for the same loss: 1.3 means 30% more than needed

    @property
    def extra_loss(self) -> float:
        return self.loss - self.best_loss


def off_optimum(law: Law, C: float, N: float) -> OffOptimum:
    """Cost of training N parameters instead of N_opt with C = 6 N D FLOPs."""
    D = C / (6 * N)
    loss = law.loss(N, D)
    return OffOptimum(N, D, loss, law.loss(*law.optimal(C)), C / compute_for_loss(law, loss))


def inference_optimal(law: Law, loss: float, inference_tokens: float) -> tuple[float, float]:
    """(N, D) with least 6 N D + 2 N D_inf that reaches `loss` (Sardana & Frankle 2023); 0 tokens give Eq. 4.
    To ask by budget: inference_optimal(law, law.loss(*law.optimal(C)), tokens). Raises NotIdentified if loss <= E.

    At the optimum alpha A N^-alpha / (beta B D^-beta) = 1 + D_inf / (3 D). Along the curve of equal loss the left side
    grows and D falls as N shrinks, so that this has one root, found by bisection in log N."""
    _reachable(law, loss)

    def tokens(N: float) -> float:
        """D that reaches the loss with N parameters."""
        left = loss - law.E - law.A * N**-law.alpha
        return (law.B / left) ** (1 / law.beta) if left > 0 else math.inf

    def excess(log_n: float) -> float:
        """Rises with N: positive where the model is larger than it should be."""
        N = math.exp(log_n)
        D = tokens(N)
        if math.isinf(D):
            return -1.0
        return 1 + inference_tokens / (3 * D) - law.alpha * law.A * N**-law.alpha / (law.beta * law.B * D**-law.beta)

    smallest = math.log(law.A / (loss - law.E)) / law.alpha  # here D would be infinite
    largest = math.log(law.optimal(compute_for_loss(law, loss))[0])  # more inference never asks for more parameters
    N = math.exp(_root(excess, smallest, largest))
    return N, tokens(N)


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function crosses 0; `high` if it does not before."""
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return high
        if rising(middle) < 0:
            low = middle
        else:
            high = middle


@dataclass(frozen=True)
class DataConstrained:
    """Muennighoff et al. 2023 (arXiv 2305.16264): repeated tokens, and parameters in excess of what the unique tokens
    deserve, are worth less and less. R_D and R_N: after so many repeats they have lost 1 - 1/e of their worth."""

    law: Law = MUENNIGHOFF
    R_D: float = 15.387756
    R_N: float = 5.309743

    def loss(self, N: float, D: float, unique_tokens: float) -> float:
        """Predicted loss of N parameters trained on D tokens, of which `unique_tokens` are different."""
        U_D = min(D, unique_tokens)
        U_N = min(N, self.law.params_for(U_D))
        return self.law.loss(_worth(N, U_N, self.R_N), _worth(D, U_D, self.R_D))

    def optimal(self, C: float, unique_tokens: float) -> tuple[float, float]:
        """(N, D) of least loss for C = 6 N D when only `unique_tokens` exist; D / unique_tokens are the epochs.
        Raises NotIdentified where more compute gains nothing any more, so that there is no optimum."""
        _, D = best = self.law.optimal(C)
        if unique_tokens >= D:
            return best
        # The loss along the budget has one minimum; golden-section search in log D around the unconstrained optimum.
        low, high = math.log(unique_tokens) - 1, math.log(D) + 3
        ratio = (math.sqrt(5) - 1) / 2
        for _ in range(200):
            left, right = high - ratio * (high - low), low + ratio * (high - low)
            f, g = (self.loss(C / 6 / math.exp(x), math.exp(x), unique_tokens) for x in (left, right))
            low, high = (low, right) if f < g else (left, high)
        D = math.exp((low + high) / 2)
        if D / unique_tokens - 1 > 20 * self.R_D:  # worth exp(-20) a token
            raise NotIdentified(f"{C:g} FLOPs are more than {unique_tokens:g} unique tokens can use: neither more "
                                "epochs nor more parameters lower the loss")  # fmt: skip
        return C / (6 * D), D


def _worth(total: float, unique: float, decay: float) -> float:
    """U + U R (1 - exp(-repeats / R)): what `total`, of which `unique` are new, is worth in new ones."""
    return unique * (1 + decay * (1 - math.exp(-(total / unique - 1) / decay)))
