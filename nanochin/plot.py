"""Figures as plain data, and two ways to draw them: SVG by hand, PNG by matplotlib.

    panel = Panel("Optimal size", Axis("training FLOPs", log=True), Axis("parameters", log=True), marks)
    to_svg(Figure("optimum", "What a budget should buy", (panel,)))       a text, light and dark, names on hover
    to_png(figure, file)                                                  needs matplotlib

The SVG stands in the report as it is, so the report needs numpy alone, follows the reader's light or dark screen and
tells which run a point is; none of this a plotting library gives. A panel is as wide as a phone and has its legend
below it, so a figure is panels side by side where there is room and one above the other where there is none.
"""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanochin.config import UserError

# Okabe and Ito's colours, which stay apart for colour-blind eyes, (light, dark) backgrounds; q0..q8 are viridis.
COLOURS = {
    "blue": ("#0072b2", "#56a9e0"),
    "orange": ("#d98c00", "#f0b133"),
    "green": ("#009e73", "#2fc39a"),
    "red": ("#d55e00", "#f5813f"),
    "purple": ("#b75c92", "#e39cc5"),
    "sky": ("#3f9fd8", "#8fd0f5"),
    "grey": ("#7a828c", "#8b95a1"),
    "ink": ("#1c2128", "#e6e9ee"),
}
VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#8fbf27", "#c3b70e")
VIRIDIS_DARK = ("#8f6fd6", "#7c83dd", "#6496dc", "#4fa9d0", "#43bcbc", "#4bcb9d", "#78d876", "#b3df4c", "#f5e626")
SCALE = [f"q{i}" for i in range(9)]
COLOURS |= {name: pair for name, *pair in zip(SCALE, VIRIDIS, VIRIDIS_DARK, strict=True)}

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 330, 58, 14, 34, 44  # of a panel, its legend not counted
LEGEND_ROW, CHARACTER = 17, 6.9  # px; a generous mean advance of 11.5 px sans-serif text, to wrap legends by


@dataclass(frozen=True)
class Axis:
    label: str  # with its unit
    log: bool = False
    low: float | None = None  # default: what the marks need
    high: float | None = None
    ticks: Sequence[tuple[float, str]] | None = None  # of named categories, for example
    powers: bool = False  # ticks as powers of ten, for FLOPs, rather than as 3M and 10B


@dataclass(frozen=True)
class Line:
    x: np.ndarray
    y: np.ndarray
    colour: str = "blue"
    label: str = ""  # in the legend
    dash: str = ""  # "", "dash" or "dot"
    width: float = 1.6
    hover: str = ""


@dataclass(frozen=True)
class Band:
    x: np.ndarray
    low: np.ndarray
    high: np.ndarray
    colour: str = "blue"
    label: str = ""


@dataclass(frozen=True)
class Points:
    x: np.ndarray
    y: np.ndarray
    colour: str | Sequence[str] = "blue"  # one for all or one for each
    label: str = ""
    hover: Sequence[str] = ()
    size: float = 3.2  # radius in px
    shape: str = "circle"  # circle, ring, diamond or cross
    x_range: tuple[np.ndarray, np.ndarray] | None = None  # ends of horizontal whiskers
    y_range: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class Note:
    """Words at a place in the plot, in ink, as all that is to be read; anchor as in SVG. The place must be inside the
    frame, the words may reach out of it."""

    x: float
    y: float
    text: str
    anchor: str = "start"  # start, middle, end
    shift: tuple[float, float] = (6, 4)  # px to the right and down


@dataclass(frozen=True)
class Panel:
    title: str
    x: Axis
    y: Axis
    marks: tuple


@dataclass(frozen=True)
class Figure:
    name: str  # of its files
    title: str
    panels: tuple[Panel, ...]
    caption: str = ""  # what to see in it


# ---------------------------------------------------------------------------------------------------------------------
# Axes


@dataclass(frozen=True)
class Scale:
    """From data to [0, 1], and where the ticks are."""

    low: float
    high: float
    log: bool
    ticks: list[tuple[float, str]]

    def __call__(self, value):
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                return (np.log(value) - math.log(self.low)) / math.log(self.high / self.low)
        return (np.asarray(value, float) - self.low) / (self.high - self.low)


