"""The figures of an analysis, in the manner of Hoffmann et al. 2022, drawn by matplotlib.

draw(analysis, found) -> {name: Figure}            those that the data support

curves     training curves, their envelope, and the size of the run on it (the paper's Figure 2)
isoflop    a parabola for each budget, in place and aligned at the minimum (Figure 3)
optimum    N and D against C, by every approach (Figures 1 and 3)
surface    contours of L(N, D) with the frontier, and tokens per parameter (Figure 4)
residuals  by compute and by tokens per parameter
hold-out   the largest budget, predicted from the others
certainty  the exponent a by every approach and of published laws, and the profile of E

Each function returns a matplotlib Figure, or None; a notebook can show it and continue with its axes.
"""

from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nanochin.base.console import count, digits, powers
from nanochin.laws import BESIROGLU, HOFFMANN, HOFFMANN_1, HOFFMANN_2, KAPLAN, Law, NotIdentified, advice
from nanochin.report.analysis import Analysis, Approach
from nanochin.report.colours import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SCALE, SKY
from nanochin.report.findings import bracketed
from nanochin.report.panels import axis, band, drawn, line, note, panels, points, whiskers

LINES = {"Approach 1": (GREEN, "--"), "Approach 2": (ORANGE, ":"), "Approach 3": (BLUE, "-")}  # the law: INK
LEFT, RIGHT, BELOW = ("right", (-7, -3)), ("left", (7, -4)), ("left", (5, -13))  # alignment of a label, its shift in px
ABOVE, ABOVE_LEFT = ("left", (3, 6)), ("right", (-3, 6))
MODELS = (  # Hoffmann et al. 2022, Table 1: parameters, tokens; place of the label in a plot of N and in others
    ("LaMDA", 137e9, 168e9, LEFT, LEFT),
    ("GPT-3", 175e9, 300e9, BELOW, ABOVE_LEFT),
    ("Gopher", 280e9, 300e9, LEFT, ABOVE),
    ("MT-NLG", 530e9, 270e9, RIGHT, RIGHT),
    ("Chinchilla", 70e9, 1.4e12, BELOW, ABOVE_LEFT),
)
MOST = 2500  # points in one panel; more are thinned evenly
LOSS = "loss, nats per token"


def draw(analysis: Analysis, found: dict[str, object]) -> dict[str, Figure]:
    """`found`: the result of each check by its name, None or missing if there is none."""
    every = {"curves": curves(analysis), "isoflop": isoflop(analysis), "optimum": optimum(analysis),
        "surface": surface(analysis), "residuals": residuals(analysis, found.get("residuals_by_compute")),
        "hold-out": hold_out(analysis, found.get("hold_out")), "certainty": certainty(analysis, found)}  # fmt: skip
    return {name: figure for name, figure in every.items() if figure}


# ---------------------------------------------------------------------------------------------------------------------


