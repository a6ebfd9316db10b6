"""The report: whole, self-contained, and with the numbers of laws.json."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import MARKUP, contrast

from nanochin import laws
from nanochin.base.console import count
from nanochin.report import figures
from nanochin.report import html as report
from nanochin.report.allocate import Questions, answer, optimum
from nanochin.report.checks import four, run_checks, three
from nanochin.report.panels import svg

VOID = {"meta", "input", "br"}  # never closed
CSS, SCRIPT = (Path(report.__file__).with_name(f"report.{kind}").read_text() for kind in ("css", "js"))


@pytest.fixture(scope="module")
def made(checked_study):
    """(analysis, outcomes, figures, report)"""
    analysis, outcomes = checked_study
    drawn = draw(analysis, outcomes)
    return analysis, outcomes, drawn, render(analysis, outcomes, drawn, Questions((1e12, 1e13, 1e15)))


def draw(analysis, outcomes) -> dict[str, list[str]]:
    """The panels of each figure."""
    drawn = figures.draw(analysis, {name: one.found for name, one in outcomes.items()})
    return {name: svg(figure, name)[1] for name, figure in drawn.items()}


def render(analysis, outcomes, drawn, asked) -> str:
    answers = answer(analysis.best, asked)
    return report.render(analysis, outcomes, drawn, asked, answers, [], report.Provenance("a < b", "c0ffee", "1"))


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
        assert tag not in ("link", "img", "iframe", "object", "a"), tag
        assert not {"src", "xlink:href", "srcset"} & attributes.keys()
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"@import|https?://|url\((?!#)", made[3])


def test_names_are_text_and_never_markup(made):
    """A run, a path or a command with angle brackets is shown as it is."""
    assert MARKUP not in made[3] and MARKUP in html.unescape(made[3]) and made[3].count("<script") == 2  # ours
    assert 'a<b>&"c' not in made[3] and "a&lt;b&gt;&amp;&#34;c/runs.csv" in made[3] and "a &lt; b" in made[3]


def test_the_numbers_are_those_of_the_laws(made):
    """Constants to six digits and intervals to four as in laws.json; the exponents of all approaches to three."""
    analysis, _, _, page = made
    text = " ".join(Page(page).text)
    third = analysis.results[3].fit.to_json(analysis.results[3].boot)
    for name in ("E", "A", "B", "alpha", "beta", "a", "b", "G"):
        assert _is_shown(third[name], 6, text), name
        low, high = third["ci"][name]
        assert _is_shown(low, 4, text) and _is_shown(high, 4, text), name
    for number, digits in ((1, 3), (2, 3), (3, 6)):
        approach = analysis.results[number]
        found = approach.fit.to_json(approach.boot)
        low, high = found["ci"]["a"] if number == 3 else found["a_ci"]
        assert _is_shown(found["a"], digits, text) and _is_shown(low, 3, text) and _is_shown(high, 3, text), number


def _is_shown(value: float, digits: int, text: str) -> bool:
    """Some number of the text is this one, rounded to so many significant digits."""
    shown = (float(word) for word in re.findall(r"(?<![\d.])\d+\.?\d*(?:e[+-]?\d+)?", text))
    return any(abs(number - value) <= 0.5000001 * 10 ** (np.floor(np.log10(value)) + 1 - digits) for number in shown)


def test_provenance_is_there(made):
    """Command, commit, hash of the data and counting convention."""
    analysis, _, _, page = made
    for fact in ("c0ffee", analysis.rows.sha256, "N total, C physical"):
        assert fact in page


def test_the_embedded_table_is_the_law(made):
    """Straight lines in log-log between the embedded optima, which is what the script draws, meet the law's own
    optimum within a thousandth, at budgets between the rows of the table."""
    analysis, _, _, page = made
    data = json.loads(re.search(r'id="law">(.*?)</script>', page).group(1))
    columns, best = data["columns"], analysis.best
    x = np.log(columns["C"])
    assert (np.diff(x) > 0).all() and data["high"] == analysis.C.max()
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
    analysis = made[0]
    refused = laws.NotIdentified("E is at its bound: <not> identified")
    without = replace(analysis, results={**analysis.results, 3: refused})
    outcomes = run_checks(without)
    drawn = draw(without, outcomes)
    page = render(without, outcomes, drawn, Questions((1e12, 1e13)))
    assert [outcomes[name].json for name in ("delta", "near_minimum", "residuals_by_compute")] == [[], [], []]
    assert outcomes["kaplan_procedure"].status == outcomes["profile_E"].status == "not checked"
    assert re.search('<li class="not-checked">Kaplan.s procedure could not', html.unescape(page))
    assert Page(page).open == [] and "E is at its bound: &lt;not&gt; identified" in page
    assert drawn.keys() == {"curves", "isoflop", "optimum", "surface", "hold-out", "certainty"}


def test_a_report_without_figures(made):
    """Every table and finding is there, the hold-out's too, and no picture."""
    analysis, outcomes, _, page = made
    without = Page(render(analysis, outcomes, {}, Questions((1e12, 1e13, 1e15))))
    assert without.open == [] and "svg" not in [tag for tag, _ in without.tags]
    for tag in ("table", "li", "h3"):
        assert sum(tag == other for other, _ in without.tags) == page.count(f"<{tag}>") + page.count(f"<{tag} ")


