"""Figures and the report: whole, self-contained, and with the numbers of laws.json."""

import html
import io
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from made_up_sweep import sweep, write_sweep

from nanochin import figures, laws, plot, report
from nanochin.answers import Questions, answer, optimum
from nanochin.checks import four, run_checks, three
from nanochin.config import UserError
from nanochin.console import count
from nanochin.curves import curves_of_runs
from nanochin.plot import COLOURS, Axis, Band, Figure, Line, Note, Panel, Points
from nanochin.rows import Labels, read_rows
from nanochin.study import Settings, study_runs

VOID = {"meta", "input", "br"}  # never closed


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(study, outcomes, figures, report) of a sweep with curves, whose first run has a name made of markup."""
    folder = write_sweep(tmp_path_factory.mktemp("report") / 'a<b>&"c', sweep(physical=0.5))
    rows = read_rows(folder)
    curves = curves_of_runs(folder, rows)
    names = rows.labels["run"]
    rows.labels["run"] = Labels(names.codes, ('<i>"&evil</i>', *names.values[1:]))
    study = study_runs(rows, curves, Settings(bootstrap=200))
    outcomes = run_checks(study)
    drawn = draw(study, outcomes)
    return study, outcomes, drawn, render(study, outcomes, drawn, Questions((1e12, 1e13, 1e15)))


def draw(study, outcomes) -> list[Figure]:
    return figures.draw(study, {name: one.found for name, one in outcomes.items()})


def render(study, outcomes, drawn, asked) -> str:
    answers = answer(study.best, asked)
    return report.render(study, outcomes, drawn, asked, answers, [], report.Provenance("a < b", "c0ffee", "1"))


class Page(HTMLParser):
    """Collects tags and text; fails at the first tag that is closed without having been opened."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.ids, self.text = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


# ---------------------------------------------------------------------------------------------------------------------
# The report


def test_html_is_well_formed_and_needs_nothing_from_outside(made):
    """Every tag is closed, no id is there twice, and nothing is loaded: no link, image, font or script of others."""
    page = Page(made[3])
    assert page.open == [] and len(page.ids) == len(set(page.ids))
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "a", "use"), tag
        assert not {"src", "href", "xlink:href", "srcset"} & attributes.keys()
    assert not re.search(r"@import|https?://|url\((?!#)", made[3])


def test_names_are_text_and_never_markup(made):
    """A run, a path or a command with angle brackets is shown as it is."""
    assert '<i>"&evil' not in made[3] and "&lt;i&gt;&quot;&amp;evil" in made[3]
    assert 'a<b>&"c' not in made[3] and "a&lt;b&gt;&amp;&quot;c/runs.csv" in made[3] and "a &lt; b" in made[3]


def test_the_numbers_are_those_of_the_laws(made):
    """Constants to six digits and intervals to four as in laws.json; the exponents of all approaches to three."""
    study, _, _, page = made
    text = " ".join(Page(page).text)
    third = study.results[3].fit.to_json(study.results[3].sure)
    for name in ("E", "A", "B", "alpha", "beta", "a", "b", "G"):
        assert _is_shown(third[name], 6, text), name
        low, high = third["ci"][name]
        assert _is_shown(low, 4, text) and _is_shown(high, 4, text), name
    for number, digits in ((1, 3), (2, 3), (3, 6)):
        approach = study.results[number]
        found = approach.fit.to_json(approach.sure)
        low, high = found["ci"]["a"] if number == 3 else found["a_ci"]
        assert _is_shown(found["a"], digits, text) and _is_shown(low, 3, text) and _is_shown(high, 3, text), number


def _is_shown(value: float, digits: int, text: str) -> bool:
    """Some number of the text is this one, rounded to so many significant digits."""
    shown = (float(word) for word in re.findall(r"(?<![\d.])\d+\.?\d*(?:e[+-]?\d+)?", text))
    return any(abs(number - value) <= 0.5000001 * 10 ** (np.floor(np.log10(value)) + 1 - digits) for number in shown)


