"""What a few minutes on a GPU are spent on: rows in order of value, each kept as soon as it is measured.

    bench/gpu_check.sh --part first --minutes 4 --out DIR
    python -m bench.gpu_table DIR                              the table, each row beside its goal

DIR/PART.jsonl gets a line per row, flushed to the disk. Called again, it measures the rows that are missing or failed.
Rows run in worker processes, so that one that hangs, crashes or breaks the device's context costs itself alone: it is
cut off at its limit and the next one starts a new process. Checks of the kernels come first, in several processes at
once, which compiles the kernels on all cores. No torch here.

    first     device; every kernel against float64; 124M by graph and eager; ceilings; attention, norms and loss beside
              their peers; the GPU tests in bf16
    second    124M beside nanoGPT compiled (--nanogpt); `python train.py`; compute-sanitizer
    tiles     the shipped tiles and their neighbours
    sizes     10M, 50M, 350M in each kind of step; last, nanoGPT
    kernels   more shapes, and peers that take long to compile
    sweep     sweeps/quick.toml on text that is tokenised already: train.bin and val.bin in --tokens
"""

import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from bench.common import LATE, ROOT, Worker, error_text, kill_group
from nanochin.base.cli import UserError, opt, parse, run_command
from nanochin.base.files import writing

STEP_TOKENS = 65_536  # of a step, accumulated where memory does not hold them at once; beyond, no kernel gets faster
SIZES = {  # width, layers, head size, vocabulary, context
    "124M": (768, 12, 64, 50304, 1024),
    "10M": (320, 6, 64, 8192, 512),
    "50M": (640, 8, 64, 16384, 1024),
    "350M": (1024, 24, 64, 50304, 1024),
}
KINDS, PEERS = ("graph", "eager", "compile"), ("nanoGPT flash", "nanoGPT cudnn")
CHECKS = (  # of bench.kernels, the most valuable first
    *("attention", "attention, rotary", "attention, rotary, QK-norm", "add_rms_norm", "linear_cross_entropy"),
    *("activation_linear", "rms_norm", "add_layer_norm", "layer_norm", "activation_linear, swiglu"),
)
# Operations of bench.kernel_cases, and their shapes.
ATTENTION = tuple(f"attention D{D} T{T}" for T in (1024, 2048) for D in (64, 128))
NORM, LOSS, GELU = "add_rms_norm C768", "linear_cross_entropy C768 V50257 M16384", "gelu F3072"
CASES = (*ATTENTION[:2], NORM, LOSS, *ATTENTION[2:], GELU, "rotary attention D64 T1024")
TUNED = ("rotary attention D64 T1024", "rotary attention D128 T1024", NORM, LOSS, GELU)
MORE_CASES = (
    *(f"{name} C{C}" for name in ("add_rms_norm", "add_layer_norm", "rms_norm", "layer_norm") for C in (768, 2048)),
    *(LOSS, "linear_cross_entropy C2048 V50257 M16384", "linear_cross_entropy C320 V8192 M65536", GELU, "swiglu F3072"),
    *(f"rotary attention D{D} T{T}" for T in (1024, 2048) for D in (64, 128)),
    *(f"attention D{D} T{T}" for T in (512, 4096) for D in (64, 128)),
)
TESTS = "(dtype2 or bfloat16 or graph or kinds_agree or losses) and not sm_80"
KERNEL_TESTS = ("triton_backend", "norms", "cross_entropy", "activation", "rotary", "attention")  # the longest last
TESTED = ("tests/run/test_step.py", *(f"tests/kernels/test_{name}.py" for name in KERNEL_TESTS))
TOGETHER = 90.0  # seconds for what runs together, so that something is left for the rest
SANITIZED = """
import torch
from kernels.attention import attention
for T, D in ((129, 64), (300, 128)):
    qkv = torch.randn(2, T, 6 * D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    attention(qkv, 2, 10_000.0).sum().backward()
torch.cuda.synchronize()
"""


