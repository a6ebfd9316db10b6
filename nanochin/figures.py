"""The figures of a study, in the manner of Hoffmann et al. 2022, as data for nanochin.plot.

draw(study, found) -> [Figure, ...]             those that the data support

curves     training curves, their envelope, and whose it is (the paper's Figure 2)
isoflop    a parabola for each budget, as they are and laid over one another (Figure 3)
optimum    N and D against C, by every approach (Figures 1 and 3)
surface    contours of L(N, D) with the frontier, and tokens per parameter (Figure 4)
residuals  what the law leaves unexplained
hold-out   the largest budget, predicted from the others
certainty  the exponent a by every way of finding it, and the profile of E
"""

from functools import partial

import numpy as np

from nanochin.console import count
from nanochin.laws import (
    BESIROGLU,
    HOFFMANN,
    HOFFMANN_1,
    HOFFMANN_2,
    KAPLAN,
    Law,
    NotIdentified,
    advice,
)
from nanochin.plot import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    SCALE,
    TOP,
    WIDTH,
    Axis,
    Band,
    Figure,
    Line,
    Note,
    Panel,
    Points,
    number,
)
from nanochin.study import Approach, Study

NAMES = ("curves", "isoflop", "optimum", "surface", "residuals", "hold-out", "certainty")  # of all that may be drawn
COLOUR = {1: "green", 2: "orange", 3: "blue"}
MODELS = (  # Hoffmann et al. 2022, Table 1: parameters, tokens; where their names stand in a plot of N and in others
    ("LaMDA", 137e9, 168e9, "left", "left"),
    ("GPT-3", 175e9, 300e9, "below", "above left"),
    ("Gopher", 280e9, 300e9, "left", "above"),
    ("MT-NLG", 530e9, 270e9, "right", "right"),
    ("Chinchilla", 70e9, 1.4e12, "below", "above left"),
)
SIDES = {
    "left": ("end", (-7, 3)),
    "right": ("start", (7, 4)),
    "below": ("start", (5, 13)),
    "above": ("start", (3, -6)),
    "above left": ("end", (-3, -6)),
}
NONE = (np.nan, np.nan)  # no interval
MOST = 2500  # points in one panel; of more, evenly spaced ones are drawn


def draw(study: Study, found: dict[str, object]) -> list[Figure]:
    """`found` are the results behind the checks by their names; None, or missing, where there is none."""
    figures = [curves(study), isoflop(study), optimum(study), surface(study)]
    figures += [residuals(study, found), hold_out(study, found), certainty(study, found)]
    return [figure for figure in figures if figure]


# ---------------------------------------------------------------------------------------------------------------------


