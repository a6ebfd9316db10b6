"""Speed of Approach 3 against what people use, side by side in one run on one thread, in CPU seconds; and how long
the whole command takes, against what is promised.

    python -m bench.fit                                    240 made-up runs like Chinchilla's
    python -m bench.fit --runs chinchilla.csv --json bench/results/fit_cpu.json

The peers are the procedures of Hoffmann et al. 2022 (L-BFGS-B from a grid of 4500 starts, keep the best) and of
Besiroglu et al. 2024 (BFGS on each resample, from one start), both with the analytic gradient, which is several
times faster than the finite differences or autograd that are published. Needs scipy.
"""

import csv
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nanochin.config import UserError, opt, parse, run_command
from nanochin.console import format_columns
from nanochin.laws import BESIROGLU, HOFFMANN, bootstrap, fit_parametric
from nanochin.laws.parametric import GRID, reference_objective

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
DELTA = 1e-3
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Options:
    runs: str | None = opt(None, "CSV with the columns params, flops, loss; the 5 highest losses are left out")
    starts: int = opt(4500, "how many of the grid's 4500 starts L-BFGS-B is timed on, evenly spread; scaled up", low=1)
    resamples: int = opt(100, "how many of the 4000 resamples BFGS is timed on; scaled up", low=1)
    rounds: int = opt(5, "repetitions of what takes less than a second", low=1)
    command_rounds: int = opt(3, "repetitions of the whole command, of which the fastest counts", low=1)
    remark: str = opt("", "what else one should know about this run, such as: beside other work")
    wrong_way: bool = opt(False, "instead: how an optimiser that stops too early makes the interval collapse")
    json: str | None = opt(None, "write the results to this file, and a table beside it (.md)")


def load_runs(path: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if path is None:
        return made_up(240)
    try:
        with open(path, newline="") as file:
            table = list(csv.DictReader(file))
        N, C, loss = (np.array([float(row[c]) for row in table]) for c in ("params", "flops", "loss"))
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"--runs {path}: needs the columns params, flops, loss ({error})") from None
    kept = np.sort(np.argsort(loss)[:-5])
    return N[kept], (C / (6 * N))[kept], loss[kept]