@dataclass(frozen=True)
class Row:
    """What to measure: a method of bench.gpu_jobs.Jobs, or a command."""

    name: str
    do: str = ""
    arguments: dict = field(default_factory=dict)
    seconds: float = 30.0  # what it may take
    together: bool = False  # with others of its kind at once
    command: tuple[str, ...] = ()
    inputs: dict[str, str] = field(default_factory=dict)  # files for it, by name in the folder for work
    files: tuple[str, ...] = ()  # patterns of files that it leaves there and that become part of the row
    expect: str = ""  # a pattern that the output must contain


# ---------------------------------------------------------------------------------------------------------------------
# The parts: their rows, the most valuable first


@dataclass(frozen=True)
class Place:
    """What the rows of a part depend on."""

    work: Path  # where commands leave their files
    minutes: float
    nanogpt: str | None = None
    tokens: str = ""
    dry: bool = False


def plan_first(place: Place) -> list[Row]:
    rows = [Row("device", "about", seconds=TOGETHER, together=True)]
    rows += [Row(f"check {name}", "check", {"name": name}, 90, together=True) for name in CHECKS]
    rows += [Row("compile 124M", "compile", {"size": "124M"}, 90, together=True)]
    rows += [of_step("124M", kind, place) for kind in ("graph", "eager")]
    rows += [Row("ceilings", "ceilings"), *(of_case(name, "case", 60) for name in CASES)]
    chosen = ("-m", "not slow", "-k", "bit_identical") if place.dry else ("-m", "gpu", "-n", "auto", "-k", TESTS)
    pytest = (
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "--import-mode=importlib",
        "-q",
        "-rf",
        "--tb=line",
        "--timeout",
        "60",
    )
    return [*rows, Row("GPU tests", seconds=110, expect=r"\d+ passed", command=(*pytest, *chosen, *TESTED))]


def plan_second(place: Place) -> list[Row]:
    small = ("--data", "README.md", "--model", "16x1", "--tokens", "3e4", "--val-bytes", "2048") if place.dry else ()
    train = (sys.executable, "train.py", "--out", str(place.work / "runs"), *small)
    sanitizer = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--report-api-errors=no")
    sanitizer += ("--error-exitcode=1", sys.executable, "-c", SANITIZED)
    return [
        of_step("124M", "graph", place),
        *(of_step("124M", kind, place) for kind in PEERS if place.nanogpt),
        Row("train.py", seconds=90, command=train, files=("runs/*/summary.json",)),
        Row("compute-sanitizer", seconds=90, command=sanitizer),
        of_step("124M", "compile", place),
    ]


def plan_tiles(place: Place) -> list[Row]:
    return [Row("device", "about"), *(of_case(name, "tiles", 120) for name in TUNED)]


def plan_sizes(place: Place) -> list[Row]:
    kinds = (*KINDS, *(PEERS if place.nanogpt else ()))
    return [of_step(size, kind, place) for kind in kinds for size in ("10M", "50M", "350M")]


def plan_kernels(place: Place) -> list[Row]:
    return [of_case(name, "case", 120, slow=True) for name in MORE_CASES]


def plan_sweep(place: Place) -> list[Row]:
    """sweeps/quick.toml for text that is tokenised already, or a tiny sweep."""
    sweep = (ROOT / "sweeps" / "quick.toml").read_text().replace('tokenizer = "bpe"\n', "")
    data = (f"{place.tokens}/train.bin", f"{place.tokens}/val.bin")
    if place.dry:
        sweep = 'kind = "grid"\nseq_len = 32\nbudgets = [2e9, 4e9]\nmodels = ["8x1", "16x1"]\nbatch_tokens = 128\n'
        sweep += 'val_bytes = 2048\nbootstrap = 20\ndevice = "cpu"\n'
        data = ("README.md", "LOG.md")
    command = (sys.executable, "sweep.py", str(place.work / "quick.toml"), "--data", data[0], "--val", data[1])
    command += ("--out", str(place.work), "--results", "none")
    left = ("quick/laws.json", "quick/runs.csv")
    return [Row("quick", seconds=60 * place.minutes, command=command, inputs={"quick.toml": sweep}, files=left)]


