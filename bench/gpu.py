"""The whole training step on one GPU beside nanoGPT's, in one call of under nine minutes.

    python -m bench.gpu --nanogpt ~/nanoGPT    writes bench/results/gpu_<device>.json and .md
    python -m bench.gpu --dry-run              the same code on tiny shapes on a CPU: its times mean nothing

For every size ours in each kind of step and nanoGPT's model and step compiled with either kernel for attention, each in
a process of its own that takes turns with the others; then where the time of our step goes, beside what the device's
measured matrix product and copy would need. What fails is a row with its error's text; what is not timed by the
deadline says so. All processes load torch before anything is timed and those of a size compile at the same time, so
their seconds until they are ready are those of a busy host.

A step is STEP_TOKENS tokens, accumulated over micro-batches as large as fit. MFU is against the published dense
peak; "nanoGPT's count" is 6 N + 12 L C T a token with N = all parameters but position embeddings, "physical" what runs
(nanochin/flops.py), attention in full in both.

On a new kind of GPU begin with bench/gpu_check.sh (bench/README.md), which runs this after what takes less time.
"""

import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.common import Worker
from nanochin import flops
from nanochin.config import UserError, make_shape, opt, parse, run_command
from nanochin.console import count

RESULTS = Path(__file__).resolve().parent / "results"
STEP_TOKENS = 65_536  # of a step, accumulated where memory does not hold them at once; beyond, no kernel gets faster
# width, layers, head size, vocabulary, context
SIZES = {
    "124M": (768, 12, 64, 50304, 1024),
    "50M": (640, 8, 64, 16384, 1024),
    "10M": (320, 6, 64, 8192, 512),
    "350M": (1024, 24, 64, 50304, 1024),
}
LAYERS = 18  # how many take as long to compile as the rest of a size does: a guess, by which sizes share their time
TURNS, SPLIT = 30.0, 10.0  # seconds for what follows once a size's variants are ready, and of them for its profile
LATE = "not timed: out of time"
# On an H100: nanoGPT's count of the peak, ours over nanoGPT's best, our memory over nanoGPT's at the same micro-batch.
TARGETS = {"124M": 0.47, "350M": 0.47, "50M": 0.40, "10M": 0.30}
FASTER, LEANER = 1.3, 0.5


@dataclass(frozen=True)
class Options:
    nanogpt: str | None = opt(None, "a checkout of karpathy/nanoGPT to time in turns with ours")
    minutes: float = opt(8.5, "what is not timed by then is left out, with a note", above=0)
    sizes: tuple[str, ...] = opt(tuple(SIZES), f"which of {', '.join(SIZES)}")
    out: str = opt(str(RESULTS), "folder of the JSON and the table")
    dry_run: bool = opt(False, "tiny shapes on the CPU: whether this command works, no more")


