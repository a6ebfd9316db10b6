"""What to train, beyond Eq. 4: for a target loss, for many inference tokens, with few unique tokens."""

from dataclasses import dataclass

from nanochin.laws.law import Law


def compute_for_loss(law: Law, loss: float) -> float:
    """Training FLOPs (6 N D) at which the optimum reaches `loss`. Raises NotIdentified if loss <= E."""
    raise NotImplementedError


@dataclass(frozen=True)
class OffOptimum:
    """What (N, C / 6N) costs against the optimum of the same budget."""

    N: float
    D: float
    loss: float
    best_loss: float  # of the optimum at the same C
    compute_factor: float  # C over the compute that the optimum needs for the same loss: 1.3 means 30% wasted

    @property
    def extra_loss(self) -> float:
        return self.loss - self.best_loss


def off_optimum(law: Law, C: float, N: float) -> OffOptimum:
    """Cost of training N parameters instead of N_opt with C = 6 N D FLOPs."""
    raise NotImplementedError


def inference_optimal(law: Law, loss: float, inference_tokens: float) -> tuple[float, float]:
    """(N, D) with least 6 N D + 2 N D_inf that reaches `loss` (Sardana & Frankle 2023); 0 tokens give Eq. 4.
    To ask by budget: inference_optimal(law, law.loss(*law.optimal(C)), tokens)."""
    raise NotImplementedError


@dataclass(frozen=True)
class DataConstrained:
    """Muennighoff et al. 2023: repeated tokens, and parameters in excess of them, count for less and less."""

    law: Law
    R_D: float = 15.387756
    R_N: float = 5.309743

    def loss(self, N: float, D: float, unique_tokens: float) -> float:
        raise NotImplementedError

    def optimal(self, C: float, unique_tokens: float) -> tuple[float, float]:
        """(N, D) of least loss for C = 6 N D when only `unique_tokens` exist; D / unique_tokens are the epochs."""
        raise NotImplementedError
