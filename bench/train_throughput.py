"""Training speed of named shapes, ours and optionally nanoGPT's, side by side in one run.

    python -m bench.train_throughput                                     ours, eager
    python -m bench.train_throughput --nanogpt ~/nanoGPT --compile both  with every variant of that checkout

Each variant is a process of its own (so its peak memory is its own); rounds alternate between them, so that a
machine that changes its speed changes it for all. What is timed is a whole step: forward, backward, clip, AdamW, loss
read. Quote the ratios: they are of medians within this one run.
"""

import json
import resource
import statistics
import time
from dataclasses import asdict, dataclass

from bench.common import Worker, messages, nanogpt_folder, write_report
from nanochin.base.cli import opt, parse, run_command
from nanochin.base.console import count, format_columns
from nanochin.config import Shape, make_shape
from nanochin.plan.flops import flops_per_token

# name: width, layers, head size, vocabulary, context, sequences a step. S and M are nanoGPT-like with a vocabulary of
# 4096; t64 and t96 are as wide and deep as the default run on a CPU and a neighbour of it on the ladder, with fewer
# heads.
SHAPES = {
    "S": (128, 4, 32, 4096, 256, 12),
    "M": (384, 6, 64, 4096, 256, 12),
    "t64": (64, 3, 64, 256, 256, 16),
    "t96": (96, 2, 48, 256, 256, 15),
}


def shape_of(name: str) -> Shape:
    width, layers, head, vocab, T, _ = SHAPES[name]
    return make_shape(width, layers, vocab_size=vocab, seq_len=T, head_size=head)


@dataclass(frozen=True)
class Options:
    shapes: tuple[str, ...] = opt(("S", "M"), "what to train", choices=tuple(SHAPES))
    nanogpt: str | None = opt(None, "a checkout of karpathy/nanoGPT to time in turns with ours")
    compile: str = opt("false", "our model eager, compiled, or both", choices=("false", "true", "both"))
    threads: int = opt(2, "CPU threads", low=1)
    rounds: int = opt(6, "turns that each variant takes", low=1)
    steps: int = opt(3, "steps a turn", low=1)
    json: str | None = opt(None, "write the results to this file, and a table beside it (.md)")
    worker: str | None = opt(None, "internal: run one variant, told by JSON, and time steps on demand")


def work(spec: dict) -> None:
    """Build the model and optimizer of a variant, then time as many steps as each message asks for."""
    if not spec["nanogpt"]:
        import train  # noqa: F401  first, since it says how torch's threads shall wait
    import torch

    from bench.steps import NanoGPT, our_step
    from nanochin.run.device import keep_freed_memory

    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    shape, sequences = shape_of(spec["shape"]), SHAPES[spec["shape"]][-1]
    batch = torch.randint(shape.vocab_size, (sequences, shape.seq_len + 1))
    place = torch.device("cpu"), getattr(torch, spec["dtype"])
    if spec["nanogpt"]:
        step = NanoGPT(spec["nanogpt"], shape, sequences, *place)
        if spec["compile"]:
            step.forward = torch.compile(step.model)
    else:
        keep_freed_memory()
        step = our_step("compile" if spec["compile"] else "eager", shape, sequences, *place)
    for steps, answer in messages():
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            loss = step(batch, 1e-3)[0].item()
            seconds.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer({"seconds": seconds, "peak_bytes": peak, "loss": loss})


def variants(options: Options, fast_bf16: bool) -> list[dict]:
    """Ours, then nanoGPT's: float32 and (where the CPU multiplies bf16 fast) bf16, eager and compiled."""
    dtypes = ["float32", "bfloat16"] if fast_bf16 else ["float32"]
    whose = {None: {"false": [False], "true": [True], "both": [False, True]}[options.compile]}
    if options.nanogpt:
        whose[nanogpt_folder(options.nanogpt)] = [False, True]
    return [
        {"nanogpt": checkout, "dtype": dtype, "compile": compiled, "threads": options.threads}
        for checkout, kinds in whose.items()
        for dtype in dtypes
        for compiled in kinds
    ]


def run_shape(name: str, specs: list[dict], rounds: int, steps: int) -> list[dict]:
    """Time every variant of a shape in turns; returns one row for each."""
    workers = [Worker("bench.train_throughput", spec | {"shape": name}) for spec in specs]
    for worker in workers:
        worker.ask(3)  # warm-up, compiling
    turns = [[worker.ask(steps) for worker in workers] for _ in range(rounds)]
    for worker in workers:
        worker.close()
    tokens, rows = SHAPES[name][-1] * shape_of(name).seq_len, []
    for spec, answers in zip(specs, zip(*turns, strict=True), strict=True):
        seconds = [s for answer in answers for s in answer["seconds"]]
        figures = {
            "ms": 1e3 * statistics.median(seconds),
            "ms_min": 1e3 * min(seconds),
            "tokens_per_s": tokens / statistics.median(seconds),
            "peak_mb": answers[-1]["peak_bytes"] / 1e6,
            "loss": answers[-1]["loss"],
        }
        who = "nanoGPT" if spec["nanogpt"] else "nanochin"
        rows.append({"shape": name, "who": who, "dtype": spec["dtype"], "compile": spec["compile"]} | figures)
    theirs = [row for row in rows if row["who"] == "nanoGPT"]
    for row in rows if theirs else []:
        best = max(theirs, key=lambda row: row["tokens_per_s"])
        row["speed_ratio"] = row["tokens_per_s"] / best["tokens_per_s"]
        row["memory_ratio"] = row["peak_mb"] / best["peak_mb"]
    return rows


def table(rows: list[dict], peak: float) -> str:
    lines = [["shape, variant", "ms/step", "min", "tokens/s", "MFU", "peak MB", "speed", "memory"]]
    for row in rows:
        how = f"{row['shape']} {row['who']} {row['dtype']} {'compiled' if row['compile'] else 'eager'}"
        ratios = [f"{row[key]:.2f}x" if key in row else "-" for key in ("speed_ratio", "memory_ratio")]
        mfu = flops_per_token(shape_of(row["shape"])) * row["tokens_per_s"] / peak
        numbers = [f"{row['ms']:.0f}", f"{row['ms_min']:.0f}", count(row["tokens_per_s"]), f"{mfu:.0%}"]
        lines.append([how, *numbers, f"{row['peak_mb']:.0f}", *ratios])
    return format_columns(lines)


def main() -> None:
    options = parse(Options, prog="python -m bench.train_throughput", description=__doc__)
    if options.worker:
        return work(json.loads(options.worker))
    import torch

    from nanochin.run.device import has_fast_bf16, peak_of

    torch.set_num_threads(options.threads)
    if not has_fast_bf16():
        print("bf16 is left out: this CPU has neither AMX nor AVX512-bf16 and only emulates it")
    peak, source = peak_of(torch.device("cpu"), torch.float32)
    specs, rows = variants(options, has_fast_bf16()), []
    for name in options.shapes:
        rows += run_shape(name, specs, options.rounds, options.steps)
    text = table(rows, peak)
    print(f"{text}\n\nspeed and memory are ratios to nanoGPT's fastest variant; {source}")
    if options.json:
        record = {"peak_flops": peak, "options": asdict(options), "rows": rows}
        write_report(options.json, "bench.train_throughput", f"{options.threads} threads", text, record)


if __name__ == "__main__":
    run_command(main, "python -m bench.train_throughput")
