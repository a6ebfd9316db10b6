"""Doubts about the table itself: numbers that can hardly be what their columns say. Each function of DOUBTS returns one
sentence, "" without a doubt; `require_plausible` refuses tables that no law can be fitted to."""

import numpy as np

from nanochin.base.cli import UserError
from nanochin.base.console import above, count
from nanochin.laws import NotIdentified
from nanochin.laws.law import line
from nanochin.report.analysis import Analysis
from nanochin.report.table import RunTable

SMALL = 1000  # parameters or tokens; below, the unit is probably millions or billions
LOGS = (2.0, 16.0)  # range of log10 of parameters and tokens
UNIT = (0.3, 3.0)  # of C / 6ND
PERPLEXITY = 12.0  # nats per token; a uniform guess over 160,000 tokens has less
SEEDS = 0.03  # of the loss; more than runs that differ by their seed alone
OUTLIER, LEAST = 8.0, 0.02  # of robust standard deviations, and of the loss
MOST_NAMED = 3  # rows in a sentence


def require_plausible(rows: RunTable) -> None:
    """Raises UserError for columns of logarithms, and for a loss that rises with both N and D."""
    N, D, loss = rows["params"], rows["tokens"], rows["loss"]
    if not len(N):
        return  # `require_usable` says so
    if all(LOGS[0] < x.min() and x.max() < LOGS[1] for x in (N, D)):
        raise UserError(
            f"{rows.source}: params is {N.min():g} to {N.max():g}, tokens {D.min():g} to {D.max():g}: these look like "
            "logarithms to base 10; write the numbers themselves"
        )
    slope, error = _slope(np.log(N) + np.log(D), np.log(loss))
    if slope > 5 * error:
        raise UserError(
            f"{rows.source}: the column used as loss rises with params and tokens, like an accuracy; a law needs a "
            "loss, which falls"
        )


def _slope(x, y) -> tuple[float, float]:
    """Least-squares slope of y on x (n,), and its standard error; 0 with fewer than 6 rows or for equal x."""
    if len(x) < 6 or not np.var(x) > 1e-12:
        return 0.0, 0.0
    start, slope = line(x, y)
    variance = np.sum((y - start - slope * x) ** 2) / (len(x) - 2)
    return float(slope), float(np.sqrt(variance / np.sum((x - x.mean()) ** 2)))


# ---------------------------------------------------------------------------------------------------------------------
# Doubts


def units(analysis: Analysis) -> str:
    """N or D too small to be counted in ones; a loss too high to be in nats; FLOPs in another unit."""
    said = []
    for name, x in (("params", analysis.rows["params"]), ("tokens", analysis.rows["tokens"])):
        if np.median(x) < SMALL:
            said.append(f"{name} is {x.min():.4g} to {x.max():.4g}: are these millions or billions?")
    if np.median(analysis.L) > PERPLEXITY:
        high = analysis.L.max()
        said.append(f"the loss is up to {high:.4g}, too high for nats per token: is it a perplexity? Use its logarithm")
    ratio = np.log(analysis.C / (6 * analysis.rows["params"] * analysis.rows["tokens"]))
    middle = float(np.exp(np.median(ratio)))
    if np.ptp(np.quantile(ratio, (0.1, 0.9))) < 0.1 and not UNIT[0] < middle < UNIT[1]:
        said.append(f"C is {middle:.3g} times 6ND in all rows: are the FLOPs in another unit?")
    return "; ".join(said)


def same_runs(analysis: Analysis) -> str:
    """Rows of equal N and D whose losses differ by more than seeds do: two evaluations, or a run that diverged."""
    order = np.lexsort((analysis.L, analysis.D, analysis.N))
    table = np.stack([analysis.N, analysis.D])[:, order]
    groups = np.split(order, 1 + np.flatnonzero(np.diff(table).any(0)))
    apart = np.array([analysis.L[rows[-1]] / analysis.L[rows[0]] - 1 for rows in groups])  # sorted by loss
    if apart.max() <= SEEDS:
        return ""
    rows, many = groups[int(apart.argmax())], int(np.sum(apart > SEEDS))
    runs = f"{many} groups of rows" if many > 1 else "rows"
    where = f"{_row(analysis, rows[0])} and {analysis.L[rows[-1]]:.4g}"
    return f"{runs} of equal N and D differ by up to {apart.max():.0%} in loss ({where}): are two evaluations mixed?"


def checkpoints(analysis: Analysis) -> str:
    """Every size at the same token counts, without a column run: probably checkpoints of one run per size."""
    if "run" in analysis.rows.labels:
        return ""
    sizes, tokens = (np.unique(np.round(np.log(x), 2)) for x in (analysis.N, analysis.D))
    n = len(analysis.N)
    if len(sizes) < 3 or len(tokens) < 4 or n < 0.9 * len(sizes) * len(tokens):
        return ""
    return (
        f"{len(sizes)} sizes are all measured at the same {len(tokens)} token counts: if these are checkpoints of "
        f"{len(sizes)} runs, the intervals are several times too narrow; add a column run"
    )


def outliers(analysis: Analysis) -> str:
    """Runs far above or below the law, by the robust spread of its residuals."""
    if isinstance(analysis.law, NotIdentified):
        return ""
    off = analysis.law.fit.residuals  # log predicted - log observed
    spread = 1.4826 * float(np.median(np.abs(off - np.median(off))))
    far = np.flatnonzero(np.abs(off) > max(OUTLIER * spread, LEAST))
    far = far[np.argsort(-np.abs(off[far]))]
    if not len(far):
        return ""
    named = "; ".join(f"{_row(analysis, i)} ({above(np.expm1(-off[i]), 0)} the law)" for i in far[:MOST_NAMED])
    more = f"; and {len(far) - MOST_NAMED} more" if len(far) > MOST_NAMED else ""
    said = f"{len(far)} run{'s' * (len(far) > 1)} far from the law, probably outliers: {named}{more}"
    highest = set(far) == set(np.argsort(-analysis.L, kind="stable")[: len(far)])
    return said + (f"; `drop` {len(far)} leaves out these" if highest else "")


def mistuned(analysis: Analysis) -> str:
    """Cells of isoFLOP curves far above their neighbours."""
    second = analysis.results[2]
    if isinstance(second, NotIdentified):
        return ""  # whose reason names them
    cells = [f"{budget.flops:.3g} FLOPs: {budget.reason}" for budget in second.fit.budgets if budget.mistuned]
    return f"Approach 2 gives no minimum at {'; '.join(cells)}" if cells else ""


def _row(analysis: Analysis, i: int) -> str:
    name = f"{analysis.rows.labels['run'][i]}, " if "run" in analysis.rows.labels else ""
    return f"{name}N {count(analysis.N[i])}, D {count(analysis.D[i])}, loss {analysis.L[i]:.4g}"


DOUBTS = {
    "units": units,
    "same_runs": same_runs,
    "checkpoints": checkpoints,
    "outliers": outliers,
    "mistuned": mistuned,
}