def scale_of(axis: Axis, marks: Sequence, vertical: bool, room: int) -> Scale:
    """The axis with its limits and at most about `room` ticks. What is off a given limit is cut off by the frame."""
    values = np.concatenate([np.ravel(v) for mark in marks for v in _extent(mark, vertical)] or [np.ones(1)])
    values = values[np.isfinite(values) & ((values > 0) | (not axis.log))]
    values = values if len(values) else np.ones(1)
    low, high = float(values.min()), float(values.max())
    if axis.log:
        margin = max(high / low, 1.02) ** 0.045
        low, high = low / margin, high * margin
    else:
        margin = 0.045 * (high - low or abs(high) or 1)
        low, high = low - margin, high + margin
    low = axis.low if axis.low is not None else low
    high = axis.high if axis.high is not None else high
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one point, but for rounding
        low, high = low - 0.05 * (abs(low) or 1), high + 0.05 * (abs(high) or 1)
    ticks = axis.ticks if axis.ticks is not None else _ticks(low, high, axis.log, room, axis.powers)
    return Scale(low, high, axis.log, [(at, text) for at, text in ticks if low <= at <= high])


def _extent(mark, vertical: bool) -> list:
    if isinstance(mark, Note):
        return []
    if not vertical:
        return [mark.x, *(getattr(mark, "x_range", None) or ())]
    if isinstance(mark, Band):
        return [mark.low, mark.high]
    return [mark.y, *(getattr(mark, "y_range", None) or ())]


def _ticks(low: float, high: float, log: bool, room: int, powers: bool) -> list[tuple[float, str]]:
    if log and high / low > 30:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        step = max(1, math.ceil((last - first + 1) / room))
        digits = (1, 3) if 2 * (last - first + 1) <= room else (1,)
        return [
            (at, number(at, powers))
            for k in range(first - 1, last + 1)
            if k % step == 0
            for at in (float(f"{d}e{k}") for d in digits)
        ]
    if log and high / low > 3:
        first = math.floor(math.log10(low))
        return [
            (at, number(at, powers))
            for k in range(first, first + 3)
            for at in (float(f"{d}e{k}") for d in (1, 2, 3, 5))
        ]
    raw = (high - low) / room
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * d for d in (1, 2, 2.5, 5, 10) if size * d >= raw * 0.999)
    ticks = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    if max(abs(low), abs(high)) >= 1e4:
        return [(at, number(at, powers)) for at in ticks]
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) + (f"{step:e}"[2] == "5" and f"{step:e}"[0] == "2")
    return [(at, f"{at:.{digits}f}".replace("-", "\N{MINUS SIGN}")) for at in ticks]


def number(value: float, powers: bool = False, digits: int = 2) -> str:
    """A tick: 70B, 3M, 0.01; beyond 10 trillion, or with `powers`, 3×10^18, whose ^ both renderers raise."""
    if powers or value >= 1e14 or 0 < value < 1e-3:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return ("" if mantissa == "1" else f"{mantissa}×") + f"10^{int(power)}"
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


# ---------------------------------------------------------------------------------------------------------------------
# SVG

STYLE = (
    ".fig text{font:11.5px system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif;fill:var(--ink)}"
    ".fig .title{font-size:13px;font-weight:600}.fig .tick{fill:var(--soft);font-size:11px}"
    ".fig .note{font-size:10.5px;paint-order:stroke;stroke:var(--paper);stroke-width:3px;"
    "stroke-linejoin:round}"
    ".fig .grid{stroke:var(--grid);stroke-width:1}.fig .frame{fill:none;stroke:var(--edge);stroke-width:1}"
    ".fig .line{fill:none;stroke:var(--c);stroke-linejoin:round;stroke-linecap:round}"
    ".fig .band{fill:var(--c);opacity:.16}"
    ".fig .dash{stroke-dasharray:7 4}.fig .dot{stroke-dasharray:1.5 4}"
    ".fig .mark{fill:var(--c);fill-opacity:.85;stroke:var(--paper);stroke-width:.6}"
    ".fig .open{fill:var(--paper);stroke:var(--c);stroke-width:1.6}.fig .mark:hover,.fig .open:hover{stroke:var(--ink);"
    "stroke-width:2}" + "".join(f".fig .{name}{{--c:var(--{name})}}" for name in COLOURS)
)
_PAGE = {
    "paper": ("#ffffff", "#14181d"),
    "soft": ("#57606a", "#a3adb8"),
    "grid": ("#eceff2", "#262c34"),
    "edge": ("#c3cad1", "#444d57"),
}


def variables(scheme: int) -> str:
    """CSS variables of all colours; scheme 0 is light, 1 is dark."""
    return "".join(f"--{name}:{pair[scheme]};" for name, pair in {**COLOURS, **_PAGE}.items())


