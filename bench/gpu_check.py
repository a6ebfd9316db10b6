"""What to measure in some minutes on a GPU, in order of value.

    python -m bench.gpu_check --part first --minutes 4 --out DIR
    python -m bench.gpu_table DIR                                the rows beside their goals

DIR/PART.jsonl gets a line per row as soon as it is measured. Run the same command again to measure the rows that are
missing or failed. Each row has its own process, so that a hang, a crash or a broken CUDA context costs only one row.

    first     124M by graph and eager; operations beside their peers; tests of the kernels in bf16
    second    124M beside nanoGPT (--nanogpt); train.py; compute-sanitizer; 124M compiled; other sizes, then nanoGPT's
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.common import ROOT
from nanochin.base.cli import UserError, opt, parse, run_command
from nanochin.base.files import writing
from nanochin.config import make_shape

STEP_TOKENS = 65_536  # per step; more tokens make no kernel faster
SIZES = {
    "124M": make_shape(768, 12, vocab_size=50304, seq_len=1024, head_size=64),
    "10M": make_shape(320, 6, vocab_size=8192, seq_len=512, head_size=64),
    "50M": make_shape(640, 8, vocab_size=16384, seq_len=1024, head_size=64),
    "350M": make_shape(1024, 24, vocab_size=50304, seq_len=1024, head_size=64),
}
KINDS, PEERS = ("graph", "eager", "compile"), ("nanoGPT flash", "nanoGPT cudnn")
# Operations in bench.kernels, with their shapes.
ATTENTION = tuple(f"attention D{D} T{T}" for T in (1024, 2048) for D in (64, 128))
NORM, LOSS = "add_rms_norm C768", "linear_cross_entropy C768 V50257 M16384"
PYTEST = (sys.executable, "-m", "pytest", "-o", "addopts=", "--import-mode=importlib", "-q", "-rf", "--tb=line")
TESTS = "(dtype2 or bfloat16 or graph or kinds_agree or losses) and not sm_80"
KERNEL_TESTS = ("triton_backend", "norms", "cross_entropy", "activation", "rotary", "attention")  # the longest last
TESTED = ("tests/run/test_step.py", *(f"tests/kernels/test_{name}.py" for name in KERNEL_TESTS))


@dataclass(frozen=True)
class Row:
    """What to measure. A command whose last line of output is a JSON object gives the fields of the row."""

    name: str
    command: tuple[str, ...]
    seconds: float  # its limit


def job(name: str, seconds: float, dry: bool, do: str, /, **arguments) -> Row:
    """A row by a function of bench.gpu_jobs."""
    interpret = ("env", "TRITON_INTERPRET=1") if dry else ()
    message = json.dumps({"do": do, "dry": dry, **arguments})
    return Row(name, (*interpret, sys.executable, "-m", "bench.gpu_jobs", message), seconds)


def step(size: str, kind: str, dry: bool, nanogpt: str | None = None) -> Row:
    return job(f"{size} {kind}", 120, dry, "training_step", size=size, kind=kind, nanogpt=nanogpt)


def plan_first(nanogpt: str | None, dry: bool) -> list[Row]:
    chosen = ("-m", "not slow", "-k", "bit_identical") if dry else ("-m", "gpu", "-n", "auto", "-k", TESTS)
    return [
        job("device", 60, dry, "about"),
        *(step("124M", kind, dry) for kind in ("graph", "eager")),
        job("attention", 90, dry, "cases", names=ATTENTION),
        job("norm, loss", 90, dry, "cases", names=(NORM, LOSS)),
        Row("GPU tests", (*PYTEST, "--timeout=60", *chosen, *TESTED), 110),
    ]


def plan_second(nanogpt: str | None, dry: bool) -> list[Row]:
    kinds, out = ("graph", *(PEERS if nanogpt else ())), f"build/gpu-check-{os.getpid()}"
    small = "--data README.md --model 16x1 --tokens 3e4 --val-bytes 2048" if dry else ""
    train = f"{shlex.quote(sys.executable)} train.py --out {out} {small} && cat {out}/*/summary.json"
    sanitizer = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--report-api-errors=no")
    attention = "tests/kernels/test_attention.py", "-k", "bit_identical or past_the_end"
    return [
        *(step("124M", kind, dry, nanogpt) for kind in kinds),
        Row("train.py", ("sh", "-c", train), 90),
        Row("compute-sanitizer", (*sanitizer, "--error-exitcode=1", *PYTEST, *attention), 90),
        step("124M", "compile", dry),
        *(step(size, kind, dry, nanogpt) for kind in kinds for size in ("10M", "50M", "350M")),
    ]


PARTS = {"first": plan_first, "second": plan_second}

# ---------------------------------------------------------------------------------------------------------------------
# Rows on the disk, and how they are measured


def read_rows(path: Path) -> dict[str, dict]:
    """The last line of each row. A truncated line counts as missing."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            rows[row["row"]] = row
    return rows


