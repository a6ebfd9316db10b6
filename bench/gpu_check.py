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
    sizes     10M, 50M, 350M
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
from dataclasses import dataclass, field
from pathlib import Path

from bench.common import Worker
from nanochin.config import UserError, opt, parse, run_command
from nanochin.files import writing

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("first", "second", "tiles", "sizes", "sweep")
LATE = "not measured: out of time"
# Names of bench.kernels.check_all, operations of bench.gpu_jobs.Jobs.compile, cases of bench.kernels
CHECKS = ("attention", "attention, rotary", "attention, rotary, QK-norm", "add_rms_norm", "linear_cross_entropy",
          "activation_linear", "rms_norm", "add_layer_norm", "layer_norm", "activation_linear, swiglu")  # fmt: skip
COMPILED = ("attention", "loss", "norms", "activation")
ATTENTION = tuple(f"D{D} T{T} 65536 tokens" for T in (1024, 2048) for D in (64, 128))
CASES = (
    ("attention", ATTENTION[0]),
    ("attention", ATTENTION[1]),
    ("add_rms_norm", "C768 65536 tokens"),
    ("linear_cross_entropy", "C768 V50257 16384 tokens"),
    ("attention", ATTENTION[2]),
    ("attention", ATTENTION[3]),
    ("gelu", "F3072 65536 tokens"),
    ("rotary attention", ATTENTION[0]),
)
TUNED = (
    ("rotary attention", ATTENTION[0]),
    ("rotary attention", ATTENTION[1]),
    ("add_rms_norm", "C768 65536 tokens"),
    ("linear_cross_entropy", "C768 V50257 16384 tokens"),
    ("gelu", "F3072 65536 tokens"),
)
TESTS = "(dtype2 or bfloat16 or graph or kinds_agree or losses) and not sm_80"
# The longest last.
TESTED = ("step", "triton_backend", "norms", "cross_entropy", "activation", "rotary", "attention")
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
    environment: tuple[tuple[str, str], ...] = ()
    results: str = ""  # a glob, in the folder for work, of JSON files of which the last becomes part of the row
    text: str = ""  # a file there, which does as well
    expect: str = ""  # a pattern that the output must contain


@dataclass(frozen=True)
class Place:
    """What the plan depends on beside the part."""

    work: Path  # where commands leave their files
    minutes: float
    nanogpt: str | None = None
    tokens: str = ""
    dry: bool = False


def plan(part: str, place: Place) -> list[Row]:
    """The rows of a part, the most valuable first."""
    python, dry = sys.executable, place.dry
    if part == "first":
        rows = [Row("device", "about", seconds=TOGETHER, together=True)]
        rows += [Row(f"check {name}", "check", {"name": name}, 90, together=True) for name in CHECKS]
        rows += [Row(f"compile {name}", "compile", {"name": name}, 90, together=True) for name in COMPILED]
        rows += [Row(f"124M {kind}", "step", {"size": "124M", "kind": kind}, 60) for kind in ("graph", "eager")]
        rows += [Row("ceilings", "ceilings")]
        for name, shape in CASES:
            limit = 60 if name == "rotary attention" else 30  # its peers compile
            rows.append(Row(f"{name} {shape}", "case", {"operation": name, "shape": shape}, limit))
        tests = [f"tests/test_{name}.py" for name in TESTED]
        chosen = ("-m", "not slow", "-k", "repeating") if dry else ("-m", "gpu", "-n", "auto", "-k", TESTS)
        pytest = (python, "-m", "pytest", "-o", "addopts=", "-q", "-rf", "--tb=line", "--timeout", "60")
        return [*rows, Row("GPU tests", seconds=110, expect=r"\d+ passed", command=(*pytest, *chosen, *tests))]
    if part == "second":
        more = ["--nanogpt", place.nanogpt] if place.nanogpt else []
        # Without nanoGPT under another name, so that a call that has it does not take the row for done.
        rows = [of_bench_gpu("124M" if more or dry else "124M without nanoGPT", place, 0.55, more)]
        small = ("--data", "README.md", "--model", "16x1", "--tokens", "3e4", "--val-bytes", "2048") if dry else ()
        rows += [
            Row(
                "train.py",
                seconds=90,
                command=(python, "train.py", "--out", str(place.work / "runs"), *small),
                results="runs/*/summary.json",
            )
        ]
        sanitizer = ("compute-sanitizer", "--report-api-errors=no", "--error-exitcode=1")
        return [
            *rows,
            Row(
                "compute-sanitizer",
                seconds=90,
                command=(*sanitizer, python, "-c", SANITIZED),
                environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
            ),
        ]
    if part == "tiles":
        return [
            Row("device", "about"),
            *(Row(f"{name} {shape}", "tiles", {"operation": name, "shape": shape}, 120) for name, shape in TUNED),
        ]
    if part == "sizes":
        return [of_bench_gpu(size, place, 0.3, []) for size in ("10M", "50M", "350M")]
    data = ("README.md", "LOG.md") if dry else (f"{place.tokens}/train.bin", f"{place.tokens}/val.bin")
    return [Row("quick", seconds=60 * place.minutes, results="quick/laws.json", text="quick/runs.csv", command=(
        python, "sweep.py", str(place.work / "quick.toml"), "--data", data[0], "--val", data[1], "--out",
        str(place.work), "--results", "none"))]  # fmt: skip


