"""Training speed of named shapes, ours and optionally nanoGPT's, side by side in one run.

    python -m bench.train_throughput                                     ours, eager
    python -m bench.train_throughput --nanogpt ~/nanoGPT --compile both  with every variant of that checkout

Each variant is a process of its own (so its peak memory is its own); rounds alternate between them, so that a
machine that changes its speed changes it for all. What is timed is a whole step: forward, backward, clip, AdamW, loss
read. Quote the ratios: they are of medians within this one run.
"""

import json
import math
import os
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.common import NanoGPT, Worker, messages
from nanochin.config import Shape, UserError, make_shape, opt, parse, run_command
from nanochin.console import count, format_columns
from nanochin.flops import flops_per_token

# name: width, layers, head size, vocabulary, context, sequences a step. S and M are nanoGPT-like with a vocabulary of
# 4096; t64 and t96 are as wide and deep as the default run on a CPU and a neighbour of it on the ladder, with fewer
# heads; the last three are for a GPU.
SHAPES = {
    "S": (128, 4, 32, 4096, 256, 12),
    "M": (384, 6, 64, 4096, 256, 12),
    "t64": (64, 3, 64, 256, 256, 16),
    "t96": (96, 2, 48, 256, 256, 15),
    "50M": (640, 10, 64, 16384, 1024, 32),
    "124M": (768, 12, 64, 50304, 1024, 32),
    "350M": (1024, 24, 64, 50304, 1024, 16),
}


def shape_of(name: str) -> Shape:
    width, layers, head, vocab, T, _ = SHAPES[name]
    return make_shape(width, layers, vocab_size=vocab, seq_len=T, head_size=head)


@dataclass(frozen=True)
class Options:
    shapes: tuple[str, ...] = opt(("S", "M"), f"which of {', '.join(SHAPES)}")
    nanogpt: str | None = opt(None, "a checkout of karpathy/nanoGPT to time in turns with ours")
    compile: str = opt("false", "our model eager, compiled, or both", choices=("false", "true", "both"))
    dtype: str = opt("auto", "compute dtype, as in train.py", choices=("auto", "float32", "bfloat16"))
    device: str = opt("auto", "auto, cpu, cuda")
    threads: int = opt(2, "CPU threads", low=1)
    rounds: int = opt(6, "turns that each variant takes", low=1)
    steps: int = opt(3, "steps a turn", low=1)
    json: str | None = opt(None, "write the results to this file, and a table beside it (.md)")
    worker: str | None = opt(None, "internal: run one variant, told by JSON, and time steps on demand")


# ---------------------------------------------------------------------------------------------------------------------
# One variant, in a process of its own


def work(spec: dict) -> None:
    """Build the model and optimizer of a variant, then time as many steps as each line of stdin asks for."""
    if not spec["nanogpt"]:
        import train  # noqa: F401  first, since it says how torch's threads shall wait
    import torch

    torch.set_num_threads(spec["threads"])
    device = torch.device(spec["device"])
    torch.manual_seed(0)
    shape = shape_of(spec["shape"])
    batch = torch.randint(shape.vocab_size, (SHAPES[spec["shape"]][-1], shape.seq_len + 1))
    step = (nanogpt_step if spec["nanogpt"] else our_step)(spec, shape, batch, device)
    for steps, answer in messages():
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        answer({"seconds": seconds, "peak_bytes": peak, "loss": loss})


def our_step(spec: dict, shape, batch, device):
    """train.py's own step."""
    import torch

    from nanochin.device import keep_freed_memory
    from nanochin.model import GPT
    from nanochin.optim import Adam
    from nanochin.step import TrainingStep
    from train import train_step

    if device.type == "cpu":
        keep_freed_memory()
    model = GPT(shape, dtype=getattr(torch, spec["dtype"])).to(device)
    optimizer = Adam(model, "adamw", 1e-3, (0.9, 0.95), 0.1)
    kind = "compile" if spec["compile"] else "eager"
    step = TrainingStep(kind, train_step, model, optimizer, len(batch), 1.0, len(batch))
    return lambda: step(batch, 1e-3)[0].item()


def nanogpt_step(spec: dict, shape, batch, device):
    """The same of a nanoGPT checkout, with the loss read each time as ours."""
    import torch

    theirs = NanoGPT(spec["nanogpt"], shape, device, getattr(torch, spec["dtype"]), len(batch))
    if spec["compile"]:
        theirs.forward = torch.compile(theirs.model)
    batch = batch.to(device)
    return lambda: theirs.step(batch).item()


# ---------------------------------------------------------------------------------------------------------------------
# All variants in turns