def curves(study: Study) -> Figure | None:
    first = study.results[1]
    if isinstance(first, NotIdentified):
        return None
    fit, own, marks, low = first.fit, first.fit.curves, [], np.inf
    sizes = np.array([N for _, _, N in own.values()])
    distinct = np.unique(sizes)
    named = set(distinct[_evenly(len(distinct), 5)])  # in the legend
    for (run, (C, L, N)), colour in sorted(zip(own.items(), shade(sizes), strict=True), key=lambda pair: pair[0][1][2]):
        every = _evenly(len(C), max(20, 16_000 // len(own)))
        label = f"N = {count(N)}" if N in named else ""
        named.discard(N)
        name = study.curves.labels["run"].values[int(run)]
        marks.append(Line(C[every], L[every], colour, label, width=1.0, hover=f"{name}: N = {count(N)}"))
        low = min(low, L.min())
    every = _evenly(len(fit.flops), 400)
    marks.append(Line(fit.flops[every], fit.loss[every], "ink", "envelope", width=2.2))
    high = np.quantile(np.concatenate([L for _, L, _ in own.values()]), 0.98)
    loss = Panel(f"Training curves ({study.convention})", _flops_axis(study), Axis(LOSS, True, low * 0.98, high), marks)

    x = np.array([fit.flops[0], fit.flops[-1]])
    changes = np.flatnonzero(np.diff(fit.winner, prepend=-1, append=-1))  # a run that wins is drawn as one stroke
    strokes = np.full((3, len(changes) - 1), np.nan)
    strokes[0], strokes[1] = fit.flops[changes[:-1]], fit.flops[changes[1:] - 1]
    winners = Line(strokes.T.ravel(), np.repeat(fit.params[changes[:-1]], 3), "ink", "winner", width=3)
    size = Panel(
        f"Size of the winner ({study.convention})",
        _flops_axis(study),
        _params_axis(study),
        (*_with_band(first, x, 0), winners),
    )
    text = (
        f"At each of {len(fit.flops)} FLOP counts the run with the lowest smoothed loss wins; {fit.late_share:.0%} of "
        "the winners are in the last 15% of their run. A minimum over noisy runs is biased low."
    )
    return Figure("curves", "Approach 1: the envelope of the training curves", (loss, size), text)


def isoflop(study: Study) -> Figure | None:
    second = study.results[2]
    if isinstance(second, NotIdentified):
        return None
    fit, marks, flat = second.fit, [], []
    spent = np.array([budget.flops for budget in fit.budgets])
    for budget, colour, name in zip(fit.budgets, shade(spent), distinct_powers(spent), strict=True):
        rows = budget.rows[_evenly(budget.n_runs, max(20, MOST // len(fit.budgets)))]
        hover = [_run(study, i) for i in rows]
        marks.append(Points(fit.N[rows], fit.loss[rows], colour, name, hover, 2.8))
        if not np.isfinite(budget.parabola[0]):
            continue
        x = np.linspace(np.log(fit.N[rows].min()), np.log(fit.N[rows].max()), 60)
        y = np.polyval(budget.parabola, x)
        marks.append(Line(np.exp(x), y, colour, dash="" if budget.bracketed else "dot", width=1.3))
        if budget.bracketed:
            N, above = fit.N[rows] / budget.params_opt, fit.loss[rows] - budget.loss_opt
            flat += [
                Line(np.exp(x) / budget.params_opt, y - budget.loss_opt, colour, width=1.0),
                Points(N, above, colour, "", hover, 2.6),
            ]
    found = _minima(second)
    hover = [
        f"C = {budget.flops:.3g}: N_opt = {count(budget.params_opt)}, D_opt = {count(budget.tokens_opt)}, "
        f"loss {budget.loss_opt:.4f}; bracketed in {at.get('share', np.nan):.0%} of the resamples"
        for budget, at in found
    ]
    N, L = [budget.params_opt for budget, _ in found], [budget.loss_opt for budget, _ in found]
    ends = tuple(np.array([at.get("params_opt", NONE) for _, at in found]).T) if second.sure else None
    vertices = Points(N, L, "ink", "minimum, with its 95%", hover, 3.4, "diamond", x_range=ends)
    losses = Panel(f"IsoFLOP curves ({study.convention})", _params_axis(study), Axis(LOSS), (*marks, vertices))
    above = Panel(
        f"The same, laid over one another ({study.convention})",
        Axis("parameters over the minimum's", True),
        Axis("loss above the minimum, nats"),
        tuple(flat),
    )
    refused = [f"{budget.flops:.2g} FLOPs: {budget.reason}" for budget in fit.budgets if not budget.bracketed]
    text = "Dotted curves have no minimum inside the sizes that were tried and count for nothing" if refused else ""
    text += f" ({'; '.join(refused)})." if refused else ""
    return Figure("isoflop", "Approach 2: isoFLOP curves", (losses, above), text)


def optimum(study: Study) -> Figure:
    x = _reach(study)
    size = _optimum_panel(study, x, 0, "Optimal size", _params_axis(study))
    tokens = _optimum_panel(study, x, 1, "Optimal tokens", Axis("tokens D", log=True))
    text = (
        f"Bands are 95% intervals. All beyond {study.C.max():.2g} FLOPs, the largest run, is extrapolated. The laws of "
        "others belong to their own tokenizers and corpora: compare the slopes."
    )
    return Figure("optimum", "What a budget should buy", (size, tokens), text)


def _optimum_panel(study: Study, x: np.ndarray, which: int, title: str, axis: Axis) -> Panel:
    marks, name = _advice(study, x, which), ("params_opt", "tokens_opt")[which]
    minima = ((study.akima, "ring", 5, "minima by Akima"), (study.results[2], "diamond", 3, "minima by parabola"))
    for approach, shape, size, label in minima:
        if isinstance(approach, Approach):
            found = _minima(approach)
            C, y = [budget.flops for budget, _ in found], [getattr(budget, name) for budget, _ in found]
            hover = [f"{label}: {count(value)} at {flops:.3g} FLOPs" for flops, value in zip(C, y, strict=True)]
            ends = tuple(np.array([at.get(name, NONE) for _, at in found]).T)
            marks.append(Points(C, y, "orange", label, hover, size, shape, y_range=ends))
    lines = np.concatenate([mark.y for mark in marks if isinstance(mark, Line)])
    marks += _models(x, which)
    axis = Axis(axis.label, True, lines.min() / 1.5, lines.max() * 1.5)  # bands are cut off where they are wild
    return Panel(f"{title} ({study.convention})", _flops_axis(study, x), axis, tuple(marks))


def surface(study: Study) -> Figure:
    x = _reach(study)
    marks = (*_advice(study, x, 2), *_models(x, 2))
    ratio = Panel(f"Tokens per parameter ({study.convention})", _flops_axis(study, x), Axis("D / N", log=True), marks)
    third = study.results[3]
    if isinstance(third, NotIdentified):
        return Figure("surface", "Tokens per parameter", (ratio,))
    text = f"Contours of L(N, D), labelled in nats; the frontier is where C ({study.flops_name}) is least for a loss."
    return Figure("surface", "Approach 3: the fitted loss", (_contours(study, third.law), ratio), text)


def _contours(study: Study, law: Law) -> Panel:
    """L(N, D) over the runs, which have the colour of their own loss."""
    N, D, L = study.N, study.D, study.L
    sizes, tokens = (np.geomspace(x.min() / 1.6, x.max() * 1.6, 120) for x in (N, D))
    left, right = np.log(L.min() - law.E), np.log(L.max() - law.E)
    levels = law.E + np.exp(np.linspace(left, right, 11)[1:-1])  # even in log(L - E)
    marks = [_contour(law, level, sizes, tokens, colour) for level, colour in zip(levels, reversed(SCALE), strict=True)]
    names = _names(marks, levels, sizes, tokens)
    keep = _evenly(len(N), MOST)
    nearest = np.abs(np.log(np.maximum(L[keep, None] - law.E, 1e-9)) - np.log(levels - law.E)).argmin(1)
    colours = [SCALE[8 - k] for k in nearest]
    marks.append(Points(D[keep], N[keep], colours, "runs, coloured by their loss", [_run(study, i) for i in keep], 2.6))
    best_N = np.geomspace(sizes[0], sizes[-1], 60)
    best_D = law.tokens_for(best_N)
    marks.append(Line(best_D, best_N, "ink", "frontier", width=2.4))
    count_of = f"N {study.settings.params}"
    return Panel(
        f"Loss by the law ({count_of})",
        Axis("tokens D", True, tokens[0], tokens[-1]),
        Axis(f"parameters {count_of}", True, sizes[0], sizes[-1]),
        (*marks, *names),
    )


def _contour(law: Law, level: float, N: np.ndarray, D: np.ndarray, colour: str) -> Line:
    """Where the loss is `level`, in the frame that the ends of N and D are; from its upper end to its lower."""

    def other(x: np.ndarray, own: tuple, others: tuple) -> np.ndarray:  # in closed form, of x with (scale, power) own
        rest = level - law.E - own[0] * x ** -own[1]
        return (others[0] / np.where(rest > 0, rest, np.nan)) ** (1 / others[1])

    of_n, of_d = (law.A, law.alpha), (law.B, law.beta)
    at_n, at_d = np.append(N, other(D, of_d, of_n)), np.append(other(N, of_n, of_d), D)
    inside = (N[0] <= at_n) & (at_n <= N[-1]) & (D[0] <= at_d) & (at_d <= D[-1])
    order = np.flatnonzero(inside)[np.lexsort((-at_n[inside], at_d[inside]))]
    return Line(at_d[order], at_n[order], colour, width=1.6, hover=f"loss {level:.3f}")


def _names(contours: list[Line], levels: np.ndarray, N: np.ndarray, D: np.ndarray) -> list[Note]:
    """The losses (rising) of contours, where no line, run or other name is: above the frame, where a contour leaves it
    there, or at its right edge under the contour, whichever gives more of them a name."""
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM  # px
    above, right, free, under = [], [], wide + 99.0, 14.0
    for line, level in reversed([pair for pair in zip(contours, levels, strict=True) if len(pair[0].x)]):
        x = wide * np.log(line.x / D[0]) / np.log(D[-1] / D[0])  # from the lower left to the upper right
        y = high * np.log(line.y / N[0]) / np.log(N[-1] / N[0])
        if y[0] > high - 1 and abs(x[0] - free) > 28:
            above.append(Note(line.x[0], line.y[0], f"{level:.3g}", "middle", (0, -4)))
            free = x[0]
        if x[-1] > wide - 1 and y[-1] > under:
            right.append(Note(line.x[-1], line.y[-1], f"{level:.3g}", "end", (-3, 12)))
        under = max(14.0, np.interp(wide - 28, x, y) + 14)  # where the next one may be
    return above if len(above) >= len(right) else right


def residuals(study: Study, found: dict[str, object]) -> Figure | None:
    third = study.results[3]
    if isinstance(third, NotIdentified):
        return None
    left, keep, colours = 100 * third.fit.residuals, _evenly(len(study.N), MOST), shade(study.N)
    hover, colours = [f"{_run(study, i)}: {left[i]:+.2f}%" for i in keep], [colours[i] for i in keep]
    limit = 1.15 * float(np.quantile(np.abs(left), 0.99))
    axis = Axis("predicted over observed loss, %", False, -limit, limit)

    def cloud(values: np.ndarray) -> list:
        none = np.empty(0)
        return [
            Line(np.array([values.min(), values.max()]), np.zeros(2), "grey", width=1),
            Points(values[keep], left[keep], colours, "", hover, 2.8),
            Points(none, none, SCALE[0], f"N = {count(study.N.min())}"),
            Points(none, none, SCALE[8], f"N = {count(study.N.max())}"),
        ]

    steps = []
    for part in found.get("residuals_by_compute") or ():
        ends, middle, sd = np.array([part["flops_low"], part["flops_high"]]), 100 * part["median"], 100 * part["sd"]
        hover_part = f"{part['n']} runs: median {middle:+.2f}%, robust sd {sd:.2f}%"
        steps += [
            Band(ends, np.full(2, middle - sd), np.full(2, middle + sd), "blue", "robust sd"),
            Line(ends, np.full(2, middle), "blue", "median", width=2, hover=hover_part),
        ]
    C, ratio = 6 * study.N * study.D, study.D / study.N
    count_of = f"N {study.settings.params}"
    by_compute = Panel(
        f"Residuals by compute ({count_of})", Axis("6 N D, FLOPs", True, powers=True), axis, (*steps, *cloud(C))
    )
    by_ratio = Panel(
        f"Residuals by D / N ({count_of})", Axis("tokens per parameter D / N", True), axis, tuple(cloud(ratio))
    )
    beyond = int(np.sum(np.abs(left) > limit))
    return Figure(
        "residuals",
        "What the law leaves unexplained",
        (by_compute, by_ratio),
        f"{beyond} of {len(left)} points lie beyond the frame." if beyond else "",
    )


def hold_out(study: Study, found: dict[str, object]) -> Figure | None:
    if not (held := found.get("hold_out")):
        return None
    N, L = study.N[held.rows], study.L[held.rows]
    sure = (held.low, held.high) if np.isfinite(held.low).all() else None
    hover = [f"{_run(study, i)}: predicted {p:.4f}" for i, p in zip(held.rows, held.predicted, strict=True)]
    size = [
        Points(N, held.predicted, "blue", "predicted, 95%", hover, 4, "ring", y_range=sure),
        Points(N, L, "red", "observed, not fitted", hover, 3.2),
    ]
    ends = np.array([min(L.min(), held.predicted.min()), max(L.max(), held.predicted.max())])
    for C, measured, predicted, _ in held.optima:
        size += [
            Line(np.full(2, measured), ends, "red", "measured minimum", "dot", hover=f"{count(measured)} at {C:.3g}"),
            Line(
                np.full(2, predicted), ends, "blue", "predicted minimum", "dash", hover=f"{count(predicted)} at {C:.3g}"
            ),
        ]
    fit, keep = held.fit, _evenly(held.fit.n, MOST)
    inside, everything = fit.law.loss(fit.N, fit.D), np.concatenate([study.L, held.predicted])
    diagonal = np.array([everything.min(), everything.max()])
    words = [f"observed {a:.4f}, by the law {b:.4f}" for a, b in zip(fit.loss[keep], inside[keep], strict=True)]
    scatter = (
        Line(diagonal, diagonal, "grey", "equal", width=1),
        Points(fit.loss[keep], inside[keep], "grey", "fitted", words, 2.2),
        Points(L, held.predicted, "red", "held out", hover, 3.4),
    )
    predicted, observed = Axis(f"predicted {LOSS}", True), Axis(f"observed {LOSS}", True)
    panels = (
        Panel(f"The largest budget, predicted ({study.convention})", _params_axis(study), Axis(LOSS), tuple(size)),
        Panel(f"Predicted against observed (N {study.settings.params})", observed, predicted, scatter),
    )
    return Figure("hold-out", "Does it extrapolate?", panels)


def certainty(study: Study, found: dict[str, object]) -> Figure:
    """The forest of exponents, ours above those of others, and how firmly E is held."""
    forest = [
        (f"Approach {one.number}", one.exponent(one.law), one.interval(one.exponent), COLOUR[one.number])
        for one in study.approaches
    ]
    third = study.results[3]
    if isinstance(third, Approach) and not study.cost.is_6nd:
        forest.append(("3, for 6ND (Eq. 4)", third.law.a, third.interval("a"), "blue"))
    if isinstance(study.akima, Approach):
        forest.append(("Approach 2 by Akima", study.akima.law.a, study.akima.interval("a"), "orange"))
    for other in found.get("other") or ():
        if not isinstance(other.fit, NotIdentified):
            ends = other.interval(third.exponent)
            forest.append((f"3, {other.change}", third.exponent(other.fit.law), ends, "sky"))
    if kaplan := found.get("kaplan_procedure"):
        forest.append(("Kaplan's procedure", kaplan.a, kaplan.intervals.get(95, NONE), "red"))
    forest += [
        ("Hoffmann 1 (80%)", HOFFMANN_1.a, (0.488, 0.502), "grey"),
        ("Hoffmann 2 (80%)", HOFFMANN_2.a, (0.462, 0.534), "grey"),
        ("Hoffmann 3 (80%)", HOFFMANN.a, (0.454, 0.455), "grey"),
        ("Besiroglu", BESIROGLU.a, NONE, "grey"),
        ("Kaplan 2020", KAPLAN.a, NONE, "grey"),
    ]
    ticks = [(float(len(forest) - i), name) for i, (name, *_) in enumerate(forest)]
    marks = [Line(np.array([0.5, 0.5]), np.array([0.0, len(forest) + 1]), "grey", dash="dot", width=1)]
    for (y, _), (name, a, (low, high), colour) in zip(ticks, forest, strict=True):
        hover = f"{name}: a = {a:.4f}" + (f" [{low:.3f}, {high:.3f}]" if np.isfinite(low) else "")
        marks.append(Points([a], [y], colour, "", [hover], 4, x_range=([low], [high])))
    names = Axis("", False, 0.4, len(forest) + 0.6, ticks)
    title = f"Exponent a, with 95% intervals ({study.convention})"
    panels = [Panel(title, Axis("a in N = k C^a"), names, tuple(marks))]
    if profile := found.get("profile_E"):
        panels.append(_profile(study, *profile))
    return Figure("certainty", "How sure", tuple(panels))


def _profile(study: Study, E: np.ndarray, rise: np.ndarray) -> Panel:
    third = study.results[3]
    order = np.argsort(np.append(E, third.law.E))
    E = np.append(E, third.law.E)[order]
    rise, (low, high) = np.append(rise, 1.0)[order], third.interval("E")
    marks = [
        Line(E, rise, "blue", "best objective", width=2),
        Points([third.law.E], [1.0], "blue", f"E = {third.law.E:.4g}", [f"E = {third.law.E:.6g}"], 4),
    ]
    if np.isfinite(low):
        marks.insert(0, Band(np.array([low, high]), np.zeros(2), np.full(2, 9.0), "blue", "95% by bootstrap"))
    near = E[rise < 1.6]
    across = Axis("E held fixed, nats", False, near.min(), max(near.max(), high))
    up = Axis("objective over its minimum", False, 0.97, 1.6)
    return Panel(f"How firmly E is held (N {study.settings.params})", across, up, tuple(marks))


# ---------------------------------------------------------------------------------------------------------------------
# Parts

LOSS = "loss, nats per token"


def _flops_axis(study: Study, x=None) -> Axis:
    low, high = (None, None) if x is None else (x[0], x[-1])
    return Axis(f"training FLOPs C ({study.flops_name})", True, low, high, powers=True)


def _params_axis(study: Study) -> Axis:
    return Axis(f"parameters N ({study.settings.params})", log=True)


def _reach(study: Study) -> np.ndarray:
    """FLOPs from the smallest run to three decades beyond the largest, or to the models that everybody knows."""
    high = 1e3 * study.C.max()
    if study.C.max() > 1e19:
        high = max(1e25, 10 * study.C.max())
    return np.exp(np.linspace(np.log(study.C.min()), np.log(high), 49))


def _advice(study: Study, x: np.ndarray, which: int) -> list:
    """What the laws of others and ours say that N (0), D (1) or D/N (2) should be."""
    return _others(study, x, which) + [mark for approach in study.approaches for mark in _with_band(approach, x, which)]


def _minima(approach: Approach) -> list[tuple]:
    """The bracketed budgets of Approach 2, each with what its resamples say of it ({}: nothing)."""
    sure = approach.sure
    return [(b, sure.at_budget(i) if sure else {}) for i, b in enumerate(approach.fit.budgets) if b.bracketed]


def _with_band(approach: Approach, x: np.ndarray, which: int) -> list:
    """The line of N (0), D (1) or D/N (2) against C, and its 95% band."""

    def quantity(law, C=x):
        N, D = law.optimal(C)
        return (N, D, D / N)[which]

    y, colour, dash = quantity(approach.law), COLOUR[approach.number], {1: "dash", 2: "dot", 3: ""}[approach.number]
    ends = [approach.interval(partial(quantity, C=C)) for C in x]
    band = [Band(x, *np.array(ends).T, colour)] if approach.sure else []
    return [*band, Line(x, y, colour, f"Approach {approach.number}", dash, 2.2)]


def _models(x: np.ndarray, which: int) -> list:
    """Models that everybody knows, where the figure reaches them."""
    marks = []
    for name, N, D, *sides in MODELS:
        if x[-1] >= 6 * N * D:
            anchor, shift = SIDES[sides[which > 0]]
            C, y = 6 * N * D, (N, D, D / N)[which]
            marks.append(Points([C], [y], "ink", "known models", [f"{name}: {count(N)} on {count(D)}"], 3.4, "cross"))
            marks.append(Note(C, y, name, anchor, shift))
    return marks


def _others(study: Study, x: np.ndarray, which: int) -> list:
    """What the laws of others say that N (0), D (1) or D/N (2) should be, in our FLOPs (see laws.advice)."""
    marks = []
    for law, colour, dash, label in (
        (HOFFMANN_1, "purple", "", "Hoffmann 2022, Approach 1"),
        (HOFFMANN_2, "purple", "dot", "Hoffmann 2022, Approach 2"),
        (HOFFMANN, "purple", "dash", "Hoffmann 2022, Approach 3"),
        (BESIROGLU, "grey", "dot", "Besiroglu 2024"),
        (KAPLAN, "red", "dash", "Kaplan 2020 (non-embedding)"),
    ):
        N, D = advice(law, study.cost, x)
        marks.append(Line(x, (N, D, D / N)[which], colour, label, dash))
    return marks


def distinct_powers(values: np.ndarray) -> list[str]:
    """Names such as 3×10^18 of two digits, or of as many as tell the values apart."""
    for digits in range(2, 8):
        names = [number(value, powers=True, digits=digits) for value in values]
        if len(set(names)) == len(names):
            break
    return names


def shade(values: np.ndarray) -> list[str]:
    """A colour for each, dark to bright with their logarithm."""
    log = np.log(values)
    at = (log - log.min()) / max(np.ptp(log), 1e-9)
    return [SCALE[min(int(9 * v), 8)] for v in at]


def _evenly(n: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


def _run(study: Study, i: int) -> str:
    name = f"{study.rows.labels['run'][i]}: " if "run" in study.rows.labels else ""
    return f"{name}N {count(study.N[i])}, D {count(study.D[i])}, C {study.C[i]:.3g}, loss {study.L[i]:.4f}"
