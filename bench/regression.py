"""Two checkouts of nanochin side by side: what a refactoring must leave equal, and how fast each of them is.

    git worktree add ../before COMMIT
    python -m bench.regression ../before                      all parts; exit code 1 if something differs
    python -m bench.regression ../before --only laws kept     some

losses    tiny runs of several shapes: same name, log and weights, to the bit
resume    a run that the other checkout began and that was stopped: finished here, it has the bits of an undisturbed one
kept      the sweep files plan the runs whose rows lie in results/, so that these count as done
laws      laws.json of every kept sweep, equal to 1e-9
options   the options of every command, with their choices
start     seconds until --help has been printed
speed     training steps, fits and a sweep: the interval of the speed ratio over `--rounds` alternations reaches 0.98
"""

import functools
import hashlib
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.common import ROOT, Worker
from nanochin.base.cli import UserError, opt, parse, run_command
from nanochin.base.console import Progress

TRAIN = "--data python --val-bytes 65536 --seq-len 64 --batch-tokens 2048 --sample-tokens 0 --eval-every 20"
RUNS = {
    "chinchilla": "--model 32x2 --tokens 120e3",
    "gpt2": "--model 32x2 --tokens 60e3 --norm layernorm --positions learned --bias --activation gelu_tanh",
    "llama": "--model 48x2 --tokens 60e3 --activation swiglu --tied=false --qk-norm --schedule wsd --optimizer adam",
    "bf16": "--model 32x2 --tokens 30e3 --dtype bfloat16 --z-loss 1e-4 --micro-batch 3",
    "bpe": "--model 16x1 --tokens 60e3 --tokenizer bpe --vocab-size 512 --schedule linear --clip 0",
}
MODULES = ("sample", "evaluate", "export", "ladder", "flops")
COMMANDS = ("train.py", "sweep.py", "fit.py", *(f"-m nanochin {name}" for name in MODULES))
LISTED = """
import csv, json, sys
from pathlib import Path
try:
    from nanochin.sweep import cells as grid
except ImportError:
    from nanochin import grid
for path in sorted(Path("sweeps").glob("*.toml")):
    table = Path("results", path.stem, "runs.csv")
    if table.exists():
        rows = {row["run"]: row for row in csv.DictReader(open(table))}
        first = next(iter(rows.values()))
        sweep, vocab = grid.read_sweep(path), int(first["vocab_size"])
        known = grid.plan_cells(sweep, vocab)
        losses = {name: float(row["loss"]) if row["loss"] else None for name, row in rows.items()}
        while more := grid.extend(sweep, known, losses, vocab):
            known += more
        digests = {cell.name: cell.digest(first["data_sha"], first["val_sha"]) for cell in known}
        print(json.dumps({"sweep": path.stem, "rows": len(rows),
                          "done": sum(digests.get(name) == row["cell"] for name, row in rows.items())}))
"""  # run in each checkout


PARTS = ("losses", "resume", "kept", "laws", "options", "start", "speed")  # each a function below


@dataclass(frozen=True)
class Options:
    base: str = opt(None, "the other checkout", positional=True)
    only: tuple[str, ...] = opt((), "parts to run; default: all", choices=PARTS)
    rounds: int = opt(10, "alternations of what is timed", low=3)
    bootstrap: int = opt(1000, "resamples of the fits that are compared", low=20)


@dataclass(frozen=True)
class Result:
    part: str
    what: str
    equal: bool
    said: str


@dataclass(frozen=True)
class Place:
    """The two checkouts, and a folder for what they write."""

    base: Path
    work: Path
    options: Options

    @property
    def both(self) -> dict[str, Path]:
        return {"base": self.base, "here": ROOT}


