"""Single operations for bench.gpu_jobs: our kernel's time beside its peers', and its error against float64.

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

from kernels import fallback, ops, reference

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
    outs = as_tuple(function(*inputs))
    seeds = [torch.randn_like(out) for out in outs]
    return lambda: torch.autograd.grad(outs, wanted, seeds, retain_graph=True)


def as_tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


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
                row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            yield row


# ---------------------------------------------------------------------------------------------------------------------
# Error against float64


def check(ours: Callable, peer: Callable, exact: Callable, inputs: list[Tensor], options: tuple = ()) -> str | None:
    """The first wrong output of ours, or None. The error of values and gradients against float64 may be twice the
    peer's plus four units in the last place of the largest value."""

    def run(function, inputs):
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        outs = as_tuple(function(*inputs, *options))
        torch.manual_seed(1)
        seeds = [torch.randn(out.shape, device=out.device, dtype=torch.bfloat16).to(out.dtype) for out in outs]
        return [*outs, *torch.autograd.grad(outs, [x for x in inputs if x.requires_grad], seeds)]

    doubled = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    got, peers, wanted = run(ours, inputs), run(peer, inputs), run(exact, doubled)
    for i, (a, b, want) in enumerate(zip(got, peers, wanted, strict=True)):
        error, allowed = (a.double() - want).abs().max(), (b.double() - want).abs().max()
        if not error <= 2 * allowed + 4 * torch.finfo(a.dtype).eps * want.abs().max():
            return f"output {i} is off by {error:.2e}, PyTorch's operations by {allowed:.2e}"
    return None


def checks(bench: Bench) -> dict[str, tuple[list[Tensor], tuple]]:
    """(inputs, options) by operation, at odd sizes that are not timed."""
    B, T, H, D = (1, 5, 2, 16) if bench.dry else (2, 1000, 3, 64)
    C, V = H * D, 257 if bench.dry else 50257
    x, residual, weight = bench.randn(B, T, C), bench.randn(B, T, C), bench.randn(C, dtype=torch.float32)
    bias = bench.randn(C, dtype=torch.float32)
    head = (0.3 * bench.randn(V, C)).detach().requires_grad_()
    targets = torch.randint(-1, V, (B * T,), device=bench.device)
    return {
        "attention": ([bench.randn(B, T, 3 * C)], (H, 10_000.0)),
        "rms_norm": ([x, weight], ()),
        "layer_norm": ([x, weight, bias], ()),
        "add_rms_norm": ([x, residual, weight], ()),
        "add_layer_norm": ([x, residual, weight, bias], ()),
        "activation_linear": ([x, head[:C].detach().requires_grad_(), bench.randn(C)], ("gelu",)),
        "linear_cross_entropy": ([x.detach().flatten(0, 1).requires_grad_(), head, targets], ()),
    }


def check_operation(bench: Bench, name: str) -> str | None:
    """What is wrong with an operation of `checks`, or None."""
    inputs, options = checks(bench)[name]
    ours, peer, exact = (getattr(module, name) for module in (ops, fallback, reference))
    return check(ours, peer, exact, inputs, options)
