"""Fit the scaling law of a set of runs: three approaches, their intervals, and what to train for a budget.

    python fit.py runs.csv                       any table with params, tokens and loss; or JSON, or a sweep's folder
    python fit.py runs.csv --drop 5 --budget 1e18 1e21 5.76e23

Prints the answer; writes laws.json (for `train.py --law`), the figures and report.html to --out.
"""

from nanochin.base import signals

if __name__ == "__main__":
    signals.end_quietly()  # on Ctrl-C during the imports

import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from nanochin import laws
from nanochin.base.cli import UserError, no_torchrun, opt, parse, run_command, with_flags
from nanochin.base.console import Progress, count, format_columns, markdown
from nanochin.base.files import versions, write_file, writing
from nanochin.config import FLOP_CONVENTIONS, PARAM_CONVENTIONS
from nanochin.laws import Law, NotIdentified
from nanochin.report import table
from nanochin.report.allocate import (
    SHOWN,
    Answer,
    Answers,
    Prediction,
    Questions,
    answer,
    frontier,
    frontier_loss,
    optimum,
)
from nanochin.report.analysis import Analysis, Approach, Settings, analyse, resamples
from nanochin.report.cells import parse_columns
from nanochin.report.checks import forms, run_checks
from nanochin.report.curves import curves_of_runs
from nanochin.report.doubts import require_plausible
from nanochin.report.findings import Results, four, plus
from nanochin.report.single import Single, analyse_single
from nanochin.report.table import RunTable
from nanochin.run.curves import is_csv_gz