def run(checkout: Path, command: list[str]) -> str:
    """What `python COMMAND` in a checkout prints. Raises UserError if it fails."""
    done = subprocess.run([sys.executable, *command], cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{checkout}: {' '.join(command)[:200]} ends with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# What must be equal


def train_command(place: Place, out: str, case: str) -> list[str]:
    folders = f"--cache {place.work / 'cache'} --out {place.work / out}"
    return f"train.py {TRAIN} {folders} {case}".split()


def finished(folder: Path) -> dict:
    """What a run left, but for times and places."""
    (run_folder,) = folder.iterdir()
    (weights,) = run_folder.glob("checkpoints/step-*/model.safetensors")
    log = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    timed = ("tokens_per_s", "mfu", "seconds")
    summary = json.loads((run_folder / "summary.json").read_text())
    return {
        "name": run_folder.name,
        "log": [{key: value for key, value in row.items() if key not in timed} for row in log],
        "summary": {key: value for key, value in summary.items() if key not in timed},
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def compared(part: str, what: str, base, here, said: str) -> Result:
    """Two values, or the first keys that differ."""
    if base == here:
        return Result(part, what, True, said)
    keys = [key for key in base.keys() | here.keys() if base.get(key) != here.get(key)]
    return Result(part, what, False, f"differ: {', '.join(sorted(keys)[:8])}")


def losses(place: Place) -> Iterator[Result]:
    for name, case in RUNS.items():
        left = {}
        for side, checkout in place.both.items():
            run(checkout, train_command(place, f"{side}-{name}", f"{case} --keep 1"))
            left[side] = finished(place.work / f"{side}-{name}")
        yield compared("losses", name, *left.values(), f"{left['here']['name']}, {left['here']['summary']['loss']:.6f}")


def resume(place: Place) -> Iterator[Result]:
    case = "--model 32x2 --tokens 400e3 --keep 1 --log-every 1"
    run(place.base, train_command(place, "whole", case))
    process = subprocess.Popen(
        [sys.executable, *train_command(place, "stopped", case)], cwd=place.base, stdout=subprocess.DEVNULL
    )
    while sum(log.read_text().count("\n") for log in (place.work / "stopped").glob("*/log.jsonl")) < 40:
        if process.poll() is not None:
            raise UserError("the run ended before it could be stopped")
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    said = run(ROOT, train_command(place, "stopped", case))
    left = [finished(place.work / name) for name in ("whole", "stopped")]
    resumed = re.search(r"from \S*(step-\d+)", said)
    yield compared("resume", f"stopped with code {code} at {resumed[1] if resumed else '?'}", *left, "the same bits")


def kept(place: Place) -> Iterator[Result]:
    told = {side: run(checkout, ["-c", LISTED]).splitlines() for side, checkout in place.both.items()}
    for base, here in zip(*(map(json.loads, lines) for lines in told.values()), strict=True):
        yield compared("kept", here["sweep"], base, here, f"{here['done']} of {here['rows']} rows count as done")


def distance(a, b) -> float:
    """The largest relative difference of two JSON values; infinite where their forms differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return max((distance(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return max(map(distance, a, b), default=0.0)
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) / max(abs(a), abs(b), 1e-300)
    if isinstance(a, str) and isinstance(b, str) and " " in a and " " in b:
        return 0.0  # a reason, which may change its words
    return 0.0 if a == b else math.inf


def laws(place: Place) -> Iterator[Result]:
    for folder in sorted(path.parent for path in ROOT.glob("results/*/runs.csv")):
        left = {}
        for side, checkout in place.both.items():
            out = place.work / f"{side}-{folder.name}"
            flags = [f"--bootstrap={place.options.bootstrap}", "--figures=none", f"--out={out}"]
            run(checkout, ["fit.py", f"results/{folder.name}", *flags])
            left[side] = json.loads((out / "laws.json").read_text())
            for key in ("command", "git", "files", "curves", "curves_sha256"):
                left[side]["meta"].pop(key)
            left[side]["checks"].pop("outcomes", None)  # sentences, which may change
        far = {key: distance(value, left["here"].get(key)) for key, value in left["base"].items()}
        worst = max(far, key=far.get)
        new = left["here"].keys() - left["base"].keys()
        yield Result("laws", folder.name, far[worst] <= 1e-9 and not new, f"at most {far[worst]:.1e} apart ({worst})")


def options(place: Place) -> Iterator[Result]:
    for command in COMMANDS:
        told = [run(checkout, [*command.split(), "--help"]) for checkout in place.both.values()]
        base, here = (dict(re.findall(r"^  (--[\w-]+)( \{.*?\})?", text, re.MULTILINE)) for text in told)
        yield compared("options", command, base, here, f"{len(here)} options")


# ---------------------------------------------------------------------------------------------------------------------
# What is timed


def ratio(part: str, what: str, rounds: int, times: dict[str, Callable[[], float]], least: float = 0.98) -> Result:
    """Speed of this checkout over the other's: the median of `rounds` alternations, with the interval of the median by
    resampling. times: what gives the seconds of each side."""
    found = []
    for number in range(rounds):
        took = {side: times[side]() for side in (("base", "here") if number % 2 else ("here", "base"))}
        found.append(took["base"] / took["here"])
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(found, k=rounds)) for _ in range(4000))
    low, high = medians[100], medians[-101]
    said = f"{statistics.median(found):.3f}x [{low:.3f}, {high:.3f}], {took['here']:.3g} s here"
    return Result(part, what, high >= least, said)


def seconds(checkout: Path, command: list[str]) -> float:
    """How long `python COMMAND` takes."""
    begun = time.monotonic()
    run(checkout, command)
    return time.monotonic() - begun


def start(place: Place) -> Iterator[Result]:
    for command in COMMANDS:
        argv = [*command.split(), "--help"]
        times = {side: functools.partial(seconds, checkout, argv) for side, checkout in place.both.items()}
        yield ratio("start", command, place.options.rounds, times, least=0.95)


def speed(place: Place) -> Iterator[Result]:
    rounds = place.options.rounds
    for shape, steps in (("S", 6), ("t96", 12), ("M", 2)):
        spec = {"nanogpt": None, "shape": shape, "compile": False, "dtype": "float32", "device": "cpu", "threads": 2}
        workers = {side: Worker("bench.train_throughput", spec, path) for side, path in place.both.items()}
        for worker in workers.values():
            worker.ask(3)  # warm up

        def step(worker: Worker, steps=steps) -> float:
            return statistics.median(worker.ask(steps)["seconds"])

        times = {side: functools.partial(step, worker) for side, worker in workers.items()}
        yield ratio("speed", f"training step, {shape}", rounds, times)
        for worker in workers.values():
            worker.close()

    fit = ["fit.py", "results/mini", "--bootstrap=1000", "--figures=none", f"--out={place.work / 'timed'}"]
    times = {side: functools.partial(seconds, checkout, fit) for side, checkout in place.both.items()}
    yield ratio("speed", "fit.py results/mini", rounds, times)
    text = Path(ROOT, "sweeps", "smoke.toml").read_text() + f'cache = "{place.work / "cache"}"\n'
    (place.work / "smoke.toml").write_text(text)

    def sweep(checkout: Path) -> float:
        out = tempfile.mkdtemp(dir=place.work)
        argv = ["sweep.py", str(place.work / "smoke.toml"), f"--out={out}", "--results=none", "--workers=2"]
        return seconds(checkout, argv)

    times = {side: functools.partial(sweep, checkout) for side, checkout in place.both.items()}
    yield ratio("speed", "sweep.py sweeps/smoke.toml", rounds, times)


def main() -> int:
    options = parse(Options, prog="python -m bench.regression", description=__doc__)
    base = Path(options.base).resolve()
    if not (base / "train.py").exists():
        raise UserError(f"{base}: no train.py there; name a checkout of nanochin")
    os.environ["OMP_WAIT_POLICY"] = "passive"
    results = []
    with tempfile.TemporaryDirectory() as work, Progress() as progress:
        for number, part in enumerate(options.only or PARTS):
            progress("comparing", number, len(options.only or PARTS), part)
            for result in globals()[part](Place(base, Path(work), options)):
                results.append(result)
                progress.say(f"{result.part:8} {result.what:42} {result.said}{'' if result.equal else '   DIFFERS'}")
    return int(not all(result.equal for result in results))


if __name__ == "__main__":
    run_command(main, "python -m bench.regression")
