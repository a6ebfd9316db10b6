"""Figures: they show what the fits found, and their files are valid and name every run."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from conftest import MARKUP, SHOWN

from nanochin import laws
from nanochin.base.console import shown
from nanochin.report import colours, figures, panels
from nanochin.report.figures import isoflop, optimum, surface

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def made(checked):
    """(analysis, figures)"""
    analysis, results = checked
    return analysis, figures.draw(analysis, {name: one.found for name, one in results.items()})


def labelled(axes, label):
    """The one mark of the axes with this label."""
    (mark,) = [mark for mark in axes.get_children() if mark.get_label() == label]
    return mark


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn


def test_lines_are_the_law(made):
    """N, D and D / N of every approach and of published laws, from the smallest run to 1000 times the largest."""
    analysis, drawn = made
    axes = *drawn["optimum"].axes, drawn["surface"].axes[1]
    known = {f"Approach {one.number}": one.law for one in analysis.approaches}
    known |= {"Besiroglu 2024": replace(laws.BESIROGLU, cost=analysis.cost), "Kaplan 2020 (non-embedding)": laws.KAPLAN}
    for label, law in known.items():
        for which, one in enumerate(axes):
            C, y = labelled(one, label).get_data()
            N, D = law.optimal(C)
            np.testing.assert_allclose(y, (N, D, D / N)[which], rtol=1e-9)
            assert C[0] == pytest.approx(analysis.C.min()) and C[-1] == pytest.approx(1e3 * analysis.C.max())


def test_every_run_is_a_point(made):
    """In the isoFLOP curves, the surface and the residuals, at its values; more than 2500 are thinned."""
    analysis, drawn = made
    runs = np.stack([analysis.N, analysis.L], 1)
    shown = np.concatenate([one.get_offsets() for one in drawn["isoflop"].axes[0].collections])
    assert all((np.abs(shown / run - 1) < 1e-12).all(1).any() for run in runs)
    np.testing.assert_allclose(
        labelled(drawn["surface"].axes[0], "runs, coloured by their loss").get_offsets(),
        np.stack([analysis.D, analysis.N], 1),
    )
    left = drawn["residuals"].axes[0]
    cloud = next(one for one in left.collections if len(one.get_offsets()) == len(runs))
    law = analysis.results[3].law
    off = 100 * np.log(law.loss(analysis.N, analysis.D) / analysis.L)
    np.testing.assert_allclose(cloud.get_offsets()[:, 1], off, rtol=1e-6, atol=1e-9)
    assert len(figures._evenly(10_000, figures.MOST)) == 2500


def test_the_band_is_the_interval(made):
    """The edges of a band are the 95% interval of the optimum."""
    analysis, drawn = made
    third, axes = analysis.results[3], drawn["optimum"].axes[0]
    C = labelled(axes, "Approach 3").get_xdata()
    band = [one for one in axes.collections if type(one).__name__.startswith("Fill")][-1]
    edges = band.get_paths()[0].vertices
    for budget in C[[0, 20, -1]]:
        ends = third.interval(lambda law, budget=budget: law.optimal(budget)[0])
        drawn_there = edges[np.isclose(edges[:, 0], budget, rtol=1e-9), 1]
        assert drawn_there.min() == pytest.approx(ends[0]) and drawn_there.max() == pytest.approx(ends[1])


def test_figures_without_some_approaches(made):
    """Without a law the surface is only D / N; without Approach 2 there are no isoFLOP curves."""
    analysis, _ = made
    refused = laws.NotIdentified("as the test says")
    without = replace(analysis, results={**analysis.results, 2: refused, 3: refused}, law=refused)
    assert isoflop(without) is None and figures.residuals(without, None) is None
    assert len(surface(without).axes) == 1
    assert not [mark for mark in optimum(without).axes[0].get_children() if mark.get_label() == "Approach 3"]


@pytest.mark.parametrize("alpha, beta", [(0.33, 0.37), (0.05, 0.6)])
def test_labels_of_contours(made, alpha, beta):
    """Contours have the law's loss; more than half have a label, at that loss, in the frame, over no run or label."""
    law = replace(made[0].results[3].law, alpha=alpha, beta=beta, E=1.0, A=0.5 * 5e5**alpha, B=0.5 * 2e7**beta)
    analysis = replace(made[0], L=law.loss(made[0].N, made[0].D))
    figure, (axes,) = panels.panels(1)
    figures._contours(axes, analysis, law)
    figure.draw_without_rendering()
    (contours,) = [one for one in axes.collections if hasattr(one, "levels")]
    for level, path in zip(contours.levels, contours.get_paths(), strict=True):
        D, N = path.vertices.T
        np.testing.assert_allclose(law.loss(N, D), level, rtol=2e-3)
    runs, boxes = axes.transData.transform(np.stack([analysis.D, analysis.N], 1)), []
    for text in axes.texts:
        D, N = text.get_position()
        assert float(text.get_text()) == pytest.approx(law.loss(N, D), rel=5e-3)
        middle, size = axes.transData.transform((D, N)), 12.0  # px from the middle of a label to its end
        assert (axes.bbox.min <= middle - size).all() and (middle + size <= axes.bbox.max).all()
        assert (np.hypot(*(runs - middle).T) > 5).all() and all(np.hypot(*(middle - box)) > size for box in boxes)
        boxes.append(middle)
    assert len(contours.levels) == 9 and len(axes.texts) >= 5


