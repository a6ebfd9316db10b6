"""The rows of bench/gpu_check.sh beside their goals, and what to change first.

python -m bench.gpu_table DIR      prints the table; of real rows also writes bench/results/gpu_check_DEVICE.md
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.gpu_check import ATTENTION, PARTS, Kept, Place, plan
from nanochin.config import UserError, opt, parse, run_command

RESULTS = Path(__file__).resolve().parent / "results"
MFU = {"10M": 0.30, "50M": 0.40, "350M": 0.47}  # by nanoGPT's count


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


def lines(rows: dict[str, dict]) -> Iterator[Line]:
    """Everything that has a goal. `rows`: by part and name, without those that failed."""
    for shape in ATTENTION:
        D, T, *_ = shape.split()
        us = times(rows.get(f"first attention {shape}"))
        if T == "T1024":
            yield Line(
                f"attention forward {D} {T}, speed over SDPA cuDNN",
                ratio(us, "forward", "SDPA cuDNN", "ours"),
                1.0 if D == "D64" else 0.95,
                part="attention, rotary",
            )
        yield Line(
            f"attention backward {D} {T}, speed over SDPA flash",
            ratio(us, "backward", "SDPA flash", "ours"),
            1.2,
            part="attention, rotary",
        )
    norm = rows.get("first add_rms_norm C768 65536 tokens", {}).get("rows", [])
    for direction in ("forward", "backward"):
        shares = [row["of_ceiling"] for row in norm if (row["direction"], row["who"]) == (direction, "ours")]
        yield Line(
            f"add + RMSNorm {direction}, share of a copy's bandwidth",
            shares[0] if shares else None,
            0.9,
            part="norm, activation",
        )
    us = times(rows.get("first linear_cross_entropy C768 V50257 16384 tokens"))
    yield Line(
        "output layer and loss, time over that of their matrix products",
        ratio(us, "both", "ours", "matrix products alone"),
        1.15,
        most=True,
        part="loss",
    )
    beside = sizes_of(rows.get("second 124M")) or sizes_of(rows.get("second 124M without nanoGPT"))
    speeds = [rows.get(f"first 124M {kind}", {}).get("tokens_per_s", 0) for kind in ("graph", "eager")]
    speeds += [row.get("tokens_per_s", 0) for row in beside if row["who"] == "nanochin"]
    yield Line("124M", max(speeds) or None, 550_000, " tokens/s")
    yield Line("124M, speed over nanoGPT compiled", best(beside, "times_nanogpt", max), 1.3)
    yield Line("124M, memory over nanoGPT's", best(beside, "memory_over_nanogpt", min), 0.5, most=True)
    for size, goal in MFU.items():
        mfu = best(sizes_of(rows.get(f"sizes {size}")), "mfu_nanogpt_count", max)
        yield Line(f"{size}, MFU by nanoGPT's count", mfu, goal)


def times(row: dict | None) -> dict[tuple[str, str], float]:
    """Microseconds by (direction, who) of a case."""
    return {(one["direction"], one["who"]): one["us"] for one in (row or {}).get("rows", []) if one["us"]}


def ratio(us: dict[tuple[str, str], float], direction: str, above: str, below: str) -> float | None:
    pair = us.get((direction, above)), us.get((direction, below))
    return pair[0] / pair[1] if all(pair) else None


def sizes_of(row: dict | None) -> list[dict]:
    """bench.gpu's rows."""
    return (row or {}).get("result", {}).get("sizes", [])


def best(rows: list[dict], name: str, of) -> float | None:
    found = [row[name] for row in rows if row["who"] == "nanochin" and row.get(name)]
    return of(found) if found else None


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


