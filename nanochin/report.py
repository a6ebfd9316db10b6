"""The report: one HTML file without anything from outside, which answers first and proves afterwards.

    render(study, outcomes, figures, questions, answers, trials, provenance) -> str

What is the law, what should a budget buy, how sure are we; then the figures, then what would change the answer. It
follows the reader's light or dark screen and is as good on a phone (report.css). Every number has its 95% interval
where there is one. A few lines of script (report.js) answer "my budget" from a table of optima that is embedded.
"""

import html
import json
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from nanochin import laws
from nanochin.answers import (
    SHOWN,
    Answer,
    Answers,
    Estimate,
    Questions,
    estimates,
    optimum,
    to_reach,
    to_serve,
    with_text,
)
from nanochin.checks import Outcome, Table, four, powers, three, with_interval
from nanochin.config import with_flags
from nanochin.console import count, digits
from nanochin.figures import Figure
from nanochin.laws import PUBLISHED, TABLE_3, Law, NotIdentified, advice
from nanochin.plot import STYLE, panel_svg, variables
from nanochin.study import Approach, Study, attempt
from nanochin.trials import Trial

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Provenance:
    """What a stranger needs to have these numbers again."""

    command: str
    commit: str
    versions: str


def render(
    study: Study,
    outcomes: dict[str, Outcome],
    figures: list[Figure],
    questions: Questions,
    answers: Answers,
    trials: list[Trial],
    provenance: Provenance,
) -> str:
    """The report as a text."""
    name = html.escape("/".join(Path(study.rows.source).parts[-2:]))
    forest = "".join(_panels(figure) for figure in figures if figure.name == "certainty")
    beside = {figure.name: _tables(outcomes, figure.name) for figure in figures}
    beside["optimum"] += _others(study)
    varied = _tables(outcomes)
    body = [
        _header(study, outcomes, name),
        f'<div class="first">{_section("The law", _law(study, outcomes["cost"].sentence))}',
        f"{_section('What to train', _answers(study, answers.optima))}</div>",
        _section("How sure", _findings(outcomes), _approaches(study), forest),
        *([_section("Predicted first, trained then", _trials(trials))] if trials else []),
        *(
            _section(figure.title, _panels(figure), beside[figure.name])
            for figure in figures
            if figure.name != "certainty"
        ),
        *([_section("What would change the answer", varied)] if varied else []),
        _section("Other questions", *_other_questions(study, questions, answers)),
        f"<footer><h2>Where these numbers come from</h2>{_provenance(study, provenance)}</footer>",
    ]
    dark = f"@media(prefers-color-scheme:dark){{:root{{{variables(1)}}}}}"
    css = f":root{{{variables(0)}}}{dark}{STYLE}\n{(HERE / 'report.css').read_text()}"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>Scaling law of {name}</title><style>{css}</style>'
    )
    data = f'<script type="application/json" id="law">{_table_of_optima(study)}</script>'
    script = f"{data}\n<script>{(HERE / 'report.js').read_text()}</script>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>'
        + "\n".join(body)
        + f"</main>\n{script}</body></html>\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def _panels(figure: Figure) -> str:
    panels = "".join(panel_svg(panel, f"{figure.name}{i}") for i, panel in enumerate(figure.panels))
    caption = f"<figcaption>{html.escape(figure.caption)}</figcaption>" if figure.caption else ""
    return f'<figure><div class="panels">{panels}</div>{caption}</figure>'