# ---------------------------------------------------------------------------------------------------------------------
# Panels and files


@pytest.mark.parametrize(
    "low, high, log",
    [(2.1, 2.9, True), (1e12, 6.4e13, True), (1e-6, 1e-2, True), (1e11, 1e31, True), (-0.3, 0.7, False)],
)
def test_ticks(low, high, log):
    """Any range gets 2 to 9 ticks with distinct labels."""
    figure, (axes,) = panels.panels(1)
    panels.axis(axes, "x", "x", log, (low, high))
    figure.draw_without_rendering()
    ticks = [(tick.get_loc(), tick.label1.get_text()) for tick in axes.xaxis.get_major_ticks()]
    ticks = [(at, text) for at, text in ticks if low <= at <= high]
    assert 2 <= len(ticks) == len({text for _, text in ticks}) <= 9


def test_svg_files_parse_and_name_every_run(made):
    """Each is XML that loads nothing, its panels have all that the file has, and every run and curve has a title."""
    analysis, drawn = made
    titles = {}
    for name, figure in drawn.items():
        text, elements = panels.svg(figure, name)
        root = ET.fromstring(text)
        assert root.tag == f"{SVG}svg" and not re.search(r"https?://(?!www.w3.org/2000/svg)", text)
        assert all(one.get("href", "#").startswith("#") for one in root.iter())
        titles[name] = [element.text for element in root.iter(f"{SVG}title")]
        inside = [ET.fromstring(element) for element in elements]
        assert [one.text for panel in inside for one in panel.iter("title")] == titles[name]
        assert len(inside) == len(figure.axes)
        ids = [one.get("id") for panel in inside for one in panel.iter() if one.get("id")]
        assert len(ids) == len(set(ids)) and "nan" not in text.lower()
    for name in ("isoflop", "surface", "residuals"):
        for i in range(len(analysis.N)):
            run = shown(analysis.rows.labels["run"][i])
            assert any(title.startswith(f"{run}: N ") for title in titles[name]), (name, i)
    assert sum(": N = " in title for title in titles["curves"]) == len(analysis.N)
    for name in (MARKUP, SHOWN):
        assert any(title.startswith(name) for title in titles["isoflop"])


def test_odd_marks_are_drawn():
    """Empty points, gaps in lines and infinite ends do not break a figure, and names stay with their points."""
    nan = np.nan

    @panels.drawn
    def odd():
        figure, (axes,) = panels.panels(1)
        panels.points(axes, [], [], colours.RED, "none")
        panels.line(axes, [1, nan, 3, 4], [1, 2, nan, 4], colours.BLUE)
        panels.band(axes, [1, 2, 3], [0.5, nan, 1], [2, np.inf, 2], colours.BLUE)
        panels.whiskers(axes, [1, 2, 3], [(0.5, 2), None, (nan, nan)], colours.INK)
        panels.points(axes, [1, 2], [1, 2], [colours.RED, colours.BLUE], "two", ["<p>", "q"], shape="ring")
        panels.points(axes, [1], [1.5], colours.INK, "a < b & c", ["r"], shape="x")
        panels.axis(axes, "x", "C^a <x>")
        panels.axis(axes, "y", "y & z", log=True)
        return figure

    figure = odd()
    text, (element,) = panels.svg(figure, "odd")
    root = ET.fromstring(element)
    assert "nan" not in text and [title.text for title in root.iter("title")] == ["<p>", "q", "r"]
    assert {"a < b & c", "y & z"} <= {"".join(one.itertext()) for one in root.iter("text")}
    assert panels.png(figure)[:8] == b"\x89PNG\r\n\x1a\n"