def test_the_same_study_gives_the_same_page(made):
    analysis, outcomes, _, page = made
    assert render(analysis, outcomes, draw(analysis, outcomes), Questions((1e12, 1e13, 1e15))) == page


def test_the_table_of_budgets_is_the_optimum(made):
    """N, D, D / N and loss of every budget that was asked, with their 95% intervals."""
    analysis, _, _, page = made
    text = " ".join(" ".join(Page(page).text).split())
    for C in (1e12, 1e13, 1e15):
        found = optimum(analysis.best, C).found
        shown = []
        for name, show in (("params", count), ("tokens", count), ("tokens_per_param", three)):
            low, high = found[name].ends
            shown.append(f"{show(found[name].value)} {show(low)} – {show(high)}")
        assert " ".join(shown) + f" {found['loss'].value:.4f}" in text


def test_answers_are_those_that_were_asked(made):
    """Questions beside the law: the report shows the same numbers as `answer` gives, one row a budget, and examples
    where nothing was asked; a loss below E is answered by why there is no answer."""
    analysis, outcomes, drawn, page = made
    asked = Questions((2e12, 3e13), target_loss=1.0, inference_tokens=7e9)
    answers = answer(analysis.best, asked)
    text = " ".join(Page(render(analysis, outcomes, drawn, asked)).text)
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
    assert f"{outside} of {len(held.rows)} runs fall outside" in text


def test_laws_of_others_stand_beside_ours(made):
    """Hoffmann's three, Besiroglu's and Kaplan's N at the largest run. Besiroglu's is the best of 20,001 sizes at what
    they cost here; Hoffmann's first, which knows 6ND only, costs the budget."""
    analysis, _, _, page = made
    text, C = " ".join(" ".join(Page(page).text).split()), analysis.C.max()
    for law in laws.PUBLISHED:
        N, D = laws.advice(law, analysis.cost, C)
        assert f"{law.name} {count(N)} {three(D / N)}" in text
    sizes = np.geomspace(1e4, 1e9, 20_001)
    tokens = C / (6 * sizes * (1 + 0.5 * (1e5 / sizes) ** 0.3))
    best = sizes[np.argmin(laws.BESIROGLU.loss(sizes, tokens))]
    assert laws.advice(laws.BESIROGLU, analysis.cost, C)[0] == pytest.approx(best, rel=2e-3)
    N, D = laws.advice(laws.HOFFMANN_1, analysis.cost, C)
    assert 6 * N * D * (1 + 0.5 * (1e5 / N) ** 0.3) == pytest.approx(C, rel=1e-4)
    assert pytest.approx(laws.HOFFMANN_1.optimal(6 * N * D)[0], rel=1e-2) == N


