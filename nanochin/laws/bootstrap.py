"""Intervals for all three approaches: resample the independent units (runs, not rows), fit again, take percentiles."""

from collections.abc import Callable
from dataclasses import dataclass

from nanochin.laws.law import Law, PowerLaw

LEVELS = (80, 95)  # percent


@dataclass(frozen=True)
class Bootstrap:
    """Laws of all replicates. Those without an optimum (`failed`) are left out of every interval."""

    law: Law | PowerLaw  # its constants are arrays (replicates - failed,)
    unit: str  # what was resampled: "run", "row" or "seed noise"
    units: int  # how many of them
    replicates: int  # asked for
    failed: int  # without an optimum (Approach 2: fewer than 2 bracketed budgets); left out
    at_bound: int  # ended with a constant at its bound (kept: E = 0 belongs in the interval of E)
    checked: int  # replicates that were optimised again from other starts,
    worse: int  # of which these had ended above what the other starts found (they were replaced by it)
    gradient_norm: float  # the largest of all replicates (Approach 3), as ParametricFit.gradient_norm
    warnings: tuple[str, ...]  # sentences for the report: rows that repeat a run, few units, failed replicates

    def interval(self, quantity: str | Callable, level: float = 95) -> tuple[float, float]:
        """Percentile interval of an attribute of the law ("alpha", "a", "G", "k_N") or of any function of it:
        interval(lambda law: law.optimal(1e21)[0], 80)."""
        raise NotImplementedError

    def intervals(self, budgets=()) -> dict[str, dict[int, tuple[float, float]]]:
        """{quantity: {80: (low, high), 95: ...}} of every constant, and of N_opt, D_opt and the ratio D/N (and
        loss_opt, for Approach 3) at each of `budgets`, named such as "N_opt(1e+21)"."""
        raise NotImplementedError


def bootstrap(fit, *, runs=None, replicates: int = 4000, seed: int = 0, verify: int = 200) -> Bootstrap:
    """Resample runs with replacement and fit each replicate to convergence. `fit` is a ParametricFit, IsoflopFit or
    EnvelopeFit; `runs` (n,) are the ids that rows share (default: each row is a run of its own; an envelope knows its
    runs). Of Approach 3, `verify` replicates are optimised again from other starts.
    Raises NotIdentified with fewer than 3 units or if most replicates fail."""
    raise NotImplementedError


def bootstrap_seed_noise(fit, *, noise: float | None = None, replicates: int = 1000, seed: int = 0) -> Bootstrap:
    """The noise-and-interpolate interval of Porian et al. 2024 for an IsoflopFit: Gaussian noise of sd `noise` on log
    loss (default: the fit's own `noise`), all minima anew, budgets weighted by how sure their minimum is."""
    raise NotImplementedError
