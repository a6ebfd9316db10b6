"""Approach 1: the lower envelope of all training curves.

At each FLOP count the run with the lowest loss wins; its size and its tokens so far are the optimum for that compute.
If the winner is the smallest or the largest size trained that far, an even smaller or larger one might be better: such
points are shown but not fitted. A minimum over noisy curves is biased low. While the learning rate is still high the
loss is too high, so the paper checks whether winners are near the end of their run.
"""

from dataclasses import dataclass

import numpy as np

from nanochin.laws.law import NotIdentified, PowerLaw, constants, distinct, fit_power_laws, line

LATE = 0.85  # from here on a run is in its last 15%


@dataclass(frozen=True)
class EnvelopeFit:
    """The winner at each FLOP count, and power laws through the winners."""

    law: PowerLaw
    flops: np.ndarray  # (points,) log-spaced
    params: np.ndarray  # N of the run with the lowest smoothed loss there
    tokens: np.ndarray  # its tokens at that moment
    loss: np.ndarray  # its smoothed loss
    winner: np.ndarray  # its index into `runs`
    bracketed: np.ndarray  # (points,) bool: smaller and larger sizes are trained as far; only these are fitted
    runs: np.ndarray  # distinct run ids, sorted
    late_share: float  # share of the bracketed winners that are in the last 15% of their run's FLOPs
    curves: dict  # run id -> (flops, smoothed loss, N), for the figure
    table: np.ndarray  # (runs, points) smoothed log loss, inf where a run has none
    log_tokens: np.ndarray  # (runs, points)
    sizes: np.ndarray  # (runs,) N

    def to_json(self, bootstrap=None) -> dict:
        """The object `approach1` of laws.json; `bootstrap` adds its to_json()."""
        out = constants(self.law) | {"points": int(self.bracketed.sum()), "late_share": self.late_share}
        out |= {"n_curves": len(self.runs), "n_winners": len(np.unique(self.winner[self.bracketed]))}
        return out | (bootstrap.to_json() if bootstrap else {})


def fit_envelope(run, N, D, loss, C=None, *, points: int = 1500, smooth: int = 10, **conventions) -> EnvelopeFit:
    """Rows are points of training curves: `run` (n,) ids, N of the run, D tokens so far, the loss there, C FLOPs so far
    (6 N D by default). Each curve is smoothed by a Gaussian of `smooth` logged points and interpolated (log loss in
    log C). At `points` log-spaced C covered by at least two sizes the lowest run wins (Hoffmann et al. 2022, 3.1).
    `conventions` are those of PowerLaw.

    Raises NotIdentified with fewer than 3 sizes, or fewer than 2 that ever win against smaller and larger ones."""
    N, D, loss = (np.asarray(v, np.float64) for v in (N, D, loss))
    C = 6 * N * D if C is None else np.asarray(C, np.float64)
    runs, run_of_row = np.unique(np.asarray(run), return_inverse=True)
    curves = []  # (log C, log D, smoothed loss, N) of each run
    for i in range(len(runs)):
        rows = np.flatnonzero(run_of_row == i)
        rows = rows[np.argsort(C[rows], kind="stable")]
        rows = rows[np.append(np.diff(C[rows]) > 0, True)]  # of two rows at one C the later is kept
        curves.append((np.log(C[rows]), np.log(D[rows]), gaussian_smooth(loss[rows], smooth), N[rows[0]]))
    sizes = np.array([n for *_, n in curves])
    if distinct(sizes) < 3:
        raise NotIdentified(f"Approach 1 needs training curves of at least 3 model sizes, but has {distinct(sizes)}")
    edges = np.unique([(c[0], c[-1]) for c, *_ in curves])
    middle = (edges[1:] + edges[:-1]) / 2
    shared = _sizes_at(np.array([(c[0] <= middle) & (middle <= c[-1]) for c, *_ in curves]), sizes) > 1
    if not shared.any():
        raise NotIdentified("Approach 1: no FLOP count is covered by the training curves of two sizes")
    log_c = np.linspace(edges[:-1][shared][0], edges[1:][shared][-1], points)
    table = np.full((len(runs), points), np.inf)
    log_tokens = np.empty((len(runs), points))
    for i, (c, d, smoothed, _) in enumerate(curves):
        table[i] = np.interp(log_c, c, np.log(smoothed), left=np.inf, right=np.inf)
        log_tokens[i] = np.interp(log_c, c, d)
    shared = _sizes_at(np.isfinite(table), sizes) > 1
    log_c, table, log_tokens = log_c[shared], table[:, shared], log_tokens[:, shared]
    winner, at = table.argmin(0), np.arange(len(log_c))
    there = np.where(np.isfinite(table), sizes[:, None], np.nan)
    params = sizes[winner]
    bracketed = (np.nanmin(there, 0) < params) & (params < np.nanmax(there, 0))
    won = len(np.unique(params[bracketed]))
    if won < 2:
        raise NotIdentified(
            "Approach 1 needs 2 sizes that have the lowest loss where smaller and larger ones are trained as far, "
            f"but has {won} of {distinct(sizes)}"
        )
    optima = log_c, np.log(params), log_tokens[winner, at]
    law = PowerLaw.through("Approach 1", *(v[bracketed] for v in optima), **conventions)
    tokens, lowest = np.exp(log_tokens[winner, at]), np.exp(table[winner, at])
    ends = np.array([c[-1] for c, *_ in curves])
    late = float((log_c >= ends[winner] + np.log(LATE))[bracketed].mean())
    shown = {str(r): (np.exp(c), smoothed, n) for r, (c, _, smoothed, n) in zip(runs, curves, strict=True)}
    return EnvelopeFit(
        law, np.exp(log_c), params, tokens, lowest, winner, bracketed, runs, late, shown, table, log_tokens, sizes
    )


