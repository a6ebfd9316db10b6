"""Our Triton kernels against the best other implementations, in one call of under eight minutes on one GPU.

    python -m bench.kernels              checks, times, writes bench/results/kernels_<device>.json and .md
    python -m bench.kernels --sweep      tries the neighbours of the shipped configurations, prints which to ship
    python -m bench.kernels --dry-run    the same code on tiny shapes on a CPU, interpreted: its times mean nothing

Every operation is first checked against `kernels.reference` in float64, then timed in bf16 by device events, the
median over many calls that take turns on inputs too large for the L2 cache together. The calls are queued behind a
pause on the device, so that what Python takes to launch them is not measured. The ceilings are a large matrix product
and a large copy, measured in the same run. What fails is a row of its own with the error's text.

FLOPs of attention are those of the causal half, 2 B H T^2 D forward and 2.5 times that backward; bytes are what an
operation must read and write once.
"""

import functools
import importlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench.kernel_cases import (
    Bench,
    Case,
    Contender,
    attention_cases,
    elementwise_cases,
    loss_cases,
    norm_cases,
    rotary_attention_cases,
)
from nanochin.config import UserError, opt, parse, run_command
from nanochin.files import write_file, write_json

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Options:
    sweep: bool = opt(False, "try the neighbours of the configurations in kernels/ and print which to ship")
    dry_run: bool = opt(False, "tiny shapes on the CPU, interpreted: whether this command works, no more")
    minutes: float = opt(7.5, "what is not timed by then is left out, with a note", above=0)
    only: tuple[str, ...] = opt(
        (),
        "cases whose operation and shape contain one of these, such as 'attention D64'; writes nothing without --out",
    )
    out: str = opt("", "folder of the JSON and the table (default: bench/results)")


@dataclass(frozen=True)
class Row:
    group: str
    operation: str
    shape: str
    direction: str
    who: str
    us: float | None = None
    tflops: float | None = None
    gbs: float | None = None
    of_ceiling: float | None = None  # of the measured matrix product (attention, loss) or copy (the rest)
    peak_mib: float | None = None
    versus_best_peer: float | None = None  # of ours: best peer's time / our time
    error: str | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Timing