def test_provenance_is_there(made):
    """Command, commit, hash of the data and counting convention."""
    study, _, _, page = made
    for fact in ("c0ffee", study.rows.sha256, "N total, C physical"):
        assert fact in page


def test_the_embedded_table_is_the_law(made):
    """Straight lines in log-log between the embedded optima, which is what the script draws, meet the law's own
    optimum within a thousandth, at budgets between the rows of the table."""
    study, _, _, page = made
    data = json.loads(re.search(r'id="law">(.*?)</script>', page).group(1))
    columns, best = data["columns"], study.best
    x = np.log(columns["C"])
    assert (np.diff(x) > 0).all() and data["high"] == study.C.max()
    for C in (3.3e12, 7.7e13, 1.1e16):
        N, D = best.law.optimal(C)
        for name, value in (("params", N), ("tokens", D), ("tokens_per_param", D / N)):
            assert np.exp(np.interp(np.log(C), x, np.log(columns[name]))) == pytest.approx(value, rel=2e-3)
            low, high = (np.interp(np.log(C), x, np.log(columns[f"{name}_{end}"])) for end in ("low", "high"))
            assert np.exp(low) < value < np.exp(high)


def test_doubts_come_first(made):
    """Of the sentences, those that should worry the reader stand above those that should not, and between them what
    could not be checked."""
    items = re.findall(r'<li class="(ok|doubt|not-checked)">', made[3])
    order = ["doubt", "not-checked", "ok"]
    assert items == sorted(items, key=order.index) and len(items) >= 5


def test_a_report_of_approach_2_alone(made):
    """Where Approach 3 has no law, the report and every figure that is left do without it."""
    study = made[0]
    refused = laws.NotIdentified("E is at its bound: <not> identified")
    without = replace(study, results={**study.results, 3: refused})
    outcomes = run_checks(without)
    drawn = draw(without, outcomes)
    page = render(without, outcomes, drawn, Questions((1e12, 1e13)))
    assert [outcomes[name].json for name in ("delta", "near_minimum", "residuals_by_compute")] == [[], [], []]
    assert outcomes["kaplan_procedure"].status == outcomes["profile_E"].status == "not checked"
    assert re.search('<li class="not-checked">Kaplan.s procedure could not', html.unescape(page))
    assert Page(page).open == [] and "E is at its bound: &lt;not&gt; identified" in page
    assert {figure.name for figure in drawn} == {"curves", "isoflop", "optimum", "surface", "hold-out", "certainty"}


def test_answers_are_those_that_were_asked(made):
    """Questions beside the law: the report shows the same numbers as `answer` gives, one row a budget, and examples
    where nothing was asked; a loss below E is answered by why there is no answer."""
    study, outcomes, drawn, page = made
    asked = Questions((2e12, 3e13), target_loss=1.0, inference_tokens=7e9)
    answers = answer(study.best, asked)
    text = " ".join(Page(render(study, outcomes, drawn, asked)).text)
    assert "irreducible loss E" in text and "irreducible loss E" not in " ".join(Page(page).text)
    for one in answers.to_serve:
        for name in ("params", "tokens"):
            assert count(one.found[name].value) in text
    assert text.count("7B") >= 2 and "tokens served" in " ".join(Page(page).text)


def test_the_hold_out_in_a_table(made):
    """Each run held out with what was predicted of it, its interval and what came; the measured minimum of its budget
    beside the predicted one, with that one's interval; how many lie outside is said in words."""
    _, outcomes, _, page = made
    text, held = " ".join(" ".join(Page(page).text).split()), outcomes["hold_out"].found
    for said, low, high, seen in zip(held.predicted, held.low, held.high, held.observed, strict=True):
        assert f"{four(said)} {four(low)} – {four(high)} {four(seen)}" in text
        assert f"{100 * (said / seen - 1):+.2f}% {'inside' if low <= seen <= high else 'OUTSIDE'}" in text
    assert held.optima
    for _, seen, told, (low, high) in held.optima:
        assert f"{count(told)} {count(low)} – {count(high)} {count(seen)} {100 * (told / seen - 1):+.0f}%" in text
    outside = int(np.sum((held.observed < held.low) | (held.observed > held.high)))
    assert f"{outside} of these {len(held.rows)} losses lie outside" in text


