"""FLOPs per token. Eq. 4 of Hoffmann et al. 2022 is the optimum if they are 6 N; few budgets are counted that way.

    C = 6 N R(N) D,    R = (1 + c N^-q)^s,    0 <= q <= 1, s = 1 or -1

FLOPs not proportional to N (logits, attention, embedding tables, which cost none) matter less in larger models: R goes
to 1. With q <= 1, N R rises with N: a token always costs more in a larger model, so each budget has one optimum.
"""

from dataclasses import dataclass

import numpy as np

SAME = 1e-3  # |log R| below this is 6 N D with rounding


@dataclass(frozen=True)
class Cost:
    """FLOPs of a run by its size; c = 0 is 6 N D."""

    c: float = 0.0
    q: float = 0.0
    s: int = 1
    misfit: float = 0.0  # root mean square deviation of log C of the runs from this curve

    @classmethod
    def of(cls, N, D, C) -> "Cost":
        """Fit to runs (n,): log(R^s - 1) of each size against log N, with weights that turn its errors into those of
        log R."""
        x, log_ratio = ratios(N, D, C)
        if np.all(np.abs(log_ratio) < SAME):
            return SIX_ND
        s = 1 if log_ratio.sum() > 0 else -1
        extra = np.expm1(s * log_ratio)
        weight = np.where(extra > 0, extra / (1 + extra), 0) ** 2
        y, total = np.log(np.where(extra > 0, extra, 1)), weight.sum()
        mean_x, mean_y = weight @ x / total, weight @ y / total
        spread = weight @ (x - mean_x) ** 2
        slope = weight @ ((x - mean_x) * (y - mean_y)) / spread if spread > 1e-12 else 0.0
        q = float(np.clip(-slope, 0, 1))
        c = float(np.exp(mean_y + q * mean_x))
        misfit = np.sqrt(np.mean((log_ratio - s * np.log1p(c * np.exp(-q * x))) ** 2))
        return cls(c, q, s, float(misfit))

    @property
    def is_6nd(self) -> bool:
        return self.c == 0

    def at(self, N):
        """R and p = d log(N R) / d log N: how much more a token costs when the model grows."""
        extra = self.c * N**-self.q
        return (1 + extra) ** self.s, 1 - self.s * self.q * extra / (1 + extra)

    def flops(self, N, D):
        return 6 * N * D * self.at(N)[0]

    def tokens(self, N, C):
        """D at which a run of N parameters costs C FLOPs."""
        return C / (6 * N * self.at(N)[0])


SIX_ND = Cost()


def ratios(N, D, C) -> tuple[np.ndarray, np.ndarray]:
    """(log N, log C / 6ND) of each size, the median of its runs."""
    ratio = np.log(C / (6 * N * D))
    order = np.lexsort((ratio, N))  # sorted by ratio within a size, for the median
    sizes, first, runs = np.unique(N[order], return_index=True, return_counts=True)
    low, high = (ratio[order[first + middle]] for middle in ((runs - 1) // 2, runs // 2))
    return np.log(sizes), (low + high) / 2
