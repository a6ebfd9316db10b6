"""The rows of bench.gpu_check, measured in its worker processes: what a message asks for is a method of `Jobs`."""

import functools
import math
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, replace

import numpy
import torch

import kernels
from bench import kernels as kernel_bench
from bench.gpu import SIZES, STEP_TOKENS
from bench.gpu_worker import Ours, peak_bytes, profile, release, shape_of, time_steps
from kernels import ops
from nanochin.config import UserError
from nanochin.files import versions

TINY = (32, 1, 16, 64, 16)  # width, layers, head size, vocabulary, context of a dry run
# Left to bench.kernels, since they compile for many seconds.
SLOW = ("torch.compile", "flex_attention", "F.linear_cross_entropy", "F.linear_cross_entropy chunked", "Liger")


def make(spec: dict) -> "Jobs":
    torch.manual_seed(0)
    if spec["dry"]:
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        raise UserError("there is no CUDA device here, so there is nothing to measure (--dry-run runs the code)")
    kernel_bench.repeat_backwards()
    return Jobs(spec["dry"])


class Jobs:
    def __init__(self, dry: bool):
        self.device = torch.device("cpu") if dry else torch.device("cuda", 0)
        cache = 0 if dry else torch.cuda.get_device_properties(self.device).L2_cache_size
        self.bench = kernel_bench.Bench(self.device, torch.float32 if dry else torch.bfloat16, dry, math.inf, cache)

    def about(self) -> dict:
        """The device and the versions of what runs on it."""
        found = {
            "versions": versions(),
            "python": platform.python_version(),
            "numpy": numpy.__version__,
            "kernels": kernels.backend(self.device)[1],
        }
        if self.device.type != "cuda":
            return found | {"device": "a CPU: these numbers mean nothing"}
        known = torch.cuda.get_device_properties(self.device)
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        ).stdout.strip()
        return found | {
            "device": known.name,
            "driver": driver,
            "cuda": torch.version.cuda,
            "memory_bytes": known.total_memory,
            "multiprocessors": known.multi_processor_count,
            "l2_bytes": known.L2_cache_size,
        }

    def check(self, name: str) -> dict:
        """One operation against float64, forward and every gradient."""
        wrong = kernel_bench.check_all(self.bench, name)[name]
        return {"error": f"wrong: {wrong}"} if wrong else {"right": True}

    def compile(self, name: str) -> dict:
        """One operation of 124M, on one sequence, both ways: its kernels are in Triton's cache then."""
        width, _, head, vocab, T = TINY if self.bench.dry else SIZES["124M"]
        x, weight = self.bench.randn(T, width), self.bench.randn(width, dtype=torch.float32)
        if name == "attention":
            out = ops.attention(self.bench.randn(1, T, 3 * width), width // head, 10_000.0)
        elif name == "loss":
            targets = torch.zeros(T, dtype=torch.long, device=self.device)
            out = ops.linear_cross_entropy(x, self.bench.randn(vocab, width, dtype=torch.float32), targets)
        elif name == "norms":
            normed, total = ops.add_rms_norm(ops.rms_norm(x, weight), x, weight)
            out = normed + total
        else:
            up, down = self.bench.randn(T, 4 * width), self.bench.randn(width, 4 * width)
            out = ops.activation_linear(up, down, None, "gelu")
        out.float().sum().backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return {"compiled": True}

    @functools.cached_property
    def limits(self) -> dict[str, float]:
        return kernel_bench.ceilings(self.bench)

    def ceilings(self) -> dict:
        """FLOP/s of a large matrix product, bytes/s of a large copy."""
        return self.limits

    def step(self, size: str, kind: str) -> dict:
        """Training steps on random tokens: losses of the first ones, time, memory, and of eager ones the device's time
        by category."""
        width, layers, head, vocab, T = TINY if self.bench.dry else SIZES[size]
        sequences = 2 if self.bench.dry else STEP_TOKENS // T
        release(self.device)
        ours = Ours(
            kind, shape_of([width, layers, head, vocab, T]), sequences, sequences, self.device, self.bench.dtype
        )
        losses = []
        peak = peak_bytes(lambda: losses.extend(float(ours.step()[0]) for _ in range(6)), self.device)
        if not all(map(math.isfinite, losses)):
            return {"error": f"losses {losses}"}
        seconds = statistics.median(time_steps(ours.step, self.device, 0.01 if self.bench.dry else 3.0))
        found = {"losses": losses, "ms": 1e3 * seconds, "tokens_per_s": sequences * T / seconds, "peak_bytes": peak}
        if kind == "eager":
            found["split_ms"] = {name: us / 1e3 for name, us in profile(ours.step, self.device).items()}
        return found

    def case(self, operation: str, shape: str, seconds: float) -> dict:
        """One operation beside its peers; what is not begun within `seconds` is left out."""
        case = self._find(operation, shape)
        for name in SLOW:
            case.contenders.pop(name, None)
        rows = [asdict(row) for row in kernel_bench.run_case(case, self._until(seconds), self.limits)]
        failed = [row["error"] for row in rows if row["who"] == "ours" and row["error"]]
        return {"rows": rows} | ({"error": failed[0]} if failed else {})

    def tiles(self, operation: str, shape: str, seconds: float) -> dict:
        """The shipped configurations of one operation and those next to them, as many as `seconds` allow."""
        return {"tiles": list(kernel_bench.tuned(self._find(operation, shape), self._until(seconds)))}

    def _until(self, seconds: float) -> kernel_bench.Bench:
        return self.bench if self.bench.dry else replace(self.bench, deadline=time.monotonic() + seconds)

    def _find(self, operation: str, shape: str) -> kernel_bench.Case:
        for case in kernel_bench.all_cases(self.bench):
            if case.operation == operation and (self.bench.dry or case.shape == shape):
                return case
        raise UserError(f"bench.kernels has no case {operation} {shape}")
