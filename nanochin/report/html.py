"""The report: one self-contained HTML file, answers first, then the evidence.

    render(analysis, results, figures, answers, provenance) -> str

Here are its numbers and tables; report.html is the page, report.css its look, report.js answers "my budget" from an
embedded table of optima, and sliders.js other questions from the embedded law. Numbers have their 95% interval if there
is one.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup, escape

from nanochin import laws
from nanochin.base.cli import with_flags
from nanochin.base.console import count, powers, shown
from nanochin.laws import PUBLISHED, TABLE_3, DataConstrained, Law, NotIdentified, PowerLaw, advice
from nanochin.laws.law import CONSTANTS
from nanochin.report import allocate
from nanochin.report.allocate import SHOWN, Answer, Answers, Estimate, Prediction, estimates, optimum
from nanochin.report.analysis import Analysis, Approach, attempt, random_rows
from nanochin.report.findings import Results, Table, four, plus, three, with_interval

LEAST, MOST = 0.1, 1e7  # budgets that the page answers, over the smallest and the largest run
MOST_DOTS = 500  # runs near the sliders' curve
ORDER = ("doubt", "not checked", "ok", "note")  # of the findings
SHOW = {name: show for name, (_, show) in SHOWN.items()} | {"flops": powers, "least_flops": powers}
SHOW |= {"target_loss": "{:.4f}".format, "tokens_per_param": three, "epochs": three}
NAMES = {
    "Approach 1": "1, envelope of curves",
    "Approach 2": "2, isoFLOP parabolas",
    "Approach 3": "3, parametric loss",
}


def render(
    analysis: Analysis, results: Results, figures: dict[str, list[str]], answers: Answers, provenance: dict[str, str]
) -> str:
    """The report as HTML. `figures`: the panels of each as SVG elements, see nanochin.report.panels.svg; `provenance`:
    the command, commit and versions that reproduce it."""
    best, budgets = analysis.best, answers.budgets
    budget = max((C for C in budgets if C / analysis.C.max() <= 1.01), default=min(budgets))  # inside the runs
    files = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=files, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page.policies["json.dumps_kwargs"] = {"allow_nan": False}
    page.filters |= {one.__name__: one for one in (count, plus, powers, raised, with_flags)} | {"four": four}
    page.globals["ends"] = lambda estimate: with_ends(estimate, SHOW["loss"])[1]
    text = page.get_template("report.html").render(
        name="/".join(Path(analysis.rows.source).parts[-2:]),
        analysis=analysis,
        results=results,
        budget=budget,
        train=optimum(best, budget).found,
        optima=_optima(analysis, answers.optima),
        findings=[one for status in ORDER for one in results.values() if one.sentence and one.status == status],
        approaches=_approaches(analysis),
        published=_published(analysis),
        predictions=_predictions(answers.trials) if answers.trials else None,
        figures=figures,
        tables=[table for one in results.values() for table in one.tables if table.rows],
        asked=_other_questions(best, answers, budget) if isinstance(best.law, Law) else None,
        provenance=provenance,
        table_of_optima=_table_of_optima(analysis),
        sliders=_sliders(analysis),
    )
    return shown(text)


def raised(text: str) -> Markup:
    """Text as HTML, exponents after ^ as superscripts; names come as Markup, which is HTML already."""
    if isinstance(text, Markup):
        return text
    return Markup(re.sub(r"\^(-?\w+|\([^)]*\))", r"<sup>\1</sup>", str(escape(text))))


def with_ends(estimate: Estimate, show: Callable[[float], str]) -> tuple[str, str]:
    """A number and its 95% interval."""
    return with_interval(show(estimate.value), estimate.ends, show)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def _optima(analysis: Analysis, answers: list[Answer]) -> Table:
    rows = []
    for answer in answers:
        C = answer.asked["flops"]
        inside = 0.99 * analysis.C.min() <= C <= 1.01 * analysis.C.max()
        where = "" if inside else "beyond the runs"
        where = where if analysis.is_tested(C) else "beyond, not tested"
        found = (with_ends(estimate, SHOW[name]) for name, estimate in answer.found.items())
        rows.append([(powers(C), where, "beyond"), *found])
    head = ("C, FLOPs", "parameters N", "tokens D", "D / N", "loss, nats")
    return Table("", head[: len(rows[0])], rows)


def _approaches(analysis: Analysis) -> Table:
    C = float(analysis.C.max())
    found = [(NAMES.get(one.name, f"3, {one.form}"), one) for one in analysis.everything]
    found += [("2, by Akima and seed noise", analysis.akima)] if isinstance(analysis.akima, Approach) else []
    found.sort(key=lambda pair: pair[1].number)
    mark, rows = [one.name for _, one in found].index(analysis.best.name), []
    for name, approach in found:
        law, at = approach.law, optimum(approach, C).found
        grow = [partial(approach.exponent, which=which) for which in (0, 1)]
        exponents = (with_interval(three(one(law)), approach.interval(one), three) for one in grow)
        there = (with_ends(at[name], SHOW[name]) for name in ("params", "tokens", "tokens_per_param"))
        rows.append([name, *exponents, f"{sum(one(law) for one in grow):.3f}", *there])
    return Table("", ("approach", "a", "b", "a + b", f"N at {powers(C)}", "D there", "D / N there"), rows, mark=mark)


def _published(analysis: Analysis) -> Table:
    """Ours and published laws, at the largest run and at 1000 times its compute."""
    budgets, rows = (float(analysis.C.max()), 1e3 * float(analysis.C.max())), []
    for approach in analysis.everything:
        at = [optimum(approach, C).found for C in budgets]
        cells = (with_ends(one[name], SHOW[name]) for one in at for name in ("params", "tokens_per_param"))
        rows.append([f"ours, {approach.name}", *cells])
    for law in PUBLISHED:
        pairs = [advice(law, analysis.cost, C) for C in budgets]
        rows.append([law.name, *(cell for N, D in pairs for cell in (count(N), three(D / N)))])
    return Table("", ["", *(f"{what} at {powers(C)}" for C in budgets for what in ("N", "D / N"))], rows)


def _predictions(predictions: Sequence[Prediction]) -> Table:
    rows = []
    for one in predictions:
        run = escape(one.run), powers(one.flops), count(one.params), count(one.tokens)
        predicted = with_interval(four(one.predicted), (one.low, one.high), four)
        rows.append([*run, predicted, four(one.loss), f"{one.error:+.2%}", "inside" if one.inside else "OUTSIDE"])
    return Table("", ("run", "C", "N", "D", "predicted", "actual", "predicted / actual - 1", ""), rows)


def _other_questions(best: Approach, answers: Answers, C: float) -> dict:
    """The answers to the questions asked, and examples at C for the others."""
    law = best.law
    N, D = law.optimal(C)
    loss = law.loss(N, D)
    reach = [allocate.to_reach(best, law.E + share * (loss - law.E)) for share in (1, 0.9, 0.8, 0.5)]
    serve = [allocate.to_serve(best, C, served) for served in (0, D, 10 * D, 100 * D)]
    text = [allocate.with_text(best, C, D / times) for times in (1, 4, 16, 64)]
    return {
        **{"C": C, "N": N, "D": D, "loss": loss},
        "sizes": _other_sizes(best, C, N),
        "to_reach": _answers(answers.to_reach or reach),
        "to_serve": _answers(answers.to_serve or serve),
        "with_text": _answers(answers.with_text or text),
        "at": _answers(answers.at) if answers.at else None,
        "paper": _table_3(law),
    }


def _answers(answers: list[Answer]) -> Table:
    """A row per answer, or the reason why there is none."""
    given, found = answers[0].asked, next((one.found for one in answers if one.found), {})
    rows = []
    for one in answers:
        cells = [with_ends(one.found[name], SHOW[name]) for name in found if one.found] or [NotIdentified(one.why)]
        rows.append([*(SHOW[name](value) for name, value in one.asked.items()), *cells])
    return Table("", [SHOWN[name][0] for name in (*given, *found)] + [""] * (not found), rows)


def _other_sizes(best: Approach, C: float, N: float) -> Table:
    def off(law, factor):
        at = laws.off_optimum(law, C, factor * N)  # rounding may put the optimum below 0
        return {"loss": np.maximum(at.extra_loss, 0), "compute": np.maximum(at.compute_factor - 1, 0)}

    rows = []
    for factor in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8):
        found = attempt(estimates, best, partial(off, factor=factor))
        shows = "{:.4f}".format, "{:.1%}".format
        cells = [found] if isinstance(found, NotIdentified) else map(with_ends, found.values(), shows)
        rows.append([f"{factor:g}", count(factor * N), count(best.law.cost.tokens(factor * N, C)), *cells])
    return Table("", ("N / optimal N", "N", "D", "loss above the optimum", "compute wasted"), rows, mark=3)


def _table_3(law: Law) -> Table:
    rows = []
    for n, *cells in TABLE_3:
        own = law.tokens_for(np.float64(n))  # infinite, where a Python float raises OverflowError
        pairs = [*zip(cells[::2], cells[1::2], strict=True), (law.cost.flops(n, own), own)]
        rows.append([count(n), *(f"{powers(C)} · {count(D)}" for C, D in pairs)])
    return Table("", ("N", "Approach 1", "Approach 2", "Approach 3", "here, Approach 3"), rows)


def _table_of_optima(analysis: Analysis) -> dict:
    """Columns over a log grid of C."""
    grid = np.geomspace(analysis.C.min() * LEAST, analysis.C.max() * MOST, 61)
    found, columns = [optimum(analysis.best, float(C)).found for C in grid], {"C": list(grid)}
    for name in found[0]:
        columns[name] = [at[name].value for at in found]
        if found[0][name].intervals:
            columns[name + "_low"], columns[name + "_high"] = zip(*(at[name].ends for at in found), strict=True)
    finite = {name: np.nan_to_num(values) for name, values in columns.items()}  # JSON has no infinity
    short = {name: [float(f"{value:.6g}") for value in values] for name, values in finite.items()}
    return {"columns": short, "low": float(analysis.C.min()), "high": float(analysis.C.max())}


def _sliders(analysis: Analysis) -> dict | None:
    """What sliders.js needs: the law and replicates as in laws.json, published laws, runs. None for a law without loss.
    `ranges` are logs to base 10."""
    law, boot = analysis.best.law, analysis.best.boot
    if not isinstance(law, Law):
        return None
    drawn = boot.sample(200) if boot else {}
    some = random_rows(len(analysis.N), MOST_DOTS, analysis.settings.seed)
    served = math.floor(np.log10(analysis.D.min() / 10)), math.ceil(np.log10(analysis.D.max() * 1e6))
    low, high = np.log10([analysis.C.min() * LEAST, analysis.C.max() * MOST])
    return {
        "law": _constants(law),
        "cost": vars(law.cost),
        "replicates": [{"gamma": 1} | dict(zip(drawn, row, strict=True)) for row in zip(*drawn.values(), strict=True)],
        "published": [{"name": one.name} | _constants(one) for one in PUBLISHED],
        "runs": np.stack([analysis.N, analysis.C, analysis.L], 1)[some].tolist(),
        **{name: getattr(DataConstrained, name) for name in ("R_D", "R_N")},
        "ranges": {"C": (math.ceil(100 * low) / 100, math.floor(100 * high) / 100), "serve": served, "unique": served},
    }


def _constants(law: Law | PowerLaw) -> dict:
    names = (*CONSTANTS, "gamma") if isinstance(law, Law) else (*law.quantities, "flops_convention")
    return {name: getattr(law, name) for name in names}
