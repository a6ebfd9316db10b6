"""The rows of bench/gpu_check.sh beside their goals, and what to change first.

    python -m bench.gpu_table DIR      prints the table; of real rows also writes bench/results/gpu_check_DEVICE.md

MFU is against the published dense peak: by nanoGPT's count, 6 N + 12 L C T FLOPs a token with N all parameters but
position embeddings, and physical, what runs (nanochin/plan/flops.py); attention in full in both.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.common import RESULTS
from bench.gpu_check import ATTENTION, KINDS, LOSS, NORM, PARTS, PEERS, SIZES, STEP_TOKENS, Kept, Place
from nanochin.base.cli import UserError, opt, parse, run_command
from nanochin.config import Shape, make_shape
from nanochin.plan import devices, flops

MFU = {"124M": 0.47, "10M": 0.30, "50M": 0.40, "350M": 0.47}  # goals by nanoGPT's count, on an H100
PARTS_OF_LEDGER = {
    "matmul": ("qkv", "output projection", "feed-forward", "logits"),
    "attention, rotary": ("rotary, qk-norm", "attention scores", "softmax", "attention values"),
    "norm, activation": ("activation", "norms, residuals", "biases"),
    "loss": ("loss",),
}
Rows = dict[str, dict]  # by part and name, such as "first 124M graph"


# ---------------------------------------------------------------------------------------------------------------------
# Figures that have a goal


@dataclass(frozen=True)
class Line:
    """A figure beside its goal."""

    what: str
    value: float | None  # None: not measured
    goal: float
    unit: str = ""
    most: bool = False  # whether the goal is an upper bound
    part: str = ""  # of the step's time, as the profile of 124M names it

    @property
    def reached(self) -> float | None:
        """1 at the goal, less when behind it."""
        if not self.value:
            return None
        return self.goal / self.value if self.most else self.value / self.goal

    def cells(self) -> list[str]:
        bound = f"{'at most' if self.most else 'at least'} {self.goal:,g}{self.unit}"
        if self.reached is None:
            return [self.what, "not measured", bound, ""]
        verdict = "ahead" if self.reached >= 1 else f"behind: {self.reached:.2f} of the goal"
        return [self.what, f"{self.value:,.4g}{self.unit}", bound, verdict]


def lines(rows: Rows) -> Iterator[Line]:
    """Everything that has a goal. `rows`: without those that failed."""
    part = "attention, rotary"
    for name in ATTENTION:
        us = figures(rows.get(f"first {name}"))
        if name.endswith("T1024"):
            goal = 1.0 if "D64" in name else 0.95
            yield Line(f"{name}, forward, speed over SDPA cuDNN", ratio(us, "forward", "SDPA cuDNN"), goal, part=part)
            yield Line(f"{name}, forward, speed over SDPA flash", ratio(us, "forward", "SDPA flash"), 1.2, part=part)
        yield Line(f"{name}, backward, speed over SDPA flash", ratio(us, "backward", "SDPA flash"), 1.2, part=part)
    shares = figures(rows.get(f"first {NORM}"), "of_ceiling")
    for direction in ("forward", "backward"):
        what = f"add + RMSNorm {direction}, share of a copy's bandwidth"
        yield Line(what, shares.get((direction, "ours")), 0.9, part="norm, activation")
    loss, alone = rows.get(f"first {LOSS}"), "matrix products alone"
    over = ratio(figures(loss), "both", "ours", alone)
    yield Line("output layer and loss, time over that of their matrix products", over, 1.15, most=True, part="loss")
    over = ratio(figures(loss, "peak_mib"), "both", "ours", "eager")
    yield Line("output layer and loss, memory over eager", over, 0.25, most=True)
    for size in SIZES:
        yield from size_lines(size, steps_of(rows, size), device_of(rows).get("device", ""))


def size_lines(size: str, steps: dict[str, dict], device: str) -> Iterator[Line]:
    """Goals of a whole training step."""
    ours = [steps[kind] for kind in KINDS if kind in steps]
    theirs = [steps[kind] for kind in PEERS if kind in steps]
    speed = max((row["tokens_per_s"] for row in ours), default=None)
    if size == "124M":
        yield Line(size, speed, 550_000, " tokens/s")
    yield Line(f"{size}, MFU by nanoGPT's count", speed and mfu(size, speed, device)[0], MFU[size])
    over = speed and theirs and speed / max(row["tokens_per_s"] for row in theirs)
    yield Line(f"{size}, speed over nanoGPT compiled", over or None, 1.3)
    # Both with nanoGPT's sequences at once.
    lean = min(theirs, key=lambda row: row["peak_bytes"], default={"micro_batch": None})
    memory = steps.get("eager", {}).get("peak_bytes_at", {}).get(str(lean["micro_batch"]))
    yield Line(f"{size}, memory over nanoGPT's", memory and memory / lean["peak_bytes"], 0.5, most=True)


def figures(row: dict | None, key: str = "us") -> dict[tuple[str, str], float]:
    """Microseconds, or another figure, by (direction, who) of a case."""
    return {(one["direction"], one["who"]): one[key] for one in (row or {}).get("rows", []) if one.get(key)}


def ratio(by: dict, direction: str, above: str, below: str = "ours") -> float | None:
    pair = by.get((direction, above)), by.get((direction, below))
    return pair[0] / pair[1] if all(pair) else None


def steps_of(rows: Rows, size: str) -> dict[str, dict]:
    """The training steps of a size by kind; part second has some of part first again, beside nanoGPT's."""
    found = {}
    for part in ("first", "second", "sizes"):
        found |= {kind: rows[name] for kind in (*KINDS, *PEERS) if (name := f"{part} {size} {kind}") in rows}
    return found


