"""Speed of Approach 3 against what people use, side by side in one run on one thread, in CPU seconds; and how long
the whole command takes, against what is promised.

    python -m bench.fit                                    240 made-up runs like Chinchilla's
    python -m bench.fit --runs chinchilla.csv --json bench/results/fit_cpu.json

The peers are the procedures of Hoffmann et al. 2022 (L-BFGS-B from a grid of 4500 starts, keep the best) and of
Besiroglu et al. 2024 (BFGS on each resample, from one start), both with the analytic gradient, which is several
times faster than the finite differences or autograd that are published. Needs scipy.
"""

import csv
import math
import os
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

from bench.common import ROOT, write_report
from nanochin.base.cli import UserError, opt, parse, run_command
from nanochin.base.console import format_columns
from nanochin.laws import BESIROGLU, HOFFMANN, Law, bootstrap, fit_parametric
from nanochin.laws.parametric import GRID, reference_objective

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
DELTA = 1e-3
COMMANDS = (  # what, options of fit.py, whether the answer on the terminal ends it, seconds promised
    ("point estimates, until the answer", ("--bootstrap=0", "--figures=none"), True, 1),
    ("4000 bootstraps, until the answer", ("--bootstrap=4000", "--figures=none"), True, 3),
    ("everything, SVG and PNG figures included", (), False, 8),
)


@dataclass(frozen=True)
class Options:
    runs: str | None = opt(None, "CSV with the columns params, flops, loss; the 5 highest losses are left out")
    starts: int = opt(4500, "how many of the grid's 4500 starts L-BFGS-B is timed on, evenly spread; scaled up", low=1)
    resamples: int = opt(100, "how many of the 4000 resamples BFGS is timed on; scaled up", low=1)
    rounds: int = opt(5, "repetitions of what takes less than a second", low=1)
    command_rounds: int = opt(3, "repetitions of the whole command, of which the fastest counts", low=1)
    wrong_way: bool = opt(False, "instead: how an optimiser that stops too early makes the interval collapse")
    json: str | None = opt(None, "write the results to this file, and a table beside it (.md)")