def test_refits_have_their_intervals(made):
    """The tables of what would change the answer give E, alpha, beta and a of each refit with its 95% interval."""
    _, outcomes, _, page = made
    text = " ".join(Page(page).text)
    refits = [one for name in ("leave_out_highest", "delta", "other", "near_minimum") for one in outcomes[name].found]
    fitted = [other for other in refits if isinstance(other.fit, laws.ParametricFit)]
    assert len(fitted) >= 12
    for other in fitted:
        for name in ("alpha", "a"):
            low, high = other.boot.interval(name)
            assert _is_shown(low, 4, text) and _is_shown(high, 4, text), (other.change, name)


@pytest.mark.parametrize("number, text", [(7_654_321, "7.65M"), (1.4321e15, "1430T"), (2.162e14, "216T"), (1e12, "1T"),
                                          (0.5, "0.5"), (5e19, "5e+19")])  # fmt: skip
def test_counts(number, text):
    """Three figures and a suffix, no exponent where people can read it."""
    assert count(number) == text


def test_other_sizes_waste_nothing_less_than_nothing(made):
    """At the optimum no compute is wasted and no loss added: not a -0.0% of rounding, at any of 40 budgets; where the
    loss is that of an endless model there is a reason in place of numbers."""
    best = replace(made[0].best, boot=None)
    for C in np.geomspace(1e10, 1e16, 40):
        rows = report._other_sizes(best, C, best.law.optimal(C)[0]).rows
        cells = [text for row in rows for text, _ in row[-2:]]
        assert not any(text.startswith("-") for text in cells) and "0.0%" in cells
    assert "no compute reaches it" in str(report._other_sizes(best, 1e150, best.law.optimal(1e150)[0]).rows)


def test_examples_are_for_the_largest_budget_inside(made):
    """Whatever the order in which budgets are asked."""
    analysis, outcomes, drawn, _ = made
    page = render(analysis, outcomes, drawn, Questions((1e13, 3e12, 1e15)))
    assert "where not said otherwise for 10<sup>13</sup> FLOPs" in page


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
@pytest.mark.parametrize(
    "typed, flops",
    [("1e13", 1e13), ("10^13", 1e13), ("3×10^13", 3e13), ("3 * 10^13", 3e13), ("2x1e13", None), ("1,5e13", 1.5e13)],
)
def test_my_budget_understands_what_people_type(made, typed, flops):
    """The box takes the forms that the page prints; what is no number is said to be none."""
    analysis, _, _, page = made
    data = re.search(r'id="law">(.*?)</script>', page).group(1)
    script = f"""const made = {{law: {{textContent: {json.dumps(data)}}}, budget: {{value: {json.dumps(typed)},
        addEventListener() {{}}}}, answer: {{}}}};
        global.document = {{getElementById: name => made[name]}};
        {SCRIPT.replace('"use strict";', "")}
        console.log(made.answer.innerHTML || made.answer.textContent);"""
    said = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True).stdout
    if flops is None:
        assert "A number of FLOPs" in said
    else:
        shown = float(re.search(r"<b>([\d.]+)k</b>", said)[1]) * 1e3
        assert shown == pytest.approx(optimum(analysis.best, flops).found["params"].value, rel=0.006)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_words_and_marks_can_be_seen(scheme):
    """Words stand out from the page by at least 4.5 to 1 in luminance as WCAG has it, marks by 2 to 1."""
    both = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root {([^}]*)}", CSS)]
    assert len(both) == 2 and both[0].keys() == both[1].keys()
    colours = both[scheme]
    contrasts = {name: contrast(colour, colours["paper"]) for name, colour in colours.items()}
    words = {name for what, rule in re.findall(r"([^{}]+){([^{}]*)}", CSS) if ":before" not in what  # marks, not words
             for name in re.findall(r"(?<![-\w])color:\s*var\(--(\w+)\)", rule)}  # fmt: skip
    assert {"ink", "soft"} <= words and all(contrasts[name] >= 4.5 for name in words)
    assert all(contrasts[name] >= 2 for name in ("blue", "green", "red", "grey")) and contrasts["ink"] > 10
