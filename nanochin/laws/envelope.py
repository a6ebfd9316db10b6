"""Approach 1: the lower envelope of all training curves."""

from dataclasses import dataclass

import numpy as np

from nanochin.laws.law import PowerLaw


@dataclass(frozen=True)
class EnvelopeFit:
    """Who wins at each FLOP count, and the power laws through the winners."""

    law: PowerLaw
    flops: np.ndarray  # (points,) log-spaced
    params: np.ndarray  # N of the run with the lowest smoothed loss there
    tokens: np.ndarray  # its tokens at that moment
    loss: np.ndarray  # its smoothed loss
    winner: np.ndarray  # its index into `runs`
    runs: np.ndarray  # distinct run ids, sorted
    late_share: float  # share of the winners that are in the last 15% of their run's FLOPs
    curves: dict  # run id -> (flops, smoothed loss, N), for the figure

    def to_json(self, bootstrap=None) -> dict:
        """The object `approach1` of laws.json; `bootstrap` adds a_ci, b_ci."""
        raise NotImplementedError


def fit_envelope(run, N, D, loss, C=None, *, points: int = 1500, smooth: int = 10, name: str = "Approach 1",
                 params_convention: str = "total", flops_convention: str = "6nd") -> EnvelopeFit:  # fmt: skip
    """Rows are moments of training: `run` (n,) ids, N of the run, D tokens so far, the loss then, C FLOPs so far
    (6 N D by default). Each curve is smoothed by a Gaussian of `smooth` logged points and interpolated (log loss in
    log C); at `points` log-spaced C covered by at least two sizes the lowest run wins (Hoffmann et al. 2022, 3.1).

    Raises NotIdentified with fewer than 3 sizes, or if fewer than 2 of them ever win."""
    raise NotImplementedError


def refit_envelope(fit, batches) -> dict:
    raise NotImplementedError