@dataclass(frozen=True)
class Bench:
    """What all parts share. Times are on time.monotonic()."""

    options: Options
    start: float
    sizes: dict[str, tuple[int, ...]]
    ceilings: dict[str, float]  # FLOP/s of a product, bytes/s of a copy, as measured
    peak: float | None  # FLOP/s, published
    device: str  # its name

    def left(self) -> float:
        """Seconds until all has to be timed."""
        return self.start + 60 * self.options.minutes - time.monotonic()

    def sequences(self, size: str) -> tuple[int, int]:
        """Of a step, and at once at most."""
        return (4, 2) if self.options.dry_run else 2 * (STEP_TOKENS // self.sizes[size][-1],)

    def worker(self, **spec) -> Worker:
        dry = self.options.dry_run
        spec |= {"module": "bench.gpu_worker", "dry": dry, "dtype": "float32" if dry else "bfloat16"}
        return Worker("bench.common", spec)

    def seconds(self, seconds: float) -> float:
        return 0.01 if self.options.dry_run else seconds

    @property
    def patience(self) -> float:
        """Seconds that a worker may take to answer what takes few."""
        return 600.0 if self.options.dry_run else 60.0


def close(workers: list[Worker]) -> None:
    """End them, so that the device's memory is free."""
    for worker in workers:
        worker.let_go()  # all at once: each takes a second or two to give back its context
    for worker in workers:
        worker.close(10)


def hear(worker: Worker, timeout: float) -> dict:
    """Its answer, or {"error": text}, after which it has ended."""
    try:
        answer = worker.hear(timeout)
    except (UserError, TimeoutError) as error:
        worker.close(0)
        answer = {"error": f"{type(error).__name__}: {error}"}
    return answer


def ask(worker: Worker, timeout: float, do: str, **arguments) -> dict:
    worker.tell({"do": do, **arguments})
    return hear(worker, timeout)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def start_size(bench: Bench, name: str) -> tuple[list[dict], list[Worker]]:
    """A row and a worker for each variant; the workers load torch and wait."""
    variants = [{"who": "nanochin", "kind": kind} for kind in ("graph", "eager", "compile")]
    if bench.options.nanogpt:
        variants += [{"who": "nanoGPT", "kind": "compile", "sdpa": sdpa} for sdpa in ("flash", "cudnn")]
    sequences, most = bench.sequences(name)
    spec = {
        "shape": bench.sizes[name],
        "sequences": sequences,
        "most": most,
        "others": len(variants) - 1,
        "nanogpt": bench.options.nanogpt,
    }
    return [{"size": name} | variant for variant in variants], [bench.worker(**spec, **v) for v in variants]


def time_for(bench: Bench, names: list[str]) -> float:
    """Seconds for the first of the sizes that are still to come: its share of what is left goes by its layers, as
    compiling does, so that no size takes the time of another one."""
    weights = [LAYERS + bench.sizes[name][1] for name in names]
    return bench.left() * weights[0] / sum(weights)


def run_size(bench: Bench, name: str, rows: list[dict], workers: list[Worker], until: float) -> dict:
    """Fills the rows by `until`, on time.monotonic(); returns the split of our step's time. A variant that is not
    ready in time for its turn is an error, and the others are timed."""

    def left() -> float:
        return until - time.monotonic()

    size = bench.sizes[name]
    tokens = bench.sequences(name)[0] * size[-1]
    if left() < bench.seconds(20):
        for row in rows:
            row["error"] = LATE
        return {}
    ready = max(1.0, left() - bench.seconds(TURNS))
    # What compiles does so while the others take their first steps, one after the other: a recording that finds the
    # memory in another's hands breaks off, and with torch before 2.12 its process cannot make another one.
    both = list(zip(workers, rows, strict=True))
    for worker, row in sorted(both, key=lambda pair: pair[1]["kind"] != "compile"):
        worker.tell({"do": "warm", "patience": 0.7 * ready})
        if row["kind"] != "compile":
            row |= hear(worker, max(1.0, left() - bench.seconds(TURNS)))
    for worker, row in both:
        if row["kind"] == "compile":
            row |= hear(worker, max(1.0, left() - bench.seconds(TURNS)))
    turns = [[] for _ in rows]
    for _ in range(1 if bench.options.dry_run else 2):
        for worker, row, got in zip(workers, rows, turns, strict=True):
            if "error" not in row and left() > bench.seconds(SPLIT):
                answer = ask(worker, bench.patience, "turn", seconds=bench.seconds(1.0))
                row |= {key: value for key, value in answer.items() if key != "seconds"}
                got += answer.get("seconds", [])
    for row, seconds in zip(rows, turns, strict=True):
        finish_row(bench, row, seconds, size, tokens)
    compare(rows)  # and again with memory at the same micro-batch, which may come too late
    split = more_of_ours(bench, name, rows, workers) if left() > 0 else {}
    compare(rows)
    return split


def finish_row(bench: Bench, row: dict, seconds: list[float], size: tuple[int, ...], tokens: int) -> None:
    """Speed, MFU and compile seconds of the blocks of steps that were timed."""
    if not seconds:
        row.setdefault("error", LATE)
        return
    width, layers, head, vocab, T = size
    shape = make_shape(width, layers, vocab_size=vocab, seq_len=T, head_size=head)
    median = statistics.median(seconds)
    speed = tokens / median
    nanogpt_count = 6 * flops.count_params(shape).total + 12 * layers * width * T
    row |= {
        "ms": 1e3 * median,
        "ms_min": 1e3 * min(seconds),
        "ms_max": 1e3 * max(seconds),
        "tokens_per_s": speed,
        "mfu_nanogpt_count": bench.peak and nanogpt_count * speed / bench.peak,
        "mfu_physical": bench.peak and flops.flops_per_token(shape) * speed / bench.peak,
        "compile_seconds": max(0.0, row["first_steps_seconds"] - 5 * median),
    }


def more_of_ours(bench: Bench, name: str, rows: list[dict], workers: list[Worker]) -> dict:
    """The memory of our eager step at nanoGPT's micro-batch, into its row; returns where its time goes."""
    index = next(i for i, row in enumerate(rows) if (row["who"], row["kind"]) == ("nanochin", "eager"))
    row, worker = rows[index], workers[index]
    if "error" in row:
        return {}
    theirs = [r["micro_batch"] for r in rows if r["who"] == "nanoGPT" and "error" not in r]
    if theirs:
        answer = ask(worker, bench.patience, "memory_at", micro_batch=min(theirs))
        row["peak_bytes_at_theirs"] = answer.get("peak_bytes")
        if "error" in answer:
            row["note"] = answer["error"]
    answer = ask(worker, bench.patience, "profile")
    if "error" in answer:
        return {"size": name, **answer}
    graph = next((r["ms"] for r in rows if r["kind"] == "graph" and "ms" in r), None)
    busy = sum(answer["split_ms"].values())
    return {
        "size": name,
        "split_ms": answer["split_ms"],
        "floor_ms": floor(bench, name),
        "gap_eager_ms": answer["wall_ms"] - busy,
        "gap_graph_ms": graph and graph - busy,
    }


def compare(rows: list[dict]) -> None:
    """Ours over nanoGPT's fastest variant, in speed, and in memory at the same micro-batch."""
    theirs = [row for row in rows if row["who"] == "nanoGPT" and "tokens_per_s" in row]
    if not theirs:
        return
    best = max(theirs, key=lambda row: row["tokens_per_s"])
    lean = min(theirs, key=lambda row: row["micro_batch"])
    for row in rows:
        if row["who"] == "nanochin" and "tokens_per_s" in row:
            row["times_nanogpt"] = row["tokens_per_s"] / best["tokens_per_s"]
        if row.get("peak_bytes_at_theirs"):
            row["memory_over_nanogpt"] = row["peak_bytes_at_theirs"] / lean["peak_bytes"]


PARTS_OF_LEDGER = {
    "matmul": ("qkv", "output projection", "feed-forward", "logits"),
    "attention, rotary": ("rotary, qk-norm", "attention scores", "softmax", "attention values"),
    "norm, activation": ("activation", "norms, residuals", "biases"),
    "loss": ("loss",),
}


def floor(bench: Bench, name: str) -> dict[str, float]:
    """Milliseconds that a step needs at least, by the ledger and at the measured ceilings. The optimizer reads weight,
    gradient and two moments and writes all but the gradient: 28 bytes a parameter."""
    width, layers, head, vocab, T = bench.sizes[name]
    shape = make_shape(width, layers, vocab_size=vocab, seq_len=T, head_size=head)
    known = flops.find_device(bench.device)
    vector = known.float32 if known else bench.ceilings["flops"] / 1e12 / 15  # TFLOP/s without matrix units
    device = flops.Device("", None, bench.ceilings["flops"] / 1e12, None, vector, bench.ceilings["bytes"] / 1e9)
    sequences, _ = bench.sequences(name)
    floors = {
        row.operation: 1e3 * flops.floor_seconds(row, sequences, device, "bfloat16") for row in flops.ledger(shape)
    }
    found = {part: sum(floors.get(row, 0.0) for row in rows) for part, rows in PARTS_OF_LEDGER.items()}
    found["optimizer"] = 1e3 * 28 * flops.count_params(shape).total / bench.ceilings["bytes"]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def table(heading: str, rows: list[list[str]]) -> list[str]:
    names = heading.split(" | ")
    return ["", f"| {heading} |", "|" + "---|" * len(names), *(f"| {' | '.join(row)} |" for row in rows)]


def cell(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    return "" if value is None else f"{value * scale:.{digits}f}"


def failed(row: dict) -> str:
    return row["error"].replace("|", "/")


def markdown(record: dict) -> str:
    about = record["about"]
    ceilings = about["ceilings"]
    lines = [
        f"# The training step on {about['device']}",
        "",
        f"`{about['command']}`, {about['date']}, torch {about['versions']['torch']}, "
        f"Triton {about['versions']['triton']}, {about['dtype']}, commit {about['versions']['git']}.",
        f"Ceilings measured in this run: {ceilings['flops'] / 1e12:.0f} TFLOP/s (matrix product), "
        f"{ceilings['bytes'] / 1e9:.0f} GB/s (copy). MFU against {count(about['peak'] or math.nan)}FLOP/s as "
        "published, by nanoGPT's count (6 N + 12 L C T) and the physical one.",
        f"Medians of blocks of steps of {STEP_TOKENS} tokens; x nanoGPT: our speed over its fastest variant's.",
    ]
    rows = []
    for row in record.get("sizes", []):
        who = f"{row['who']} {row['kind']}" + (f", {row['sdpa']}" if "sdpa" in row else "")
        if "error" in row:
            rows.append([row["size"], who, failed(row), *[""] * 8])
            continue
        rows.append([row["size"], who, count(row["tokens_per_s"]), cell(row["ms"]),
                     cell(row["mfu_nanogpt_count"], 1, 100), cell(row["mfu_physical"], 1, 100),
                     str(row["micro_batch"]), cell(row["peak_bytes"], 1, 2**-30), cell(row["compile_seconds"]),
                     cell(row["ready_seconds"]), cell(row.get("times_nanogpt"), 2)])  # fmt: skip
    if rows:
        lines += ["", "## Sizes"]
        lines += table(
            "size | who | tokens/s | ms | MFU % nanoGPT's | MFU % physical | sequences at once | peak GiB | "
            "compile s | ready after s | x nanoGPT",
            rows,
        )
        if any(row["who"] == "nanoGPT" for row in record["sizes"]):
            lines += [
                "",
                "nanoGPT's sequences at once are as many as its step holds uncompiled; compiled, as it is "
                "timed, it may hold more.",
            ]
        lines += ["", *targets(record["sizes"])]
    lines += [
        f"- {split['size']}, where its time goes: {failed(split)}"
        for split in record.get("splits", [])
        if "error" in split
    ]
    if splits := [split for split in record.get("splits", []) if "split_ms" in split]:
        lines += ["", "## Where our step's time goes, ms of the device; in brackets the floor"]
        parts = list(splits[0]["split_ms"])
        rows = [
            [
                split["size"],
                *(
                    f"{cell(split['split_ms'][part], 2)} ({cell(split['floor_ms'].get(part), 2) or '-'})"
                    for part in parts
                ),
                cell(split["gap_eager_ms"], 2),
                cell(split["gap_graph_ms"], 2),
            ]
            for split in splits
        ]
        lines += table(f"size | {' | '.join(parts)} | gaps, eager | gaps, graph", rows)
    return "\n".join(lines) + "\n"


def targets(rows: list[dict]) -> list[str]:
    """What the step is meant to reach on one H100, beside what it did."""
    lines = []
    for name in dict.fromkeys(row["size"] for row in rows):
        ours = [row for row in rows if row["size"] == name and row["who"] == "nanochin" and "tokens_per_s" in row]
        if name not in TARGETS or not ours:
            continue
        best = max(ours, key=lambda row: row["tokens_per_s"])
        memory = next((row["memory_over_nanogpt"] for row in ours if row.get("memory_over_nanogpt")), None)
        mfu = best["mfu_nanogpt_count"]
        faster = cell(best.get("times_nanogpt"), 2) or "-"
        lines.append(
            f"- {name}: fastest is {best['kind']}; MFU by nanoGPT's count {cell(mfu, 1, 100) or '-'}% (goal "
            f"{TARGETS[name]:.0%}), {faster}x nanoGPT (goal {FASTER}), memory {cell(memory, 2) or '-'}x "
            f"nanoGPT's at its micro-batch (goal {LEANER} at V 50k)"
        )
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Command


def main() -> None:
    options = parse(Options, prog="python -m bench.gpu", description=__doc__)
    start = time.monotonic()
    if unknown := set(options.sizes) - set(SIZES):
        raise UserError(f"--sizes {sorted(unknown)[0]}: choose from {', '.join(SIZES)}")
    if options.nanogpt and not (Path(options.nanogpt) / "model.py").exists():
        raise UserError(f"--nanogpt {options.nanogpt}: no model.py there; name a checkout of karpathy/nanoGPT")
    import torch

    from bench import kernels as kernel_bench
    from nanochin.files import versions

    if not options.dry_run and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here, so there is nothing to time (--dry-run runs the code)")
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", 0)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(0) if cuda else "a CPU: these times mean nothing"
    dtype = torch.bfloat16 if cuda else torch.float32
    ceilings = kernel_bench.ceilings(kernel_bench.Bench(device, dtype, options.dry_run, math.inf, 0))
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else 0
    if cuda:
        torch.cuda.empty_cache()
    sizes = {key: SIZES[key] for key in options.sizes} if cuda else {"tiny": (32, 1, 16, 64, 16)}
    peak = flops.peak_flops(name, "bfloat16") if cuda else ceilings["flops"]
    bench = Bench(options, start, sizes, ceilings, peak, name)
    # All processes load torch now, before anything is timed.
    started = {size: start_size(bench, size) for size in bench.sizes}
    record = {
        "about": {
            "command": " ".join(["python -m bench.gpu", *sys.argv[1:]]),
            "device": name,
            "date": time.strftime("%Y-%m-%d"),
            "dtype": str(dtype).split(".")[1],
            "ceilings": ceilings,
            "peak": peak,
            "memory_bytes": memory,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "versions": versions(),
            "cuda": torch.version.cuda,
        },
        "sizes": [],
        "splits": [],
    }

    def keep() -> None:
        """What is known so far; of a dry run only where a folder is named."""
        if cuda or options.out != str(RESULTS):
            path = Path(options.out) / f"gpu_{name.replace(' ', '_')}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
            path.with_suffix(".md").write_text(markdown(record))

    def say(what: str) -> None:
        print(f"{time.monotonic() - start:4.0f} s  {what}", file=sys.stderr, flush=True)
        keep()

    for i, (size, (rows, workers)) in enumerate(started.items()):
        record["sizes"] += rows
        try:
            split = run_size(bench, size, rows, workers, time.monotonic() + time_for(bench, list(started)[i:]))
        finally:  # also if interrupted
            for row in rows:
                if "tokens_per_s" not in row:
                    row.setdefault("error", LATE)
            keep()
        close(workers)
        record["splits"] += [split] if split else []
        say(f"size {size}")
    record["about"]["seconds"] = time.monotonic() - start
    keep()
    print(markdown(record))


if __name__ == "__main__":
    run_command(main, "python -m bench.gpu")