def to_svg(figure: Figure) -> str:
    """A file of its own: all panels side by side, with the style inside."""
    panels = [panel_svg(panel, f"{figure.name}{i}") for i, panel in enumerate(figure.panels)]
    height = max(panel_height(panel) for panel in figure.panels)
    width = WIDTH * len(panels)
    placed = "".join(
        panel.replace("<svg ", f'<svg x="{WIDTH * i}" width="{WIDTH}" height="{panel_height(p)}" ', 1)
        for i, (panel, p) in enumerate(zip(panels, figure.panels, strict=True))
    )
    style = f":root{{{variables(0)}}}@media(prefers-color-scheme:dark){{:root{{{variables(1)}}}}}{STYLE}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f"<title>{html.escape(figure.title)}</title><style>{style}</style>"
        f'<rect width="{width}" height="{height}" style="fill:var(--paper)"/>{placed}</svg>\n'
    )


def _words(text: str) -> str:
    """Text in SVG; what follows a ^ is raised: 10^18, C^a."""
    parts = re.split(r"\^(-?\w+)", html.escape(text))  # plain, raised, plain, raised, ..., plain
    back = '<tspan dy="4">\N{ZERO WIDTH SPACE}</tspan>'
    raised = [f'<tspan dy="-4" font-size="9">{part}</tspan>{back}' for part in parts[1::2]]
    return parts[0] + "".join(up + plain for up, plain in zip(raised, parts[2::2], strict=True))


def panel_height(panel: Panel) -> int:
    return HEIGHT + LEGEND_ROW * len(_legend_rows(panel)) + 8


def panel_svg(panel: Panel, name: str) -> str:
    """One panel; `name` must be unique on its page. Its classes want STYLE and `variables` around it."""
    x, y, box = scales(panel)
    left, right, top, bottom = box
    inside = [
        f'<clipPath id="{name}"><rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"/>'
        f'</clipPath><text class="title" x="13" y="18">{_words(panel.title)}</text>'
    ]
    for at, text in x.ticks:
        px = left + x(at) * (right - left)
        inside.append(
            f'<path class="grid" d="M{px:.1f} {top}V{bottom}"/>'
            f'<text class="tick" x="{px:.1f}" y="{bottom + 16}" text-anchor="middle">{_words(text)}'
            "</text>"
        )
    for at, text in y.ticks:
        py = bottom - y(at) * (bottom - top)
        inside.append(
            f'<path class="grid" d="M{left} {py:.1f}H{right}"/><text class="tick" x="{left - 6}" '
            f'y="{py + 3.5:.1f}" text-anchor="end">{_words(text)}</text>'
        )
    middle = (left + right) / 2
    inside.append(f'<text x="{middle:.0f}" y="{bottom + 36}" text-anchor="middle">{_words(panel.x.label)}</text>')
    if panel.y.label:
        middle = (top + bottom) / 2
        inside.append(
            f'<text transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">'
            f"{_words(panel.y.label)}</text>"
        )
    place = _Place(x, y, box)
    inside.append(
        f'<g clip-path="url(#{name})">'
        + "".join(_draw(mark, place) for mark in panel.marks if not isinstance(mark, Note))
        + "</g>"
    )
    inside.append(f'<rect class="frame" x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"/>')
    inside += [_draw(mark, place) for mark in panel.marks if isinstance(mark, Note)]
    inside += [_legend_row(row, HEIGHT + 11 + LEGEND_ROW * i) for i, row in enumerate(_legend_rows(panel))]
    return (
        f'<svg class="fig" viewBox="0 0 {WIDTH} {panel_height(panel)}" role="img" '
        f'aria-label="{html.escape(panel.title)}">' + "".join(inside) + "</svg>"
    )


def scales(panel: Panel) -> tuple[Scale, Scale, tuple[float, float, float, float]]:
    """(x, y, (left, right, top, bottom)) of a panel; long tick labels get the room they need."""
    y = scale_of(panel.y, panel.marks, vertical=True, room=6)
    x = scale_of(panel.x, panel.marks, vertical=False, room=6)
    widest = max((len(text) for _, text in y.ticks), default=0)
    left = max(LEFT, round(widest * CHARACTER) + (26 if panel.y.label else 12))
    return x, y, (left, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM)


@dataclass(frozen=True)
class _Place:
    x: Scale
    y: Scale
    box: tuple[float, float, float, float]

    def __call__(self, x, y) -> np.ndarray:
        """(n, 2) px, far-off values kept within what every renderer can draw."""
        left, right, top, bottom = self.box
        px = left + self.x(np.atleast_1d(np.asarray(x, float))) * (right - left)
        py = bottom - self.y(np.atleast_1d(np.asarray(y, float))) * (bottom - top)
        return np.clip(np.stack(np.broadcast_arrays(px, py), axis=1), -9999, 9999)