def variants(options: Options, device, fast_bf16: bool) -> list[dict]:
    """Ours, then nanoGPT's: float32 and (where the device multiplies bf16 fast) bf16, eager and compiled."""
    common = {"device": str(device), "threads": options.threads}
    compiled = {"false": [False], "true": [True], "both": [False, True]}[options.compile]
    dtypes = ["float32", "bfloat16"] if fast_bf16 else ["float32"]
    ours = [options.dtype] if options.dtype != "auto" else dtypes
    made = [{"nanogpt": None, "dtype": d, "compile": c, **common} for d in ours for c in compiled]
    if options.nanogpt:
        if not (Path(options.nanogpt) / "model.py").exists():
            raise UserError(f"--nanogpt {options.nanogpt}: no model.py there; name a checkout of karpathy/nanoGPT")
        path = str(Path(options.nanogpt).resolve())
        made += [{"nanogpt": path, "dtype": d, "compile": c, **common} for d in dtypes for c in (False, True)]
    return made


def run_shape(name: str, specs: list[dict], rounds: int, steps: int) -> list[dict]:
    """Time every variant of a shape in turns; returns one row for each."""
    workers = [Worker("bench.train_throughput", spec | {"shape": name}) for spec in specs]
    for worker in workers:
        worker.ask(3)  # warm-up, compiling
    answers = [[] for _ in workers]
    for _ in range(rounds):
        for worker, got in zip(workers, answers, strict=True):
            got.append(worker.ask(steps))
    for worker in workers:
        worker.close()

    shape, sequences = shape_of(name), SHAPES[name][-1]
    rows = []
    for spec, got in zip(specs, answers, strict=True):
        seconds = [s for answer in got for s in answer["seconds"]]
        median = statistics.median(seconds)
        speed = sequences * shape.seq_len / median
        rows.append({"shape": name, "who": "nanoGPT" if spec["nanogpt"] else "nanochin", "dtype": spec["dtype"],
                     "compile": spec["compile"], "ms_median": 1e3 * median, "ms_min": 1e3 * min(seconds),
                     "tokens_per_s": speed, "flops_per_s": flops_per_token(shape) * speed,
                     "peak_mb": got[-1]["peak_bytes"] / 1e6, "loss": got[-1]["loss"]})  # fmt: skip
    peers = [row["tokens_per_s"] for row in rows if row["who"] == "nanoGPT"]
    lean = [row["peak_mb"] for row in rows if row["who"] == "nanoGPT" and row["tokens_per_s"] == max(peers)]
    for row in rows:
        row["speed_ratio"] = row["tokens_per_s"] / max(peers) if peers else None
        row["memory_ratio"] = row["peak_mb"] / lean[0] if peers else None
    return rows


def table(rows: list[dict], peak: float | None) -> str:
    heading = ["shape, variant", "ms/step", "min", "tokens/s", "MFU", "peak MB", "speed", "memory"]
    lines = [heading]
    for row in rows:
        how = f"{row['shape']} {row['who']} {row['dtype']} {'compiled' if row['compile'] else 'eager'}"
        ratios = [f"{row[key]:.2f}x" if row[key] else "-" for key in ("speed_ratio", "memory_ratio")]
        mfu = f"{row['flops_per_s'] / peak:.0%}" if peak else "-"
        times = [f"{row['ms_median']:.0f}", f"{row['ms_min']:.0f}", count(row["tokens_per_s"])]
        lines.append([how, *times, mfu, f"{row['peak_mb']:.0f}", *ratios])
    return format_columns(lines)


def main() -> None:
    options = parse(Options, prog="python -m bench.train_throughput", description=__doc__)
    if options.worker:
        return work(json.loads(options.worker))
    for name in options.shapes:
        if name not in SHAPES:
            raise UserError(f"--shapes {name}: choose from {', '.join(SHAPES)}")
    import torch

    from nanochin.device import device_name, has_fast_bf16, peak_of, pick_device
    from nanochin.files import versions

    device = pick_device(options.device)
    torch.set_num_threads(options.threads)
    fast_bf16 = device.type == "cuda" or has_fast_bf16()
    if not fast_bf16:
        print("bf16 is left out: this CPU has neither AMX nor AVX512-bf16 and only emulates it")
    peak, source = peak_of(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    rows = []
    for name in options.shapes:
        rows += run_shape(name, variants(options, device, fast_bf16), options.rounds, options.steps)
    text = table(rows, peak)
    print(f"{text}\n\nspeed and memory are ratios to nanoGPT's fastest variant; {source}")
    if options.json:
        about = {
            "command": "python -m bench.train_throughput " + " ".join(sys.argv[1:]),
            "device": device_name(device),
            "cpu": cpu_name(),
            "threads": options.threads,
            "date": time.strftime("%Y-%m-%d"),
            "load": load(),
            "peak_flops": peak,
            "peak_source": source,
            "versions": versions(),
        }
        Path(options.json).write_text(json.dumps(about | {"options": asdict(options), "rows": rows}, indent=1) + "\n")
        note = f"{about['cpu']}, {device}, {options.threads} threads, torch {torch.__version__}, {about['date']}"
        Path(options.json).with_suffix(".md").write_text(f"`{about['command']}`\n\n{note}\n\n```\n{text}\n```\n")


def cpu_name() -> str:
    """The processor as Linux names it, else as Python does."""
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def load() -> float:
    """Mean number of running programs over the last minute, ours included: above the threads, others disturbed it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan


if __name__ == "__main__":
    run_command(main, "python -m bench.train_throughput")
