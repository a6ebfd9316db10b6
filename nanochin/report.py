"""The report: one HTML file without anything from outside, which answers first and proves afterwards.

    render(study, checks, figures, provenance) -> str

What is the law, how sure are we, what should a budget buy; then the figures, then what would change the answer. It
follows the reader's light or dark screen and is as good on a phone. Every number has its 95% interval where there
is one. The few lines of script answer "my budget" by interpolating the table that is embedded; without script the
report lacks that line and nothing else.
"""

import html
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochin import laws
from nanochin.console import count
from nanochin.figures import Figure
from nanochin.laws import TABLE_3, DataConstrained, Law, NotIdentified
from nanochin.plot import STYLE, panel_svg, variables
from nanochin.study import Answer, Approach, Checks, Study, attempt, findings


@dataclass(frozen=True)
class Provenance:
    """What a stranger needs to have these numbers again."""

    command: str
    commit: str
    versions: str
    source: str
    sha256: str


@dataclass(frozen=True)
class Questions:
    """What was asked beside the optimum; None: examples are given."""

    budgets: tuple[float, ...]
    inference_tokens: float | None = None
    unique_tokens: float | None = None
    target_loss: float | None = None


def render(study: Study, checks: Checks, figures: list[Figure], questions: Questions, provenance: Provenance) -> str:
    """The report as a text."""
    answers = [study.best.optimum(C) for C in questions.budgets]
    name = html.escape(Path(study.rows.source).name)
    N, D, C = study.N, study.D, study.C
    lead = (f"{len(N)} runs of {name}: {count(N.min())} to {count(N.max())} parameters, {count(D.min())} to "
            f"{count(D.max())} tokens, {C.min():.2g} to {C.max():.2g} FLOPs")  # fmt: skip
    (sure,), others = ([f for f in figures if (f.name == "certainty") == want] for want in (True, False))
    sections = [
        f'<header><p class="eyebrow">nanochin · scaling law</p><h1>{_headline(study)}</h1><p class="lead">{lead}.</p>'
        f"<p class=lead>Counted as: {study.convention}.</p></header>",
        f'<div class="first"><section><h2>The law</h2>{_law(study)}</section>'
        f"<section><h2>What to train</h2>{_calculator(study, answers)}</section></div>",
        f"<section><h2>How sure</h2>{_findings(study, checks)}{_approaches(study)}{_panels(sure)}</section>",
        *(_figure(figure) for figure in others),
        f"<section><h2>What would change the answer</h2>{_sensitivity(study, checks)}</section>",
        f"<section><h2>Other questions</h2>{_questions(study, questions)}</section>",
        f"<footer><h2>Where these numbers come from</h2>{_provenance(study, provenance)}</footer>",
    ]
    css = f":root{{{variables(0)}}}@media(prefers-color-scheme:dark){{:root{{{variables(1)}}}}}{STYLE}{CSS}"
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
            f"<title>Scaling law of {name}</title><style>{css}</style></head>\n<body><main>"
            + "\n".join(sections) + f"</main>\n{_script(study)}</body></html>\n")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def ci(value: float, ends: tuple[float, float], digits: int = 3) -> str:
    """A number, and its interval in small print below or beside it."""
    interval = f' <span class="ci">{_plain(ends[0], digits)} – {_plain(ends[1], digits)}</span>'
    return _plain(value, digits) + (interval if math.isfinite(ends[0]) else "")


def ci_count(value: float, ends: tuple[float, float]) -> str:
    interval = f' <span class="ci">{count(ends[0])} – {count(ends[1])}</span>' if math.isfinite(ends[0]) else ""
    return f"{count(value)}{interval}"