def test_laws_of_others_stand_beside_ours(made):
    """Hoffmann's three, Besiroglu's and Kaplan's N at the largest run. Besiroglu's is the best of 20,001 sizes at what
    they cost here; Hoffmann's first, which knows 6ND only, costs the budget."""
    study, _, _, page = made
    text, C = " ".join(" ".join(Page(page).text).split()), study.C.max()
    for law in laws.PUBLISHED:
        N, D = laws.advice(law, study.cost, C)
        assert f"{law.name} {count(N)} {three(D / N)}" in text
    sizes = np.geomspace(1e4, 1e9, 20_001)
    tokens = C / (6 * sizes * (1 + 0.5 * (1e5 / sizes) ** 0.3))
    best = sizes[np.argmin(laws.BESIROGLU.loss(sizes, tokens))]
    assert laws.advice(laws.BESIROGLU, study.cost, C)[0] == pytest.approx(best, rel=2e-3)
    N, D = laws.advice(laws.HOFFMANN_1, study.cost, C)
    assert 6 * N * D * (1 + 0.5 * (1e5 / N) ** 0.3) == pytest.approx(C, rel=1e-4)
    assert pytest.approx(laws.HOFFMANN_1.optimal(6 * N * D)[0], rel=1e-2) == N


def test_whiskers_are_of_the_minima(made):
    """What is drawn at each minimum is its own interval, which holds it."""
    study, _, drawn, _ = made
    panel = next(figure for figure in drawn if figure.name == "isoflop").panels[0]
    vertices = next(mark for mark in panel.marks if getattr(mark, "shape", "") == "diamond")
    found = [i for i, budget in enumerate(study.results[2].fit.budgets) if budget.bracketed]
    expected = [study.results[2].sure.at_budget(i)["params_opt"] for i in found]
    np.testing.assert_allclose(np.transpose(vertices.x_range), expected)
    assert (vertices.x_range[0] < vertices.x).all() and (vertices.x < vertices.x_range[1]).all()


def test_refits_have_their_intervals(made):
    """The tables of what would change the answer give E, alpha, beta and a of each refit with its 95% interval."""
    _, outcomes, _, page = made
    text = " ".join(Page(page).text)
    refits = [one for name in ("leave_out_highest", "delta", "other", "near_minimum") for one in outcomes[name].found]
    fitted = [other for other in refits if isinstance(other.fit, laws.ParametricFit)]
    assert len(fitted) >= 12
    for other in fitted:
        for name in ("alpha", "a"):
            low, high = other.sure.interval(name)
            assert _is_shown(low, 4, text) and _is_shown(high, 4, text), (other.change, name)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def test_svg_files_parse_and_name_every_run(made):
    """Each figure is XML of its own; every run is a point with its name on it, and every curve a line."""
    study, _, drawn, _ = made
    assert [figure.name for figure in drawn] == [
        "curves", "isoflop", "optimum", "surface", "residuals", "hold-out", "certainty"]  # fmt: skip
    titles = {}
    for figure in drawn:
        root = ET.fromstring(plot.to_svg(figure))
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and not {"href", "src"} & set(root.attrib)
        titles[figure.name] = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]
    for name in ("isoflop", "surface", "residuals"):
        for i in range(len(study.N)):
            assert any(title.startswith(f"{study.rows.labels['run'][i]}: N ") for title in titles[name]), (name, i)
    assert sum(": N = " in title for title in titles["curves"]) == len(study.N)


