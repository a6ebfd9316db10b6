"""Timing and checking of single operations, and the search for better tiles, for bench.gpu_jobs.

Times are medians by `triton.testing.do_bench`, which empties the L2 cache before each call. It does not wait between
calls, so Python runs ahead and its own time does not count, as long as a call and emptying the cache (some 100 us)
take the device longer than Python: 42 us for our norms forward and 82 us backward, launches left out (XEON-2).
"""

import importlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.common import LATE, error_text
from bench.kernel_cases import Bench, Case
from kernels import fallback, ops, reference

# ---------------------------------------------------------------------------------------------------------------------
# Timing


def seconds(call: Callable[[], object], bench: Bench) -> float:
    """Median time of a call; of a single one in a dry run."""
    if not bench.dry:
        from triton.testing import do_bench

        return do_bench(call, return_mode="median") / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ceilings(bench: Bench) -> dict[str, float]:
    """FLOP/s of a matrix product and bytes/s of a copy, both large, as this device reaches them now."""
    n, size = (64, 2**16) if bench.dry else (8192, 2**30)
    a, b = bench.randn(n, n).detach(), bench.randn(n, n).detach()
    x = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    y = torch.empty_like(x)
    return {
        "flops": 2 * n**3 / seconds(lambda: a @ b, bench),
        "bytes": 2 * size / seconds(lambda: y.copy_(x), bench),
    }


def bind(function: Callable, inputs: list[Tensor], direction: str) -> Callable[[], object]:
    """A call without arguments that runs one direction: forward, backward, or both."""
    wanted = [x for x in inputs if x.requires_grad]
    if direction == "forward":
        return lambda: function(*inputs)
    if direction == "both":
        return lambda: torch.autograd.grad(function(*inputs), wanted)
    outs = as_tuple(function(*inputs))
    seeds = [torch.randn_like(out) for out in outs]
    return lambda: torch.autograd.grad(outs, wanted, seeds, retain_graph=True)