def write_sweep(place: Place) -> None:
    """sweeps/quick.toml for text that is tokenised already, or a tiny one."""
    text = (ROOT / "sweeps" / "quick.toml").read_text().replace('tokenizer = "bpe"\n', "")
    if place.dry:
        text = 'kind = "grid"\nseq_len = 32\nbudgets = [2e9, 4e9]\nmodels = ["8x1", "16x1"]\nbatch_tokens = 128\n'
        text += 'val_bytes = 2048\nbootstrap = 20\ndevice = "cpu"\n'
    place.work.mkdir(parents=True, exist_ok=True)
    (place.work / "quick.toml").write_text(text)


def of_bench_gpu(name: str, place: Place, share: float, more: list[str]) -> Row:
    """A size, with which the name begins, by bench.gpu."""
    size = name.split()[0]
    folder, minutes, dry = place.work / f"gpu_{size}", share * place.minutes, place.dry
    command = [sys.executable, "-m", "bench.gpu", "--sizes", size, "--minutes", f"{minutes:g}",
               "--out", str(folder), *more]  # fmt: skip
    command += ["--dry-run"] * dry
    return Row(name, seconds=60 * minutes + 15, command=tuple(command), results=f"gpu_{size}/*.json")


# ---------------------------------------------------------------------------------------------------------------------
# Rows on the disk