def shape_of(size: str) -> Shape:
    width, layers, head, vocab, T = SIZES[size]
    return make_shape(width, layers, vocab_size=vocab, seq_len=T, head_size=head)


def mfu(size: str, speed: float, device: str) -> tuple[float, float] | tuple[None, None]:
    """(by nanoGPT's count, physical); None where the device's peak is not known."""
    shape, peak = shape_of(size), devices.peak_flops(device, "bfloat16")
    if peak is None:
        return None, None
    nanogpt_count = 6 * flops.count_params(shape).total + 12 * shape.layers * shape.width * shape.seq_len
    return nanogpt_count * speed / peak, flops.flops_per_token(shape) * speed / peak


def floor(size: str, ceilings: dict[str, float], device: str) -> dict[str, float]:
    """Milliseconds by part that a step needs at least, by the ledger and at the measured ceilings. The optimizer reads
    weight, gradient and two moments and writes all but the gradient: 28 bytes a parameter."""
    shape, known = shape_of(size), devices.find_device(device)
    vector = known.float32 if known else ceilings["flops"] / 1e12 / 15  # TFLOP/s without matrix units
    limits = devices.Device("", None, ceilings["flops"] / 1e12, None, vector, ceilings["bytes"] / 1e9)
    sequences = STEP_TOKENS // shape.seq_len
    ms = {r.operation: 1e3 * flops.floor_seconds(r, sequences, limits, "bfloat16") for r in flops.ledger(shape)}
    found = {part: sum(ms.get(operation, 0.0) for operation in names) for part, names in PARTS_OF_LEDGER.items()}
    return found | {"optimizer": 1e3 * 28 * flops.count_params(shape).total / ceilings["bytes"]}