def _plain(value: float, digits: int) -> str:
    """Significant digits without an exponent where people can read them."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-4 <= abs(value) < 1e7:
        return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.{digits - 1}e}"


def flops(C: float) -> str:
    """1e18 -> 10<sup>18</sup>, 5.76e23 -> 5.76×10<sup>23</sup>"""
    mantissa, power = f"{C:.2e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return ("" if mantissa == "1" else f"{mantissa}×") + f"10<sup>{int(power)}</sup>"


def table(head: list[str], rows: list[list[str]], mark: int | None = None) -> str:
    """Cells are HTML; row `mark` is the one that matters."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr{' class=mark' if i == mark else ''}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
                   for i, row in enumerate(rows))  # fmt: skip
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


# ---------------------------------------------------------------------------------------------------------------------
# The first screen


def _headline(study: Study) -> str:
    best = study.best
    return f"Parameters grow as C<sup>{best.law.a:.2f}</sup>, tokens as C<sup>{best.law.b:.2f}</sup>"


def _law(study: Study) -> str:
    best = study.best
    names = ("E", "A", "B", "alpha", "beta", "a", "b", "G") if isinstance(best.law, Law) else ("a", "b", "k_N", "k_D")
    greek = {"alpha": "α", "beta": "β", "k_N": "k<sub>N</sub>", "k_D": "k<sub>D</sub>"}
    meaning = {
        "E": "loss of an endless model on endless text, nats", "A": "size term", "B": "data term",
        "alpha": "exponent of size", "beta": "exponent of data", "a": "optimal parameters ∝ C<sup>a</sup>",
        "b": "optimal tokens ∝ C<sup>b</sup>", "G": "N = G (C/6)<sup>a</sup>, D = (C/6)<sup>b</sup> / G",
        "k_N": "N = k<sub>N</sub> C<sup>a</sup>", "k_D": "D = k<sub>D</sub> C<sup>b</sup>",
    }  # fmt: skip
    if isinstance(best.law, Law):
        law = best.law
        formula = (f"L(N, D) = {law.E:.4g} + <span class=frac><span>{_plain(law.A, 4)}</span><span>N<sup>{law.alpha:.4f}"
                   f"</sup></span></span> + <span class=frac><span>{_plain(law.B, 4)}</span><span>D<sup>{law.beta:.4f}"
                   "</sup></span></span>")  # fmt: skip
    else:
        formula = (f"N = {best.law.k_N:.4g} C<sup>{best.law.a:.4f}</sup>, "
                   f"D = {best.law.k_D:.4g} C<sup>{best.law.b:.4f}</sup>")  # fmt: skip
    rows = [[f"<i>{greek.get(name, name)}</i>", _plain(getattr(best.law, name), 6), _ends(best, name),
             f"<small>{meaning[name]}</small>"] for name in names]  # fmt: skip
    return (f'<p class="formula">{formula}</p>'
            + table(["", "value", "95% interval", ""], rows))  # fmt: skip


def _ends(approach: Approach, name: str) -> str:
    low, high = approach.interval(name)
    return f'<span class="ci">{_plain(low, 4)} – {_plain(high, 4)}</span>' if math.isfinite(low) else "–"


def _calculator(study: Study, answers: list[Answer]) -> str:
    ask = ('<p class="ask"><label>My budget <input id="budget" inputmode="decimal" autocomplete="off" '
           f'value="{answers[len(answers) // 2].C:.3g}"> FLOPs</label></p><p id="answer" class="answer"></p>')  # fmt: skip
    knows_loss = math.isfinite(answers[0].loss[0])
    head = ["C, FLOPs", "parameters N", "tokens D", "D / N"] + ["loss, nats"] * knows_loss
    rows = []
    for answer in answers:
        outside = (
            "" if study.C.min() <= answer.C <= 1.01 * study.C.max() else ' <span class="beyond">beyond the runs</span>'
        )
        rows.append([flops(answer.C) + outside, ci_count(*answer.N), ci_count(*answer.D), ci(*answer.ratio)]
                    + [ci(*answer.loss, 4)] * knows_loss)  # fmt: skip
    return ask + table(head, rows)