def table(head: list[str], rows: list[list[str]], mark: int | None = None) -> str:
    """Cells are HTML, the last of a short row as wide as what is missing; row `mark` is the one that matters."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = []
    for row in rows:
        wide = f' colspan="{len(head) - len(row) + 1}"' if len(row) < len(head) else ""
        lines.append("".join(f"<td>{cell}</td>" for cell in row[:-1]) + f"<td{wide}>{row[-1]}</td>")
    body = "".join(f"<tr{' class=mark' * (i == mark)}>{line}</tr>" for i, line in enumerate(lines))
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def flops(C: float) -> str:
    """1e18 -> 10<sup>18</sup>, 5.76e23 -> 5.76×10<sup>23</sup>"""
    return _raised(powers(C)) if math.isfinite(C) else "∞"


def _raised(text: str) -> str:
    """Text as HTML; what follows a ^ is raised."""
    return re.sub(r"\^(-?\w+|\([^)]*\))", r"<sup>\1</sup>", html.escape(text))


def between(ends: tuple[float, float], show=three) -> str:
    """An interval in small print, "" where there is none."""
    low, high = ends
    return "" if math.isnan(low) else f' <span class="ci">{show(low)} – {show(high)}</span>'


def ci(estimate: Estimate, show) -> str:
    """A number and its 95% interval."""
    return show(estimate.value) + between(estimate.ends, show)


SHOW = {name: show for name, (_, show) in SHOWN.items()} | {
    "flops": flops,
    "least_flops": flops,
    "target_loss": "{:.4f}".format,
    "tokens_per_param": three,
    "epochs": three,
}


# ---------------------------------------------------------------------------------------------------------------------
# The first screen


def _header(study: Study, outcomes: dict[str, Outcome], name: str) -> str:
    N, D, C, best = study.N, study.D, study.C, study.best
    a, b = (best.exponent(best.law, which) for which in (0, 1))
    title = f"Parameters grow as C<sup>{a:.2f}</sup>, tokens as C<sup>{b:.2f}</sup>"
    what = (
        f"{len(N)} runs of {name}: {count(N.min())} to {count(N.max())} parameters, {count(D.min())} to "
        f"{count(D.max())} tokens, {flops(C.min())} to {flops(C.max())} FLOPs. Counted as: {study.convention}."
    )
    low, high = best.interval(best.exponent)
    sure = [] if math.isnan(low) else [f"With 95% confidence the first exponent is between {low:.3f} and {high:.3f}."]
    if held := outcomes["hold_out"].found:
        sure.append(
            f"Fitted without the {len(held.rows)} largest runs, the law predicts them to {100 * held.error:.2g}%."
        )
    statuses = [one.status for one in outcomes.values() if one.sentence]
    doubts, missing = statuses.count("doubt"), statuses.count("not checked")
    sure.append(f"The checks below raise {doubts or 'no'} doubt{'s' * (doubts != 1)}.")
    sure += [f"{missing} could not be made."] if missing else []
    return (
        f'<header><p class="eyebrow">nanochin · scaling law</p><h1>{title}</h1><p class="lead">{what}</p>'
        f'<p class="lead">{" ".join(sure)}</p></header>'
    )


SYMBOL = {  # and what it means, on hover
    "E": ("E", "loss of an endless model on endless text, nats"),
    "A": ("A", "scale of what the size costs"),
    "B": ("B", "scale of what the data cost"),
    "alpha": ("α", "exponent of the size"),
    "beta": ("β", "exponent of the data"),
    "a": ("a", "optimal parameters grow as C^a"),
    "b": ("b", "optimal tokens grow as C^b"),
    "G": ("G", "scale of the optimal parameters"),
    "k_N": ("k<sub>N</sub>", "scale of the optimal parameters"),
    "k_D": ("k<sub>D</sub>", "scale of the optimal tokens"),
}


def _law(study: Study, cost: str) -> str:
    """`cost` says what a token costs where that is not 6N."""
    best, law = study.best, study.best.law
    if isinstance(law, Law):
        terms = ((law.A, "N", law.alpha), (law.B, "D", law.beta))
        formula = f"L(N, D) = {four(law.E)}" + "".join(
            f" + <span class=frac><span>{four(scale)}</span><span>{x}<sup>{power:.4f}</sup></span></span>"
            for scale, x, power in terms
        )
        frontier = "For 6ND = C the optimum is N = G (C/6)<sup>a</sup>, D = (C/6)<sup>b</sup> / G."
        if cost:
            frontier += f" {cost} What to train is said for such C."
        names = ("E", "A", "B", "alpha", "beta", "a", "b", "G")
    else:
        formula = f"N = {four(law.k_N)} C<sup>{law.a:.4f}</sup>, D = {four(law.k_D)} C<sup>{law.b:.4f}</sup>"
        frontier = "The optimum is N = k<sub>N</sub> C<sup>a</sup>, D = k<sub>D</sub> C<sup>b</sup>."
        names = ("a", "b", "k_N", "k_D")
    rows = []
    for name in names:
        symbol, meaning = SYMBOL[name]
        ends = [best.interval(name, level) for level in (80, 95)]
        intervals = [
            "–" if math.isnan(low) else f'<span class="ci">{four(low)} – {four(high)}</span>' for low, high in ends
        ]
        rows.append([f'<i title="{meaning}">{symbol}</i>', digits(getattr(law, name), 6), *intervals])
    values = table(["", f"approach {best.number}", "80% interval", "95% interval"], rows)
    return f'<p class="formula">{formula}</p>{values}<p><small>{frontier}</small></p>'


def _answers(study: Study, answers: list[Answer]) -> str:
    """The box for one's own budget, and the optimum of some."""
    budgets = [answer.asked["flops"] for answer in answers]
    usual = max((C for C in budgets if C / study.C.max() <= 1.01), default=budgets[0])
    ask = (
        '<p class="ask"><label>My budget <input id="budget" inputmode="decimal" autocomplete="off" '
        f'value="{usual:.3g}"> FLOPs</label></p><p id="answer" class="answer"></p>'
    )
    rows = []
    for C, answer in zip(budgets, answers, strict=True):
        inside = 0.99 * study.C.min() <= C <= 1.01 * study.C.max()
        name = flops(C) + ("" if inside else ' <span class="beyond">beyond the runs</span>')
        rows.append([name, *(ci(estimate, SHOW[quantity]) for quantity, estimate in answer.found.items())])
    head = ["C, FLOPs", "parameters N", "tokens D", "D / N", "loss, nats"]
    return ask + table(head[: len(rows[0])], rows)