def load_runs(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


class Peers:
    """scipy on the same rows."""

    def __init__(self, N: np.ndarray, D: np.ndarray, loss: np.ndarray):
        self.data, self.ones = (np.log(N), np.log(D), np.log(loss), DELTA), np.ones(len(N))

    def minimize(self, start, method: str, weights: np.ndarray | None = None):
        from scipy.optimize import minimize

        arguments = (*self.data, self.ones if weights is None else weights)
        return minimize(reference_objective, start, arguments, method, jac=True)

    def resamples(self, number: int) -> np.ndarray:
        """How often each row is drawn: (number, rows)."""
        n = len(self.ones)
        return np.random.default_rng(0).multinomial(n, self.ones / n, number).astype(float)


def start_at(law: Law) -> tuple[float, ...]:
    return np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta


def timed(work: Callable[[], object], rounds: int = 1) -> tuple[float, object]:
    """Median CPU seconds, and the last result."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        result = work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), result


def compare(N, D, loss, options: Options) -> list[dict]:
    peers = Peers(N, D, loss)
    starts = [GRID[i] for i in np.linspace(0, len(GRID) - 1, options.starts).round().astype(int)]
    fit_parametric(N, D, loss)  # warm up: imports, caches
    ours, fit = timed(lambda: fit_parametric(N, D, loss), 4 * options.rounds)
    theirs, found = timed(lambda: [peers.minimize(start, "L-BFGS-B").fun for start in starts])
    warm, weights = start_at(fit.law), peers.resamples(options.resamples)
    strap, boot = timed(lambda: bootstrap(fit), options.rounds)
    bfgs, _ = timed(lambda: [peers.minimize(warm, "BFGS", w) for w in weights])
    near = float(np.mean(np.array(found) <= fit.objective * (1 + 1e-6)))
    notes = (
        f"{fit.starts_agreeing} of {fit.starts} starts agree to 1e-9",
        f"{near:.1%} of starts within 1e-6; timed on {len(starts)} of 4500",
        f"{boot.worse} of {boot.checked} checked from a second start were wrong",
        f"timed on {len(weights)} of 4000",
    )
    theirs, bfgs = theirs * len(GRID) / len(starts), bfgs * 4000 / len(weights)
    rows = (
        ("one fit: nanochin", ours, None, fit.objective),
        ("one fit: scipy L-BFGS-B, 4500 starts", theirs, theirs / ours, min(found)),
        ("4000 bootstraps: nanochin", strap, None, None),
        ("4000 bootstraps: scipy BFGS, one start", bfgs, bfgs / strap, None),
    )
    names = ("what", "seconds", "ratio", "objective", "note")
    return [dict(zip(names, (*row, note), strict=True)) for row, note in zip(rows, notes, strict=True)]


def wrong_way(N, D, loss, resamples: int) -> list[dict]:
    """Width of the 80% interval of a when resamples are optimised as published at first (the mean of the Huber terms,
    L-BFGS-B at its default tolerances, one start at Hoffmann's constants), when only the mean is mended to a sum, and
    when each resample is carried to its optimum."""
    peers, told = Peers(N, D, loss), []
    for name, scale in (("mean, default tolerances", 1 / len(N)), ("sum, default tolerances", 1.0)):
        weights = scale * peers.resamples(resamples)
        results = [peers.minimize(start_at(HOFFMANN), "L-BFGS-B", w) for w in weights]
        low, high = np.percentile([r.x[4] / (r.x[3] + r.x[4]) for r in results], (10, 90))
        told.append({"how": name, "low": low, "high": high, "steps": float(np.median([r.nit for r in results]))})
    low, high = bootstrap(fit_parametric(N, D, loss), replicates=resamples).interval("a", 80)
    return [*told, {"how": "sum, converged (nanochin)", "low": low, "high": high, "steps": math.nan}]


# ---------------------------------------------------------------------------------------------------------------------
# Memory and the whole command


def peak_memory(rows: int) -> float:
    """MB that a fit of `rows` rows and 20 bootstraps of it take at most, arguments included."""
    tracemalloc.start()
    bootstrap(fit_parametric(*made_up(rows)), replicates=20, verify=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


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
            seconds, cpu = min(time_command(argv, until_answer) for _ in range(rounds))
            rows.append({"what": what, "target": target, "seconds": seconds, "cpu_seconds": cpu})
    return rows


def time_command(argv: list[str], until_answer: bool) -> tuple[float, float]:
    """(seconds by the clock, CPU seconds)."""
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
    return answered if until_answer else ended, used.ru_utime + used.ru_stime


def main() -> None:
    options = parse(Options, prog="python -m bench.fit", description=__doc__)
    if any(os.environ.get(name) != value for name, value in ONE_THREAD.items()):
        # Read by the BLAS when it is loaded: start again.
        os.execve(sys.executable, [sys.executable, "-m", "bench.fit", *sys.argv[1:]], os.environ | ONE_THREAD)
    runs = load_runs(options.runs) if options.runs else made_up(240)
    if options.wrong_way:
        lines = [["resamples are optimised by", "80% interval of a", "width", "steps"]]
        for row in wrong_way(*runs, options.resamples):
            low, high, steps = row["low"], row["high"], row["steps"]
            width, steps = f"{high - low:.4f}", "-" if math.isnan(steps) else f"{steps:.0f}"
            lines.append([row["how"], f"{low:.4f} to {high:.4f}", width, steps])
        return print(format_columns(lines))
    rows = compare(*runs, options)
    memory = {n: peak_memory(n) for n in (1000, 100_000)}
    commands = time_commands(*runs, options.command_rounds)
    lines = [["what", "CPU s", "ratio", "objective", "remarks"]]
    for row in rows:
        ratio = f"{row['ratio']:.0f}x" if row["ratio"] else "1"
        objective = f"{row['objective']:.13g}" if row["objective"] else "-"
        lines.append([row["what"], f"{row['seconds']:.3g}", ratio, objective, row["note"]])
    table = [[f"python fit.py, {len(runs[0])} rows", "by the clock, s", "target, s", "CPU s of it all"]]
    for row in commands:
        table.append([row["what"], f"{row['seconds']:.2f}", str(row["target"]), f"{row['cpu_seconds']:.2f}"])
    used = [f"{n} rows, a fit and 20 bootstraps: {mb:.0f} MB" for n, mb in memory.items()]
    text = "\n".join([format_columns(lines), *used, "", format_columns(table)])
    print(text)
    if options.json:
        import scipy

        kept = asdict(options) | {"runs": options.runs and Path(options.runs).name}
        record = {"options": kept, "rows": rows, "memory_mb": memory, "commands": commands}
        note = f"one thread, numpy {np.__version__}, scipy {scipy.__version__}; CPU seconds, ratios to nanochin"
        write_report(options.json, "bench.fit", note, text, record)


if __name__ == "__main__":
    run_command(main, "python -m bench.fit")
