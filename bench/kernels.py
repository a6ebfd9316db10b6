"""Single operations for bench.gpu_jobs: our kernel's time beside its peers'.

Times are by `triton.testing.do_bench`, which empties the L2 cache (some 100 us) before each call and does not wait
between calls: Python's time, such as 82 us for our norms backward without launches (XEON-2), does not count.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import ops
from nanochin.base.cli import brief

TOKENS = 65_536  # of attention and norms
TINY = {"T": 16, "D": 16, "C": 24, "V": 65, "M": 8}  # shape in a dry run
SDPA = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Bench:
    """Where and in which dtype things run."""

    device: torch.device
    dtype: torch.dtype
    dry: bool  # on a CPU, with tiny shapes

    def randn(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(size, device=self.device, dtype=dtype or self.dtype, requires_grad=True)


# ---------------------------------------------------------------------------------------------------------------------
# Operations to be timed: T is the context, D the head size, C the width, V the vocabulary, M the number of tokens


@dataclass(frozen=True)
class Case:
    contenders: dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], list[Tensor]]]  # function, its inputs
    work: dict[str, float]  # FLOPs or bytes by direction: forward, backward, or both in one
    bound: str  # "flops" or "bytes": which of the two limits its speed


def make_case(bench: Bench, name: str) -> Case:
    """name: operation and shape, such as "attention D64 T1024"."""
    operation, *sizes = name.split()
    shape = {size[0]: TINY[size[0]] if bench.dry else int(size[1:]) for size in sizes}
    return OPERATIONS[operation](bench, **shape)


def attention(bench: Bench, D: int, T: int) -> Case:
    """Without positions; the peers get queries, keys and values unpacked, in the layout that they prefer. FLOPs of the
    causal half: 2 B H T^2 D forward, 2.5 times as many backward."""
    B, H = (1, 1) if bench.dry else (TOKENS // T, 2048 // D)
    qkv = bench.randn(B, T, 3 * H * D)
    parts = qkv.detach().view(B, T, 3, H, D).unbind(2)
    parts = [x.contiguous().transpose(1, 2).requires_grad_() for x in parts]  # (B, H, T, D)

    def sdpa(q, k, v, backend):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    contenders = {"ours": (lambda qkv: ops.attention(qkv, H), [qkv])}
    contenders |= {who: (partial(sdpa, backend=backend), parts) for who, backend in SDPA.items()}
    scores = B * H * T * T * D
    return Case(contenders, {"forward": 2 * scores, "backward": 5 * scores}, "flops")


def add_rms_norm(bench: Bench, C: int) -> Case:
    """Limited by memory: four tensors of (M, C) are read or written in each direction."""
    M = TINY["M"] if bench.dry else TOKENS

    def eager(x, residual, weight):
        total = x + residual
        return F.rms_norm(total, (C,), weight.to(x.dtype), eps=1e-6), total

    inputs = [bench.randn(M, C), bench.randn(M, C), bench.randn(C, dtype=torch.float32)]
    contenders = {"ours": (ops.add_rms_norm, inputs), "eager": (eager, inputs)}
    return Case(contenders, dict.fromkeys(("forward", "backward"), 4 * inputs[0].nbytes), "bytes")


def linear_cross_entropy(bench: Bench, C: int, V: int, M: int) -> Case:
    """The output layer and its loss; FLOPs of its three matrix products."""
    h, targets = bench.randn(M, C), torch.randint(V, (M,), device=bench.device)
    weight = (0.02 * bench.randn(V, C)).detach().requires_grad_()
    padded = F.pad(weight.detach(), (0, 0, 0, -V % 64))  # aligned rows of logits, as in ours

    def eager(h, weight, targets):
        return F.cross_entropy(F.linear(h, weight).float(), targets)

    def products(h):
        logits = h @ padded.T
        return logits @ padded, logits.T @ h  # the shapes of both gradients

    contenders = {
        "ours": (ops.linear_cross_entropy, [h, weight, targets]),
        "eager": (eager, [h, weight, targets]),
        "matrix products alone": (products, [h.detach()]),
    }
    return Case(contenders, {"both": 6 * M * C * V}, "flops")


OPERATIONS = {case.__name__: case for case in (attention, add_rms_norm, linear_cross_entropy)}


# ---------------------------------------------------------------------------------------------------------------------
# Time


def seconds(call: Callable[[], object], bench: Bench) -> float:
    """Median time of a call; of a single one in a dry run."""
    if not bench.dry:
        from triton.testing import do_bench

        return do_bench(call, return_mode="median") / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ceilings(bench: Bench) -> dict[str, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy on this device."""
    n = 64 if bench.dry else 8192
    a, b = bench.randn(n, n).detach(), bench.randn(8 * n, n).detach()  # in bf16, b has 1 GiB
    c = torch.empty_like(b)
    flops = 2 * n**3 / seconds(lambda: a @ a, bench)
    return {"flops": flops, "bytes": 2 * b.nbytes / seconds(lambda: c.copy_(b), bench)}


def bind(function: Callable, inputs: list[Tensor], direction: str) -> Callable[[], object]:
    """A call without arguments that runs one direction: forward, backward, or both."""
    wanted = [x for x in inputs if x.requires_grad]
    if direction == "forward" or not wanted:  # matrix products alone need no gradient
        return lambda: function(*inputs)
    if direction == "both":
        return lambda: torch.autograd.grad(function(*inputs), wanted)
    out = function(*inputs)
    outs = out if isinstance(out, tuple) else (out,)
    seeds = [torch.randn_like(out) for out in outs]
    return lambda: torch.autograd.grad(outs, wanted, seeds, retain_graph=True)


def time_case(case: Case, bench: Bench, limits: dict[str, float]) -> Iterator[dict]:
    """A row per direction and contender: microseconds, share of its ceiling in `limits`, peak MiB; or the error."""
    for direction, work in case.work.items():
        for who, (function, inputs) in case.contenders.items():
            row = {"direction": direction, "who": who}
            try:
                if not bench.dry:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                took = seconds(bind(function, inputs, direction), bench)
                row |= {"us": 1e6 * took, "of_ceiling": work / took / limits[case.bound]}
                if not bench.dry:
                    row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            except Exception as error:  # a peer that fails must not cost the other rows
                row["error"] = brief(error)
            yield row
