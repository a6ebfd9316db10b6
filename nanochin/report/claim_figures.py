"""Figures of the claims: what was measured, with 95% intervals where these are of the claim's effects."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nanochin.base.console import powers
from nanochin.report.colours import BLUE, GREEN, GREY, INK, PURPLE, RED, SKY
from nanochin.report.estimates import Effect, Kept, options
from nanochin.report.figures import forest
from nanochin.report.panels import axis, drawn, line, panels, points, whiskers

COLOURS = (BLUE, RED, GREEN, PURPLE, SKY)
Effects = dict[str, Effect]


def excess(axes: Axes, sweep: Kept, key: str, effects: Effects, title: str, label: str) -> None:
    """Excess loss over the first value of an option: a point per run, and the claim's effect with its interval."""
    groups = sweep.groups(key)
    models = dict.fromkeys(model for model, _ in groups)
    for model, colour, shift in zip(models, COLOURS, (0.985, 1.015, 1.03), strict=False):
        base = np.mean(groups[model, "1"])
        rows = [(float(value), 100 * (loss / base - 1)) for (m, value), v in groups.items() if m == model for loss in v]
        x, y = np.transpose(rows)
        points(axes, x * shift, y, colour, model, [f"{model}, {key} {a:g}: {b:+.2f}%" for a, b in rows], 2.6)
    found = {float(name): effect for name, effect in effects.items() if name.replace(".", "").isdigit()}
    whiskers(axes, found, [(100 * e.low, 100 * e.high) for e in found.values()], INK)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_title(title)
    axis(axes, "x", label, log=True, show=lambda v: f"{v:g}")
    axis(axes, "y", "excess loss in %")


@drawn
def schedule(effects: Effects, sweep: Kept, _horizons: Kept) -> Figure:
    figure, (axes,) = panels(1)
    excess(axes, sweep, "cycle", effects, "Cosines longer than the run", "length of the cosine / length of the run")
    return figure


@drawn
def repeats(effects: Effects, sweep: Kept, _books: Kept) -> Figure:
    figure, (axes,) = panels(1)
    excess(axes, sweep, "epochs", effects, "Equal tokens from ever fewer unique ones", "epochs")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=-1)
    axes.set_yticks(ticks := [0, 1, 3, 10, 30, 100, 300], [str(tick) for tick in ticks])
    return figure


@drawn
def sizes(_effects: Effects, low: Kept, high: Kept) -> Figure:
    figure, both = panels(2)
    for axes, sweep in zip(both, (low, high), strict=True):
        N, _, loss, C = sweep.columns()
        points(axes, N, loss, COLOURS[0], "a run", [row.run for row in sweep.rows], 3)
        mean = [(n, loss[n == N].mean()) for n in np.unique(N)]
        line(axes, *np.transpose(mean), COLOURS[0], "mean over seeds", width=1.2)
        axes.set_title(f"Sizes at {powers(C.mean())} FLOPs")
        axis(axes, "x", "parameters N", log=True)
        axis(axes, "y", "validation loss in nats")
    return figure


@drawn
def optimizers(_effects: Effects, adamw: Kept, adam: Kept) -> Figure:
    figure, (left, right) = panels(2)
    decays = dict.fromkeys(options(row.run)["weight_decay"] for row in adam.rows)
    kinds = [(adamw, "AdamW 0.1", "0.1"), (adamw, "no decay", "0")]
    kinds += [(adam, f"Adam, L2 {decay}", decay) for decay in decays]
    for (sweep, name, decay), colour in zip(kinds, COLOURS, strict=False):
        rows = [row for row in sweep.rows if options(row.run)["weight_decay"] == decay]
        times = np.array([float(options(row.run)["lr_times"]) for row in rows])
        loss = np.array([row.loss for row in rows])
        points(left, times, loss, colour, "", (), 2.6)
        tried = np.unique(times)
        means = [loss[times == one].mean() for one in tried]
        line(left, tried, means, colour, name, width=1.2)
        best = times == tried[np.argmin(means)]
        row = min((rows[i] for i in np.flatnonzero(best)), key=lambda row: row.seed)
        tokens, smoothed = sweep.curve(row.run, "tokens")
        line(right, tokens[20:] / row.tokens, smoothed[20:], colour, f"{name}, best rate", width=1.2)
    left.set_title("Rates")
    axis(left, "x", "multiple of the rate by rule", log=True, show=lambda v: f"{v:g}")
    axis(left, "y", "validation loss in nats")
    right.set_title("Training loss, first seed")
    axis(right, "x", "share of the run")
    axis(right, "y", "training loss, smoothed")
    return figure


@drawn
def exponents(effects: Effects, *_sweeps: Kept) -> Figure:
    """The differences of exponents that a claim is about."""
    figure, (axes,) = panels(1)
    forest(axes, [(name, e.value, (e.low, e.high), BLUE, f"{name}: {e.note}") for name, e in effects.items()], 0)
    axes.set_title("Change of the exponent a, with 95% intervals")
    axis(axes, "x", "difference of a")
    return figure


FIGURES: dict[int, Callable[..., Figure]] = {
    2: schedule,
    3: sizes,
    4: optimizers,
    6: exponents,
    8: repeats,
    16: exponents,
    19: exponents,
}