def of_step(size: str, kind: str, place: Place) -> Row:
    """A training step in one kind, in a process of its own."""
    checkout = {"nanogpt": place.nanogpt} if kind in PEERS else {}
    seconds = 60 if kind in ("graph", "eager") else 120  # the others compile
    return Row(f"{size} {kind}", "step", {"size": size, "kind": kind, **checkout}, seconds)


def of_case(name: str, do: str, seconds: float, **more) -> Row:
    """An operation at a shape, such as "attention D64 T1024"."""
    operation, shape = re.sub(r" [A-Z]\d+", "", name), dict(re.findall(r" ([A-Z])(\d+)", name))
    shape = {letter: int(number) for letter, number in shape.items()}
    return Row(name, do, {"operation": operation, "shape": shape, **more}, seconds)


PARTS = {
    "first": plan_first,
    "second": plan_second,
    "tiles": plan_tiles,
    "sizes": plan_sizes,
    "kernels": plan_kernels,
    "sweep": plan_sweep,
}

# ---------------------------------------------------------------------------------------------------------------------
# Rows on the disk


@dataclass(frozen=True)
class Kept:
    """The rows of a part, on the disk. Several threads write."""

    path: Path
    dry: bool
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self) -> dict[str, dict]:
        """The last line of each row. A line that was cut off counts as missing."""
        rows = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                rows[row["row"]] = row
        return rows

    def add(self, name: str, got: dict, seconds: float) -> None:
        line = json.dumps({"row": name, "dry": self.dry, "seconds": round(seconds, 2), **got}) + "\n"
        with self.lock, open(self.path, "ab+") as file:
            if file.tell():  # at the end of what is there
                file.seek(-1, os.SEEK_END)
                line = ("" if file.read() == b"\n" else "\n") + line  # after a line that was cut off
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        print(f"{name}: {got.get('error') or 'done'} ({seconds:.1f} s)", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(rows: list[Row], kept: Kept, work: Path, deadline: float) -> None:
    """Those that may run together first, then one after the other, until `deadline` on time.monotonic()."""
    together = [row for row in rows if row.together]
    threads = min(len(together), 2 if kept.dry else os.cpu_count() or 2)
    waiting = queue.SimpleQueue()
    for row in [*together, *[None] * threads]:
        waiting.put(row)
    first = min(deadline, time.monotonic() + TOGETHER * (10 if kept.dry else 1))
    with ThreadPoolExecutor(max(1, threads)) as pool:
        list(pool.map(lambda _: in_turn(iter(waiting.get, None), kept, work, first), range(threads)))
    in_turn([row for row in rows if not row.together], kept, work, deadline)


def in_turn(rows: Iterable[Row], kept: Kept, work: Path, deadline: float) -> None:
    """Rows by one worker process, which a row that fails takes with it. Commands and training steps have the device to
    themselves: the worker before them ends, and a step has a worker of its own."""
    worker = None
    for row in rows:
        start = time.monotonic()
        limit = min(row.seconds * (10 if kept.dry else 1), deadline - start)
        if limit < 1:
            print(f"{row.name}: {LATE}", flush=True)
            continue
        if worker and (row.command or row.do == "step"):
            worker.close(10)
            worker = None
        if row.command:
            got = run_row(row, work, limit)
        else:
            worker = worker or new_worker(kept.dry)
            got = ask(worker, row, limit)
        if worker and ("error" in got or row.do == "step"):
            worker.close(0 if "error" in got else 10)
            worker = None
        kept.add(row.name, got, time.monotonic() - start)
    if worker:
        worker.close(10)


def new_worker(dry: bool) -> Worker:
    return Worker("bench.gpu_jobs", {"dry": dry}, environment={"TRITON_INTERPRET": "1"} if dry else None)


def ask(worker: Worker, row: Row, limit: float) -> dict:
    """The worker's answer, or {"error": text}."""
    # These stop by themselves and keep what they have; the worker may still have to start.
    arguments = row.arguments | ({"seconds": max(1.0, limit - 8)} if row.do in ("case", "tiles") else {})
    try:
        return worker.ask({"do": row.do, **arguments}, limit)
    except (UserError, TimeoutError) as error:
        return {"error": error_text(error)}


def run_row(row: Row, work: Path, limit: float) -> dict:
    """The end of what a command prints, the files that it leaves in `work`, and an error if it fails. At its limit it
    is interrupted, with all its processes, and killed five seconds later."""
    work.mkdir(parents=True, exist_ok=True)
    for name, text in row.inputs.items():
        (work / name).write_text(text)
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        row.command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
    )
    got = {}
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        got["error"] = f"cut off after {limit:.0f} s"
        os.killpg(process.pid, signal.SIGINT)  # so that it says what it knows
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        kill_group(process)
        out, err = process.communicate()
    if not re.search(row.expect, out):
        got.setdefault("error", f"its output does not contain {row.expect}")
    if process.returncode:
        got.setdefault("error", f"exit code {process.returncode} {' '.join(err.split())[-100:]}".strip())
    left = [path for pattern in row.files for path in work.glob(pattern)]
    got |= {"tail": out[-1500:], "files": {path.name: path.read_text() for path in left}}
    return got | ({"stderr": err[-1500:]} if "error" in got else {})


