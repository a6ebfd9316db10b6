"""The rows of bench.gpu_check, measured in its worker processes: what a message asks for is a method of `Jobs`."""

import functools
import gc
import json
import math
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import replace

import torch
from torch import Tensor

import kernels
from bench import kernels as kernel_bench
from bench.common import error_text, messages
from bench.gpu_check import PEERS, SIZES, STEP_TOKENS
from bench.kernel_cases import Bench, make_case
from bench.steps import NanoGPT, our_step, profile, time_blocks
from nanochin.base.cli import UserError
from nanochin.base.files import versions
from nanochin.config import Shape, make_shape
from nanochin.run.step import WARM_UP, TrainingStep

SLOW = ("torch.compile", "F.linear_cross_entropy")  # peers that compile for many seconds
FIRST = WARM_UP + 3  # steps until one is like any other: a graph's warm-up, its capture, replays


def prepare(dry: bool) -> None:
    """Settings of this process."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch

    functorch.donated_buffer = False  # a compiled forward is timed with many backwards
    dynamo.recompile_limit = 64
    if dry:
        torch.set_num_threads(1)
        torch.compile = lambda function, **_: function  # it takes seconds
    elif not torch.cuda.is_available():
        raise UserError("there is no CUDA device here, so there is nothing to measure (--dry-run runs the code)")


class Jobs:
    def __init__(self, dry: bool):
        prepare(dry)
        self.device = torch.device("cpu") if dry else torch.device("cuda", 0)
        self.bench = Bench(self.device, torch.float32 if dry else torch.bfloat16, dry)

    def about(self) -> dict:
        """The device and the versions of what runs on it."""
        found = {"versions": versions(), "kernels": kernels.backend(self.device)[1]}
        if self.bench.dry:
            return found | {"device": "a CPU: these numbers mean nothing"}
        known = torch.cuda.get_device_properties(self.device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        return found | {"device": known.name, "memory_bytes": known.total_memory, "driver": driver}

    def check(self, name: str) -> dict:
        """One operation against float64, forward and every gradient."""
        wrong = kernel_bench.check_operation(self.bench, name)
        return {"error": f"wrong: {wrong}"} if wrong else {"right": True}

    def compile(self, size: str) -> dict:
        """A step of one layer on one sequence: the kernels of this size are in Triton's cache then."""
        shape = replace(self._shape(size), layers=1)
        first_steps(our_step("eager", shape, 1, self.device, self.bench.dtype), random_batch(shape, 1), 1)
        return {"compiled": True}

    @functools.cached_property
    def limits(self) -> dict[str, float]:
        return kernel_bench.ceilings(self.bench)

    def ceilings(self) -> dict:
        """FLOP/s of a large matrix product, bytes/s of a large copy."""
        return self.limits

    def case(self, operation: str, shape: dict[str, int], seconds: float, slow: bool = False) -> dict:
        """One operation beside its peers; what is not begun within `seconds` is left out."""
        bench = self._until(seconds)
        case = make_case(bench, operation, shape)
        for name in () if slow else SLOW:
            case.contenders.pop(name, None)
        rows = list(kernel_bench.time_case(case, bench, self.limits))
        failed = [row["error"] for row in rows if row["who"] == "ours" and "error" in row]
        return {"rows": rows} | ({"error": failed[0]} if failed else {})

    def tiles(self, operation: str, shape: dict[str, int], seconds: float) -> dict:
        """The shipped configurations of one operation and those next to them, as many as `seconds` allow."""
        bench = self._until(seconds)
        return {"tiles": list(kernel_bench.tune(operation, make_case(bench, operation, shape), bench))}

    def _until(self, seconds: float) -> Bench:
        return self.bench if self.bench.dry else replace(self.bench, deadline=time.monotonic() + seconds)

    # -----------------------------------------------------------------------------------------------------------------
    # Training steps

    def step(self, size: str, kind: str, nanogpt: str | None = None) -> dict:
        """Training steps on random tokens, ours or nanoGPT's: losses of the first ones, time, memory; of our eager ones
        also memory at smaller micro-batches and the device's time by part."""
        torch.manual_seed(0)  # for losses that can be compared
        shape = self._shape(size)
        sequences = 2 if self.bench.dry else STEP_TOKENS // shape.seq_len
        batch, began = random_batch(shape, sequences), time.perf_counter()
        if kind in PEERS:
            batch = batch.to(self.device)
            step = self._nanogpt_step(nanogpt, kind.split()[1], shape, batch)
        else:
            replay = {"capture": lambda function, *_: function} if self.bench.dry else {}
            step = our_step(kind, shape, sequences, self.device, self.bench.dtype, say=refuse, **replay)
        losses = first_steps(step, batch)
        seconds = time.perf_counter() - began
        if not all(map(math.isfinite, losses)):
            return {"error": f"losses {losses}"}
        own = step.micro_batch
        smaller = [own // n for n in (8, 4, 2) if n <= own] if kind == "eager" else []
        peaks = {n: self._peak_bytes(step, batch, n) for n in (*smaller, own)}
        blocks = time_blocks(lambda: step(batch, 1e-3), self.device, 0.01 if self.bench.dry else 3.0)
        median = statistics.median(blocks)
        found = {
            "losses": losses,
            "first_steps_seconds": seconds,
            "ms": 1e3 * median,
            "ms_min": 1e3 * min(blocks),
            "ms_max": 1e3 * max(blocks),
            "tokens_per_s": sequences * shape.seq_len / median,
            "micro_batch": own,
            "peak_bytes": peaks[own],
            "peak_bytes_at": peaks,
        }
        if kind == "eager":
            found["split_ms"] = profile(lambda: step(batch, 1e-3), self.device)
        return found

    def _shape(self, size: str) -> Shape:
        width, layers, head, vocab, T = (16, 1, 16, 64, 16) if self.bench.dry else SIZES[size]
        return make_shape(width, layers, vocab_size=vocab, seq_len=T, head_size=head)

    def _nanogpt_step(self, checkout: str, attention: str, shape: Shape, batch: Tensor) -> NanoGPT:
        """Compiled, with one kernel for attention."""
        if not self.bench.dry:
            for backend in ("flash", "cudnn", "mem_efficient", "math"):
                getattr(torch.backends.cuda, f"enable_{backend}_sdp")(backend == attention)
            torch.backends.cuda.matmul.allow_tf32 = True  # as its train.py has it
            torch.backends.cudnn.allow_tf32 = True
        theirs = NanoGPT(checkout, shape, len(batch), self.device, self.bench.dtype)
        theirs.compile(batch)
        return theirs

    def _peak_bytes(self, step: TrainingStep | NanoGPT, batch: Tensor, micro_batch: int) -> int:
        """Most memory allocated by steps with so many sequences at once, a graph's capture included; 0 on a CPU."""
        step.set_micro_batch(micro_batch)
        if not self.bench.dry:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        first_steps(step, batch)
        return 0 if self.bench.dry else torch.cuda.max_memory_allocated()


def random_batch(shape: Shape, sequences: int) -> Tensor:
    return torch.randint(shape.vocab_size, (sequences, shape.seq_len + 1))


def first_steps(step: TrainingStep | NanoGPT, batch: Tensor, number: int = FIRST) -> list[float]:
    """Their losses."""
    return [float(step(batch, 1e-3)[0]) for _ in range(number)]


def refuse(message: str) -> None:
    """A kind of step that falls back to another one is an error here."""
    raise RuntimeError(message)


def serve(dry: bool) -> None:
    """Answer {"do": NAME, ...} with the result of that method of `Jobs`, or with {"error": text}."""
    jobs = None
    for message, answer in messages():
        try:
            jobs = jobs or Jobs(dry)
            answer(getattr(jobs, message.pop("do"))(**message))
        except Exception as error:
            traceback.print_exc()
            answer({"error": error_text(error)})


if __name__ == "__main__":
    serve(**json.loads(sys.argv[2]))  # after --worker