def bind(contender: Contender, inputs: list[Tensor], direction: str) -> Callable[[], object]:
    """A call without arguments that runs one direction."""
    inputs = contender.prepare(inputs)
    wanted = [x for x in inputs if x.requires_grad]
    if direction == "forward":
        return lambda: contender.function(*inputs)
    if direction == "both":
        return lambda: torch.autograd.grad(contender.function(*inputs), wanted)
    outs = contender.function(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    seeds = [torch.randn_like(out) for out in outs]
    return lambda: torch.autograd.grad(outs, wanted, seeds, retain_graph=True)


def seconds(calls: list[Callable[[], object]], bench: Bench) -> float:
    """Median time of a call."""
    for call in calls:
        call()
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    calls[0]()
    if bench.device.type != "cuda":
        return time.perf_counter() - start
    torch.cuda.synchronize()
    number = min(40, max(10, int(0.03 / (time.perf_counter() - start))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(number)]
    torch.cuda._sleep(60_000_000)  # some 30 ms: longer than launching 40 backward calls takes
    for i, (begin, end) in enumerate(events):
        begin.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def turns(case: Case, bench: Bench) -> list[list[Tensor]]:
    """Enough sets of inputs to fill the L2 cache three times."""
    first = case.inputs()
    size = sum(x.numel() * x.element_size() for x in first)
    more = 0 if bench.dry else min(8, max(1, math.ceil(3 * bench.cache / size)))
    return [first, *(case.inputs() for _ in range(more))]


def ceilings(bench: Bench) -> dict[str, float]:
    """FLOP/s of a matrix product and bytes/s of a copy, both large, as this device reaches them now."""
    n, size = (64, 2**16) if bench.dry else (8192, 2**30)
    a, b = bench.randn(n, n, grad=False), bench.randn(n, n, grad=False)
    x = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    y = torch.empty_like(x)
    product, copy = seconds([lambda: a @ b], bench), seconds([lambda: y.copy_(x)], bench)
    return {"flops": 2 * n**3 / product, "bytes": 2 * size / copy}


def run_case(case: Case, bench: Bench, limits: dict[str, float]) -> Iterator[Row]:
    """A row for each direction and contender."""
    inputs = turns(case, bench)
    for direction in case.directions:
        rows = [run_contender(case, direction, who, inputs, bench, limits) for who in case.contenders]
        peers = [row.us for row in rows if row.us and row.who not in ("ours", "matrix products alone")]
        for row in rows:
            if row.who == "ours" and row.us and peers:
                row = replace(row, versus_best_peer=min(peers) / row.us)
            yield row


def run_contender(case, direction, who, inputs, bench, limits) -> Row:
    place = {"group": case.group, "operation": case.operation, "shape": case.shape, "direction": direction, "who": who}
    if time.monotonic() > bench.deadline:
        return Row(**place, error="not timed: out of time")
    cuda = bench.device.type == "cuda"
    try:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        took = seconds([bind(case.contenders[who], xs, direction) for xs in inputs], bench)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else None
    except Exception as error:  # whatever a peer fails with must not cost the other rows
        return Row(**place, error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200])
    flops, moved = case.flops.get(direction), case.bytes.get(direction)
    share = flops / took / limits["flops"] if flops else moved / took / limits["bytes"]
    return Row(
        **place,
        us=took * 1e6,
        tflops=flops and flops / took / 1e12,
        gbs=moved and moved / took / 1e9,
        of_ceiling=share,
        peak_mib=peak,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def check(ours: Callable, peer: Callable, exact: Callable, inputs: list[Tensor]) -> str | None:
    """What is wrong with ours, or None: errors against float64, of values and gradients, at most twice the peer's plus
    four units in the last place of the largest value."""

    def run(function, inputs):
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        outs = function(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
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


def check_all(bench: Bench, only: str = "") -> dict[str, str | None]:
    """By operation, all or `only` one, what is wrong with it at a size of its own: odd, and not one that is timed."""
    from kernels import fallback, ops, reference

    B, T, H, D = (1, 5, 2, 16) if bench.dry else (2, 1000, 3, 64)
    C, V = H * D, 257 if bench.dry else 50257
    qkv, x, residual = bench.randn(B, T, 3 * C), bench.randn(B, T, C), bench.randn(B, T, C)
    weight, bias = bench.randn(C, dtype=torch.float32), bench.randn(C, dtype=torch.float32)
    head = (0.3 * bench.randn(V, C)).detach().requires_grad_()
    targets = torch.randint(-1, V, (B * T,), device=bench.device)
    arguments = {
        "attention": ([qkv], (H,)),
        "attention, rotary": ([qkv], (H, 10_000.0)),
        "attention, rotary, QK-norm": ([qkv], (H, 10_000.0, True)),
        "rms_norm": ([x, weight], ()),
        "layer_norm": ([x, weight, bias], ()),
        "add_rms_norm": ([x, residual, weight], ()),
        "add_layer_norm": ([x, residual, weight, bias], ()),
        "activation_linear": ([x, head[:C].detach().requires_grad_(), bench.randn(C)], ("gelu",)),
        "activation_linear, swiglu": ([x, head[:C, : C // 2].detach().requires_grad_(), bench.randn(C)], ("swiglu",)),
        "linear_cross_entropy": ([x.detach().flatten(0, 1).requires_grad_(), head, targets], ()),
    }
    wrong = {}
    for name, (inputs, options) in arguments.items():
        if only not in ("", name):
            continue
        operation = name.partition(",")[0]

        def by(module, operation=operation, options=options):
            return lambda *xs: getattr(module, operation)(*xs, *options)

        try:
            wrong[name] = check(by(ops), by(fallback), by(reference), inputs)
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
    return wrong


# ---------------------------------------------------------------------------------------------------------------------
# Sweep

# Tiles of attention to be timed beside the neighbours of those shipped on sm_90, by kernel and head size, as BLOCK_M,
# BLOCK_N, warps, stages: two programs on a multiprocessor where the shipped tiles allow one, or larger tiles.
CANDIDATES = {
    ("_forward", 128): ((64, 64, 4, 2), (128, 64, 8, 3)),
    ("_backward_kv", 64): ((32, 128, 8, 2),),
    ("_backward_kv", 128): ((64, 128, 8, 2),),
}


def sweep(bench: Bench, only: tuple[str, ...]) -> None:
    """Times the shipped configurations, their neighbours, half and double in one number at a time, and attention's
    CANDIDATES, and prints the fastest whose results agree."""
    shapes = ("D64 T1024 65536", "D128 T1024 65536", "C768 65536", "F3072", "C768 V50257 16384", "C320 V8192")
    for case in all_cases(bench):
        if not wanted(case, only) or not only and not bench.dry and not any(shape in case.shape for shape in shapes):
            continue
        for found in tuned(case, bench):
            print(
                f"{found['what']}: as shipped {found['shipped_us']:.1f} us; ship {found['best']}: "
                f"{found['best_us']:.1f} us ({found['gain']:.3f}x; {found['failed']} of {found['tried']} failed)"
                if "error" not in found
                else f"{found['what']}: as shipped {found['error']}",
                flush=True,
            )


def tuned(case: Case, bench: Bench) -> Iterator[dict]:
    """For each kernel of a case the fastest configuration, and microseconds by configuration; in a dry run the first
    kernel alone, which shows that it works."""
    for direction, module, name, kernel, numbers in tunables(case):
        module = importlib.import_module(f"kernels.{module}")
        kernel = None if kernel is None else module.KERNELS[kernel]
        what = f"{case.operation} {direction} {case.shape}" + (f" {kernel.__name__}" if kernel else "")
        try:
            tried = dict(neighbours(case, direction, module, name, kernel, numbers, bench))
        except Exception as error:
            yield {"what": what, "error": f"{type(error).__name__}: {error}"}
            continue
        us = {change: 1e6 * took for change, took in tried.items() if took}
        best = min(us, key=us.get)
        yield {
            "what": what,
            "shipped_us": us["as shipped"],
            "best": best,
            "best_us": us[best],
            "gain": us["as shipped"] / us[best],
            "us": us,
            "tried": len(tried),
            "failed": len(tried) - len(us),
        }
        if bench.dry:
            return


def tunables(case: Case) -> Iterator[tuple]:
    """(direction, module, name of the function in it that configures, place in KERNELS or None, what to vary)."""
    for direction in case.directions:
        if case.group == "attention":
            continue  # the same kernels as below
        if case.group == "rotary attention":
            for kernel in (0,) if direction == "forward" else (1, 2):
                yield direction, "attention", "configure", kernel, ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
            if direction == "forward":
                yield direction, "rotary", "_config", None, ("ROWS", "HEADS", "num_warps")
        elif case.group == "norms":
            yield direction, "norms", f"_{direction}_config", None, ("ROWS", "num_warps")
        elif case.group == "loss":
            yield direction, "cross_entropy", "_config", None, ("BLOCK", "num_warps")
        else:
            yield direction, "activation", "_config", None, ("BLOCK", "num_warps")


def neighbours(case, direction, module, name, kernel, numbers, bench) -> Iterator[tuple[str, float | None]]:
    """(change, seconds or None) of a configuration and those next to it."""
    shipped, seen, inputs = getattr(module, name), {}, turns(case, bench)
    ours = case.contenders["ours"]

    def configure(*arguments, change=None):
        config = shipped(*arguments)
        if kernel is None or arguments[0] is kernel:
            seen.update(config)
            config = config | (change or {})
        return config

    def run(change):
        setattr(module, name, functools.partial(configure, change=change))
        try:
            results = bind(ours, inputs[0], direction)()
            took = seconds([bind(ours, xs, direction) for xs in inputs], bench)
            return [x.detach() for x in (results if isinstance(results, tuple) else (results,))], took
        finally:
            setattr(module, name, shipped)

    torch.manual_seed(0)
    want, took = run({})
    yield "as shipped", took
    changes = [
        {number: value}
        for number in numbers
        for value in (
            (seen[number] - 1, seen[number] + 1) if number == "num_stages" else (seen[number] // 2, seen[number] * 2)
        )
        if value >= 1
    ]
    if kernel is not None:
        candidates = CANDIDATES.get((kernel.__name__, seen["D"]), ())
        changes += [dict(zip(numbers, tile, strict=True)) for tile in candidates]
    for change in changes:
        if time.monotonic() > bench.deadline:
            return
        label = ", ".join(f"{number}={value}" for number, value in change.items())
        try:
            torch.manual_seed(0)  # the same seeds of the gradients
            got, took = run(change)
            same = all(
                torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2 * b.abs().max().item())
                for a, b in zip(got, want, strict=True)
            )
            yield label, took if same else None
        except Exception:  # too much shared memory, say
            yield label, None


# ---------------------------------------------------------------------------------------------------------------------
# Command


def wanted(case: Case, only: tuple[str, ...]) -> bool:
    return not only or any(text in f"{case.operation} {case.shape}" for text in only)


def repeat_backwards() -> None:
    """Let torch.compile make backwards that run many times over one forward, for many shapes."""
    from torch._dynamo import config as dynamo  # not before TRITON_INTERPRET is set: it imports triton
    from torch._functorch import config as functorch

    functorch.donated_buffer = False
    dynamo.recompile_limit = 64


def all_cases(bench: Bench) -> Iterator[Case]:
    for cases in (attention_cases, rotary_attention_cases, norm_cases, elementwise_cases, loss_cases):
        yield from cases(bench)


def keep(path: Path, record: dict, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path.with_suffix(".json"), record)
    write_file(path.with_suffix(".md"), text.encode())


def markdown(rows: list[Row], about: dict) -> str:
    def number(value, digits=1):
        return "" if value is None else f"{value:.{digits}f}"

    lines = [
        f"# Kernels on {about['device']}",
        "",
        f"`python -m bench.kernels`, {about['date']}, torch {about['torch']}, Triton {about['triton']}, bf16.",
        f"Ceilings measured in this run: {about['ceilings']['flops'] / 1e12:.0f} TFLOP/s (matrix product), "
        f"{about['ceilings']['bytes'] / 1e9:.0f} GB/s (copy). Medians; best peer: its time over ours.",
        "",
        "Checked against float64: " + ", ".join(f"{k} {v or 'right'}" for k, v in about["checks"].items()) + ".",
        "",
        "| operation | shape | direction | who | us | TFLOP/s | GB/s | of ceiling | peak MiB | best peer |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first = row.error.replace("|", "/") if row.error else number(row.us)
        cells = [row.operation, row.shape, row.direction, row.who, first, number(row.tflops), number(row.gbs, 0),
                 number(row.of_ceiling, 2), number(row.peak_mib, 0), number(row.versus_best_peer, 2)]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def targets(rows: list[Row]) -> list[str]:
    """What the kernels are meant to reach, and the worst case of this run."""

    def ratios(numerator, denominator, direction, field="us", where=lambda shape: True):
        by = {(row.who, row.shape): getattr(row, field) for row in rows if row.direction == direction}
        shapes = [shape for who, shape in by if who == denominator and where(shape)]
        pairs = [(by.get((numerator, shape)), by[denominator, shape]) for shape in shapes]
        return [a / b for a, b in pairs if a and b]

    short = lambda shape: "T512 " in shape or "T1024 " in shape  # noqa: E731
    norms = [row.of_ceiling for row in rows if row.group == "norms" and row.who == "ours" and row.of_ceiling]
    found = [
        (
            "attention forward, T <= 1024: time of SDPA flash / ours, at least 1.2",
            ratios("SDPA flash", "ours", "forward", where=short),
            min,
        ),
        (
            "attention forward, T <= 1024: time of SDPA cuDNN / ours, at least 0.9",
            ratios("SDPA cuDNN", "ours", "forward", where=short),
            min,
        ),
        ("attention backward: time of SDPA flash / ours, at least 1", ratios("SDPA flash", "ours", "backward"), min),
        ("norms: share of copy bandwidth, at least 0.9", norms, min),
        ("loss: time of ours / its matrix products, at most 1.2", ratios("ours", "matrix products alone", "both"), max),
        ("loss: memory of ours / eager, below 0.25", ratios("ours", "eager", "both", "peak_mib"), max),
    ]
    return [f"- {target}; worst of {len(values)}: {worst(values):.2f}" for target, values, worst in found if values]


def main() -> None:
    options = parse(Options, prog="python -m bench.kernels", description="Times our kernels against their peers.")
    start = time.monotonic()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before kernels is imported
    elif not torch.cuda.is_available():
        raise UserError("there is no CUDA device here, so there is nothing to time (--dry-run runs the code)")
    import kernels

    device = torch.device("cpu" if options.dry_run else "cuda", None if options.dry_run else 0)
    backend, why = kernels.backend(device)
    if backend == "fallback":
        raise UserError(f"nothing of ours to time: {why}")
    cuda = device.type == "cuda"
    bench = Bench(
        device,
        torch.bfloat16 if cuda else torch.float32,
        options.dry_run,
        start + 60 * options.minutes,
        torch.cuda.get_device_properties(device).L2_cache_size if cuda else 0,
    )
    if not any(wanted(case, options.only) for case in all_cases(bench)):
        raise UserError(f"--only {' '.join(options.only)}: no case has this in its operation and shape")
    repeat_backwards()
    torch.manual_seed(0)
    if options.sweep:
        return sweep(bench, options.only)

    import triton

    about = {
        "device": torch.cuda.get_device_name(device) if cuda else "a CPU, interpreted: these times mean nothing",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "dtype": str(bench.dtype).split(".")[1],
        "backend": why,
    }
    about |= {"checks": check_all(bench), "ceilings": ceilings(bench)}
    rows, text = [], ""
    for case in filter(lambda case: wanted(case, options.only), all_cases(bench)):
        rows += run_case(case, bench, about["ceilings"])
        print(f"{time.monotonic() - start:4.0f} s  {case.operation} {case.shape}", file=sys.stderr)
        text = markdown(rows, about) + "\n" + "\n".join(targets(rows)) + "\n"
        if options.out or not (options.dry_run or options.only):  # what is known so far
            path = Path(options.out or RESULTS) / f"kernels_{'dry' if options.dry_run else about['device']}"
            keep(path.with_name(path.name.replace(" ", "_")), about | {"rows": [asdict(row) for row in rows]}, text)
    print(text)
    if wrong := [name for name, text in about["checks"].items() if text]:
        raise UserError(f"wrong results, see the table: {', '.join(wrong)}")


if __name__ == "__main__":
    run_command(main, "python -m bench.kernels")
