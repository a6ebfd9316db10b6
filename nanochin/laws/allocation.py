"""Optima beyond Eq. 4: for a target loss, for many inference tokens, with few unique tokens.

FLOPs are counted by the law's `cost`. All but the last also take a law of replicates and return arrays."""

import math
from dataclasses import dataclass, replace

import numpy as np

from nanochin.laws.law import Law, NotIdentified
from nanochin.laws.published import MUENNIGHOFF


def compute_for_loss(law: Law, loss: float) -> float:
    """Training FLOPs at which the optimum reaches `loss`; nan for replicates with loss <= E. Raises NotIdentified if
    all are."""
    N = law.params_reaching(_reachable(law, loss))
    return law.cost.flops(N, law.tokens_for(N))


def loss_of_compute(law: Law, low: float, high: float) -> tuple[float, float, float]:
    """(E, K, c) of the loss of the optimum, L(C) = E + K C^-c, through the optima of `low` and `high` FLOPs.

    If C is 6ND this holds at every C: both terms fall as (C/6)^-(alpha beta / (alpha + beta)) along Eq. 4, so that
    c = gamma alpha beta / (alpha + beta) and K = 6^c (A G^-alpha + B G^beta)^gamma. Otherwise it holds over the runs if
    these are at `low` to `high`."""
    without_e = replace(law, E=0.0)  # which has the same optima
    first, last = (np.log(without_e.loss(*law.optimal(C))) for C in (low, high))
    c = (first - last) / math.log(high / low)
    return law.E, np.exp(first + c * math.log(low)), c


def _reachable(law: Law, loss):
    """`loss`, nan where it is E or less."""
    above = loss > law.E
    if not np.any(above):
        raise NotIdentified(f"loss {loss:g}: no compute reaches it; the irreducible loss E is {np.max(law.E):.6g}")
    return loss if np.all(above) else np.where(above, loss, np.nan)


@dataclass(frozen=True)
class OffOptimum:
    """Another model size compared with the optimum of the same budget."""

    N: float
    D: float
    loss: float
    extra_loss: float  # above that of the optimum at the same C
    compute_factor: float  # C over the compute that the optimum needs for the same loss: 1.3 means 30% more than needed


def off_optimum(law: Law, C: float, N: float) -> OffOptimum:
    """Cost of training N parameters instead of N_opt with C FLOPs."""
    D = law.cost.tokens(N, C)
    loss = law.loss(N, D)
    return OffOptimum(N, D, loss, loss - law.loss(*law.optimal(C)), C / compute_for_loss(law, loss))


@np.errstate(divide="ignore", invalid="ignore")  # terms of a size too small for the loss
def inference_optimal(law: Law, loss: float, inference_tokens: float) -> tuple[float, float]:
    """(N, D) that reaches `loss` with the lowest compute for training plus serving D_inf tokens, 6 N D + 2 N D_inf:
    a served token costs a third of a trained one (Sardana & Frankle 2023). 0 tokens give the training optimum.
    By budget: inference_optimal(law, law.loss(*law.optimal(C)), tokens). Raises NotIdentified if loss <= E.

    At the optimum alpha A N^-alpha / (beta B D^-beta) = p (1 + D_inf / 3D). Along the curve of equal loss the left
    side and D grow as N shrinks, so there is one root, found by bisection in log N."""
    loss = _reachable(law, loss)
    terms = law.bracket(loss)

    def tokens(N):
        """D that reaches the loss with N parameters."""
        return (np.fmax(terms - law.A * N**-law.alpha, 0) / law.B) ** (-1 / law.beta)

    high = np.log(law.params_reaching(loss))  # inference never favours a larger model
    low = np.log(law.A / terms) / law.alpha  # here D would be infinite
    for _ in range(60):
        middle = (low + high) / 2
        N = np.exp(middle)
        D = tokens(N)
        ratio = law.alpha * law.A * N**-law.alpha / (law.beta * law.B * D**-law.beta)
        too_large = law.cost.at(N)[1] * (1 + inference_tokens / (3 * D)) > ratio
        low, high = np.where(too_large, low, middle), np.where(too_large, middle, high)
    N = np.exp(high)
    return N, tokens(N)


@dataclass(frozen=True)
class DataConstrained:
    """Muennighoff et al. 2023 (arXiv 2305.16264): repeated tokens, and parameters beyond the optimum for the unique
    tokens, have diminishing value. R_D and R_N: after that many repeats, the value of one more has fallen to 1/e."""

    law: Law = MUENNIGHOFF
    R_D: float = 15.387756
    R_N: float = 5.309743

    def loss(self, N: float, D: float, unique_tokens: float) -> float:
        """Predicted loss of N parameters trained on D tokens, of which `unique_tokens` are unique."""
        U_D = min(D, unique_tokens)
        U_N = min(N, self.law.params_for(U_D))
        return self.law.loss(_effective(N, U_N, self.R_N), _effective(D, U_D, self.R_D))

    def optimal(self, C: float, unique_tokens: float) -> tuple[float, float]:
        """(N, D) of lowest loss for C FLOPs if only `unique_tokens` exist; D / unique_tokens is the number of epochs.
        Raises NotIdentified if more compute no longer lowers the loss, so that there is no optimum."""
        N, D = best = self.law.optimal(C)
        if unique_tokens >= D:
            return best
        from scipy.optimize import minimize_scalar

        def loss(log_n: float) -> float:
            return self.loss(math.exp(log_n), self.law.cost.tokens(math.exp(log_n), C), unique_tokens)

        # The loss along the budget has one minimum, between the unconstrained optimum and larger models.
        bounds = math.log(N) - 3, math.log(N) + 2 * math.log(D / unique_tokens) + 1
        N = math.exp(minimize_scalar(loss, bounds=bounds, options={"xatol": 1e-9}).x)
        D = self.law.cost.tokens(N, C)
        if D / unique_tokens - 1 > 20 * self.R_D:  # one more token is worth exp(-20)
            raise NotIdentified(f"{C:g} FLOPs are more than {unique_tokens:g} unique tokens can use")
        return N, D


def _effective(total: float, unique: float, decay: float) -> float:
    """U + U R (1 - exp(-repeats / R)): the unique tokens or parameters that `total` is worth, U = `unique`."""
    return unique * (1 + decay * (1 - math.exp(-(total / unique - 1) / decay)))