def _findings(study: Study, checks: Checks) -> str:
    items = "".join(f'<li class="{"good" if good else "bad"}">{html.escape(text)}</li>'
                    for good, text in sorted(findings(study, checks), key=lambda said: said[0]))  # fmt: skip
    return f'<ul class="findings">{items}</ul>'


def _approaches(study: Study) -> str:
    C = float(study.C.max())
    rows = []
    for approach in [*study.approaches, *([study.akima] if isinstance(study.akima, Approach) else [])]:
        at = approach.optimum(C)
        name = {1: "1, envelope of curves", 2: "2, isoFLOP parabolas", 3: "3, parametric loss"}[approach.number]
        name = "2, by Akima and seed noise" if approach is study.akima else name
        rows.append([name, ci(approach.law.a, approach.interval("a")), ci(approach.law.b, approach.interval("b")),
                     f"{approach.law.a + approach.law.b:.3f}", ci_count(*at.N), ci_count(*at.D), ci(*at.ratio)])  # fmt: skip
    head = ["approach", "a", "b", "a + b", f"N at {flops(C)}", "D there", "D / N there"]
    return table(head, rows)


# ---------------------------------------------------------------------------------------------------------------------
# The rest


def _figure(figure: Figure) -> str:
    return f"<section><h2>{html.escape(figure.title)}</h2>{_panels(figure)}</section>"


def _panels(figure: Figure) -> str:
    panels = "".join(panel_svg(panel, f"{figure.name}{i}") for i, panel in enumerate(figure.panels))
    caption = f"<figcaption>{html.escape(figure.caption)}</figcaption>" if figure.caption else ""
    return f'<figure><div class="panels">{panels}</div>{caption}</figure>'


def _constants(words: str, fit) -> list[str]:
    """A row of a table of parametric fits; of one that failed, why."""
    if fit is None or isinstance(fit, NotIdentified):
        return [words, f"<em>{html.escape(str(fit or 'not identified'))}</em>", "", "", "", "", "", ""]
    law = fit.law
    return [words, _plain(law.E, 5), _plain(law.A, 5), _plain(law.B, 5), f"{law.alpha:.5f}", f"{law.beta:.5f}",
            f"{law.a:.4f}", f"{fit.objective:.6g}"]  # fmt: skip


def _sensitivity(study: Study, checks: Checks) -> str:
    head = ["", "E", "A", "B", "α", "β", "a", "objective"]
    parts = []
    if checks.leave_out:
        parts.append("<h3>Without the runs of highest loss</h3>" + table(head, [
            _constants("all runs" if k == 0 else f"without the {k} highest", fit) for k, fit in checks.leave_out]))  # fmt: skip
    if checks.deltas:
        parts.append("<h3>With another δ of the Huber loss</h3><p>Residuals below δ count as squares, above it as "
                     "distances.</p>" + table(head, [_constants(f"δ = {fit.delta:g}", fit) for fit in checks.deltas]))  # fmt: skip
    if checks.variants:
        parts.append(
            "<h3>With another objective or form</h3>" + table(head, [_constants(*row) for row in checks.variants])
        )
    if not isinstance(checks.kaplan_form, NotIdentified):
        form = checks.kaplan_form
        parts.append(f"<p>The form of Kaplan et al., ((N<sub>c</sub>/N)<sup>α<sub>N</sub>/α<sub>D</sub></sup> + "
                     f"D<sub>c</sub>/D)<sup>α<sub>D</sub></sup>, which knows no E: N<sub>c</sub> {form.N_c:.4g}, "
                     f"D<sub>c</sub> {form.D_c:.4g}, α<sub>N</sub> {form.alpha_N:.4f}, α<sub>D</sub> {form.alpha_D:.4f}; "
                     f"objective {form.objective:.6g}.</p>")  # fmt: skip
    if checks.by_compute:
        parts.append("<h3>Residuals by compute</h3>" + table(["6ND", "runs", "median", "robust sd"], [
            [f"{flops(part['flops_low'])} to {flops(part['flops_high'])}", str(part["n"]), f"{100 * part['median']:+.2f}%",
             f"{100 * part['sd']:.2f}%"] for part in checks.by_compute]))  # fmt: skip
    if checks.counts:
        rows = [[convention.replace("_", " "), *(f"{fit.law.a:.4f}" if not isinstance(fit, NotIdentified) else "–"
                 for fit in (parametric, isoflop))] for convention, parametric, isoflop in checks.counts]  # fmt: skip
        parts.append(
            "<h3>Counting the parameters in another way</h3>"
            + table(["N counts", "a, approach 3", "a, approach 2"], rows)
        )
    if not isinstance(checks.kaplan, NotIdentified):
        parts.append(f"<p>Kaplan's procedure on these runs gives a = {checks.kaplan.a:.3f}; on the same grid without noise "
                     f"our fitted law gives it {checks.kaplan.simulated:.3f}.</p>")  # fmt: skip
    return "".join(parts) or "<p>Approach 3 gives no law for these runs, so there is nothing to vary.</p>"