def _findings(outcomes: dict[str, Outcome]) -> str:
    """Doubts first, then what could not be checked."""
    order = ("doubt", "not checked", "ok")
    said = sorted((one for one in outcomes.values() if one.sentence), key=lambda one: order.index(one.status))
    items = (f'<li class="{one.status.replace(" ", "-")}">{html.escape(with_flags(one.sentence))}</li>' for one in said)
    return f'<ul class="findings">{"".join(items)}</ul>'


def _approaches(study: Study) -> str:
    C = float(study.C.max())
    names = {1: "1, envelope of curves", 2: "2, isoFLOP parabolas", 3: "3, parametric loss"}
    found = [(names[approach.number], approach) for approach in study.approaches]
    if isinstance(study.akima, Approach):
        found.append(("2, by Akima and seed noise", study.akima))
    rows = []
    for name, approach in sorted(found, key=lambda pair: pair[1].number):
        law, at = approach.law, optimum(approach, C).found
        there = (ci(at[name], SHOW[name]) for name in ("params", "tokens", "tokens_per_param"))
        grow = [partial(approach.exponent, which=which) for which in (0, 1)]
        exponents = (three(one(law)) + between(approach.interval(one)) for one in grow)
        rows.append([name, *exponents, f"{sum(one(law) for one in grow):.3f}", *there])
    return table(["approach", "a", "b", "a + b", f"N at {flops(C)}", "D there", "D / N there"], rows)