def _draw(mark, place: _Place) -> str:
    match mark:
        case Line():
            hover = f"<title>{html.escape(mark.hover or mark.label)}</title>" if mark.hover or mark.label else ""
            return (
                f'<path class="line {mark.colour} {mark.dash}" stroke-width="{mark.width}" '
                f'd="{_path(place(mark.x, mark.y))}">{hover}</path>'
            )
        case Band():
            edge = np.concatenate([place(mark.x, mark.low), place(mark.x, mark.high)[::-1]])
            edge = edge[np.isfinite(edge).all(1)]
            return f'<path class="band {mark.colour}" d="{_path(edge)}Z"/>' if len(edge) else ""
        case Note():
            if not (-1e-9 <= place.x(mark.x) <= 1 + 1e-9 and -1e-9 <= place.y(mark.y) <= 1 + 1e-9):  # nor nan
                return ""
            ((px, py),) = place(mark.x, mark.y) + np.array(mark.shift)
            return (
                f'<text class="note" x="{px:.1f}" y="{py:.1f}" text-anchor="{mark.anchor}">{_words(mark.text)}</text>'
            )
    drawn = []
    for ends, horizontal in ((mark.x_range, True), (mark.y_range, False)):
        if ends is not None:
            pairs = [place(end, mark.y) if horizontal else place(mark.x, end) for end in ends]
            path = "".join(
                f"M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}"
                for (a, b), (c, d) in zip(*pairs, strict=True)
                if math.isfinite(a + b + c + d)
            )
            colour = mark.colour if isinstance(mark.colour, str) else "ink"
            drawn.append(f'<path class="line {colour}" stroke-width="1.6" d="{path}"/>')
    same = isinstance(mark.colour, str)
    for i, (px, py) in enumerate(place(mark.x, mark.y)):
        if math.isfinite(px) and math.isfinite(py):
            hover = f"<title>{html.escape(mark.hover[i])}</title>" if len(mark.hover) else ""
            drawn.append(_symbol(px, py, mark, mark.colour if same else mark.colour[i], hover))
    return "".join(drawn)