@drawn
def curves(analysis: Analysis) -> Figure | None:
    first = analysis.results[1]
    if isinstance(first, NotIdentified):
        return None
    figure, (left, right) = panels(2)
    fit, own = first.fit, first.fit.curves
    sizes = np.array([N for _, _, N in own.values()])
    distinct = np.unique(sizes)
    named = set(distinct[_evenly(len(distinct), 5)])  # sizes in the legend
    for (run, (C, L, N)), colour in sorted(zip(own.items(), shade(sizes), strict=True), key=lambda pair: pair[0][1][2]):
        every = _evenly(len(C), max(20, 16_000 // len(own)))
        label = f"N = {count(N)}" if N in named else ""
        named.discard(N)
        hover = f"{analysis.curves.labels['run'].values[int(run)]}: N = {count(N)}"
        line(left, C[every], L[every], colour, label, width=1.0, hover=hover)
    every = _evenly(len(fit.flops), 400)
    line(left, fit.flops[every], fit.loss[every], INK, "envelope", width=2.2)
    every_loss = np.concatenate([L for _, L, _ in own.values()])
    left.set_title(f"Training curves ({analysis.convention})")
    _flops_axis(left, analysis)
    axis(left, "y", LOSS, log=True, limits=(0.98 * every_loss.min(), np.quantile(every_loss, 0.98)))

    x = np.array([fit.flops[0], fit.flops[-1]])
    changes = np.flatnonzero(np.diff(fit.winner, prepend=-1, append=-1))  # one stroke for each run that wins
    strokes = np.full((3, len(changes) - 1), np.nan)
    strokes[0], strokes[1] = fit.flops[changes[:-1]], fit.flops[changes[1:] - 1]
    _with_band(right, first, x, 0)
    winners = np.repeat(fit.params[changes[:-1]], 3)
    line(right, strokes.T.ravel(), winners, INK, "winner", width=3)
    right.set_title(f"Size of the winner ({analysis.convention})")
    _flops_axis(right, analysis)
    _params_axis(right, "y", analysis)
    return figure


@drawn
def isoflop(analysis: Analysis) -> Figure | None:
    second = analysis.results[2]
    if isinstance(second, NotIdentified):
        return None
    figure, (left, right) = panels(2)
    fit = second.fit
    spent = np.array([budget.flops for budget in fit.budgets])
    named = spent[_evenly(len(spent), 12)]  # budgets in the legend
    for budget, colour, name in zip(fit.budgets, shade(spent), distinct_powers(spent), strict=True):
        rows = budget.rows[_evenly(budget.n_runs, max(20, MOST // len(fit.budgets)))]
        hover = [_run(analysis, i) for i in rows]
        points(left, fit.N[rows], fit.loss[rows], colour, name if budget.flops in named else "", hover, 2.8)
        if not np.isfinite(budget.parabola[0]):
            continue
        x = np.linspace(np.log(fit.N[budget.fitted].min()), np.log(fit.N[budget.fitted].max()), 60)
        y = np.polyval(budget.parabola, x)
        line(left, np.exp(x), y, colour, dash="-" if budget.bracketed else ":", width=1.3)
        if budget.bracketed:
            line(right, np.exp(x) / budget.params_opt, y - budget.loss_opt, colour, width=1.0)
            N, above = fit.N[rows] / budget.params_opt, fit.loss[rows] - budget.loss_opt
            points(right, N, above, colour, "", hover, 2.6)
    minima = _minima(second)
    hover = [
        f"C = {budget.flops:.3g}: N_opt = {count(budget.params_opt)}, D_opt = {count(budget.tokens_opt)}, "
        f"loss {budget.loss_opt:.4f}; bracketed in {at.get('share', np.nan):.0%} of the resamples"
        for budget, at in minima
    ]
    N, L = [budget.params_opt for budget, _ in minima], [budget.loss_opt for budget, _ in minima]
    whiskers(left, L, [at.get("params_opt") for _, at in minima], INK, horizontal=True)
    points(left, N, L, INK, "minimum, with its 95%", hover, 3.2, "D")
    left.set_title(f"IsoFLOP curves ({analysis.convention})")
    read = np.concatenate([fit.loss[budget.fitted] for budget in fit.budgets])
    _params_axis(left, "x", analysis)
    axis(left, "y", LOSS, limits=_clip(left, read))
    right.set_title(f"The same, laid over one another ({analysis.convention})")
    axis(right, "x", "parameters over the minimum's", log=True)
    read = [fit.loss[b.fitted] - b.loss_opt for b in fit.budgets if b.bracketed]
    axis(right, "y", "loss above the minimum, nats", limits=_clip(right, np.concatenate(read)))
    return figure


def _clip(axes: Axes, read: np.ndarray) -> tuple[float, float]:
    """Limits of y that show all values `read`; points above the frame get a mark at its edge."""
    margin = 0.06 * np.ptp(read)
    top = read.max() + margin
    places = [mark.get_offsets() for mark in axes.collections if len(mark.get_offsets())]
    above = [x for x, y in np.concatenate(places) if y > top]
    if above:
        points(axes, above, [top - 0.3 * margin] * len(above), GREY, "above the frame", radius=3.4, shape="^")
    return read.min() - margin, top


@drawn
def optimum(analysis: Analysis) -> Figure:
    figure, both = panels(2)
    x = _flops_range(analysis)
    for which, axes in enumerate(both):
        _advice(axes, analysis, x, which)
        name = ("params_opt", "tokens_opt")[which]
        minima = ((analysis.akima, "ring", 5, "minima by Akima"), (analysis.results[2], "D", 2.8, "minima by parabola"))
        for approach, shape, size, label in minima:
            if isinstance(approach, Approach):
                found = _minima(approach)
                C, y = [budget.flops for budget, _ in found], [getattr(budget, name) for budget, _ in found]
                hover = [f"{label}: {count(value)} at {flops:.3g} FLOPs" for flops, value in zip(C, y, strict=True)]
                whiskers(axes, C, [at.get(name) for _, at in found], ORANGE)
                points(axes, C, y, ORANGE, label, hover, size, shape)
        lines = np.concatenate([one.get_ydata() for one in axes.lines])
        axes.set_ylim(lines.min() / 1.5, lines.max() * 1.5)  # wide bands are cut off
        _models(axes, x, which)
        _flops_axis(axes, analysis, x)
    both[0].set_title(f"Optimal size ({analysis.convention})")
    _params_axis(both[0], "y", analysis)
    both[1].set_title(f"Optimal tokens ({analysis.convention})")
    axis(both[1], "y", "tokens D", log=True)
    return figure


@drawn
def surface(analysis: Analysis) -> Figure:
    third, x = analysis.law, _flops_range(analysis)
    figure, both = panels(1 if isinstance(third, NotIdentified) else 2)
    if isinstance(third, Approach):
        _contours(both[0], analysis, third.law)
    _advice(both[-1], analysis, x, 2)
    _models(both[-1], x, 2)
    both[-1].set_title(f"Tokens per parameter ({analysis.convention})")
    _flops_axis(both[-1], analysis, x)
    axis(both[-1], "y", "D / N", log=True)
    return figure


def _contours(axes: Axes, analysis: Analysis, law: Law) -> None:
    """L(N, D), with the runs coloured by their loss."""
    N, D, L = analysis.N, analysis.D, analysis.L
    sizes, tokens = (np.geomspace(x.min() / 1.6, x.max() * 1.6, 120) for x in (N, D))
    count_of = f"N {analysis.settings.params}"
    axes.set_title(f"Loss by the law ({count_of})")
    axis(axes, "x", "tokens D", log=True, limits=(tokens[0], tokens[-1]))
    axis(axes, "y", f"parameters {count_of}", log=True, limits=(sizes[0], sizes[-1]))
    left, right = np.log(L.min() - law.E), np.log(L.max() - law.E)
    levels = law.E + np.exp(np.linspace(left, right, 11)[1:-1])  # even in log(L - E)
    losses = law.loss(sizes[:, None], tokens)
    keep, best_N = _evenly(len(N), MOST), np.geomspace(sizes[0], sizes[-1], 60)
    best_D = law.tokens_for(best_N)
    lines = axes.contour(tokens, sizes, losses, levels, colors=SCALE[::-1], linewidths=1.6)
    free = _free(axes, lines, np.append(D[keep], best_D), np.append(N[keep], best_N))
    axes.clabel(lines, fmt=partial(digits, figures=3), fontsize=10, colors=INK, manual=free)
    nearest = np.abs(np.log(np.maximum(L[keep, None] - law.E, 1e-9)) - np.log(levels - law.E)).argmin(1)
    colours, hover = [SCALE[8 - k] for k in nearest], [_run(analysis, i) for i in keep]
    points(axes, D[keep], N[keep], colours, "runs, coloured by their loss", hover, 2.8)
    line(axes, best_D, best_N, INK, "frontier", width=2.4)


def _free(axes: Axes, contours, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """A place on each contour for its label: inside the frame and farthest from points and other labels."""
    taken, places = axes.transData.transform(np.stack([x, y], 1)), []
    low, high = axes.bbox.min + 18, axes.bbox.max - 18
    for path in contours.get_paths():
        at = axes.transData.transform(path.vertices)
        inside = ((low < at) & (at < high)).all(1)
        if inside.any():
            best = np.linalg.norm(at[inside, None] - taken, axis=2).min(1).argmax()
            places.append(path.vertices[inside][best])
            taken = np.append(taken, at[inside][best : best + 1], axis=0)
    return places


@drawn
def residuals(analysis: Analysis, by_compute: list[dict] | None) -> Figure | None:
    third = analysis.law
    if isinstance(third, NotIdentified):
        return None
    figure, (left, right) = panels(2)
    off, keep, colours = 100 * third.fit.residuals, _evenly(len(analysis.N), MOST), shade(analysis.N)
    hover, colours = [f"{_run(analysis, i)}: {off[i]:+.2f}%" for i in keep], [colours[i] for i in keep]
    for part in by_compute or ():
        ends, middle, sd = [part["flops_low"], part["flops_high"]], 100 * part["median"], 100 * part["sd"]
        words = f"{part['n']} runs: median {middle:+.2f}%, robust sd {sd:.2f}%"
        band(left, ends, [middle - sd] * 2, [middle + sd] * 2, BLUE, "robust sd")
        line(left, ends, [middle] * 2, BLUE, "median", width=2, hover=words)
    limit = 1.15 * float(np.quantile(np.abs(off), 0.99))
    beyond = int(np.sum(np.abs(off) > limit))
    for axes, x in ((left, 6 * analysis.N * analysis.D), (right, analysis.D / analysis.N)):
        axes.axhline(0, color=GREY, linewidth=1)
        points(axes, x[keep], off[keep], colours, "", hover, 2.8)
        for colour, N in ((SCALE[0], analysis.N.min()), (SCALE[8], analysis.N.max())):
            points(axes, [], [], colour, f"N = {count(N)}", radius=2.8)
        axis(axes, "y", "predicted over observed loss, %", limits=(-limit, limit))
        if beyond:
            note(axes, (1, 1), f"{beyond} of {len(off)} beyond the frame", "right", (-5, -13), xycoords="axes fraction")
    left.set_title(f"Residuals by compute (N {analysis.settings.params})")
    axis(left, "x", "6 N D, FLOPs", log=True, show=powers)
    right.set_title(f"Residuals by D / N (N {analysis.settings.params})")
    axis(right, "x", "tokens per parameter D / N", log=True)
    return figure


@drawn
def hold_out(analysis: Analysis, held) -> Figure | None:
    """`held`: a nanochin.laws.HoldOut, or None."""
    if not held:
        return None
    figure, (left, right) = panels(2)
    N, L = analysis.N[held.rows], analysis.L[held.rows]
    hover = [f"{_run(analysis, i)}: predicted {p:.4f}" for i, p in zip(held.rows, held.predicted, strict=True)]
    whiskers(left, N, zip(held.low, held.high, strict=True), BLUE)
    points(left, N, held.predicted, BLUE, "predicted, 95%", hover, 4, "ring")
    points(left, N, L, RED, "observed, not fitted", hover, 3.2)
    for C, measured, predicted, _ in held.optima:
        for at, colour, dash, label in ((measured, RED, ":", "measured"), (predicted, BLUE, "--", "predicted")):
            ends = [min(L.min(), held.predicted.min()), max(L.max(), held.predicted.max())]
            line(left, [at, at], ends, colour, f"{label} minimum", dash, hover=f"{count(at)} at {C:.3g}")
    left.set_title(f"The largest budget, predicted ({analysis.convention})")
    _params_axis(left, "x", analysis)
    axis(left, "y", LOSS)

    fit, keep = held.fit, _evenly(held.fit.n, MOST)
    inside, everything = fit.law.loss(fit.N, fit.D), np.concatenate([analysis.L, held.predicted])
    words = [f"observed {a:.4f}, by the law {b:.4f}" for a, b in zip(fit.loss[keep], inside[keep], strict=True)]
    line(right, [everything.min(), everything.max()], [everything.min(), everything.max()], GREY, "equal", width=1)
    points(right, fit.loss[keep], inside[keep], GREY, "fitted", words, 2.2)
    points(right, L, held.predicted, RED, "held out", hover, 3.4)
    right.set_title(f"Predicted against observed (N {analysis.settings.params})")
    axis(right, "x", f"observed {LOSS}", log=True)
    axis(right, "y", f"predicted {LOSS}", log=True)
    return figure


@drawn
def certainty(analysis: Analysis, found: dict[str, object]) -> Figure:
    """Exponents with intervals, ours above the published ones, and the profile of E."""
    profile = found.get("profile_E")
    figure, both = panels(2 if profile else 1)
    rows = [
        (name, a, ends, colour, f"{name}: a = {a:.4f}" + bracketed(ends))
        for name, a, ends, colour in _exponents(analysis, found)
    ]
    forest(both[0], rows, 0.5)
    both[0].set_title(f"Exponent a, with 95% intervals ({analysis.convention})")
    axis(both[0], "x", "a in N = k C^a")
    if profile:
        _profile(both[1], analysis, *profile)
    return figure


def forest(axes: Axes, rows: list[tuple], reference: float) -> None:
    """Rows of (name, value, interval, colour, text on hover), the first on top, and a line at `reference`."""
    places = range(len(rows), 0, -1)
    for y, (_, value, ends, colour, hover) in zip(places, rows, strict=True):
        whiskers(axes, [y], [ends], colour, horizontal=True)
        points(axes, [value], [y], colour, "", [hover], 4)
    axes.axvline(reference, color=GREY, linestyle=":", linewidth=1)
    axis(axes, "y", "", limits=(0.4, len(rows) + 0.6))
    axes.set_yticks(places, [name for name, *_ in rows])


def _exponents(analysis: Analysis, found: dict[str, object]) -> list[tuple]:
    """(name, exponent a, its 95% interval, colour), ours before the published ones."""
    none, third = (np.nan, np.nan), analysis.results[3]
    rows = [
        (one.name, one.exponent(one.law), one.interval(one.exponent), LINES.get(one.name, (INK,))[0])
        for one in analysis.everything
    ]
    if isinstance(third, Approach) and not analysis.cost.is_6nd:
        rows.append(("3, for 6ND (Eq. 4)", third.law.a, third.interval("a"), BLUE))
    if isinstance(analysis.akima, Approach):
        rows.append(("Approach 2 by Akima", analysis.akima.law.a, analysis.akima.interval("a"), ORANGE))
    for other in found.get("other") or ():
        if not isinstance(other.fit, NotIdentified):
            ends = other.interval(third.exponent)
            rows.append((f"3, {other.change}", third.exponent(other.fit.law), ends, SKY))
    if kaplan := found.get("kaplan_procedure"):
        rows.append(("Kaplan's procedure", kaplan.a, kaplan.intervals.get(95, none), RED))
    return [
        *rows,
        ("Hoffmann 1 (80%)", HOFFMANN_1.a, (0.488, 0.502), GREY),
        ("Hoffmann 2 (80%)", HOFFMANN_2.a, (0.462, 0.534), GREY),
        ("Hoffmann 3 (80%)", HOFFMANN.a, (0.454, 0.455), GREY),
        ("Besiroglu", BESIROGLU.a, none, GREY),
        ("Kaplan 2020", KAPLAN.a, none, GREY),
    ]


def _profile(axes: Axes, analysis: Analysis, E: np.ndarray, rise: np.ndarray) -> None:
    third = analysis.results[3]
    order = np.argsort(np.append(E, third.law.E))
    E = np.append(E, third.law.E)[order]
    rise, (low, high) = np.append(rise, 1.0)[order], third.interval("E")
    if np.isfinite(low):
        band(axes, [low, high], [0, 0], [9, 9], BLUE, "95% by bootstrap")
    line(axes, E, rise, BLUE, "best objective", width=2)
    points(axes, [third.law.E], [1.0], BLUE, f"E = {third.law.E:.4g}", [f"E = {third.law.E:.6g}"], 4)
    near = E[rise < 1.6]
    axes.set_title(f"Profile of E in Approach 3 (N {analysis.settings.params})")
    axis(axes, "x", "E held fixed, nats", limits=(near.min(), np.nanmax([near.max(), high])))
    axis(axes, "y", "objective over its minimum", limits=(0.97, 1.6))


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the figures


def _flops_axis(axes: Axes, analysis: Analysis, x=None) -> None:
    limits = None if x is None else (x[0], x[-1])
    axis(axes, "x", f"training FLOPs C ({analysis.flops_name})", log=True, limits=limits, show=powers)


def _params_axis(axes: Axes, which: str, analysis: Analysis) -> None:
    axis(axes, which, f"parameters N ({analysis.settings.params})", log=True)


def _flops_range(analysis: Analysis) -> np.ndarray:
    """FLOPs from the smallest run to three decades beyond the largest, or to the known models."""
    largest = analysis.C.max()
    high = max(1e25, 10 * largest) if largest > 1e19 else 1e3 * largest
    return np.exp(np.linspace(np.log(analysis.C.min()), np.log(high), 49))


def _minima(approach: Approach) -> list[tuple]:
    """The bracketed budgets of Approach 2, each with its intervals ({}: none)."""
    boot = approach.boot
    return [(b, boot.at_budget(i) if boot else {}) for i, b in enumerate(approach.fit.budgets) if b.bracketed]


def _advice(axes: Axes, analysis: Analysis, x: np.ndarray, which: int) -> None:
    """The optimal N (0), D (1) or D/N (2) by published laws (see laws.advice) and ours, in our FLOPs."""
    for law, colour, dash, label in (
        (HOFFMANN_1, PURPLE, "-", "Hoffmann 2022, Approach 1"),
        (HOFFMANN_2, PURPLE, ":", "Hoffmann 2022, Approach 2"),
        (HOFFMANN, PURPLE, "--", "Hoffmann 2022, Approach 3"),
        (BESIROGLU, GREY, ":", "Besiroglu 2024"),
        (KAPLAN, RED, "--", "Kaplan 2020 (non-embedding)"),
    ):
        N, D = advice(law, analysis.cost, x)
        line(axes, x, (N, D, D / N)[which], colour, label, dash)
    for approach in analysis.everything:
        _with_band(axes, approach, x, which)


def _with_band(axes: Axes, approach: Approach, x: np.ndarray, which: int) -> None:
    """N (0), D (1) or D/N (2) against C, with its 95% band."""

    def quantity(law, C=x):
        N, D = law.optimal(C)
        return (N, D, D / N)[which]

    colour, dash = LINES.get(approach.name, (INK, "-"))
    if approach.boot:
        band(axes, x, *np.array([approach.interval(partial(quantity, C=C)) for C in x]).T, colour)
    line(axes, x, quantity(approach.law), colour, approach.name, dash, 2.2)


def _models(axes: Axes, x: np.ndarray, which: int) -> None:
    """Known models within the range of x."""
    for name, N, D, *sides in MODELS:
        C, y = 6 * N * D, (N, D, D / N)[which]
        if x[-1] >= C:
            points(axes, [C], [y], INK, "known models", [f"{name}: {count(N)} on {count(D)}"], 3.4, "x")
            note(axes, (C, y), name, *sides[which > 0])


def distinct_powers(values: np.ndarray) -> list[str]:
    """Names such as 3×10^18, of two digits or as many as make them distinct."""
    for n in range(2, 8):
        names = [powers(value, n) for value in values]
        if len(set(names)) == len(names):
            break
    return names


def shade(values: np.ndarray) -> list[str]:
    """A colour for each value, dark to bright with its logarithm."""
    log = np.log(values)
    at = (log - log.min()) / max(np.ptp(log), 1e-9)
    return [SCALE[min(int(9 * v), 8)] for v in at]


def _evenly(n: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


def _run(analysis: Analysis, i: int) -> str:
    name = f"{analysis.rows.labels['run'][i]}: " if "run" in analysis.rows.labels else ""
    return f"{name}N {count(analysis.N[i])}, D {count(analysis.D[i])}, C {analysis.C[i]:.3g}, loss {analysis.L[i]:.4f}"
