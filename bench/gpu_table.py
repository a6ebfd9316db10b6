"""The rows of bench.gpu_check beside their goals.

    python -m bench.gpu_table DIR      prints the page; unless DIR is a dry run, also bench/results/gpu_check_DEVICE.md

MFU is against the published dense peak and by nanoGPT's count: 6 N + 12 L C T FLOPs per token, with N all parameters
except position embeddings and attention in full.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.common import RESULTS
from bench.gpu_check import ATTENTION, KINDS, LOSS, NORM, PARTS, PEERS, SIZES, read_rows
from nanochin.base.cli import UserError, opt, parse, run_command
from nanochin.base.console import markdown
from nanochin.plan import devices, flops

MFU = {"124M": 0.47, "10M": 0.30, "50M": 0.40, "350M": 0.47}  # goals by nanoGPT's count, on an H100
Rows = dict[str, dict]  # by part and name, such as "first 124M graph"


@dataclass(frozen=True)
class Line:
    """A figure and its goal."""

    what: str
    value: float | None  # None: not measured
    goal: float
    most: bool = False  # the goal is an upper bound

    def cells(self) -> list[str]:
        bound = f"{'at most' if self.most else 'at least'} {self.goal:,g}"
        if not self.value:
            return [self.what, "not measured", bound, ""]
        reached = self.goal / self.value if self.most else self.value / self.goal
        verdict = "ahead" if reached >= 1 else f"behind: {reached:.2f} of the goal"
        return [self.what, f"{self.value:,.4g}", bound, verdict]


def lines(rows: Rows) -> Iterator[Line]:
    """All figures that have a goal. rows: without those that failed."""
    cases = {(case["case"], case["direction"], case["who"]): case for case in timed(rows)}

    def ratio(case: str, direction: str, above: str, below: str = "ours", key: str = "us") -> float | None:
        pair = [cases.get((case, direction, who), {}).get(key) for who in (above, below)]
        return pair[0] / pair[1] if all(pair) else None

    for name in ATTENTION:
        if name.endswith("T1024"):
            cudnn = ratio(name, "forward", "SDPA cuDNN")
            yield Line(f"{name}, forward, speed over SDPA cuDNN", cudnn, 1.0 if "D64" in name else 0.95)
            yield Line(f"{name}, forward, speed over SDPA flash", ratio(name, "forward", "SDPA flash"), 1.2)
        yield Line(f"{name}, backward, speed over SDPA flash", ratio(name, "backward", "SDPA flash"), 1.2)
    for direction in ("forward", "backward"):
        share = cases.get((NORM, direction, "ours"), {}).get("of_ceiling")
        yield Line(f"add + RMSNorm {direction}, share of a copy's bandwidth", share, 0.9)
    over = ratio(LOSS, "both", "ours", "matrix products alone")
    yield Line("output layer and loss, time over its matrix products", over, 1.15, most=True)
    over = ratio(LOSS, "both", "ours", "eager", key="peak_mib")
    yield Line("output layer and loss, memory over eager", over, 0.25, most=True)
    for size in SIZES:
        yield from size_lines(size, steps_of(rows, size), device_of(rows))


def size_lines(size: str, steps: dict[str, dict], device: str) -> Iterator[Line]:
    """Goals of a training step."""
    theirs = [steps[kind] for kind in PEERS if kind in steps]
    speed = max((steps[kind]["tokens_per_s"] for kind in KINDS if kind in steps), default=None)
    over = speed / max(row["tokens_per_s"] for row in theirs) if speed and theirs else None
    yield Line(f"{size}, MFU by nanoGPT's count", speed and mfu(size, speed, device), MFU[size])
    yield Line(f"{size}, speed over nanoGPT compiled", over, 1.3)
    if size == "124M":
        yield Line("124M, tokens/s", speed, 550_000)
        # Both with nanoGPT's micro-batch. Other sizes are not measured at several.
        peak, n = min(((row["peak_bytes"], str(row["micro_batch"])) for row in theirs), default=(1, ""))
        memory = steps.get("eager", {}).get("peak_bytes_at", {}).get(n)
        yield Line("124M, memory over nanoGPT's", memory and memory / peak, 0.5, most=True)


def timed(rows: Rows) -> Iterator[dict]:
    """The operations that were timed."""
    return (case for row in rows.values() for case in row.get("rows", []) if "us" in case)


def steps_of(rows: Rows, size: str) -> dict[str, dict]:
    """The training steps of a size by kind; part second replaces part first."""
    names = {f"{part} {size} {kind}": kind for part in PARTS for kind in (*KINDS, *PEERS)}
    return {kind: rows[name] for name, kind in names.items() if name in rows}


def mfu(size: str, speed: float, device: str) -> float | None:
    """At `speed` tokens/s; None if the device's peak is not known."""
    shape, peak = SIZES[size], devices.peak_flops(device, "bfloat16")
    flops_per_token = 6 * flops.count_params(shape).total + 12 * shape.layers * shape.width * shape.seq_len
    return flops_per_token * speed / peak if peak else None