def _path(points: np.ndarray) -> str:
    """'M1 2L3 4...', a new start after every gap."""
    parts, pen = [], "M"
    for px, py in points:
        if math.isfinite(px) and math.isfinite(py):
            parts.append(f"{pen}{px:.1f} {py:.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


def _symbol(px: float, py: float, mark: Points, colour: str, inside: str = "") -> str:
    r = mark.size
    if mark.shape in ("circle", "ring"):
        kind = "open" if mark.shape == "ring" else "mark"
        return f'<circle class="{kind} {colour}" cx="{px:.1f}" cy="{py:.1f}" r="{r}">{inside}</circle>'
    if mark.shape == "cross":
        d = f"M{px - r:.1f} {py - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}"
        return f'<path class="line {colour}" stroke-width="1.6" d="{d}">{inside}</path>'
    d = f"M{px:.1f} {py - 1.35 * r:.1f}l{1.35 * r} {1.35 * r}l{-1.35 * r} {1.35 * r}l{-1.35 * r} {-1.35 * r}Z"
    return f'<path class="mark {colour}" d="{d}">{inside}</path>'


def _legend_rows(panel: Panel) -> list[list]:
    """Marks with a label, as many a row as fit; a label that occurs twice (a line and its band) is named once."""
    rows, room, seen = [], 0.0, set()
    for mark in panel.marks:
        label = getattr(mark, "label", "")
        if not label or label in seen:
            continue
        seen.add(label)
        needs = 34 + CHARACTER * len(label)
        if not rows or needs > room:
            rows.append([])
            room = WIDTH - 20.0
        rows[-1].append(mark)
        room -= needs
    return rows


def _legend_row(row: list, y: float) -> str:
    x, drawn = 14.0, []
    for mark in row:
        colour = mark.colour if isinstance(mark.colour, str) else mark.colour[len(mark.colour) // 2]
        if isinstance(mark, Line):
            drawn.append(f'<path class="line {colour} {mark.dash}" stroke-width="2" d="M{x} {y}h20"/>')
        elif isinstance(mark, Band):
            drawn.append(f'<path class="band {colour}" d="M{x} {y - 5}h20v10h-20Z"/>')
        else:
            drawn.append(_symbol(x + 10, y, mark, colour))
        drawn.append(f'<text x="{x + 25}" y="{y + 4}">{_words(mark.label)}</text>')
        x += 34 + CHARACTER * len(mark.label)
    return "".join(drawn)


# ---------------------------------------------------------------------------------------------------------------------
# PNG


def to_png(figure: Figure, path) -> None:
    """The same figure by matplotlib, light. Raises UserError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise UserError("PNG figures need matplotlib: pip install matplotlib") from None
    width, height = WIDTH * len(figure.panels), max(panel_height(panel) for panel in figure.panels)
    canvas = Canvas(figsize=(width / 100, height / 100), dpi=180)
    FigureCanvasAgg(canvas)
    for i, panel in enumerate(figure.panels):
        x, y, (left, right, top, bottom) = scales(panel)
        place = ((WIDTH * i + left) / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height)
        axes = canvas.add_axes(place)  # the same place as in the SVG
        for scale, name, label in ((x, "x", panel.x.label), (y, "y", panel.y.label)):
            axes.set(**{f"{name}scale": "log" if scale.log else "linear", f"{name}lim": (scale.low, scale.high)})
            getattr(axes, f"set_{name}label")(_math(label), fontsize=8)
            getattr(axes, f"set_{name}ticks")([at for at, _ in scale.ticks], [_math(text) for _, text in scale.ticks])
        axes.minorticks_off()
        axes.tick_params(labelsize=7.5, length=2)
        axes.grid(color=_PAGE["grid"][0])
        axes.set_axisbelow(True)
        axes.spines[:].set_color(_PAGE["edge"][0])
        canvas.text((WIDTH * i + 13) / width, 1 - 18 / height, _math(panel.title), fontsize=9, weight="bold")
        for mark in panel.marks:
            _plot(axes, mark)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        for k, row in enumerate(_legend_rows(panel)):
            corner = ((WIDTH * i + 8) / width, 1 - (HEIGHT + LEGEND_ROW * k) / height)
            labels = [_math(mark.label) for mark in row]
            canvas.legend([handles[label] for label in labels], labels, loc="upper left", bbox_to_anchor=corner,
                          ncols=len(row), fontsize=7, frameon=False, borderaxespad=0, columnspacing=1.2)  # fmt: skip
    canvas.savefig(path, format="png")


def _math(text: str) -> str:
    return re.sub(r"(\w+)\^(-?\w+)", r"$\\mathdefault{\1^{\2}}$", text)


def _plot(axes, mark) -> None:
    def paint(colour):
        return COLOURS[colour][0] if isinstance(colour, str) else [COLOURS[name][0] for name in colour]

    colour = paint(getattr(mark, "colour", "ink"))
    known = {text.get_label() for text in axes.get_children()}
    label = _math(mark.label) if getattr(mark, "label", "") and _math(mark.label) not in known else None
    match mark:
        case Line():
            style = {"dash": (0, (5, 2)), "dot": (0, (1, 2))}.get(mark.dash, "-")
            axes.plot(mark.x, mark.y, color=colour, linestyle=style, linewidth=0.9 * mark.width, label=label)
        case Band():
            axes.fill_between(mark.x, mark.low, mark.high, color=colour, alpha=0.16, linewidth=0, label=label)
        case Note():
            shift = (0.75 * mark.shift[0], -0.75 * mark.shift[1])
            align = {"start": "left", "middle": "center", "end": "right"}[mark.anchor]
            axes.annotate(
                mark.text,
                (mark.x, mark.y),
                shift,
                textcoords="offset points",
                fontsize=7,
                color=colour,
                ha=align,
                annotation_clip=True,
            )
        case Points():
            for ends, error in ((mark.x_range, "xerr"), (mark.y_range, "yerr")):
                if ends is not None:
                    middle = np.asarray(mark.x if error == "xerr" else mark.y, float)
                    reach = np.abs(np.stack([middle - ends[0], ends[1] - middle]))
                    axes.errorbar(mark.x, mark.y, **{error: reach}, fmt="none", ecolor=colour, elinewidth=1.2)
            ring = mark.shape == "ring"
            face = {"facecolors": "white", "edgecolors": colour} if ring else {"c": colour}
            axes.scatter(
                mark.x,
                mark.y,
                s=(1.6 * mark.size) ** 2,
                label=label,
                zorder=3,
                **face,
                marker={"diamond": "D", "cross": "x"}.get(mark.shape, "o"),
                linewidths=1.2 if ring or mark.shape == "cross" else 0,
            )
