"""Fit the scaling law of a set of runs: three approaches, their intervals, and what a budget should buy.

    python fit.py runs.csv                       any table with params, tokens and loss; or .jsonl, or a sweep's folder
    python fit.py runs.csv --drop 5 --budget 1e18 1e21 5.76e23

The answer comes on the terminal; laws.json (for `train.py --law`), the figures and report.html go to --out.
"""

import json
import os
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from nanochin import laws
from nanochin.base.cli import UserError, opt, parse, run_command, with_flags
from nanochin.base.console import Progress, count, format_columns
from nanochin.base.files import versions, write_file, writing
from nanochin.config import FLOP_CONVENTIONS, PARAM_CONVENTIONS
from nanochin.laws import Law, NotIdentified
from nanochin.report.allocate import SHOWN, Answer, Answers, Questions, Trial, answer, estimates, optimum, read_trial
from nanochin.report.analysis import Analysis, Approach, Settings, analyse, resamples
from nanochin.report.checks import CheckResult, run_checks
from nanochin.report.curves import curves_of_runs
from nanochin.report.table import (
    RunTable,
    all_or_no_flops,
    best_tuning,
    parse_columns,
    read_curves,
    read_rows,
    require_usable,
)
from nanochin.run.curves import is_csv_gz

MOST = 1e40  # FLOPs or tokens that one may ask about: beyond, losses differ from E in no digit
GREAT_FILE = 10_000_000  # bytes that take some seconds to read
FIGURES = ("curves", "isoflop", "optimum", "surface", "residuals", "hold-out", "certainty")  # all that may be drawn
OURS = ("laws.json", "report.html", *(f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")))
UNWANTED = {"all": (), "svg": (".png",), "none": (".svg", ".png")}  # of these, by --figures
MARKS = {"ok": "  ", "doubt": "! ", "not checked": "? "}
MOMENTS = 3e6  # rows x resamples below which it takes no longer than a moment, and progress is not shown


@dataclass(frozen=True)
class FitOptions:
    path: str = opt(None, "runs.csv, .jsonl, or the folder of a sweep or of runs", positional=True)
    out: str | None = opt(None, "folder of laws.json, figures and report; default: fit-NAME beside the runs")

    # What to read.
    columns: str | None = opt(None, "columns of other names, such as params=N,tokens=D")
    curves: str | None = opt(
        None, "training curves for Approach 1: a table of run, params, tokens, loss, or a curves.csv.gz"
    )
    skip_bad: bool = opt(False, "leave out lines that cannot be used, and count them")
    drop: int = opt(0, "leave out this many runs of highest loss", low=0)
    params: str = opt("total", "how N is counted", choices=tuple(PARAM_CONVENTIONS))
    flops: str | None = opt(
        None, "how C is counted; default: the column flops, else 6nd", choices=tuple(FLOP_CONVENTIONS)
    )

    # How to fit.
    delta: float = opt(1e-3, "delta of the Huber loss on log-loss residuals", above=0)
    fixed_e: float | None = opt(None, "irreducible loss E, if it is known", low=0)
    bootstrap: int | None = opt(
        None, "resamples for the intervals, 0 = none; default: 4000, fewer of very many rows", low=0, high=10**6
    )
    cluster: str = opt("auto", "what is resampled; auto: runs, if rows name them", choices=("auto", "run", "row"))
    seed: int = opt(0, "seed of the resampling", low=0)

    # What to ask.
    budget: tuple[float, ...] = opt(
        (), "training FLOPs to allocate; default: around those of the runs", low=1, high=MOST
    )
    target_loss: float | None = opt(None, "what does this loss cost?", above=0)
    inference_tokens: float | None = opt(None, "tokens that the model will serve", low=1, high=MOST)
    unique_tokens: float | None = opt(None, "tokens of text that there are", low=1, high=MOST)
    trials: tuple[str, ...] = opt(
        (),
        "runs that train.py --law made after these were fitted: shown beside what the "
        "law had predicted of them, not fitted",
    )
    figures: str = opt(
        "all",
        "all: in the report, and as files in SVG and PNG; svg: no PNG; none: no figures",
        choices=("all", "svg", "none"),
    )


def main() -> None:
    options = parse(FitOptions, prog="fit.py", description=__doc__)
    out = require_output(options)
    trials = [read_trial(folder) for folder in options.trials]
    rows, curves = read(options)
    settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
    replicates, note = resamples(len(rows), options.bootstrap)
    quiet = len(rows) * replicates < MOMENTS
    with Progress(quiet) as progress:
        if note:
            progress.say(with_flags(note))
        analysis = analyse(rows, curves, settings, progress)
    questions = Questions(
        options.budget or around(analysis), options.target_loss, options.inference_tokens, options.unique_tokens
    )
    answers = answer(analysis.best, questions)
    print(first_screen(analysis, answers), flush=True)

    with Progress(quiet) as progress:
        outcomes = run_checks(analysis, progress)
    said = [MARKS[one.status] + with_flags(one.sentence) for one in outcomes.values() if one.sentence]
    print("\n" + "\n".join(said), flush=True)
    if trials:
        print("\nPredicted first, trained then:\n" + "\n".join(f"  {trial}" for trial in trials))
    print("\n" + write(analysis, outcomes, questions, answers, trials, options, out))


def require_output(options: FitOptions) -> Path:
    """The folder to write to. Raises UserError, before anything is computed, where there can be none, or where a file
    would be written over that no earlier fit has written."""
    path = Path(options.path)
    out = Path(options.out) if options.out else path / "fit" if path.is_dir() else path.parent / f"fit-{path.stem}"
    there = next(folder for folder in (out, *out.absolute().parents) if os.path.exists(folder))
    if not there.is_dir():
        raise UserError(f"--out {out}: cannot be a folder, since {there} is a file; name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: cannot write in {there}; name another folder")
    ours = set(files_of_earlier_fit(out))
    wanted = [name for name in OURS if not name.endswith(UNWANTED[options.figures])]
    if others := [name for name in wanted if (out / name).exists() and name not in ours]:
        raise UserError(
            f"--out {out}: {', '.join(others)} there would be written over, and no earlier fit has written "
            f"{'it' if len(others) == 1 else 'them'}; move, delete or name another folder"
        )
    return out


def read(options: FitOptions) -> tuple[RunTable, RunTable | None]:
    """The runs and, where there are any, their training curves. Raises UserError for what cannot be used."""
    path, columns = Path(options.path), parse_columns(options.columns)
    if path.is_file() and (size := path.stat().st_size) > GREAT_FILE:
        print(f"reading {path}, {size / 1e6:.0f} MB", flush=True)
    rows = read_rows(path, columns, options.skip_bad)
    if options.flops in (None, "physical"):
        rows = all_or_no_flops(rows, options.skip_bad)
    rows = best_tuning(rows)
    require_usable(rows)
    if not options.curves:
        return rows, curves_of_runs(path if path.is_dir() else path.parent, rows)
    if not is_csv_gz(options.curves):
        return rows, read_curves(options.curves, columns, options.skip_bad)
    if curves := curves_of_runs(options.curves, rows):
        return rows, curves
    raise UserError(f"{options.curves}: has no curve of a run in {rows.source}")


def around(analysis: Analysis) -> tuple[float, ...]:
    """At most seven powers of ten, from that above the smallest run to a hundred times that above the largest."""
    first = int(np.ceil(np.log10(analysis.C.min())))
    last = int(np.ceil(np.log10(analysis.C.max()))) + 2
    step = -(-(last - first + 1) // 7)
    return tuple(float(f"1e{power}") for power in range(last, first - 1, -step))[::-1]


# ---------------------------------------------------------------------------------------------------------------------
# On the terminal


def first_screen(analysis: Analysis, answers: Answers) -> str:
    N, D, C = analysis.N, analysis.D, analysis.C
    lines = [
        f"{analysis.rows.source}: {len(N)} runs, N {count(N.min())} to {count(N.max())}, D {count(D.min())} to "
        f"{count(D.max())}, C {C.min():.3g} to {C.max():.3g} FLOPs ({analysis.convention})",
        "",
    ]
    table = [["", "a", "95%", "b", "95%", "a + b"]]
    for number, found in analysis.results.items():
        if isinstance(found, Approach):
            table.append([f"approach {number}", *exponents(found, found.flops_range)])
            if number == 3 and not analysis.cost.is_6nd:
                table.append(["  for 6ND (Eq. 4)", *exponents(found)])
            if number == 2 and isinstance(analysis.akima, Approach):
                table.append(["  by Akima, seed noise", *exponents(analysis.akima, analysis.akima.flops_range)])
        else:
            table.append([f"approach {number}", "-", "", "-", "", ""])
    lines += [format_columns(table), ""]
    best = analysis.best
    if isinstance(best.law, Law):
        law = best.law
        lines.append(f"L(N, D) = {law.E:.6g} + {law.A:.6g} / N^{law.alpha:.6g} + {law.B:.6g} / D^{law.beta:.6g}")
        if best.boot is not None:
            ends = {name: best.interval(name) for name in ("E", "A", "B", "alpha", "beta")}
            lines.append("95%: " + ", ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in ends.items()))
    else:
        lines.append(f"N = {best.law.k_N:.6g} C^{best.law.a:.6g}, D = {best.law.k_D:.6g} C^{best.law.b:.6g}")
    for title, found in (
        (f"what to train ({analysis.flops_name})", answers.optima),
        ("to reach a loss", answers.to_reach),
        ("as good as the optimum of C, but cheapest when it has served", answers.to_serve),
        ("when there is only so much text, which is then repeated", answers.with_text),
    ):
        lines += ["", *asked(title, found)] if found else []
    return "\n".join(lines)


def asked(title: str, answers: list[Answer]) -> list[str]:
    """The lines of a table: what was asked, what was found with its 95% interval, or why there is nothing."""
    given, reasons = answers[0].asked, {one.why: None for one in answers if one.why}
    found = next((one.found for one in answers if one.found), {})
    with_ends = [name for name, estimate in found.items() if estimate.intervals]
    table = [[SHOWN[name][0] for name in given]]
    for name in found:
        table[0] += [SHOWN[name][0]] + ["95%"] * (name in with_ends)
    for one in answers:
        row = [SHOWN[name][1](value) for name, value in one.asked.items()]
        for name in found:
            estimate, show = one.found.get(name), SHOWN[name][1]
            row.append(show(estimate.value) if estimate else "-")
            if name in with_ends:
                row.append(between(estimate.ends, show) if estimate else "")
        table.append(row)
    return [title, format_columns([[cell + " " for cell in row] for row in table]), *(f"-: {why}" for why in reasons)]


def exponents(approach: Approach, flops_range: tuple | None = None) -> list[str]:
    """a and b of the optimum in the FLOPs of the analysis, between those of `flops_range`; without, those of Eq. 4."""
    a, b = estimates(approach, lambda law: laws.exponents(law, *flops_range) if flops_range else (law.a, law.b))
    return [f"  {a.value:.4f}", between(a.ends), f"  {b.value:.4f}", between(b.ends), f"  {a.value + b.value:.4f}"]


def between(ends: tuple[float, float], show="{:.3g}".format) -> str:
    return f"[{show(ends[0])}, {show(ends[1])}]" if np.isfinite(ends[0]) else ""


# ---------------------------------------------------------------------------------------------------------------------
# In files


def write(
    analysis: Analysis,
    outcomes: dict[str, CheckResult],
    questions: Questions,
    answers: Answers,
    trials: list[Trial],
    options: FitOptions,
    out: Path,
) -> str:
    """laws.json, figures, report.html: each whole or as it was before. Figures that an earlier fit wrote here and this
    one does not are deleted; nothing else in the folder is touched."""
    from nanochin.report import html  # imports jinja2, as `draw` matplotlib: --help needs neither

    built = versions()
    provenance = html.Provenance(
        command=command(),
        commit=built["git"] or "not in git",
        versions=f"python {built['python']}, numpy {built['numpy']}",
    )
    files, panels = draw(analysis, outcomes, options.figures)
    files["report.html"] = html.render(analysis, outcomes, panels, questions, answers, trials, provenance).encode()
    meta = describe(analysis, options) | {"command": command(), "git": built["git"], "files": sorted(files)}
    files["laws.json"] = laws.laws_text(contents(analysis, outcomes, questions, answers, trials, meta)).encode()

    stale, new = set(files_of_earlier_fit(out)) - set(files), []
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        for name, content in files.items():  # all made before one is written; laws.json, which lists them, is the last
            new += [] if (out / name).exists() else [out / name]
            write_file(out / name, content)
    except BaseException:  # a full disk, Ctrl-C: what no list names would be in the way of the next fit
        for path in new:
            path.unlink(missing_ok=True)
        raise
    for name in stale:
        (out / name).unlink(missing_ok=True)
    kinds = {"all": "SVG and PNG", "svg": "SVG"}
    said = f", {len(panels)} figures in {kinds[options.figures]}" if panels else ""
    return f"{out}: laws.json, report.html{said}"


def draw(
    analysis: Analysis, outcomes: dict[str, CheckResult], wanted: str
) -> tuple[dict[str, bytes], dict[str, list[str]]]:
    """({file name: content}, {figure: its panels for the report}) of `wanted`: all, svg or none."""
    if wanted == "none":
        return {}, {}
    from nanochin.report import figures
    from nanochin.report.panels import png, svg

    drawn, files, panels = figures.draw(analysis, {name: one.found for name, one in outcomes.items()}), {}, {}
    for name, figure in drawn.items():
        text, panels[name] = svg(figure, name)
        files[f"{name}.svg"] = text.encode()
        if wanted == "all":
            files[f"{name}.png"] = png(figure)
    return files, panels


def files_of_earlier_fit(out: Path) -> list[str]:
    """Of OURS, what the laws.json in `out` says was written there, itself included."""
    try:
        listed = json.loads((out / "laws.json").read_text(encoding="utf-8"))["meta"]["files"]
        return [name for name in OURS if name == "laws.json" or name in listed]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, of an older version, or not ours
        return []


def contents(
    analysis: Analysis,
    outcomes: dict[str, CheckResult],
    questions: Questions,
    answers: Answers,
    trials: list[Trial],
    meta: dict,
) -> dict:
    """laws.json: each approach with its intervals and its optima of the budgets that were asked, the answers, and of
    the checks what each has to store and, under `outcomes`, what all of them say."""

    def as_json(found) -> dict | NotIdentified:
        if isinstance(found, NotIdentified):
            return found
        optima = answers.optima if found is analysis.best else [optimum(found, C) for C in questions.budgets]
        return found.fit.to_json(found.boot) | {"optima": [one.to_json() for one in optima]} | frontier(found)

    def frontier(found: Approach) -> dict:
        """Where C is not 6ND: how the optimum of Approach 3 grows with it."""
        if not isinstance(found.law, Law) or analysis.cost.is_6nd:
            return {}
        both = estimates(found, lambda law: laws.exponents(law, *found.flops_range))
        grown = Answer({}, dict(zip("ab", both, strict=True)))
        return {
            "frontier": {"flops": analysis.flops_name, "from": found.flops_range[0], "to": found.flops_range[1]}
            | grown.to_json()
        }

    everything = laws.laws_json(*(as_json(analysis.results[number]) for number in (1, 2, 3)), meta)
    if isinstance(analysis.akima, Approach):
        everything["approach2_akima"] = as_json(analysis.akima)
    everything["answers"] = {"approach": analysis.best.number} | answers.to_json()
    stored = {name: one.json for name, one in outcomes.items() if one.json is not None}
    everything["checks"] = stored | {"outcomes": [[name, one.status, one.sentence] for name, one in outcomes.items()]}
    return everything | ({"trials": [trial.to_json() for trial in trials]} if trials else {})


def describe(analysis: Analysis, options: FitOptions) -> dict:
    """`meta` of laws.json: what was counted, in which way, on what."""

    def only(name: str) -> str | None:
        used = analysis.rows.labels[name].used() if name in analysis.rows.labels else []
        return used[0] if len(used) == 1 else ", ".join(used) or None

    boot = analysis.best.boot
    return {
        "source": analysis.rows.source,
        "sha256": analysis.rows.sha256,
        "curves": analysis.curves.source if analysis.curves else None,
        "curves_sha256": analysis.curves.sha256 if analysis.curves else None,
        "params_convention": options.params,
        "flops_convention": analysis.flops_convention,
        "flops_name": analysis.flops_name,
        **{name: only(name) for name in ("tokenizer", "seq_len", "data_sha", "val_sha")},
        "n_runs": len(analysis.N),
        "dropped": analysis.rows.dropped,
        "bootstrap": analysis.settings.bootstrap,
        "cluster": None if boot is None else boot.unit,
        "level": 95,
        "seed": options.seed,
    }


def command() -> str:
    return shlex.join(["python", "fit.py", *sys.argv[1:]])


if __name__ == "__main__":
    run_command(main, "fit.py")