# ---------------------------------------------------------------------------------------------------------------------
# Command


@dataclass(frozen=True)
class Options:
    part: str = opt("first", "what to measure", choices=tuple(PARTS))
    minutes: float = opt(4.0, "rows that are not begun by then are left for another call", above=0)
    out: str = opt("gpu-check", "folder of the rows")
    nanogpt: str = opt(".peer/nanoGPT", "a checkout of karpathy/nanoGPT; without it its rows are left out")
    tokens: str = opt(".peer/tokens", "part sweep: a folder with train.bin and val.bin")
    dry_run: bool = opt(False, "tiny shapes on a CPU, interpreted: whether all parts work, no more")


def main() -> int:
    start = time.monotonic()
    options = parse(Options, prog="bench/gpu_check.sh", description=__doc__)
    if not options.dry_run and not shutil.which("nvidia-smi"):
        raise UserError("there is no NVIDIA GPU here (no nvidia-smi): nothing to measure; --dry-run runs the code")
    tokens, nanogpt, out = (Path(path).resolve() for path in (options.tokens, options.nanogpt, options.out))
    if options.part == "sweep" and not options.dry_run and not (tokens / "train.bin").exists():
        raise UserError(f"--tokens {tokens}: has no train.bin and val.bin; bench/README.md says how to make them")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    there = (nanogpt / "model.py").exists()
    if options.part in ("second", "sizes") and not there:
        print(f"nanoGPT left out: {options.nanogpt} has no model.py", flush=True)
    kept = Kept(out / f"{options.part}.jsonl", options.dry_run)
    work = ROOT / "build" / f"gpu-check-{os.getpid()}"
    place = Place(work, options.minutes, str(nanogpt) if there else None, str(tokens), options.dry_run)
    rows = PARTS[options.part](place)
    measure(missing(rows, kept), kept, work, start + 60 * options.minutes)
    good = len(rows) - len(missing(rows, kept))
    print(f"{kept.path}: {good} of {len(rows)} rows ({time.monotonic() - start:.0f} s)")
    return int(good < len(rows))


def missing(rows: list[Row], kept: Kept) -> list[Row]:
    """Those that were not measured or failed. Raises UserError if real rows would stand beside those of a dry run."""
    known = kept.read()
    if any(row["dry"] != kept.dry for row in known.values()):
        raise UserError(f"{kept.path}: holds rows of {'a real' if kept.dry else 'a dry'} run; give another --out")
    return [row for row in rows if "error" in known.get(row.name, {"error": "missing"})]


if __name__ == "__main__":
    run_command(main, "bench/gpu_check.sh")
