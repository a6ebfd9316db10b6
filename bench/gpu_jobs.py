"""The rows of bench.gpu_check that need torch, a process for each: `python -m bench.gpu_jobs MESSAGE`.

MESSAGE is JSON: `do` names a function of JOBS, `dry` asks for tiny shapes on a CPU, the rest are its arguments. Prints
the row as a line of JSON, and again when it has more fields.
"""

import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.gpu_check import PEERS, SIZES, STEP_TOKENS
from bench.kernels import Bench, ceilings, make_case, time_case
from bench.steps import NanoGPT, our_step, profile, time_blocks
from nanochin.base.files import versions
from nanochin.config import Shape, make_shape
from nanochin.run.step import WARM_UP, TrainingStep

TINY = make_shape(16, 1, vocab_size=64, seq_len=16)


def about(bench: Bench) -> Iterator[dict]:
    """The device and the versions."""
    device = "a CPU" if bench.dry else torch.cuda.get_device_name(bench.device)
    yield {"device": device, "versions": versions()}


def cases(bench: Bench, names: list[str]) -> Iterator[dict]:
    """Operations beside their peers, and the speed of a large matrix product and a large copy."""
    limits = ceilings(bench)
    found = {"ceilings": limits, "rows": []}
    for name in names:
        for row in time_case(make_case(bench, name), bench, limits):
            found["rows"].append({"case": name} | row)
            if row["who"] == "ours" and "error" in row:
                found["error"] = f"{name}: {row['error']}"
        yield found


def training_step(bench: Bench, size: str, kind: str, nanogpt: str | None) -> Iterator[dict]:
    """Training steps on random tokens, ours or nanoGPT's: losses of the first steps, time, memory. For our eager steps
    also the memory at smaller micro-batches and the device's time by operation."""
    torch.manual_seed(0)  # losses can be compared between kinds
    shape = TINY if bench.dry else SIZES[size]
    sequences = 2 if bench.dry else STEP_TOKENS // shape.seq_len
    batch, began = torch.randint(shape.vocab_size, (sequences, shape.seq_len + 1)), time.perf_counter()
    if kind in PEERS:
        batch = batch.to(bench.device)
        step = nanogpt_step(bench, nanogpt, kind.split()[1], shape, batch)
    else:
        replay = {"capture": lambda function, *_: function} if bench.dry else {}
        step = our_step(kind, shape, sequences, bench.device, bench.dtype, **replay)
    found = {"losses": first_losses(step, batch), "first_steps_seconds": time.perf_counter() - began}
    if getattr(step, "kind", kind) != kind or not all(map(math.isfinite, found["losses"])):
        raise RuntimeError(f"fell back to another kind, or diverged: losses {found['losses']}")
    own, eager = step.micro_batch, kind == "eager"
    sizes = (own // 8, own // 4, own // 2, own) if eager else (own,)
    peaks = {n: peak_bytes(bench, step, batch, n) for n in sizes if n}
    found |= {"micro_batch": own, "peak_bytes": peaks[own], "peak_bytes_at": peaks}
    blocks = time_blocks(lambda: step(batch, 1e-3), 0.01 if bench.dry else 3.0)
    found |= {"ms": 1e3 * statistics.median(blocks), "ms_min": 1e3 * min(blocks), "ms_max": 1e3 * max(blocks)}
    found["tokens_per_s"] = 1e3 * sequences * shape.seq_len / found["ms"]
    yield found
    if eager:
        yield found | {"split_ms": profile(lambda: step(batch, 1e-3), bench.device)}


def nanogpt_step(bench: Bench, checkout: str, attention: str, shape: Shape, batch: Tensor) -> NanoGPT:
    """Compiled, with one kernel for attention."""
    if not bench.dry:
        for backend in ("flash", "cudnn", "mem_efficient", "math"):
            getattr(torch.backends.cuda, f"enable_{backend}_sdp")(backend == attention)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as in its train.py
    theirs = NanoGPT(checkout, shape, len(batch), bench.device, bench.dtype)
    theirs.compile(batch)
    return theirs


def peak_bytes(bench: Bench, step: TrainingStep | NanoGPT, batch: Tensor, micro_batch: int) -> int:
    """Peak memory of steps with this micro-batch, a graph's capture included; 0 on a CPU."""
    step.set_micro_batch(micro_batch)
    if not bench.dry:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    first_losses(step, batch)
    return 0 if bench.dry else torch.cuda.max_memory_allocated()


def first_losses(step: TrainingStep | NanoGPT, batch: Tensor) -> list[float]:
    """Losses of the first steps, of which the last three replay a graph."""
    return [float(step(batch, 1e-3)[0]) for _ in range(WARM_UP + 3)]


JOBS = {job.__name__: job for job in (about, cases, training_step)}


def main() -> None:
    message = json.loads(sys.argv[1])
    do, dry = message.pop("do"), message.pop("dry")
    if dry:
        torch.set_num_threads(1)
        torch.compile = lambda function, **_: function  # compiling takes seconds
    bench = Bench(torch.device("cpu" if dry else "cuda:0"), torch.float32 if dry else torch.bfloat16, dry)
    for row in JOBS[do](bench, **message):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