def as_tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def time_case(case: Case, bench: Bench, limits: dict[str, float]) -> Iterator[dict]:
    """A row for each direction and contender: microseconds, share of the ceiling in `limits`, MiB beside the inputs at
    most; or the error."""
    for direction, work in case.work.items():
        for who, (function, inputs) in case.contenders.items():
            row = {"direction": direction, "who": who}
            if time.monotonic() > bench.deadline:
                yield row | {"error": LATE}
                continue
            try:
                if not bench.dry:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                took = seconds(bind(function, inputs, direction), bench)
                row |= {"us": 1e6 * took, "of_ceiling": work / took / limits[case.ceiling]}
                if not bench.dry:
                    row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            except Exception as error:  # a peer's failure must not cost the other rows
                row["error"] = error_text(error)
            yield row


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def check(ours: Callable, peer: Callable, exact: Callable, inputs: list[Tensor]) -> str | None:
    """What is wrong with ours, or None: errors against float64, of values and gradients, at most twice the peer's plus
    four units in the last place of the largest value."""

    def run(function, inputs):
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        outs = as_tuple(function(*inputs))
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
    """(inputs, options) by operation, at sizes of their own: odd, and none that is timed."""
    B, T, H, D = (1, 5, 2, 16) if bench.dry else (2, 1000, 3, 64)
    C, V = H * D, 257 if bench.dry else 50257
    qkv, x, residual = bench.randn(B, T, 3 * C), bench.randn(B, T, C), bench.randn(B, T, C)
    weight, bias, out_bias = bench.randn(C, dtype=torch.float32), bench.randn(C, dtype=torch.float32), bench.randn(C)
    head = (0.3 * bench.randn(V, C)).detach().requires_grad_()
    down, half_down = head[:C].detach().requires_grad_(), head[:C, : C // 2].detach().requires_grad_()
    targets = torch.randint(-1, V, (B * T,), device=bench.device)
    return {
        "attention": ([qkv], (H,)),
        "attention, rotary": ([qkv], (H, 10_000.0)),
        "attention, rotary, QK-norm": ([qkv], (H, 10_000.0, True)),
        "rms_norm": ([x, weight], ()),
        "layer_norm": ([x, weight, bias], ()),
        "add_rms_norm": ([x, residual, weight], ()),
        "add_layer_norm": ([x, residual, weight, bias], ()),
        "activation_linear": ([x, down, out_bias], ("gelu",)),
        "activation_linear, swiglu": ([x, half_down, out_bias], ("swiglu",)),
        "linear_cross_entropy": ([x.detach().flatten(0, 1).requires_grad_(), head, targets], ()),
    }


def check_operation(bench: Bench, name: str) -> str | None:
    """What is wrong with one of `checks`, or None."""
    inputs, options = checks(bench)[name]
    operation = name.partition(",")[0]
    ours, peer, exact = (
        lambda *xs, module=module: getattr(module, operation)(*xs, *options) for module in (ops, fallback, reference)
    )
    return check(ours, peer, exact, inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Tiles

# By operation: direction, file of the kernels, the function in it that configures, place in its KERNELS if it has them,
# and what to vary.
TILE = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
TUNABLE = {
    "rotary attention": (
        ("forward", "attention", "configure", 0, TILE),
        ("backward", "attention", "configure", 1, TILE),
        ("backward", "attention", "configure", 2, TILE),
        ("forward", "rotary", "_config", None, ("ROWS", "HEADS", "num_warps")),
    ),
    "add_rms_norm": (
        ("forward", "norms", "_forward_config", None, ("ROWS", "num_warps")),
        ("backward", "norms", "_backward_config", None, ("ROWS", "num_warps")),
    ),
    "linear_cross_entropy": (("both", "cross_entropy", "_config", None, ("BLOCK", "num_warps")),),
    "gelu": (
        ("forward", "activation", "_config", None, ("BLOCK", "num_warps")),
        ("backward", "activation", "_config", None, ("BLOCK", "num_warps")),
    ),
}
# Tiles of attention to be timed beside the neighbours of those shipped on sm_90, by kernel and head size: two programs
# on a multiprocessor where the shipped tiles allow one, or larger tiles.
CANDIDATES = {
    ("_forward", 128): ((64, 64, 4, 2), (128, 64, 8, 3)),
    ("_backward_kv", 64): ((32, 128, 8, 2),),
    ("_backward_kv", 128): ((64, 128, 8, 2),),
}


def tune(operation: str, case: Case, bench: Bench) -> Iterator[dict]:
    """For each kernel of an operation the shipped configuration beside the fastest of its neighbours; in a dry run of
    the first kernel alone."""
    for direction, file, configure, kernel, numbers in TUNABLE[operation][: 1 if bench.dry else None]:
        module = importlib.import_module(f"kernels.{file}")
        kernel = None if kernel is None else module.KERNELS[kernel]
        what = f"{direction} {kernel.__name__ if kernel else file}"
        try:
            us = dict(neighbours(case, direction, module, configure, kernel, numbers, bench))
        except Exception as error:
            yield {"what": what, "error": error_text(error)}
            continue
        shipped, best = us["as shipped"], min((name for name in us if us[name]), key=us.get)
        yield {"what": what, "shipped_us": shipped, "best": best, "gain": shipped / us[best], "us": us}


def neighbours(case, direction, module, name, kernel, numbers, bench) -> Iterator[tuple[str, float | None]]:
    """(change, microseconds) of the shipped configuration, of those with one number halved or doubled (stages: one
    less or more) and of CANDIDATES; None for what fails or gives other results."""
    shipped, seen = getattr(module, name), {}
    function, inputs = case.contenders["ours"]

    def run(change: dict) -> tuple[list[Tensor], float]:
        def configure(*arguments):
            config = shipped(*arguments)
            if kernel is None or arguments[0] is kernel:
                seen.update(config)
                config = config | change
            return config

        setattr(module, name, configure)
        try:
            torch.manual_seed(0)  # the same seeds of the gradients
            call = bind(function, inputs, direction)
            return [x.detach() for x in as_tuple(call())], 1e6 * seconds(call, bench)
        finally:
            setattr(module, name, shipped)

    want, us = run({})
    yield "as shipped", us
    changes = []
    for number in numbers:
        value = seen[number]
        near = (value - 1, value + 1) if number == "num_stages" else (value // 2, 2 * value)
        changes += [{number: other} for other in near if other >= 1]
    if kernel is not None:
        changes += [dict(zip(numbers, tile, strict=True)) for tile in CANDIDATES.get((kernel.__name__, seen["D"]), ())]
    for change in changes:
        if time.monotonic() > bench.deadline:
            return
        label = ", ".join(f"{number}={value}" for number, value in change.items())
        try:
            got, us = run(change)
            yield label, us if all(map(close, got, want)) else None
        except Exception:  # too much shared memory, say
            yield label, None


def close(a: Tensor, b: Tensor) -> bool:
    a, b = a.float(), b.float()
    return torch.allclose(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())