def _questions(study: Study, questions: Questions) -> str:
    if not isinstance(study.best.law, Law):
        return "<p>These need a law that knows the loss, that is Approach 3.</p>"
    law = study.best.law
    C = float(study.best.budget(questions.budgets[len(questions.budgets) // 2]))
    N, D = law.optimal(C)
    parts = [f"<p>All by Approach 3, at 6ND = {flops(C)} unless said otherwise: N = {count(N)}, D = {count(D)}, "
             f"loss {law.loss(N, D):.4f}.</p>"]  # fmt: skip
    rows = []
    for factor in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8):
        off = laws.off_optimum(law, C, factor * N)
        rows.append([f"{factor:g}", count(off.N), count(off.D), f"{off.loss:.4f}", f"{off.extra_loss:+.4f}",
                     f"{100 * (off.compute_factor - 1):.1f}%"])  # fmt: skip
    parts.append("<h3>A model of another size</h3>" + table(
        ["N over the optimal", "N", "D", "loss", "against the best", "compute wasted"], rows, mark=3))  # fmt: skip
    targets = (questions.target_loss,) if questions.target_loss else [
        law.E + (law.loss(N, D) - law.E) * share for share in (1, 0.9, 0.8, 0.5)]  # fmt: skip
    rows = []
    for target in targets:
        need = attempt(laws.compute_for_loss, law, target)
        rows.append([f"{target:.4f}", *(["–", "–", f"<em>{html.escape(str(need))}</em>"] if isinstance(need, NotIdentified)
                    else [flops(need), *map(count, law.optimal(need))])])  # fmt: skip
    parts.append("<h3>To reach a loss</h3>" + table(["loss", "least 6ND", "N", "D"], rows))
    tokens = (questions.inference_tokens,) if questions.inference_tokens else (0, D, 10 * D, 100 * D)
    rows = []
    for served in tokens:
        n, d = laws.inference_optimal(law, law.loss(N, D), served)
        saved = 1 - (6 * n * d + 2 * n * served) / (6 * N * D + 2 * N * served)
        rows.append([count(served), count(n), count(d), f"{d / n:.3g}", f"{100 * saved:.1f}%"])
    parts.append("<h3>If the model will be used much</h3><p>The same loss for the least compute of training and of "
                 "inference together (Sardana and Frankle 2023).</p>" + table(
                     ["tokens served", "N", "D", "D / N", "saved"], rows))  # fmt: skip
    unique = (questions.unique_tokens,) if questions.unique_tokens else (D, D / 4, D / 16, D / 64)
    limited, rows = DataConstrained(law), []
    for U in unique:
        n, d = limited.optimal(C, U)
        rows.append([count(U), count(n), count(d), f"{max(d / U, 1):.2g}", f"{limited.loss(n, d, U):.4f}"])
    parts.append("<h3>If there is little text</h3><p>Repeated tokens count for less and less (Muennighoff et al. 2023, "
                 "whose decay constants these are; they were fitted on C4).</p>" + table(
                     ["unique tokens", "N", "D", "epochs", "loss"], rows))  # fmt: skip
    rows = []
    for n, *cells in TABLE_3:
        own = law.tokens_for(n)
        rows.append([count(n), *(f"{flops(c)} · {count(d)}" for c, d in zip(cells[::2], cells[1::2], strict=True)),
                     f"{flops(6 * n * own)} · {count(own)}"])  # fmt: skip
    parts.append("<h3>Beside the paper's Tables 3 and A3</h3><p>FLOPs and tokens for which a size is optimal.</p>" + table(
        ["N", "Approach 1", "Approach 2", "Approach 3", "here, Approach 3"], rows))  # fmt: skip
    return "".join(parts)


def _provenance(study: Study, provenance: Provenance) -> str:
    unit = study.best.sure.unit if study.best.sure is not None else "none"
    rows = [("command", provenance.command), ("commit", provenance.commit), ("data", provenance.source),
            ("SHA-256 of the data", provenance.sha256), ("counted as", study.convention),
            ("resampled", f"{unit}, {study.settings.bootstrap} times; intervals are 95% percentiles"),
            ("versions", provenance.versions)]  # fmt: skip
    return (
        "<dl>" + "".join(f"<dt>{key}</dt><dd><code>{html.escape(value)}</code></dd>" for key, value in rows) + "</dl>"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The budget that the reader types


def _script(study: Study) -> str:
    """The optimum on a log grid of C, a tenth of the smallest run to ten million times the largest, and the lines
    that interpolate in it. N, D and their ends are power laws in C, so that lines in log-log are right."""
    grid = np.geomspace(study.C.min() / 10, study.C.max() * 1e7, 121)
    answers = [study.best.optimum(float(C)) for C in grid]
    columns = {"C": grid.tolist()}
    for name in ("N", "D", "ratio", "loss"):
        found = [getattr(answer, name) for answer in answers]
        if math.isfinite(found[0][0]):
            columns[name] = [value for value, _ in found]
            if math.isfinite(found[0][1][0]):
                columns[name + "_low"], columns[name + "_high"] = zip(*(ends for _, ends in found), strict=True)
    data = {"columns": columns, "low": float(study.C.min()), "high": float(study.C.max())}
    digits = json.loads(json.dumps(data), parse_float=lambda text: float(f"{float(text):.6g}"))
    return f'<script type="application/json" id="law">{json.dumps(digits)}</script>\n<script>{JAVASCRIPT}</script>'


JAVASCRIPT = """
const law = JSON.parse(document.getElementById('law').textContent), K = law.columns;
const short = v => { for (const [s, u] of [[1e12, 'T'], [1e9, 'B'], [1e6, 'M'], [1e3, 'k']])
  if (v >= 0.9995 * s) return +(v / s).toPrecision(3) + u; return '' + +v.toPrecision(3); };
const at = (name, C) => { const x = K.C.map(Math.log), y = K[name].map(Math.log), c = Math.log(C);
  let i = x.findIndex(v => v > c); i = i < 1 ? 1 : i;
  return Math.exp(y[i - 1] + (y[i] - y[i - 1]) * (c - x[i - 1]) / (x[i] - x[i - 1])); };
const part = (name, C, show) => '<b>' + show(at(name, C)) + '</b>' + (K[name + '_low'] ?
  ' <span class="ci">' + show(at(name + '_low', C)) + ' \\u2013 ' + show(at(name + '_high', C)) + '</span>' : '');
function answer() {
  const C = Number(document.getElementById('budget').value.trim().replace(',', '.').replace(/\\s*[x\\u00d7*]\\s*10\\^?/, 'e'));
  const out = document.getElementById('answer');
  if (!(C > 0)) { out.textContent = 'A number of FLOPs, such as 1e18.'; return; }
  if (C < K.C[0] || C > K.C[K.C.length - 1]) { out.textContent = 'Too far from these runs to say.'; return; }
  let text = part('N', C, short) + ' parameters on ' + part('D', C, short) + ' tokens';
  text += ', ' + part('ratio', C, v => '' + +v.toPrecision(3)) + ' tokens per parameter';
  if (K.loss) text += ', loss ' + part('loss', C, v => v.toFixed(3));
  if (C > 1.01 * law.high) text += '. <span class="beyond">' + short(C / law.high) + ' times beyond the largest run</span>';
  if (C < 0.99 * law.low) text += '. <span class="beyond">below the smallest run</span>';
  out.innerHTML = text; }
document.getElementById('budget').addEventListener('input', answer); answer();
"""

CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,
Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:36px 24px 64px}
header{margin-bottom:20px}.eyebrow{color:var(--soft);letter-spacing:.06em;text-transform:uppercase;font-size:12px;margin:0}
h1{font-size:clamp(25px,4.2vw,38px);line-height:1.18;letter-spacing:-.015em;margin:.25em 0 .35em;text-wrap:balance}
h1 sup,sup{font-size:.65em;line-height:0}sub{font-size:.65em;line-height:0}
h2{font-size:20px;letter-spacing:-.01em;margin:0 0 10px}h3{font-size:16px;margin:26px 0 6px}
.lead{color:var(--soft);margin:0}
section{margin-top:40px;min-width:0}.first{display:grid;grid-template-columns:minmax(0,5fr) minmax(0,6fr);gap:0 40px}
.first section{margin-top:20px}
.formula{font:clamp(17px,2.4vw,22px)/1.5 Georgia,'Times New Roman',serif;margin:6px 0 14px;display:flex;flex-wrap:wrap;
align-items:center;gap:.3em}
.frac{display:inline-flex;flex-direction:column;text-align:center;line-height:1.25}
.frac span:first-child{border-bottom:1px solid currentColor;padding:0 .3em}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th{font-weight:600;text-align:left;color:var(--soft);font-size:12.5px}
th,td{padding:6px 14px 6px 0;border-bottom:1px solid var(--grid);vertical-align:baseline}
thead th{border-bottom:1px solid var(--edge)}tr.mark td{font-weight:600}
.scroll{overflow-x:auto;max-width:100%}.ci{color:var(--soft);font-size:.86em;white-space:nowrap}
.first .ci{display:inline-block}small{color:var(--soft);font-size:12.5px}.approach{color:var(--soft)}.beyond{color:var(--red);font-size:12px;white-space:nowrap}
.ask{margin:0 0 4px}.ask input{font:inherit;font-variant-numeric:tabular-nums;width:7.5em;padding:5px 9px;margin:0 4px;
border:1px solid var(--edge);border-radius:7px;background:var(--paper);color:var(--ink)}
.ask input:focus{outline:2px solid var(--blue);outline-offset:1px}
.answer{margin:6px 0 14px;min-height:3.1em}.answer b{font-size:1.12em}
.findings{list-style:none;padding:0;margin:0 0 18px}.findings li{padding:3px 0 3px 26px;position:relative}
.findings li:before{position:absolute;left:2px;font-weight:700}
.good:before{content:'\\2713';color:var(--green)}.bad:before{content:'!';color:var(--red);left:6px!important}
figure{margin:0}.panels{display:flex;flex-wrap:wrap;align-items:flex-start;gap:18px 28px}.panels svg{flex:1 1 440px;min-width:0;max-width:660px;
height:auto}
figcaption{color:var(--soft);font-size:14px;margin-top:8px;max-width:75ch}
footer{margin-top:48px;border-top:1px solid var(--edge);padding-top:20px;font-size:14px}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:4px 20px;margin:0}dt{color:var(--soft)}dd{margin:0}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}em{color:var(--soft)}
@media(max-width:760px){main{padding:22px 16px 48px}.first{display:block}.first section{margin-top:28px}
.panels svg{flex-basis:100%}dl{display:block}dt{margin-top:8px}table{font-size:13.5px}th,td{padding-right:12px}}
@media print{section,figure{break-inside:avoid}.ask,.answer{display:none}}
"""