def _others(study: Study) -> str:
    """Ours beside the laws of others: at the largest run, and far beyond it."""
    budgets, rows = (float(study.C.max()), 1e3 * float(study.C.max())), []
    for approach in study.approaches:
        at = [optimum(approach, C).found for C in budgets]
        cells = (ci(one[name], SHOW[name]) for one in at for name in ("params", "tokens_per_param"))
        rows.append([f"ours, Approach {approach.number}", *cells])
    for law in PUBLISHED:
        pairs = [advice(law, study.cost, C) for C in budgets]
        rows.append([law.name, *(cell for N, D in pairs for cell in (count(N), three(D / N)))])
    head = [""] + [f"{what} at {flops(C)}" for C in budgets for what in ("N", "D / N")]
    words = "<p><small>The laws of others are for other text and tokenizers. Kaplan's counts neither embeddings in N "
    return table(head, rows) + words + "nor what they cost in C.</small></p>"


def _tables(outcomes: dict[str, Outcome], figure: str = "") -> str:
    """Those of the checks that stand below a figure, or those that stand below none."""
    return "".join(_table(one) for outcome in outcomes.values() for one in outcome.tables if one.figure == figure)


def _table(one: Table) -> str:
    title = f"<h3>{_raised(one.title)}</h3>" if one.title else ""
    note = f"<p><small>{_raised(one.note)}</small></p>" if one.note else ""
    rows = [[_cell(cell) for cell in row] for row in one.rows]
    return f'{title}<div class="dense">{table([*map(_raised, one.head)], rows)}</div>{note}' if rows else ""


def _cell(cell: str | tuple[str, str] | NotIdentified) -> str:
    if isinstance(cell, NotIdentified):
        return f"<em>{html.escape(str(cell))}</em>"
    text, interval = (cell, "") if isinstance(cell, str) else cell
    return _raised(text) + (f' <span class="ci">{interval}</span>' if interval else "")


# ---------------------------------------------------------------------------------------------------------------------
# Other questions


def _other_questions(study: Study, questions: Questions, answers: Answers) -> list[str]:
    """The answers to what was asked; of what was not, examples at the largest budget inside the runs."""
    best, law = study.best, study.best.law
    if not isinstance(law, Law):
        return ["<p>These need a law that knows the loss, that is Approach 3.</p>"]
    inside = [C for C in questions.budgets if C / study.C.max() <= 1.01]
    C = max(inside) if inside else min(questions.budgets)
    N, D = law.optimal(C)
    loss = law.loss(N, D)
    targets = [law.E + share * (loss - law.E) for share in (1, 0.9, 0.8, 0.5)]
    start = (
        f"<p>By Approach 3, where not said otherwise for {flops(C)} FLOPs, whose optimum is N = {count(N)}, "
        f"D = {count(D)} with loss {loss:.4f}.</p>"
    )
    return [
        start,
        _other_sizes(best, C, N),
        "<h3>To reach a loss</h3>",
        _answer_table(answers.to_reach or [to_reach(best, target) for target in targets]),
        "<h3>If the model will be used much</h3><p>As good as the optimum, for the least compute of training and "
        "inference together (Sardana and Frankle 2023).</p>",
        _answer_table(answers.to_serve or [to_serve(best, C, served) for served in (0, D, 10 * D, 100 * D)]),
        "<h3>If there is little text</h3><p>Repeated tokens count for less and less. How fast is taken from "
        "Muennighoff et al. 2023, who fitted it on C4; hence no intervals.</p>",
        _answer_table(answers.with_text or [with_text(best, C, unique) for unique in (D, D / 4, D / 16, D / 64)]),
        _paper_table(law),
    ]


def _trials(trials: list[Trial]) -> str:
    """Runs beside what the law had said of them."""
    rows = []
    for one in trials:
        run = one.run, powers(one.flops), count(one.params), count(one.tokens)
        told = with_interval(four(one.predicted), (one.low, one.high), four)
        rows.append([*run, told, four(one.loss), f"{100 * one.off:+.2f}%", "inside" if one.inside else "OUTSIDE"])
    words = (
        "<p>Runs that are no part of the fit. The law's forecast of each, an interval of 95% for a single run, "
        "was written into its config.json before its first step.</p>"
    )
    return words + _table(Table("", ("run", "C", "N", "D", "predicted", "reached", "off by", ""), rows))