def device_of(rows: Rows) -> str:
    return rows.get("first device", {}).get("device", "an unknown device")


def page(rows: Rows, planned: list[str], dry: bool) -> str:
    """rows: including those that failed; planned: the names of all rows."""
    good = {name: row for name, row in rows.items() if "error" not in row}
    versions = good.get("first device", {}).get("versions", {})
    text = f"# Measured on {device_of(good)}\n\n"
    text += "**A dry run on a CPU: these numbers mean nothing.**\n\n" * dry
    text += f"`python -m bench.gpu_check`: {', '.join(f'{name} {version}' for name, version in versions.items())}\n"
    figures = [["figure", "measured", "goal", ""], *(line.cells() for line in lines(good))]
    cases = [["case", "direction", "who", "us", "share of the ceiling"]]
    for case in timed(good):
        cases.append([case["case"], case["direction"], case["who"], f"{case['us']:.1f}", f"{case['of_ceiling']:.2f}"])
    failed = [["rows that failed or are missing", "why"]]
    for name in planned:
        if name not in good:
            failed.append([name, rows.get(name, {}).get("error", "not measured").replace("|", "/")])
    return text + "".join(markdown(t) for t in (figures, *training_steps(good), cases, failed) if len(t) > 1)


def training_steps(good: Rows) -> list[list[list[str]]]:
    """Tables: speed and memory of each size and kind; the device's time in the eager step by operation."""
    heading = "step", "tokens/s", "ms", "MFU", "micro-batch", "peak GiB", "first steps, s", "loss after these"
    speeds, times = [[*heading]], [["step", "operation", "ms of the device"]]
    for size in SIZES:
        for kind, row in steps_of(good, size).items():
            name, share = f"{size} {kind}", mfu(size, row["tokens_per_s"], device_of(good))
            speed = f"{row['tokens_per_s']:,.0f}", f"{row['ms']:.1f}", f"{share:.1%}" if share else "-"
            memory = str(row["micro_batch"]), f"{row['peak_bytes'] / 2**30:.1f}"
            speeds.append([name, *speed, *memory, f"{row['first_steps_seconds']:.0f}", f"{row['losses'][-1]:.4f}"])
            times += [[name, operation, f"{ms:.2f}"] for operation, ms in row.get("split_ms", {}).items()]
    return [speeds, times]


@dataclass(frozen=True)
class Options:
    folder: str = opt(None, "--out of bench.gpu_check", positional=True)


def main() -> None:
    folder = Path(parse(Options, prog="python -m bench.gpu_table", description=__doc__).folder)
    rows, planned = {}, []
    for part, plan in PARTS.items():
        if found := read_rows(folder / f"{part}.jsonl"):
            rows |= {f"{part} {name}": row for name, row in found.items()}
            planned += [f"{part} {row.name}" for row in plan("nanoGPT", dry=False)]
    if not rows:
        raise UserError(f"{folder}: has no rows of bench.gpu_check")
    dry = any(row["dry"] for row in rows.values())
    text = page(rows, planned, dry)
    print(text)
    if not dry:
        (RESULTS / f"gpu_check_{device_of(rows).replace(' ', '_')}.md").write_text(text)


if __name__ == "__main__":
    run_command(main, "python -m bench.gpu_table")