def missing(rows: list[Row], path: Path, dry: bool) -> list[Row]:
    """Rows that were not measured or failed. Raises UserError if real rows would mix with rows of a dry run."""
    known = read_rows(path)
    if any(row["dry"] != dry for row in known.values()):
        raise UserError(f"{path}: holds rows of a {'real' if dry else 'dry'} run; give another --out")
    return [row for row in rows if "error" in known.get(row.name, {"error": "missing"})]


def add_row(path: Path, row: dict) -> None:
    """Append a line, to survive a crash."""
    with open(path, "ab", buffering=0) as file:
        file.write(f"\n{json.dumps(row)}".encode())  # starts a new line, also after a truncated one
        os.fsync(file.fileno())


def measure(rows: list[Row], path: Path, dry: bool, deadline: float) -> None:
    """The rows one by one, until `deadline` on time.monotonic()."""
    for row in rows:
        start = time.monotonic()
        limit = min(row.seconds * (10 if dry else 1), deadline - start)
        if limit < 1:
            print(f"{row.name}: not measured: out of time", flush=True)
            continue
        got, took = run(row, limit), time.monotonic() - start
        add_row(path, {"row": row.name, "dry": dry, "seconds": round(took, 2), **got})
        print(f"{row.name}: {got.get('error') or 'done'} ({took:.1f} s)", flush=True)


def run(row: Row, limit: float) -> dict:
    """The fields of a row, with an error if it fails. At its limit a command is interrupted with all its processes, and
    killed five seconds later."""
    got, pipe = {}, subprocess.PIPE
    process = subprocess.Popen(
        row.command, cwd=ROOT, stdout=pipe, stderr=pipe, errors="replace", start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        got["error"] = f"cut off after {limit:.0f} s"
        os.killpg(process.pid, signal.SIGINT)  # pytest then prints its summary
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what is left of its children
    if got:
        out, err = process.communicate()
    elif process.returncode:
        got["error"] = f"exit code {process.returncode} {' '.join(err.split())[-200:]}".strip()
    try:
        got = dict(json.loads(out.splitlines()[-1])) | got
    except (ValueError, TypeError, IndexError):
        got["tail"] = out[-3000:]
    return got | ({"stderr": err[-1500:]} if "error" in got else {})


@dataclass(frozen=True)
class Options:
    part: str = opt("first", "what to measure", choices=tuple(PARTS))
    minutes: float = opt(4.0, "rows that have not started by then are left for the next call", above=0)
    out: str = opt("gpu-check", "folder of the rows")
    nanogpt: str = opt(".peer/nanoGPT", "a checkout of karpathy/nanoGPT; without it its rows are left out")
    dry_run: bool = opt(False, "tiny shapes on a CPU, interpreted: only whether all rows work")


def main() -> int:
    start = time.monotonic()
    options = parse(Options, prog="python -m bench.gpu_check", description=__doc__)
    if not options.dry_run and not shutil.which("nvidia-smi"):
        raise UserError("there is no NVIDIA GPU here (no nvidia-smi): nothing to measure; --dry-run runs the code")
    path, dry = Path(options.out) / f"{options.part}.jsonl", options.dry_run
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    nanogpt = options.nanogpt if (Path(options.nanogpt) / "model.py").exists() else None
    if options.part == "second" and not nanogpt:
        print(f"nanoGPT left out: {options.nanogpt} has no model.py", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the row's processes are killed
    rows = PARTS[options.part](nanogpt, dry)
    measure(missing(rows, path, dry), path, dry, start + 60 * options.minutes)
    good = len(rows) - len(missing(rows, path, dry))
    print(f"{path}: {good} of {len(rows)} rows ({time.monotonic() - start:.0f} s)")
    return int(good < len(rows))


if __name__ == "__main__":
    run_command(main, "python -m bench.gpu_check")