def made_up(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs over Chinchilla's range with 0.5% of noise."""
    rng = np.random.default_rng(0)
    N, D = np.exp(rng.uniform(18, 23.5, n)), np.exp(rng.uniform(21, 26.5, n))
    return N, D, BESIROGLU.loss(N, D) * np.exp(0.005 * rng.standard_normal(n))


# ---------------------------------------------------------------------------------------------------------------------
# The peers


def timed(work: Callable[[], object], rounds: int = 1) -> tuple[float, object]:
    """Median CPU seconds, and the last result."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        result = work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), result


def compare(N, D, loss, options: Options) -> list[dict]:
    from scipy.optimize import minimize

    x, y, target = np.log(N), np.log(D), np.log(loss)
    some = [GRID[i] for i in np.linspace(0, len(GRID) - 1, options.starts).round().astype(int)]

    def lbfgs(weights=np.ones(len(N))):  # noqa: B008
        return [
            minimize(reference_objective, s, (x, y, target, DELTA, weights), "L-BFGS-B", jac=True).fun for s in some
        ]

    fit_parametric(N, D, loss)  # warm up: imports, caches
    ours, fit = timed(lambda: fit_parametric(N, D, loss), 4 * options.rounds)
    theirs, objectives = timed(lbfgs)
    best, law = min(objectives), fit.law
    warm = (np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(N), np.full(len(N), 1 / len(N)), options.resamples).astype(float)

    def bfgs():
        return [minimize(reference_objective, warm, (x, y, target, DELTA, w), "BFGS", jac=True) for w in counts]

    strap, sure = timed(lambda: bootstrap(fit), options.rounds)
    bfgs_seconds, _ = timed(bfgs)
    theirs *= len(GRID) / len(some)
    bfgs_seconds *= 4000 / len(counts)
    near = float(np.mean(np.array(objectives) <= fit.objective * (1 + 1e-6)))
    return [
        {"what": "one fit", "who": "nanochin", "seconds": ours, "ratio": None, "objective": fit.objective,
         "note": f"{fit.starts_agreeing} of {fit.starts} starts agree to 1e-9"},
        {"what": "one fit", "who": "scipy L-BFGS-B, 4500 starts", "seconds": theirs, "ratio": theirs / ours,
         "objective": best, "note": f"{near:.1%} of starts within 1e-6; timed on {len(some)} of 4500"},
        {"what": "4000 bootstraps", "who": "nanochin", "seconds": strap, "ratio": None, "objective": None,
         "note": f"{sure.worse} of {sure.checked} checked from a second start were wrong"},
        {"what": "4000 bootstraps", "who": "scipy BFGS, one start", "seconds": bfgs_seconds,
         "ratio": bfgs_seconds / strap, "objective": None, "note": f"timed on {len(counts)} of 4000"},
    ]  # fmt: skip


def wrong_way(N, D, loss, resamples: int) -> list[dict]:
    """Width of the 80% interval of a when resamples are optimised as published at first (the mean of the Huber terms,
    L-BFGS-B at its default tolerances, one start at Hoffmann's constants), when only the mean is mended to a sum, and
    when each resample is carried to its optimum."""
    from scipy.optimize import minimize

    x, y, target, law = np.log(N), np.log(D), np.log(loss), HOFFMANN
    start = (np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta)
    counts = np.random.default_rng(0).multinomial(len(N), np.full(len(N), 1 / len(N)), resamples).astype(float)
    told = []
    for name, scale in (("mean, default tolerances", 1 / len(N)), ("sum, default tolerances", 1.0)):
        results = [
            minimize(reference_objective, start, (x, y, target, DELTA, scale * w), "L-BFGS-B", jac=True) for w in counts
        ]
        exponents = [r.x[4] / (r.x[3] + r.x[4]) for r in results]
        low, high = np.percentile(exponents, (10, 90))
        told.append({"how": name, "low": low, "high": high, "steps": float(np.median([r.nit for r in results]))})
    low, high = bootstrap(fit_parametric(N, D, loss), replicates=resamples).interval("a", 80)
    return [*told, {"how": "sum, converged (nanochin)", "low": low, "high": high, "steps": math.nan}]


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def peak_memory(rows: int) -> float:
    """MB that a fit of `rows` rows and 20 bootstraps of it take at most, arguments included."""
    tracemalloc.start()
    bootstrap(fit_parametric(*made_up(rows)), replicates=20, verify=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


# ---------------------------------------------------------------------------------------------------------------------
# The command

COMMANDS = (  # what, options of fit.py, whether the answer on the terminal ends it, seconds promised
    ("point estimates, until the answer", ("--bootstrap=0", "--figures=none"), True, 1),
    ("4000 bootstraps, until the answer", ("--bootstrap=4000", "--figures=none"), True, 3),
    ("everything, SVG and PNG figures included", (), False, 8),
)


def time_commands(N, D, loss, rounds: int) -> list[dict]:
    """Seconds by the clock from the start of Python to the answer on the terminal or to the end of the command, the
    best of `rounds`; CPU seconds of the whole command."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.csv"
        header = "params,tokens,loss"
        np.savetxt(path, np.stack([N, D, loss], 1), fmt="%.17g", delimiter=",", header=header, comments="")
        for what, options, until_answer, target in COMMANDS:
            argv = [sys.executable, "fit.py", str(path), f"--out={folder}/out", *options]
            best = {"seconds": math.inf}
            for _ in range(rounds):
                start = time.perf_counter()
                with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE) as process:
                    process.stdout.readline()  # the answer comes in one piece
                    answered = time.perf_counter() - start
                    process.stdout.read()
                    ended = time.perf_counter() - start
                    _, status, used = os.wait4(process.pid, 0)
                    process.returncode = os.waitstatus_to_exitcode(status)
                if process.returncode:
                    raise UserError(f"{' '.join(argv)}: exit code {process.returncode}")
                seconds, cpu = answered if until_answer else ended, used.ru_utime + used.ru_stime
                if seconds < best["seconds"]:
                    best = {"seconds": seconds, "cpu_seconds": cpu}
            rows.append({"what": what, "options": " ".join(options), "target": target} | best)
    return rows


def main() -> None:
    options = parse(Options, prog="python -m bench.fit", description=__doc__)
    if any(os.environ.get(name) != value for name, value in ONE_THREAD.items()):
        # Read by the BLAS when it is loaded: start again.
        os.execve(sys.executable, [sys.executable, "-m", "bench.fit", *sys.argv[1:]], os.environ | ONE_THREAD)
    N, D, loss = load_runs(options.runs)
    if options.wrong_way:
        lines = [["resamples are optimised by", "80% interval of a", "width", "steps"]]
        for row in wrong_way(N, D, loss, options.resamples):
            lines.append(
                [
                    row["how"],
                    f"{row['low']:.4f} to {row['high']:.4f}",
                    f"{row['high'] - row['low']:.4f}",
                    "-" if math.isnan(row["steps"]) else f"{row['steps']:.0f}",
                ]
            )
        return print(format_columns(lines))
    rows = compare(N, D, loss, options)
    memory = {n: peak_memory(n) for n in (1000, 100_000)}
    commands = time_commands(N, D, loss, options.command_rounds)
    lines = [["what", "CPU s", "ratio", "objective", "remarks"]]
    for row in rows:
        ratio = f"{row['ratio']:.0f}x" if row["ratio"] else "1"
        objective = f"{row['objective']:.13g}" if row["objective"] else "-"
        lines.append([f"{row['what']}: {row['who']}", f"{row['seconds']:.3g}", ratio, objective, row["note"]])
    text = format_columns(lines)
    text += "\n" + "\n".join(f"{n} rows, a fit and 20 bootstraps: {mb:.0f} MB" for n, mb in memory.items())
    table = [[f"python fit.py, {len(N)} rows", "by the clock, s", "target, s", "CPU s of it all"]]
    for row in commands:
        numbers = (f"{row['seconds']:.2f}", str(row["target"]), f"{row['cpu_seconds']:.2f}")
        table.append([row["what"], *numbers])
    text += "\n\n" + format_columns(table)
    print(text)
    if options.json:
        import scipy

        from bench.train_throughput import cpu_name

        source = "240 made-up runs" if options.runs is None else f"{len(N)} rows of {Path(options.runs).name}"
        shown = shlex.join(Path(a).name if a == options.runs else a for a in sys.argv[1:])
        about = {
            "command": f"python -m bench.fit {shown}".strip(),
            "source": source,
            "cpu": cpu_name(),
            "threads": 1,
            "date": time.strftime("%Y-%m-%d"),
            "python": sys.version.split()[0],
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        }
        kept = asdict(options) | {"runs": options.runs and Path(options.runs).name}
        result = about | {"options": kept, "rows": rows, "memory_mb": memory, "commands": commands}
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
        note = (
            f"{source}; {about['cpu']}, one thread, numpy {about['numpy']}, scipy {about['scipy']}, "
            f"{about['date']}; CPU seconds, ratios to nanochin in the same run"
            + f"; {options.remark}"
            * bool(options.remark)
        )
        Path(options.json).with_suffix(".md").write_text(f"`{about['command']}`\n\n{note}\n\n```\n{text}\n```\n")


if __name__ == "__main__":
    run_command(main, "python -m bench.fit")