def test_points_stand_where_their_values_are():
    """px of a point by hand: decades are even on a log axis, up is more."""
    marks = (Points([1e3, 1e4, 1e6], [1.0, 2.0, 4.0], hover=("p", "q", "r")),)
    panel = Panel("t", Axis("x", True, 1e2, 1e7), Axis("y", False, 0, 5), marks)
    circles = re.findall(r'<circle class="mark blue" cx="([\d.]+)" cy="([\d.]+)"', plot.panel_svg(panel, "t0"))
    x, y = np.array(circles, float).T
    _, _, (left, right, top, bottom) = plot.scales(panel)
    np.testing.assert_allclose(x, [left + share * (right - left) for share in (0.2, 0.4, 0.8)], atol=0.06)
    np.testing.assert_allclose(y, [bottom - share * (bottom - top) for share in (0.2, 0.4, 0.8)], atol=0.06)


@pytest.mark.parametrize(
    "low, high, log",
    [(1, 1, True), (1, 1, False), (0, 0, False), (2.1, 2.9, True), (2.1, 2.1001, True), (1e12, 6.4e13, True),
     (1e18, 1e25, True), (5, 5e9, True), (-0.3, 0.7, False), (1e-6, 1e-2, True), (0.13, 88, True), (1e5, 3e5, False)],
)  # fmt: skip
def test_ticks(low, high, log):
    """Any range gets 2 to 9 ticks in rising order, inside the axis, whose texts say their values."""
    marks = [Points(np.array([low, high]), np.array([low, high]))]
    scale = plot.scale_of(Axis("x", log), marks, vertical=False, room=6)
    at = [value for value, _ in scale.ticks]
    assert scale.low < scale.high and at == sorted(at)
    assert all(scale.low <= value <= scale.high for value in at)
    if high > low:
        assert 2 <= len(at) <= 9, scale.ticks
    for value, text in scale.ticks:
        assert _value(text) == pytest.approx(value, rel=1e-3, abs=1e-9 + 0.005 * abs(high - low))


def _value(text: str) -> float:
    """3M, 2.5, 10^18 or 3×10^-4 as a number."""
    text = text.replace("\N{MINUS SIGN}", "-")
    if "^" in text:
        mantissa, _, power = text.rpartition("10^")
        return float(mantissa.rstrip("×") or 1) * 10.0 ** int(power)
    suffix = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1])
    return float(text[:-1]) * suffix if suffix else float(text)


def test_odd_marks_are_drawn():
    """Empty points, gaps in lines, infinite ends, one category: no mark breaks a figure, in SVG or as PNG."""
    nan, none = np.nan, np.empty(0)
    marks = (Points(none, none, "red", "none"), Line(np.array([1, nan, 3, 4]), np.array([1, 2, nan, 4])),
             Band(np.array([1, 2]), np.array([0.5, nan]), np.array([2, np.inf])), Note(2, 2, "a < b & c"),
             Points([1, 2], [1, nan], ["q0", "q8"], "two", ["<p>", "q"], shape="ring", x_range=([0, nan], [2, 3])),
             Points([1.5], [1.5], shape="diamond"), Points([1.5], [1.2], shape="cross"))  # fmt: skip
    figure = Figure("odd", "Odd & <even>", (Panel("C^a <x>", Axis("x"), Axis("y & z", True), marks),))
    root = ET.fromstring(plot.to_svg(figure))
    assert "a < b & c" in "".join(root.itertext()) and "nan" not in plot.to_svg(figure)
    line = next(e for e in root.iter("{http://www.w3.org/2000/svg}path") if e.get("class") == "line blue ")
    assert line.get("d").count("M") == 2 and line.get("d").count("L") == 0  # two points, neither with a neighbour
    pytest.importorskip("matplotlib")
    plot.to_png(figure, io.BytesIO())


