"""A sweep's wall time against a plain loop of train.py processes on the same runs, and where the time goes.

    python -m bench.sweep sweeps/mini.toml              in a folder of its own; what is there already is not redone
    python -m bench.sweep sweeps/mini.toml --loop 3     time three runs of the loop and estimate the others

The loop is what one would write in a shell: one `train.py` after the other, with torch's own number of threads, each
paying for start-up, imports and opening the corpus. Of runs that are not timed the training is taken to last in
proportion to what it took in the sweep (FLOPs do not tell: small models take longer for one), and all else as long as
for a timed one.
"""

import csv
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.common import ROOT
from nanochin.base.cli import UserError, opt, parse, run_command
from nanochin.sweep.spec import read_sweep


@dataclass(frozen=True)
class BenchOptions:
    sweep: str = opt("sweeps/mini.toml", "the sweep", positional=True)
    out: str = opt("build/bench-sweep", "folder of the runs; give a new one for a new measurement")
    loop: int = opt(0, "runs of the loop to time, spread over the sweep; 0 = all", low=0)


def main() -> None:
    options = parse(BenchOptions, prog="python -m bench.sweep", description=__doc__)
    out = Path(options.out)
    if (out / "sweep").exists():
        raise UserError(f"--out {out}: has runs of an earlier measurement; give a new folder")
    seconds, workers = time_sweep(options, out)
    with open(out / "sweep" / Path(options.sweep).stem / "runs.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "finished"]
    training = sum(float(row["seconds"]) for row in rows)
    outside = 1 - training / (workers * seconds)

    chosen = rows if not options.loop else rows[:: max(1, len(rows) // options.loop)][: options.loop]
    timed = time_loop(options, out, chosen)
    loop = estimate_loop(timed, loop_training(out, chosen), chosen, rows)
    print(
        f"sweep: {seconds:.1f} s for {len(rows)} runs with {workers} workers; outside training steps {outside:.1%} "
        f"of {workers} x {seconds:.1f} s (start-up, evaluation, checkpoints, waiting for the last run, the fit)"
    )
    print(
        f"loop of train.py: {timed:.1f} s for {len(chosen)} runs"
        + (f", {loop:.1f} s estimated for all" if len(chosen) < len(rows) else "")
    )
    print(f"the sweep takes {seconds / loop:.2f} of the loop's time")


def time_sweep(options: BenchOptions, out: Path) -> tuple[float, int]:
    """(seconds, workers) of the sweep."""
    command = [sys.executable, str(ROOT / "sweep.py"), options.sweep, "--out", str(out / "sweep"), "--results", "none"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"the sweep failed: {done.stderr.strip() or done.stdout.strip()}")
    said = next(line for line in done.stdout.splitlines() if " workers on " in line)
    return seconds, int(said.split()[0])


def time_loop(options: BenchOptions, out: Path, rows: list[dict]) -> float:
    """train.py once a run, with the options of its row."""
    base = read_sweep(options.sweep).base
    start = time.perf_counter()
    for row in rows:
        known = {key: row[key] for key in ("seq_len", "tokens", "batch_tokens", "lr", "seed")}
        known |= {key: getattr(base, key) for key in ("val_bytes", "cache", "device")}
        known |= {"model": f"{row['width']}x{row['layers']}", "name": row["run"], "out": out / "loop"}
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in known.items()]
        train = [sys.executable, str(ROOT / "train.py"), "--data", *base.data, "--sample-tokens=0"]
        subprocess.run([*train, *flags], check=True, capture_output=True)
    return time.perf_counter() - start


def loop_training(out: Path, rows: list[dict]) -> float:
    """Seconds that the runs of the loop spent training, by their own summaries."""
    return sum(json.loads((out / "loop" / row["run"] / "summary.json").read_text())["seconds"] for row in rows)


def estimate_loop(timed: float, training: float, chosen: list[dict], rows: list[dict]) -> float:
    """Seconds of a loop over all `rows`, of which the `chosen` took `timed`, `training` of them in training."""
    share = sum(float(row["seconds"]) for row in chosen) / sum(float(row["seconds"]) for row in rows)
    return training / share + (timed - training) * len(rows) / len(chosen)


if __name__ == "__main__":
    run_command(main, "python -m bench.sweep")
