"""CPU time of Approach 3 beside scipy, on one thread, and the time of the whole command.

    python -m bench.fit                                    240 synthetic runs like Chinchilla's
    python -m bench.fit --runs chinchilla.csv --save bench/results/fit_cpu.md

scipy runs the procedures of Hoffmann et al. 2022 (L-BFGS-B from a grid of 4500 starts, keep the lowest) and Besiroglu
et al. 2024 (BFGS on each resample, from one start) with the analytic gradient, several times faster than as published.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.common import ROOT, save
from nanochin.base.cli import UserError, opt, parse, run_command
from nanochin.base.console import format_columns
from nanochin.laws import BESIROGLU, bootstrap, fit_parametric
from nanochin.laws.parametric import GRID, reference_objective

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
RESAMPLES = 100  # on which BFGS is timed; scaled up to 4000
COMMANDS = (  # what, options of fit.py, whether it ends with the answer on the terminal, goal in seconds
    ("point estimates, until the answer", ("--bootstrap=0", "--figures=none"), True, 1),
    ("4000 bootstraps, until the answer", ("--bootstrap=4000", "--figures=none"), True, 3),
    ("everything, with figures in SVG and PNG", (), False, 8),
)


@dataclass(frozen=True)
class Options:
    runs: str | None = opt(None, "CSV with the columns params, flops, loss; the 5 highest losses are left out")
    save: str | None = opt(None, "write the tables to this Markdown file")


def load_runs(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, D, loss) without the 5 highest losses."""
    try:
        N, C, loss = np.genfromtxt(path, delimiter=",", names=True, usecols=("params", "flops", "loss"), unpack=True)
    except (OSError, ValueError) as error:
        raise UserError(f"`runs` {path}: needs the columns params, flops, loss ({error})") from None
    kept = np.sort(np.argsort(loss)[:-5])
    return N[kept], (C / (6 * N))[kept], loss[kept]


def synthetic(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, D, loss) over Chinchilla's range with 0.5% noise."""
    rng = np.random.default_rng(0)
    N, D = np.exp(rng.uniform(18, 23.5, n)), np.exp(rng.uniform(21, 26.5, n))
    return N, D, BESIROGLU.loss(N, D) * np.exp(0.005 * rng.standard_normal(n))


def timed(work: Callable[[], object], rounds: int = 1) -> tuple[float, object]:
    """Median CPU seconds, and the last result."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        result = work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), result


def compare(N: np.ndarray, D: np.ndarray, loss: np.ndarray) -> list[list[str]]:
    """The table: CPU seconds of one fit and of 4000 bootstraps, ours and scipy's, with gamma = 1 and free."""
    lines = [["what", "CPU s", "ratio", "objective", "remarks"]]
    for form, gamma, every in (("", 1.0, 1), (" with gamma", None, 10)):
        for what, cpu, base, *rest in compare_form(N, D, loss, gamma, every):
            lines.append([what + form, f"{cpu:.3g}", f"{cpu / base:.0f}x", *rest])
    return lines


def compare_form(N: np.ndarray, D: np.ndarray, loss: np.ndarray, gamma: float | None, every: int) -> tuple:
    """(what, CPU seconds, ours, objective, remark) of each contender. Of the 4500 starts scipy gets one in `every`."""
    from scipy.optimize import minimize

    def scipy(start, method: str, weights: np.ndarray):
        data = (np.log(N), np.log(D), np.log(loss), 1e-3, weights)
        return minimize(reference_objective, start, data, method, jac=True)

    n, fixed = len(N), gamma is not None
    fit_parametric(N, D, loss, gamma=gamma)  # warm up: imports, caches
    ours, fit = timed(lambda: fit_parametric(N, D, loss, gamma=gamma), 20)
    starts = [start if fixed else (*start, 0.0) for start in GRID[::every]]
    theirs, found = timed(lambda: [scipy(start, "L-BFGS-B", np.ones(n)).fun for start in starts])
    theirs *= every
    strap, boot = timed(lambda: bootstrap(fit), 5)
    law = fit.law
    start = [*np.log([law.A, law.B, law.E]), law.alpha, law.beta] + [np.log(law.gamma)] * (not fixed)
    resamples = np.random.default_rng(0).multinomial(n, np.ones(n) / n, RESAMPLES).astype(float)
    bfgs, _ = timed(lambda: [scipy(start, "BFGS", counts) for counts in resamples])
    bfgs *= 4000 / RESAMPLES
    near = np.mean(np.array(found) <= fit.objective * (1 + 1e-6))
    agree, wrong = f"{fit.starts_agreeing} of {fit.starts}", f"{boot.worse} of {boot.checked}"
    lowest, timed_on = min(found), f", timed on {len(starts)}" if every > 1 else ""
    grid = f"one fit: scipy L-BFGS-B, {len(GRID)} starts"
    return (
        ("one fit: nanochin", ours, ours, f"{fit.objective:.13g}", f"{agree} starts agree to 1e-9"),
        (grid, theirs, ours, f"{lowest:.13g}", f"{near:.1%} within 1e-6{timed_on}"),
        ("4000 bootstraps: nanochin", strap, strap, "-", f"{wrong} checked from a second start were wrong"),
        ("4000 bootstraps: scipy BFGS, one start", bfgs, strap, "-", f"timed on {RESAMPLES} of 4000"),
    )


def time_commands(N: np.ndarray, D: np.ndarray, loss: np.ndarray) -> list[list[str]]:
    """The table: seconds from the start of Python to the answer or the end, the fastest of three; CPU seconds."""
    rows = [[f"python fit.py, {len(N)} rows", "wall s", "goal s", "CPU s in all"]]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/runs.csv"
        np.savetxt(path, np.stack([N, D, loss], 1), delimiter=",", header="params,tokens,loss", comments="")
        for what, options, until_answer, goal in COMMANDS:
            argv = [sys.executable, "fit.py", path, f"--out={folder}/out", *options]
            seconds, cpu = min(time_command(argv, until_answer) for _ in range(3))
            rows.append([what, f"{seconds:.2f}", str(goal), f"{cpu:.2f}"])
    return rows


def time_command(argv: list[str], until_answer: bool) -> tuple[float, float]:
    """(wall seconds, CPU seconds)."""
    start, before = time.perf_counter(), os.times()
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()  # the answer is printed at once
        answered = time.perf_counter() - start
        process.stdout.read()
    ended, used = time.perf_counter() - start, os.times()
    if process.returncode:
        raise UserError(f"{' '.join(argv)}: exit code {process.returncode}")
    cpu = used.children_user + used.children_system - before.children_user - before.children_system
    return answered if until_answer else ended, cpu


def main() -> None:
    options = parse(Options, prog="python -m bench.fit", description=__doc__)
    if any(os.environ.get(name) != value for name, value in ONE_THREAD.items()):
        # BLAS reads these when it is loaded, so start again.
        os.execve(sys.executable, [sys.executable, "-m", "bench.fit", *sys.argv[1:]], os.environ | ONE_THREAD)
    runs = load_runs(options.runs) if options.runs else synthetic(240)
    text = "\n\n".join(map(format_columns, (compare(*runs), time_commands(*runs))))
    print(text)
    if options.save:
        import scipy

        note = f"one thread, scipy {scipy.__version__}; CPU seconds, ratios to nanochin"
        save(options.save, "bench.fit", note, text)


if __name__ == "__main__":
    run_command(main, "python -m bench.fit")