def gaussian_smooth(values, span: int) -> np.ndarray:
    """Gaussian smoothing of evenly logged values; `span` points are 4 standard deviations. It fits a line in each
    span, so that a falling curve is not bent at its ends, where part of the span is missing."""
    if span < 2 or len(values) < 3:
        return values
    half = span // 2
    offset = np.arange(-half, half + 1)
    kernel = np.exp(-0.5 * (offset / (span / 4)) ** 2)
    index = np.arange(len(values))[:, None] + offset
    inside = (index >= 0) & (index < len(values))
    return line(offset.astype(float), values[np.clip(index, 0, len(values) - 1)], kernel * inside)[0]


def _sizes_at(there, sizes) -> np.ndarray:
    """(points,): how many of the sizes (runs,) have a curve `there` (runs, points)."""
    return sum(there[sizes == size].any(0).astype(int) for size in np.unique(sizes))


def refit_envelope(fit: EnvelopeFit, batches) -> dict[str, np.ndarray]:
    """Constants (replicates,) of the power laws for resampled runs; `batches(size)` yields how often each was drawn,
    (k, runs), of which only zero or not matters here. nan if fewer than 2 sizes win."""
    log_c, log_n = np.log(fit.flops), np.log(fit.sizes)
    there, at, fits = np.isfinite(fit.table), np.arange(len(log_c)), []
    keys = (fit.table, log_n[:, None], -log_n[:, None])  # lowest loss, smallest and largest size first
    ranks = [np.where(there, key, np.inf).argsort(0, kind="stable") for key in keys]
    for drawn in batches(64):
        winner, smallest, largest = (_first_present(rank, there, drawn > 0) for rank in ranks)  # each (k, points)
        n, d = log_n[winner], fit.log_tokens[winner, at]
        used = (log_n[smallest] < n) & (n < log_n[largest])
        several = np.where(used, n, -np.inf).max(1) > np.where(used, n, np.inf).min(1)
        fits.append(np.where(several, np.stack([*fit_power_laws(log_c, n, d, used).values()]), np.nan))
    return dict(zip(PowerLaw.quantities, np.concatenate(fits, 1), strict=True))


def _first_present(rank, there, drawn) -> np.ndarray:
    """(k, points): at each point the first run in `rank` (runs, points) that has a loss `there` (runs, points) and was
    `drawn` (k, runs), or 0 if there is none. Runs without a loss are last in `rank`."""
    first = np.full((len(drawn), rank.shape[1]), -1)
    left = there.sum(0)  # candidates of each point
    for i, runs in enumerate(rank):
        waiting = (first < 0) & (i < left)
        if not waiting.any():  # soon: 63% of the runs are drawn
            break
        first = np.where(waiting & drawn[:, runs], runs, first)
    return np.maximum(first, 0)
