"""The look of figures: panels side by side, each as wide as a phone, with the legend below; and their files.

    @drawn
    def sizes(analysis):
        figure, (left, right) = panels(2)           # a matplotlib Figure and the Axes of its panels
        points(left, analysis.N, analysis.L, BLUE, "runs", names)
        axis(left, "x", "parameters N", log=True)
        return figure

    text, elements = svg(figure, "sizes")           # a file; its panels for a page, which may stack them

Text stays text in the SVG, in the font of the page, and marks show their names on hover.
"""

import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from nanochin.base.console import count, powers, shown

STYLE = Path(__file__).with_name("figures.mplstyle")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 330, 58, 18, 34, 44  # px of a panel without its legend
LEGEND_ROW, LEGEND_MARK, CHARACTER = 18, 48, 6.9  # px; a generous mean width of a character
DPI = 72  # as in STYLE: a point is a px
MOST_NAMED = 500  # points with a name on hover
NAMES = "\N{LINE SEPARATOR}"  # before each name in the gid of an artist
STEPS = (1, 2, 2.5, 5, 10)  # of linear ticks
PLAIN, SMALL = "0123456789-a", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵃ"


def drawn(function: Callable) -> Callable:
    """A function that draws on `panels`, in our style; places titles and legends."""

    @wraps(function)
    def styled(*args) -> Figure | None:
        with matplotlib.rc_context(fname=STYLE):
            if figure := function(*args):
                _lay_out(figure)
            return figure

    return styled


