"""Wall time of a sweep beside a loop that runs one train.py after the other, with torch's default number of threads.

    python -m bench.sweep sweeps/mini.toml              into a new folder
    python -m bench.sweep sweeps/mini.toml --loop 3     times three runs of the loop and estimates the others

For runs that are not timed, training is assumed proportional to its seconds in the sweep (FLOPs would mislead: small
models take longer per FLOP), the rest equal to that of a timed run.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.common import ROOT
from nanochin.base.cli import UserError, opt, parse, run_command, to_arguments
from nanochin.base.files import read_json
from nanochin.runrow import RunRow, read_csv


@dataclass(frozen=True)
class BenchOptions:
    sweep: str = opt("sweeps/mini.toml", "the sweep", positional=True)
    out: str = opt("build/bench-sweep", "folder of the runs, a new one for each measurement")
    loop: int = opt(0, "runs of the loop to time, spread over the sweep; 0 = all", low=0)


def main() -> None:
    options = parse(BenchOptions, prog="python -m bench.sweep", description=__doc__)
    out = Path(options.out)
    if (out / "sweep").exists():
        raise UserError(f"--out {out}: has runs of an earlier measurement; give a new folder")
    command = [sys.executable, str(ROOT / "sweep.py"), options.sweep, "--out", str(out / "sweep"), "--results", "none"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"the sweep failed: {done.stderr.strip() or done.stdout.strip()}")
    workers = int(next(line for line in done.stdout.splitlines() if " workers on " in line).split()[0])
    folder = out / "sweep" / Path(options.sweep).stem
    rows = [row for row in read_csv(folder / "runs.csv").values() if row.status == "finished"]
    outside = 1 - sum(row.seconds for row in rows) / (workers * seconds)

    chosen = rows[:: max(1, len(rows) // options.loop)][: options.loop] if options.loop else rows
    timed, training = time_loop(folder / "runs", out / "loop", chosen)
    loop = estimate_loop(timed, training, chosen, rows)
    print(f"sweep: {seconds:.1f} s for {len(rows)} runs with {workers} workers, {outside:.1%} outside training steps")
    print(f"loop of train.py: {timed:.1f} s for {len(chosen)} of {len(rows)} runs, {loop:.1f} s estimated for all")
    print(f"the sweep takes {seconds / loop:.2f} of the loop's time")


def time_loop(runs: Path, out: Path, rows: list[RunRow]) -> tuple[float, float]:
    """(seconds of one train.py per row, with the options of that run; of these in training, by the summaries)."""
    start, training = time.perf_counter(), 0.0
    for row in rows:
        options = read_json(runs / row.run / "config.json")["options"] | {"threads": None, "out": str(out)}
        given = to_arguments({key: value for key, value in options.items() if value not in (None, [])})
        subprocess.run([sys.executable, str(ROOT / "train.py"), *given], check=True, capture_output=True)
        training += read_json(out / row.run / "summary.json")["seconds"]
    return time.perf_counter() - start, training


def estimate_loop(timed: float, training: float, chosen: list[RunRow], rows: list[RunRow]) -> float:
    """Seconds of a loop over all `rows`; the `chosen` took `timed`, of which `training` in training."""
    share = sum(row.seconds for row in chosen) / sum(row.seconds for row in rows)
    return training / share + (timed - training) * len(rows) / len(chosen)


if __name__ == "__main__":
    run_command(main, "python -m bench.sweep")