def markdown(rows: dict[str, dict], planned: list[str], dry: bool) -> str:
    """The page. `rows`: by part and name, those that failed included; `planned`: all that there should be."""
    good = {name: row for name, row in rows.items() if "error" not in row}
    text = heading(good, dry)
    checks = [name for name in planned if name.startswith("first check ")]
    if checks:
        text.append(f"Kernels that agree with float64: {sum(name in good for name in checks)} of {len(checks)}.")
    found = list(lines(good))
    text += ["", "| figure | measured | goal | |", "|---|---|---|---|"]
    text += [f"| {' | '.join(line.cells())} |" for line in found]
    for kind in ("graph", "eager"):
        if row := good.get(f"first 124M {kind}"):
            text += [
                "",
                f"124M by {kind}, 65,536 tokens a step: {row['ms']:.1f} ms, {row['tokens_per_s']:,.0f} "
                f"tokens/s, {row['peak_bytes'] / 2**30:.1f} GiB at most, loss {row['losses'][0]:.4f}, after "
                f"{len(row['losses'])} steps {row['losses'][-1]:.4f}.",
            ]
    if split := good.get("first 124M eager", {}).get("split_ms"):
        text += [
            "",
            "Milliseconds of the device by part: " + ", ".join(f"{name} {ms:.2f}" for name, ms in split.items()) + ".",
        ]
        text += ["", "What to change first, by the share of a step that reaching the goal would save:", ""]
        text += [f"- {gain:.1%}: {what}" for gain, what in to_change_first(found, split)] or ["- nothing is behind"]
    if law := good.get("sweep quick", {}).get("result", {}).get("approach2"):
        text += ["", f"sweeps/quick.toml: a = {law['a']:.3f}, 95% {law.get('a_ci')}, by Approach 2."]
    tuned = [one for row in good.values() for one in row.get("tiles", []) if one.get("gain", 0) > 1.02]
    if tuned:
        text += ["", "Tiles that are faster than the shipped ones:", ""]
        text += [f"- {one['what']}: {one['best']}, {one['gain']:.2f}x" for one in tuned]
    failed = [
        f"- {name}: {rows[name]['error'] if name in rows else 'not measured'}" for name in planned if name not in good
    ]
    text += ["", "Rows that failed or are missing:", "", *failed] if failed else []
    return "\n".join(text) + "\n"


def device_of(rows: dict[str, dict]) -> dict:
    """The row that names the device, of whichever part has it."""
    return next((row for name, row in rows.items() if name.endswith(" device") and "device" in row), {})


def heading(good: dict[str, dict], dry: bool) -> list[str]:
    about = device_of(good)
    versions = about.get("versions", {})
    text = [f"# Measured on {about.get('device', 'a device that no row names')}", ""]
    text += ["**A dry run on a CPU: these numbers mean nothing.**", ""] if dry else []
    text += [
        f"`bench/gpu_check.sh`, torch {versions.get('torch', '?')}, Triton {versions.get('triton', '?')}, driver "
        f"{about.get('driver', '?')}, commit {versions.get('git', '?')}.",
        "",
    ]
    if ceilings := good.get("first ceilings"):
        text += [
            f"Ceilings: {ceilings['flops'] / 1e12:.0f} TFLOP/s (matrix product), "
            f"{ceilings['bytes'] / 1e9:.0f} GB/s (copy)."
        ]
    return text


@dataclass(frozen=True)
class Options:
    folder: str = opt(None, "where bench/gpu_check.sh left its rows", positional=True)


def main() -> None:
    options = parse(Options, prog="python -m bench.gpu_table", description=__doc__)
    folder = Path(options.folder)
    rows, planned, dry = {}, [], False
    for part in PARTS:
        kept = Kept(folder / f"{part}.jsonl", dry=False)
        if not kept.path.exists():
            continue
        found = kept.read(any_kind=True)
        dry = dry or any(row["dry"] for row in found.values())
        rows |= {f"{part} {name}": row for name, row in found.items()}
        place = Place(folder, 4.0, nanogpt="as planned")
        planned += [f"{part} {row.name}" for row in plan(part, place) if row.do != "compile"]
    if not rows:
        raise UserError(f"{folder}: no rows of bench/gpu_check.sh there")
    text = markdown(rows, planned, dry)
    print(text)
    if not dry:
        device = device_of(rows).get("device", "a GPU").replace(" ", "_")
        (RESULTS / f"gpu_check_{device}.md").write_text(text)


if __name__ == "__main__":
    run_command(main, "python -m bench.gpu_table")