def test_png(made):
    """matplotlib draws every figure: a PNG in the proportions of the SVG, and not an empty one."""
    pytest.importorskip("matplotlib")
    figure = next(figure for figure in made[2] if figure.name == "optimum")
    file = io.BytesIO()
    plot.to_png(figure, file)
    content = file.getvalue()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 30_000
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    box = ET.fromstring(plot.to_svg(figure)).get("viewBox").split()
    assert width / height == pytest.approx(float(box[2]) / float(box[3]), rel=0.01)


def test_png_without_matplotlib(made, monkeypatch):
    """Where matplotlib is not installed the line says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot.to_png(made[2][0], io.BytesIO())


@pytest.mark.parametrize("alpha, beta", [(0.33, 0.37), (0.44, 0.32), (0.05, 0.6), (0.6, 0.05)])
def test_names_of_contours_can_be_read(made, alpha, beta):
    """Contours of the loss, steep or flat, have the law's loss; more than half have their name, where the law has
    that loss, in or just above the frame, across no contour and over no other name."""
    law = replace(made[0].results[3].law, alpha=alpha, beta=beta, E=1.0, A=0.5 * 5e5**alpha, B=0.5 * 2e7**beta)
    study = replace(made[0], L=law.loss(made[0].N, made[0].D))
    panel = figures._contours(study, law)
    place = plot._Place(*plot.scales(panel))
    notes = [mark for mark in panel.marks if isinstance(mark, Note)]
    lines = {mark.hover: mark for mark in panel.marks if isinstance(mark, Line) and mark.hover}
    paths = []
    for line in lines.values():
        np.testing.assert_allclose(law.loss(line.y, line.x), float(line.hover[5:]), atol=6e-4)
        path = place(line.x, line.y)
        paths += [path[:-1] + share * np.diff(path, axis=0) for share in np.linspace(0, 1, 20)]
    points, (left, right, top, bottom), boxes = np.concatenate(paths), place.box, []
    for note in notes:
        assert float(note.text) == pytest.approx(law.loss(note.y, note.x), rel=5e-3)
        ((x, y),) = place(note.x, note.y) + np.array(note.shift)
        wide = 5.5 * len(note.text)
        low = np.array([x - wide * {"end": 1, "middle": 0.5}[note.anchor], y - 8])
        high = low + (wide, 8)
        assert left - wide / 2 <= low[0] and high[0] <= right + wide / 2 and top - 13 <= low[1] and high[1] <= bottom
        assert not ((low < points) & (points < high)).all(1).any(), note
        assert not any((low < other_high).all() and (other_low < high).all() for other_low, other_high in boxes)
        boxes.append((low, high))
    assert len(lines) == 9 and len(notes) >= 5


def test_notes_are_of_places_inside():
    """Words of a place in the frame are drawn though they reach out of it; those of a place outside, or nowhere, are
    not."""
    marks = (
        Points([1, 9], [1, 9]),
        Note(5, 10, "above", "middle", (0, -4)),
        Note(5, 11, "beyond"),
        Note(np.nan, 5, "?"),
    )
    svg = plot.panel_svg(Panel("t", Axis("x", False, 0, 10), Axis("y", False, 0, 10), marks), "t0")
    assert re.findall(r'class="note"[^>]* y="([\d.]+)"[^>]*>([^<]*)<', svg) == [("30.0", "above")]


def test_a_contour_outside_the_frame_has_no_name():
    """A loss that the law reaches nowhere in the frame is drawn as nothing."""
    law, N, D = laws.Law("x", 1.8, 400.0, 2000.0, 0.35, 0.37), np.geomspace(1e8, 1e9, 9), np.geomspace(1e9, 1e10, 9)
    levels = (1.81, 20.0)
    lines = [figures._contour(law, level, N, D, "blue") for level in levels]
    assert all(len(line.x) == 0 for line in lines) and figures._names(lines, levels, N, D) == []


def test_budgets_have_different_names():
    """Budgets that are alike in two digits get as many as tell them apart; round ones keep one."""
    assert figures.distinct_powers(np.array([1e18, 3e18, 1.74e20, 2.21e20])) == [
        "10^18",
        "3×10^18",
        "1.7×10^20",
        "2.2×10^20",
    ]
    assert figures.distinct_powers(np.array([1.741e20, 1.744e20])) == ["1.741×10^20", "1.744×10^20"]


@pytest.mark.parametrize("number, text", [(7_654_321, "7.65M"), (1.4321e15, "1430T"), (2.162e14, "216T"), (1e12, "1T"),
                                          (0.5, "0.5"), (5e19, "5e+19")])  # fmt: skip
def test_counts(number, text):
    """Three figures and a suffix, no exponent where people can read it."""
    assert count(number) == text


def test_other_sizes_waste_nothing_less_than_nothing(made):
    """At the optimum no compute is wasted and no loss added: not a -0.0% of rounding, at any of 40 budgets; where the
    loss is that of an endless model there is a reason in place of numbers."""
    best = replace(made[0].best, sure=None)
    for C in np.geomspace(1e10, 1e16, 40):
        text = report._other_sizes(best, C, best.law.optimal(C)[0])
        assert "-0" not in text and "0.0%" in text
    assert "no compute reaches it" in report._other_sizes(best, 1e150, best.law.optimal(1e150)[0])


def test_examples_are_for_the_largest_budget_inside(made):
    """Whatever the order in which budgets are asked."""
    study, outcomes, drawn, _ = made
    page = render(study, outcomes, drawn, Questions((1e13, 3e12, 1e15)))
    assert "where not said otherwise for 10<sup>13</sup> FLOPs" in page


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
@pytest.mark.parametrize(
    "typed, flops",
    [("1e13", 1e13), ("10^13", 1e13), ("3×10^13", 3e13), ("3 * 10^13", 3e13), ("2x1e13", None), ("1,5e13", 1.5e13)],
)
def test_my_budget_understands_what_people_type(made, typed, flops):
    """The box takes the forms that the page prints; what is no number is said to be none."""
    study, _, _, page = made
    data = re.search(r'id="law">(.*?)</script>', page).group(1)
    script = f"""const made = {{law: {{textContent: {json.dumps(data)}}}, budget: {{value: {json.dumps(typed)},
        addEventListener() {{}}}}, answer: {{}}}};
        global.document = {{getElementById: name => made[name]}};
        {(report.HERE / "report.js").read_text().replace('"use strict";', "")}
        console.log(made.answer.innerHTML || made.answer.textContent);"""
    said = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True).stdout
    if flops is None:
        assert "A number of FLOPs" in said
    else:
        shown = float(re.search(r"<b>([\d.]+)k</b>", said)[1]) * 1e3
        assert shown == pytest.approx(optimum(study.best, flops).found["params"].value, rel=0.006)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_seen(scheme):
    """Every colour stands out from the page by at least 2 to 1 in luminance as WCAG has it, words by 4.5 to 1."""
    values = {**COLOURS, **plot._PAGE}
    paper = _luminance(values["paper"][scheme])

    def contrast(name: str) -> float:
        a, b = sorted((_luminance(values[name][scheme]), paper))
        return (b + 0.05) / (a + 0.05)

    for name in COLOURS:
        assert contrast(name) >= 2, name
    assert contrast("ink") > 10 and contrast("soft") >= 4.5
    css = plot.STYLE + (report.HERE / "report.css").read_text()
    rules = re.findall(r"([^{}]+){([^{}]*)}", css)
    words = [(what, rule) for what, rule in rules if "text" in what or "note" in what or "tick" in what
             or re.search(r"(?<![-\w])color:", rule)]  # fmt: skip
    of_words = {name for what, rule in words if ":before" not in what  # marks, not words
                for name in re.findall(r"(?<![-\w])(?:color|fill):\s*var\(--(\w+)\)", rule)}  # fmt: skip
    assert {"ink", "soft"} <= of_words and all(contrast(name) >= 4.5 for name in of_words - {"paper"}), of_words


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