def panels(n: int) -> tuple[Figure, list[Axes]]:
    """A figure of n panels side by side."""
    figure = Figure((n * WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
    box = LEFT / WIDTH, BOTTOM / HEIGHT, (WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT
    return figure, [part.add_axes(box) for part in figure.subfigures(1, n, squeeze=False, wspace=0)[0]]


def _lay_out(figure: Figure) -> None:
    """Make room for long tick labels, align the title to the panel, put the legend below."""
    height = max(_legend(axes)[2] for axes in figure.axes)
    figure.set_size_inches(figure.get_figwidth(), height / DPI)
    for axes in figure.axes:
        widest = max((len(text.get_text()) for text in axes.get_yticklabels()), default=0)
        left = max(LEFT, round(CHARACTER * widest) + (26 if axes.get_ylabel() else 12))
        wide = WIDTH - left - RIGHT
        axes.set_position(
            (left / WIDTH, 1 - (HEIGHT - BOTTOM) / height, wide / WIDTH, (HEIGHT - TOP - BOTTOM) / height)
        )
        axes.set_title(axes.get_title("left"), x=(13 - left) / wide)
        found, columns, _ = _legend(axes)
        corner = 8 / WIDTH, 1 - HEIGHT / height
        legend = axes.figure.legend(found.values(), found, ncols=columns, loc="upper left", bbox_to_anchor=corner)
        for one in legend.get_lines():
            one.set_linewidth(2)


def _legend(axes: Axes) -> tuple[dict[str, Artist], int, int]:
    """({label: mark}, columns, height of the panel in px), with as few rows as fit, filled column by column."""
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    for rows in range(len(found) + 1):
        columns = math.ceil(len(found) / max(rows, 1)) or 1
        longest = (max(map(len, column), default=0) for column in np.array_split([*found], columns))
        if sum(LEGEND_MARK + CHARACTER * length for length in longest) <= WIDTH:
            break
    return found, columns, HEIGHT + 8 + LEGEND_ROW * math.ceil(len(found) / columns)


class _LogTicks(LogLocator):
    """Powers of ten; on shorter axes times 1 and 3, or 1, 2, 3 and 5; on the shortest linear steps."""

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        decades = math.log10(vmax / vmin)
        if decades < 0.5:
            return MaxNLocator(6, steps=STEPS).tick_values(vmin, vmax)
        digits, step = (1,) if decades > 3.2 else (1, 3) if decades > 1.5 else (1, 2, 3, 5), math.ceil(decades / 7)
        exponents = range(math.floor(math.log10(vmin)), math.ceil(math.log10(vmax)) + 1)
        return [float(f"{digit}e{k}") for k in exponents if k % step == 0 for digit in digits]


def axis(
    axes: Axes, which: str, label: str, log: bool = False, limits: tuple | None = None, show: Callable = count
) -> None:
    """Label, scale and limits of the axis `which`, "x" or "y"; `show` formats the ticks of a log axis."""
    axes.set(**{f"{which}label": raised(label), f"{which}scale": "log" if log else "linear"})
    one = getattr(axes, f"{which}axis")
    if log:
        one.set_major_locator(_LogTicks())
        one.set_minor_locator(NullLocator())
        one.set_major_formatter(lambda value, _: raised(show(value) if 1e-3 <= value < 1e15 else powers(value)))
    else:
        one.set_major_locator(MaxNLocator(6, steps=STEPS))
    if limits:
        axes.set(**{f"{which}lim": limits})


def raised(text: str) -> str:
    """'C^a, 10^-3' -> 'Cᵃ, 10⁻³'"""
    return re.sub(r"\^(-?\w+)", lambda up: up[1].translate(str.maketrans(PLAIN, SMALL)), text)


# ---------------------------------------------------------------------------------------------------------------------
# Marks


def line(axes: Axes, x, y, colour: str, label: str = "", dash: str = "-", width: float = 1.6, hover: str = "") -> None:
    (mark,) = axes.plot(x, y, color=colour, label=label, linestyle=dash, linewidth=width, solid_joinstyle="round")
    if hover or label:
        _name(mark, [hover or label])


def band(axes: Axes, x, low, high, colour: str, label: str = "") -> None:
    finite = np.isfinite(low) & np.isfinite(high)
    axes.fill_between(x, low, high, finite, color=colour, alpha=0.16, linewidth=0, label=label)


def points(
    axes: Axes, x, y, colour, label: str = "", hover: Sequence[str] = (), radius: float = 3.2, shape: str = "o"
) -> None:
    """`colour`: one, or a list of one per point; `shape`: a marker of matplotlib, or "ring"."""
    style = {"color": colour, "linewidths": 1.6, "marker": shape}
    if shape == "ring":
        style = {"facecolors": "white", "edgecolors": colour, "linewidths": 1.6}
    elif shape != "x":
        style |= {"edgecolors": "white", "linewidths": 0.6}
    marks = axes.scatter(x, y, s=(2 * radius) ** 2, label=raised(label), zorder=3, **style)
    if len(hover) <= MOST_NAMED:
        _name(marks, hover)


def whiskers(axes: Axes, at, ends: Iterable, colour: str, horizontal: bool = False) -> None:
    """Intervals (low, high) at each of `at`; None or nan: none."""
    rows = [(x, *pair) for x, pair in zip(at, ends, strict=True) if pair is not None and np.isfinite(pair).all()]
    if rows:
        (axes.hlines if horizontal else axes.vlines)(*np.transpose(rows), color=colour, linewidth=1.6)


def note(axes: Axes, place: tuple, text: str, align: str, shift: tuple, xycoords: str = "data") -> None:
    axes.annotate(text, place, shift, xycoords, "offset points", ha=align, fontsize=10.5, annotation_clip=True)


def _name(artist: Artist, names: Sequence[str]) -> None:
    """`svg` turns these into titles of the marks, visible on hover."""
    artist.set_gid("".join(NAMES + shown(name) for name in names))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=1.8 * DPI)
    return file.getvalue()


def svg(figure: Figure, name: str) -> tuple[str, list[str]]:
    """(a file, each panel as an element of HTML), reproducible; marks have their names as titles. `name`, unique on a
    page, makes ids unique."""
    file, nothing = io.BytesIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}, STYLE):
        figure.savefig(file, format="svg", metadata=nothing)
    root = ET.fromstring(file.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # HTML knows no namespaces
        found = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        for key in ("d", "x", "y", "transform"):
            if key in found:
                found[key] = re.sub(r"(\.\d\d)\d+", r"\1", found[key])  # a hundredth of a px is enough
        element.attrib = found
    for group in root.iter("g"):
        names = group.attrib.pop("id", "").split(NAMES)[1:]
        marks = [*group.iter("use")] or [*group.findall("path"), *group.findall("g/path")]
        if len(names) == len(marks):
            for mark, title in zip(marks, names, strict=True):
                ET.SubElement(mark, "title").text = title
    for text in root.iter("text"):  # raised digits are easier to read than a font's superscripts
        if up := re.fullmatch(f"(.*?)([{SMALL}]+)", text.text or ""):
            text.text, plain = up[1], up[2].translate(str.maketrans(SMALL, PLAIN))
            ET.SubElement(text, "tspan", dy="-4", style="font-size: 0.8em").text = plain
    root.set("xmlns", "http://www.w3.org/2000/svg")
    whole = ET.tostring(root, "unicode")
    parts, shared = root.find("g").findall("g")[-len(figure.axes) :], root.findall("defs")[1:]  # the first is a style
    parts[0].extend(shared)
    elements = []
    for i, (part, axes) in enumerate(zip(parts, figure.axes, strict=True)):
        place = f"{i * WIDTH} 0 {WIDTH} {_legend(axes)[2]}"
        element = ET.Element("svg", {"viewBox": place, "role": "img", "aria-label": axes.get_title("left")})
        element.append(part)
        elements.append(ET.tostring(element, "unicode"))
    return whole, elements