MOST = 1e40  # FLOPs or tokens in a question; beyond, losses equal E in all digits
FIGURES = ("curves", "isoflop", "optimum", "surface", "residuals", "hold-out", "certainty")
OUTPUTS = ("laws.json", "report.html", *(f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")))
NOT_WRITTEN = {"all": (), "svg": (".png",), "none": (".svg", ".png")}  # by --figures
MARKS = {"ok": "  ", "doubt": "! ", "not checked": "? ", "note": "  "}
QUICK = 3e6  # rows x resamples below which no progress is shown


@dataclass(frozen=True)
class FitOptions:
    path: str = opt(None, "runs.csv, JSON, JSON lines, or the folder of a sweep or of runs", positional=True)
    out: str | None = opt(None, "folder of laws.json, figures and report; default: fit-NAME beside the runs")

    columns: str | None = opt(None, "names of columns in the file, such as params=N,tokens=D", section="What to read")
    curves: str | None = opt(None, "curves for Approach 1: a table of run, params, tokens, loss, or a curves.csv.gz")
    skip_bad: bool = opt(False, "leave out and count lines that cannot be used")
    drop: int = opt(0, "leave out this many runs of highest loss", low=0)
    params: str = opt("total", "how N is counted", choices=tuple(PARAM_CONVENTIONS))
    flops: str | None = opt(None, "how C is counted; default: the column flops or 6nd", choices=tuple(FLOP_CONVENTIONS))

    delta: float = opt(1e-3, "delta of the Huber loss on log-loss residuals", above=0, section="How to fit")
    fixed_e: float | None = opt(None, "irreducible loss E, if known", low=0)
    bootstrap: int | None = opt(None, "replicates, 0 = none; default: 4000, or fewer of many rows", low=0, high=10**6)
    cluster: str = opt("auto", "what is resampled; auto: runs, if rows name them", choices=("auto", "run", "row"))
    seed: int = opt(0, "seed of the resampling", low=0)

    budget: tuple[float, ...] = opt(
        (), "training FLOPs; default: 1, 3, 10 and 30 times the largest run", low=1, high=MOST, section="What to ask"
    )
    target_loss: float | None = opt(None, "loss to reach at the lowest compute", above=0)
    inference_tokens: float | None = opt(None, "tokens that the model will serve", low=1, high=MOST)
    unique_tokens: float | None = opt(None, "tokens of text available", low=1, high=MOST)
    loss_at: tuple[float, ...] = opt((), "parameters and tokens of a model: its loss", low=1, high=MOST)
    trials: tuple[str, ...] = opt((), "held-out runs trained with --law: predicted vs actual loss, not fitted")
    format: str = opt("text", "tables on the terminal; markdown: to paste", choices=("text", "markdown"))
    figures: str = opt("all", "figures as SVG and PNG files, SVG, or none", choices=("all", "svg", "none"))


@np.errstate(over="ignore", divide="ignore", invalid="ignore")  # laws of some replicates overflow: infinite, not wrong
def main() -> None:
    options = parse(FitOptions, prog="fit.py", description=__doc__)
    no_torchrun("start fit.py by python")
    if len(options.loss_at) % 2:
        raise UserError("`loss_at`: give parameters and tokens in turn, such as 70e9 1.4e12")
    out = require_output(options)
    predictions = [Prediction.read(folder) for folder in options.trials]
    rows = read(options)
    for note in rows.notes:
        print(with_flags(note), flush=True)
    settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
    if found := analyse_single(rows, settings):
        return fit_single(found, options, out)
    require_plausible(rows)
    table.require_usable(rows)
    curves = read_curves(options, rows)
    replicates, note = resamples(len(rows), options.bootstrap)
    quiet = len(rows) * replicates < QUICK
    with Progress(quiet) as progress:
        if note:
            progress.say(with_flags(note))
        analysis = analyse(rows, curves, settings, progress)
    asked = options.target_loss, options.inference_tokens, options.unique_tokens, options.loss_at
    questions = Questions(options.budget or default_budgets(analysis.C), *asked)
    answers = answer(analysis.best, questions, predictions)
    print(summary(analysis, answers, markdown if options.format == "markdown" else format_columns), flush=True)

    with Progress(quiet) as progress:
        results = run_checks(analysis, progress)
    said = [one for name, one in results.items() if one.sentence and name != "forms"]  # which `summary` has
    findings = [MARKS[one.status] + with_flags(one.sentence) for one in said]
    print("\n" + "\n".join(findings), flush=True)
    if predictions:
        print("\nPre-registered predictions:\n" + "\n".join(f"  {one}" for one in predictions))
    print("\n" + write(analysis, results, answers, options, out))


def require_output(options: FitOptions) -> Path:
    """The folder to write to. Raises UserError if it cannot be written, or if a file that no earlier fit has written
    would be overwritten."""
    path = Path(options.path)
    out = Path(options.out) if options.out else path / "fit" if path.is_dir() else path.parent / f"fit-{path.stem}"
    nearest = next(folder for folder in (out, *out.absolute().parents) if os.path.exists(folder))
    if not nearest.is_dir():
        raise UserError(f"--out {out}: {nearest} is a file; name another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: cannot write in {nearest}; name another folder")
    ours = files_of_earlier_fit(out)
    wanted = [name for name in OUTPUTS if not name.endswith(NOT_WRITTEN[options.figures])]
    if others := [name for name in wanted if (out / name).exists() and name not in ours]:
        what = f"would overwrite {', '.join(others)}, not written by an earlier fit"
        raise UserError(f"--out {out}: {what}; move, delete or name another folder")
    return out


def read(options: FitOptions) -> RunTable:
    """The runs. Raises UserError for what cannot be used."""
    rows = table.read_rows(options.path, parse_columns(options.columns), options.skip_bad).in_order()
    if options.flops in (None, "physical"):
        rows = table.all_or_no_flops(rows, options.skip_bad)
    rows = table.best_tuning(rows) if "params" in rows.numbers else rows
    return table.without_highest(rows, options.drop)


def read_curves(options: FitOptions, rows: RunTable) -> RunTable | None:
    """Training curves of the runs, if there are any. Raises UserError for what cannot be used."""
    path = Path(options.path)
    if not options.curves:
        return curves_of_runs(path if path.is_dir() else path.parent, rows)
    if not is_csv_gz(options.curves):
        return table.read_curves(options.curves, parse_columns(options.columns), options.skip_bad)
    if curves := curves_of_runs(options.curves, rows):
        return curves
    raise UserError(f"{options.curves}: no curve of a run in {rows.source}")


def default_budgets(C: np.ndarray) -> tuple[float, ...]:
    """The largest run, and 3, 10 and 30 times it, to three digits: hold-out tests a law to about 3 times."""
    return tuple(float(f"{times * C.max():.3g}") for times in (1, 3, 10, 30))


def fit_single(found: Single, options: FitOptions, out: Path) -> None:
    """Answer and write laws.json by a law of one variable."""
    names = ["curves", "inference_tokens", "unique_tokens", "trials"] + ["budget"] * (found.of != "C")
    if unused := [f"`{name}`" for name in names if getattr(options, name)]:
        print(with_flags(f"not used by a law of one variable: {', '.join(unused)}"))
    answers = found.to_json((found.of == "C" and options.budget) or default_budgets(found.fit.x), options.target_loss)
    print(found.text(answers), flush=True)
    rows, (convention, name) = found.rows, found.counted
    meta = {"source": rows.source, "sha256": rows.sha256, "params_convention": options.params,
        "flops_convention": convention, "flops_name": name, "n_runs": len(rows), "dropped": rows.dropped, "level": 95,
        "seed": options.seed, "command": command_line(), "git": versions()["git"], "files": []}  # fmt: skip
    save({"laws.json": laws.laws_text({"single": answers, "meta": meta}).encode()}, out)
    print(f"\n{out}: laws.json")


# ---------------------------------------------------------------------------------------------------------------------
# On the terminal


def summary(analysis: Analysis, answers: Answers, show: Callable[[list[list[str]]], str]) -> str:
    """The result; `show` makes text of a table, rows of cells with the heading first."""
    N, D, C, best, law = analysis.N, analysis.D, analysis.C, analysis.best, analysis.best.law
    lines = [
        f"{analysis.rows.source}: {len(N)} runs, N {count(N.min())} to {count(N.max())}, D {count(D.min())} to "
        f"{count(D.max())}, C {C.min():.3g} to {C.max():.3g} FLOPs ({analysis.convention})",
        "",
    ]
    rows = [["", "a", "95%", "b", "95%", "a + b"]]
    for number, found in analysis.results.items():
        if isinstance(found, Approach):
            rows.append([f"approach {number}{'*' * (found.name == best.name)}", *exponents(found)])
            if number == 3 and not analysis.cost.is_6nd:
                rows.append(["  for 6ND (Eq. 4)", *exponents(found, eq4=True)])
            if number == 2 and isinstance(analysis.akima, Approach):
                rows.append(["  by Akima, seed noise", *exponents(analysis.akima)])
        else:
            rows.append([f"approach {number}", "-", "", "-", "", ""])
    rows += [[f"  {other.form}*", *exponents(other)] for other in analysis.everything[len(analysis.approaches) :]]
    lines += [show(rows), ""]
    if isinstance(law, Law):
        lines += [show(form_table(analysis)), "", f"* law in use: {best.form}; {analysis.choice.why}"]
        terms = f"{four(law.A)} / N^{four(law.alpha)} + {four(law.B)} / D^{four(law.beta)}"
        lines.append(f"L(N, D) = {plus(law.E)}" + (terms if law.is_sum else f"({terms})^{four(law.gamma)}"))
        if best.boot is not None:
            ends = {name: best.interval(name) for name in law.constants}
            lines.append("95%: " + ", ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in ends.items()))
        E, K, c = (one.value for one in frontier_loss(best).values())
        span = "" if law.cost.is_6nd else " (over the runs)"
        lines.append(f"at the optimum of C: L = {plus(E)}{four(K)} C^-{four(c)}{span}")
    else:
        k_N, a, k_D, b = (four(getattr(law, name)) for name in law.quantities)
        lines.append(f"* law in use: N = {k_N} C^{a}, D = {k_D} C^{b}")
    for title, found in (
        (f"what to train ({analysis.flops_name})", answers.optima),
        ("to reach a loss", answers.to_reach),
        ("the loss of the optimum of C, at the lowest compute of training and inference", answers.to_serve),
        ("with limited unique text, repeated", answers.with_text),
        ("the loss of a model", answers.at),
    ):
        lines += ["", *answer_table(title, found, show)] if found else []
        if found is answers.optima and best.boot and (error := getattr(law, "form_error", None)):
            lines.append(
                f"intervals of the loss include extrapolation error: {error.sd:.2%} at {error.tested:.2g} times the "
                "largest C, as measured on held-out budgets, growing with log C"
            )
            far = [f"{C:g}" for C in answers.budgets if not error.is_tested(C)]
            lines += [f"not tested at this distance: C = {', '.join(far)}"] if far else []
    return "\n".join(lines)


def form_table(analysis: Analysis) -> list[list[str]]:
    """The forms of the law with their errors; * marks the one used, - what is not known."""
    (table,) = forms(analysis).tables
    rows = [[table.head[0], *(f"  {name}" for name in table.head[1:])]]
    for i, (name, *cells) in enumerate(table.rows):
        shown = [f"  {cell}" for cell in cells] if len(cells) > 1 else ["  -"] * (len(table.head) - 1)
        rows.append([name + "*" * (i == table.mark), *shown])
    return rows


def answer_table(title: str, answers: list[Answer], text: Callable[[list[list[str]]], str]) -> list[str]:
    """The lines of a table: what was asked, what was found with its 95% interval, or why there is no answer."""
    reasons = dict.fromkeys(one.why for one in answers if one.why)
    found = next((one.found for one in answers if one.found), {})
    head = [SHOWN[name][0] for name in answers[0].asked]
    for name, estimate in found.items():
        head += [SHOWN[name][0]] + ["95%"] * bool(estimate.intervals)
    rows = [head]
    for one in answers:
        row = [SHOWN[name][1](value) for name, value in one.asked.items()]
        for name, estimate in one.found.items():
            show = SHOWN[name][1]
            row += [show(estimate.value)] + [interval(estimate.ends, show)] * bool(estimate.intervals)
        rows.append(row + ["-"] * (len(head) - len(row)))
    return [title, text([[cell + " " for cell in row] for row in rows]), *(f"-: {why}" for why in reasons)]


def exponents(approach: Approach, eq4: bool = False) -> list[str]:
    """a and b of the optimum, with intervals: in the FLOPs of the analysis over the runs, or by Eq. 4, for 6ND."""
    a, b = frontier(approach, eq4).values()
    return [f"  {a.value:.4f}", interval(a.ends), f"  {b.value:.4f}", interval(b.ends), f"  {a.value + b.value:.4f}"]


def interval(ends: tuple[float, float], show="{:.3g}".format) -> str:
    return f"[{show(ends[0])}, {show(ends[1])}]" if np.isfinite(ends[0]) else ""


# ---------------------------------------------------------------------------------------------------------------------
# In files


def write(analysis: Analysis, results: Results, answers: Answers, options: FitOptions, out: Path) -> str:
    """Write laws.json, figures and report.html, each atomically. Figures of an earlier fit that this one lacks are
    deleted; nothing else in the folder is touched."""
    from nanochin.report import html  # imports jinja2, as `draw` does matplotlib: --help needs neither

    command, built = command_line(), versions()
    packages = f"python {built['python']}, numpy {built['numpy']}"
    provenance = {"command": command, "commit": built["git"] or "not in git", "versions": packages}
    files, panels = draw(analysis, results, options.figures)
    files["report.html"] = html.render(analysis, results, panels, answers, provenance).encode()
    meta = describe(analysis, options) | {"command": command, "git": built["git"], "files": sorted(files)}
    files["laws.json"] = laws.laws_text(contents(analysis, results, answers, meta)).encode()
    save(files, out)
    figures = f", {len(panels)} figures in {'SVG and PNG' if options.figures == 'all' else 'SVG'}" if panels else ""
    return f"{out}: laws.json, report.html{figures}"


def command_line() -> str:
    return shlex.join(["python", "fit.py", *sys.argv[1:]])


def save(files: dict[str, bytes], out: Path) -> None:
    """Write {name: content}, each atomically, laws.json last; delete files of an earlier fit that are not among
    them."""
    stale, new = set(files_of_earlier_fit(out)) - set(files), []
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        for name, content in files.items():  # laws.json, which lists them, last
            new += [] if (out / name).exists() else [out / name]
            write_file(out / name, content)
    except BaseException:  # a full disk, Ctrl-C: the next fit would refuse to overwrite files that no laws.json lists
        for path in new:
            path.unlink(missing_ok=True)
        raise
    for name in stale:
        (out / name).unlink(missing_ok=True)


def draw(analysis: Analysis, results: Results, wanted: str) -> tuple[dict[str, bytes], dict[str, list[str]]]:
    """({file name: content}, {figure: its panels for the report}) of `wanted`: all, svg or none."""
    if wanted == "none":
        return {}, {}
    from nanochin.report import figures
    from nanochin.report.panels import png, svg

    files, panels = {}, {}
    for name, figure in figures.draw(analysis, {name: one.found for name, one in results.items()}).items():
        text, panels[name] = svg(figure, name)
        files[f"{name}.svg"] = text.encode()
        if wanted == "all":
            files[f"{name}.png"] = png(figure)
    return files, panels


def files_of_earlier_fit(out: Path) -> list[str]:
    """Of OUTPUTS, those that laws.json in `out` lists as written with it, itself included."""
    try:
        listed = json.loads((out / "laws.json").read_text(encoding="utf-8"))["meta"]["files"]
        return [name for name in OUTPUTS if name == "laws.json" or name in listed]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, of an older version, or not ours
        return []


def contents(analysis: Analysis, results: Results, answers: Answers, meta: dict) -> dict:
    """laws.json: each approach with its intervals and its optimum of each budget, the answers, and the JSON and the
    sentence of every check."""

    def as_json(found: Approach | NotIdentified) -> dict | NotIdentified:
        if isinstance(found, NotIdentified):
            return found
        optima = [optimum(found, C).to_json() for C in answers.budgets]
        out = found.fit.to_json(found.boot) | {"optima": optima}
        if isinstance(found.law, Law) and not analysis.cost.is_6nd:
            span = {"flops": analysis.flops_name, "from": found.flops_range[0], "to": found.flops_range[1]}
            out["frontier"] = span | Answer({}, frontier(found)).to_json()
        return out

    law = as_json(analysis.law)
    if isinstance(law, dict):
        law |= {"form": analysis.law.form, "loss_of_C": Answer({}, frontier_loss(analysis.law)).to_json()}
    everything = laws.laws_json(*(as_json(analysis.results[number]) for number in (1, 2, 3)), meta, law=law)
    everything["forms"] = analysis.choice.to_json()
    if isinstance(analysis.akima, Approach):
        everything["approach2_akima"] = as_json(analysis.akima)
    everything["answers"] = {"approach": analysis.best.number} | answers.to_json()
    stored = {name: one.json for name, one in results.items() if one.json is not None}
    everything["checks"] = stored | {"outcomes": [[name, one.status, one.sentence] for name, one in results.items()]}
    return everything | ({"trials": [one.to_json() for one in answers.trials]} if answers.trials else {})


def describe(analysis: Analysis, options: FitOptions) -> dict:
    """`meta` of laws.json: what was counted, in which way, on what."""
    labels, boot, curves = analysis.rows.labels, analysis.best.boot, analysis.curves
    same = ("tokenizer", "seq_len", "data_sha", "val_sha")
    return {"source": analysis.rows.source, "sha256": analysis.rows.sha256,
        "curves": curves.source if curves else None, "curves_sha256": curves.sha256 if curves else None,
        "params_convention": options.params, "flops_convention": analysis.flops_convention,
        "flops_name": analysis.flops_name,
        **{name: ", ".join(labels[name].used()) or None if name in labels else None for name in same},
        "n_runs": len(analysis.N), "dropped": analysis.rows.dropped, "bootstrap": analysis.settings.bootstrap,
        "cluster": boot.unit if boot else None, "level": 95, "seed": options.seed}  # fmt: skip


if __name__ == "__main__":
    run_command(main, "fit.py")