def _answer_table(answers: list[Answer]) -> str:
    """A row for each answer, or why there is none."""
    given, found = answers[0].asked, next((one.found for one in answers if one.found), {})
    rows = []
    for one in answers:
        cells = [ci(one.found[name], SHOW[name]) for name in found if one.found]
        cells = cells or [f"<em>{html.escape(one.why)}</em>"]
        rows.append([*(SHOW[name](value) for name, value in one.asked.items()), *cells])
    return table([SHOWN[name][0] for name in (*given, *found)] + [""] * (not found), rows)


def _other_sizes(best: Approach, C: float, N: float) -> str:
    def off(law, factor):
        at = laws.off_optimum(law, C, factor * N)
        return np.maximum(at.extra_loss, 0), np.maximum(at.compute_factor - 1, 0)  # the optimum, but for rounding

    rows = []
    for factor in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8):
        found = attempt(estimates, best, partial(off, factor=factor))
        if isinstance(found, NotIdentified):
            cells = [f"<em>{html.escape(str(found))}</em>"]
        else:
            cells = [ci(one, show) for one, show in zip(found, ("{:.4f}".format, "{:.1%}".format), strict=True)]
        rows.append([f"{factor:g}", count(factor * N), count(best.law.cost.tokens(factor * N, C)), *cells])
    head = ["N over the optimal", "N", "D", "loss above the best", "compute wasted"]
    return "<h3>A model of another size</h3>" + table(head, rows, mark=3)


def _paper_table(law: Law) -> str:
    rows = []
    for n, *cells in TABLE_3:
        own = law.tokens_for(n)
        pairs = [*zip(cells[::2], cells[1::2], strict=True), (law.cost.flops(n, own), own)]
        rows.append([count(n), *(f"{flops(C)} · {count(D)}" for C, D in pairs)])
    text = "<h3>Beside the paper's Tables 3 and A3</h3><p>FLOPs and tokens for which a size is optimal.</p>"
    return text + table(["N", "Approach 1", "Approach 2", "Approach 3", "here, Approach 3"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# The end


def _provenance(study: Study, provenance: Provenance) -> str:
    sure = study.best.sure
    how = (
        "not at all"
        if sure is None
        else f"{sure.units} {sure.unit}s, {sure.replicates} times, seed {study.settings.seed}"
    )
    curves = study.curves
    facts = {
        "command": provenance.command,
        "commit": provenance.commit,
        "data": study.rows.source,
        "SHA-256 of the data": study.rows.sha256,
        **({"curves": curves.source, "SHA-256 of the curves": curves.sha256} if curves else {}),
        "counted as": study.convention,
        "objective": f"sum of Huber losses of log-loss residuals, δ = {study.settings.delta:g}",
        "resampled": how,
        "intervals": "95%, percentiles of the resamples",
        "versions": provenance.versions,
    }
    return "<dl>" + "".join(f"<dt>{k}</dt><dd><code>{html.escape(v)}</code></dd>" for k, v in facts.items()) + "</dl>"


def _table_of_optima(study: Study) -> str:
    """JSON: columns over a log grid of C, from a tenth of the smallest run to ten million times the largest."""
    grid = np.geomspace(study.C.min() / 10, study.C.max() * 1e7, 61)
    found, columns = [optimum(study.best, float(C)).found for C in grid], {"C": list(grid)}
    for name in found[0]:
        columns[name] = [at[name].value for at in found]
        if found[0][name].intervals:
            columns[name + "_low"], columns[name + "_high"] = zip(*(at[name].ends for at in found), strict=True)
    short = {name: [float(f"{value:.6g}") for value in values] for name, values in columns.items()}
    return json.dumps({"columns": short, "low": float(study.C.min()), "high": float(study.C.max())}, allow_nan=False)