@dataclass(frozen=True)
class Kept:
    """The rows of a part, on the disk. Several threads write."""

    path: Path
    dry: bool
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, any_kind: bool = False) -> dict[str, dict]:
        """The last line of each row. A line that was cut off counts as missing. Raises UserError if real rows would
        stand beside those of a dry run, unless told to read `any_kind`."""
        rows = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                row = json.loads(line)
                rows[row["row"]] = row
            except (ValueError, KeyError, TypeError):
                continue
        if not any_kind and any(row.get("dry", False) != self.dry for row in rows.values()):
            raise UserError(f"{self.path}: holds rows of {'a real' if self.dry else 'a dry'} run; give another --out")
        return rows

    def add(self, name: str, got: dict, seconds: float) -> None:
        line = json.dumps({"row": name, "dry": self.dry, "seconds": round(seconds, 2), **got})
        with self.lock, open(self.path, "ab+") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = ("" if file.read() == b"\n" else "\n") + line  # after a line that was cut off
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{name}: {got.get('error') or 'done'} ({seconds:.1f} s)", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(rows: list[Row], kept: Kept, work: Path, deadline: float) -> None:
    """Those that may run together first, then one after the other, until `deadline` on time.monotonic()."""
    together, alone = queue.SimpleQueue(), queue.SimpleQueue()
    for row in rows:
        (together if row.together else alone).put(row)
    number = min(together.qsize(), 2 if kept.dry else os.cpu_count() or 2)
    first = min(deadline, time.monotonic() + TOGETHER * (10 if kept.dry else 1))
    threads = [threading.Thread(target=in_turn, args=(together, kept, work, first)) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    in_turn(alone, kept, work, deadline)


def in_turn(rows: queue.SimpleQueue, kept: Kept, work: Path, deadline: float) -> None:
    """Rows by one worker process, which a row that fails takes with it."""
    worker = None
    while True:
        try:
            row = rows.get_nowait()
        except queue.Empty:
            break
        start = time.monotonic()
        limit = min(row.seconds * (10 if kept.dry else 1), deadline - start)
        if limit < 1:
            print(f"{row.name}: {LATE}", flush=True)
            continue
        if row.command:
            if worker:
                worker.close(10)  # its memory is wanted
            worker, got = None, run_row(row, work, limit)
        else:
            environment = {"TRITON_INTERPRET": "1"} if kept.dry else {}
            spec = {"module": "bench.gpu_jobs", "dry": kept.dry, "environment": environment}
            worker = worker or Worker("bench.common", spec)
            try:
                limited = {"seconds": max(1.0, limit - 8)} if row.do in ("case", "tiles") else {}  # its process starts
                got = worker.ask({"do": row.do, **row.arguments, **limited}, limit)
            except (UserError, TimeoutError) as error:
                got = {"error": f"{type(error).__name__}: {error}"}
            if "error" in got:  # a broken context would fail all that follow
                worker.process.kill()
                worker.process.wait()
                worker = None
        kept.add(row.name, got, time.monotonic() - start)
    if worker:
        worker.close(10)


def run_row(row: Row, work: Path, limit: float) -> dict:
    """The end of what a command prints, what it leaves as JSON in `work`, and an error if it fails. At its limit it is
    interrupted, with all its processes, and killed five seconds later; what it has left until then is kept."""
    begun = time.time()
    try:
        process = subprocess.Popen(
            row.command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            env=os.environ | dict(row.environment),
        )
    except FileNotFoundError:
        return {"error": f"{row.command[0]}: not installed here"}
    got = {}
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        got["error"] = f"cut off after {limit:.0f} s"
        out, err = end(process)
    if not re.search(row.expect, out):
        got.setdefault("error", f"its output does not contain {row.expect}")
    if process.returncode:
        got.setdefault("error", f"exit code {process.returncode}")
    got["tail"] = out[-1500:]
    if "error" in got:
        got["stderr"] = err[-1500:]
    left = [path for path in work.glob(row.results) if path.stat().st_mtime >= begun - 1] if row.results else []
    with contextlib.suppress(ValueError):  # half a file
        if left:
            got["result"] = json.loads(max(left, key=lambda path: path.stat().st_mtime).read_text())
    if row.text and (work / row.text).exists():
        got["text"] = (work / row.text).read_text()
    if failed := untimed(got.get("result")):
        got.setdefault("error", failed)
    return got


def end(process: subprocess.Popen) -> tuple[str, str]:
    """Interrupt a command and its children, so that it says what it knows; kill what is left of them."""
    for number, patience in ((signal.SIGINT, 5), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            said = process.communicate(timeout=patience)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return said
    raise AssertionError("a killed process has ended")


def untimed(result) -> str:
    """Of bench.gpu's result: why neither ours nor, where it takes part, nanoGPT was timed. "" if both were."""
    rows = result.get("sizes", []) if isinstance(result, dict) else []
    for who in dict.fromkeys(row["who"] for row in rows):
        if not any("tokens_per_s" in row for row in rows if row["who"] == who):
            return f"{who}: {next(row['error'] for row in rows if row['who'] == who)}"
    return ""


@dataclass(frozen=True)
class Options:
    part: str = opt("first", "what to measure", choices=PARTS)
    minutes: float = opt(4.0, "rows that are not begun by then are left for another call", above=0)
    out: str = opt("gpu-check", "folder of the rows")
    nanogpt: str = opt(".peer/nanoGPT", "a checkout of karpathy/nanoGPT; without it its rows are left out")
    tokens: str = opt(".peer/tokens", "part sweep: a folder with train.bin and val.bin")
    dry_run: bool = opt(False, "tiny shapes on a CPU, interpreted: whether all parts work, no more")


def main() -> None:
    start = time.monotonic()
    options = parse(Options, prog="bench/gpu_check.sh", description=__doc__)
    if not options.dry_run and not shutil.which("nvidia-smi"):
        raise UserError("there is no NVIDIA GPU here (no nvidia-smi): nothing to measure; --dry-run runs the code")
    tokens = Path(options.tokens)
    if options.part == "sweep" and not options.dry_run and not (tokens / "train.bin").exists():
        raise UserError(f"--tokens {tokens}: has no train.bin and val.bin; bench/README.md says how to make them")
    out = Path(options.out).resolve()
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    kept = Kept(out / f"{options.part}.jsonl", options.dry_run)
    there = (Path(options.nanogpt) / "model.py").exists()
    if options.part == "second" and not there:
        print(f"nanoGPT left out: {options.nanogpt} has no model.py", flush=True)
    nanogpt = str(Path(options.nanogpt).resolve()) if there else None
    work = ROOT / "build" / f"gpu-check-{os.getpid()}"
    place = Place(work, options.minutes, nanogpt, str(tokens.resolve()), options.dry_run)
    if options.part == "sweep":
        write_sweep(place)
    rows, known = plan(options.part, place), kept.read()
    missing = [row for row in rows if "error" in known.get(row.name, {"error": "missing"})]
    measure(missing, kept, work, start + 60 * options.minutes)
    found = kept.read()
    good = [row for row in rows if "error" not in found.get(row.name, {"error": "missing"})]
    print(f"{kept.path}: {len(good)} of {len(rows)} rows ({time.monotonic() - start:.0f} s)")
    sys.exit(0 if len(good) == len(rows) else 1)


if __name__ == "__main__":
    run_command(main, "bench/gpu_check.sh")