def to_change_first(found: list[Line], split: dict[str, float]) -> list[tuple[float, str]]:
    """(share of a step's time that reaching the goal would save, what), the largest first. Of each part of the step,
    whose share the profile of 124M gives, the figure that is farthest from its goal."""
    saved: dict[str, tuple[float, str]] = {}
    for line in found:
        if line.part in split and line.reached is not None and line.reached < 1:
            # The goal of the loss is of a time that includes its products, which the profile counts as matmul.
            saved_of_part = (line.value - line.goal) / (line.value - 1) if line.most else 1 - line.reached
            gain = split[line.part] / sum(split.values()) * saved_of_part
            saved[line.part] = max(saved.get(line.part, (0.0, "")), (gain, line.what))
    return sorted(saved.values(), reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def markdown(rows: Rows, planned: list[str], dry: bool) -> str:
    """The page. `rows`: those that failed included; `planned`: all that there should be."""
    good = {name: row for name, row in rows.items() if "error" not in row}
    text = heading(good, dry)
    checks = [name for name in planned if name.startswith("first check ")]
    if checks:
        text.append(f"Kernels that agree with float64: {sum(name in good for name in checks)} of {len(checks)}.")
    found = list(lines(good))
    text += table("figure | measured | goal | ", [" | ".join(line.cells()) for line in found])
    text += training_steps(good)
    if split := good.get("first 124M eager", {}).get("split_ms"):
        text += ["", "What to change first, by the share of a step of 124M that reaching the goal would save:", ""]
        text += [f"- {gain:.1%}: {what}" for gain, what in to_change_first(found, split)] or ["- nothing is behind"]
    cases = [
        f"{name} | {one['direction']} | {one['who']} | {one['us']:.1f} | {one['of_ceiling']:.2f}"
        for name, row in good.items()
        for one in row.get("rows", [])
        if "us" in one
    ]
    text += table("case | direction | who | us | share of the ceiling", cases)
    if law := json.loads(good.get("sweep quick", {}).get("files", {}).get("laws.json", "{}")).get("approach2"):
        text += ["", f"sweeps/quick.toml: a = {law['a']:.3f}, 95% {law.get('a_ci')}, by Approach 2."]
    faster = [
        f"{name.removeprefix('tiles ')} {one['what']} | {one['best']} | {one['gain']:.2f}x"
        for name, row in good.items()
        for one in row.get("tiles", [])
        if one.get("gain", 0) > 1.02
    ]
    text += table("tiles that are faster than the shipped ones | which | gain", faster)
    errors = {name: rows.get(name, {}).get("error", "not measured") for name in planned if name not in good}
    failed = [f"{name} | {error.replace('|', '/')}" for name, error in errors.items()]
    text += table("rows that failed or are missing | why", failed)
    return "\n".join(text) + "\n"


def table(heading: str, rows: list[str]) -> list[str]:
    """Lines of Markdown; none without rows."""
    rule = "|---" * (heading.count("|") + 1) + "|"
    return ["", f"| {heading} |", rule, *(f"| {row} |" for row in rows)] if rows else []


def training_steps(good: Rows) -> list[str]:
    """Speed and memory of each size and kind, and where the time of our eager steps goes."""
    device, ceilings = device_of(good).get("device", ""), good.get("first ceilings")
    speeds, splits, parts = [], [], []
    for size in SIZES:
        steps = steps_of(good, size)
        for kind, row in steps.items():
            shares = " | ".join(f"{share:.1%}" if share else "-" for share in mfu(size, row["tokens_per_s"], device))
            speeds.append(
                f"{size} {kind} | {row['tokens_per_s']:,.0f} | {row['ms']:.1f} | {shares} | {row['micro_batch']} | "
                f"{row['peak_bytes'] / 2**30:.1f} | {row['first_steps_seconds']:.0f} | {row['losses'][-1]:.4f}"
            )
        if split := steps.get("eager", {}).get("split_ms"):
            parts, busy = list(split), sum(split.values())
            least = floor(size, ceilings, device) if ceilings else {}
            cells = [f"{ms:.2f} ({least.get(part, 0):.2f})" for part, ms in split.items()]
            cells += [f"{steps[kind]['ms'] - busy:.2f}" if kind in steps else "-" for kind in ("eager", "graph")]
            splits.append(" | ".join([size, *cells]))
    heading = "step | tokens/s | ms | MFU by nanoGPT's count | physical | sequences at once | peak GiB | "
    text = table(heading + "first steps, s | loss of the last of these", speeds)
    heading = ["ms of the device by part (in brackets the floor)", *parts, "gaps, eager", "gaps, graph"]
    return text + table(" | ".join(heading), splits)


def device_of(rows: Rows) -> dict:
    """The row that names the device, of whichever part has it."""
    return next((row for name, row in rows.items() if name.endswith(" device") and "device" in row), {})


def heading(good: Rows, dry: bool) -> list[str]:
    about = device_of(good)
    versions = {"torch": "?", "triton": "?", "git": "?"} | about.get("versions", {})
    text = [f"# Measured on {about.get('device', 'a device that no row names')}", ""]
    text += ["**A dry run on a CPU: these numbers mean nothing.**", ""] if dry else []
    text += [
        f"`bench/gpu_check.sh`, torch {versions['torch']}, Triton {versions['triton']}, driver "
        f"{about.get('driver', '?')}, commit {versions['git']}.",
        "",
    ]
    if ceilings := good.get("first ceilings"):
        product, copy = ceilings["flops"] / 1e12, ceilings["bytes"] / 1e9
        text.append(f"Ceilings: {product:.0f} TFLOP/s (matrix product), {copy:.0f} GB/s (copy).")
    return text


@dataclass(frozen=True)
class Options:
    folder: str = opt(None, "where bench/gpu_check.sh left its rows", positional=True)


def main() -> None:
    options = parse(Options, prog="python -m bench.gpu_table", description=__doc__)
    folder = Path(options.folder)
    rows, planned = {}, []
    for part, plan in PARTS.items():
        found = Kept(folder / f"{part}.jsonl", dry=False).read()
        if found:
            rows |= {f"{part} {name}": row for name, row in found.items()}
            planned += [f"{part} {row.name}" for row in plan(Place(folder, 4.0, nanogpt="as planned"))]
    if not rows:
        raise UserError(f"{folder}: no rows of bench/gpu_check.sh there")
    dry = any(row["dry"] for row in rows.values())
    text = markdown(rows, planned, dry)
    print(text)
    if not dry:
        device = device_of(rows).get("device", "a GPU").replace(" ", "_")
        (RESULTS / f"gpu_check_{device}.md").write_text(text)


if __name__ == "__main__":
    run_command(main, "python -m bench.gpu_table")
