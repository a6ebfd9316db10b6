"""Speed and memory of a training step on a CPU, ours and optionally nanoGPT's.

    python -m bench.train_throughput                                     ours, eager
    python -m bench.train_throughput --nanogpt ~/nanoGPT --compile       also compiled; nanoGPT's eager and compiled

Each variant has its own process, and rounds alternate between them, so that a change of the machine's speed affects
all. A step is forward, backward, clip, AdamW, loss read, in the dtype that train.py chooses. Quote the ratios to
nanoGPT's fastest variant, which are of medians within one run.
"""

import json
import resource
import statistics
import time
from dataclasses import dataclass

from bench.common import Worker, messages, save
from nanochin.base.cli import opt, parse, run_command
from nanochin.base.console import count, format_columns
from nanochin.config import make_shape

# (shape, sequences per step). S and M are like nanoGPT's; t96 is near the default run on a CPU, with fewer heads.
SHAPES = {
    "S": (make_shape(128, 4, vocab_size=4096, seq_len=256, head_size=32), 12),
    "M": (make_shape(384, 6, vocab_size=4096, seq_len=256, head_size=64), 12),
    "t96": (make_shape(96, 2, vocab_size=256, seq_len=256, head_size=48), 15),
}
HEADING = ["shape, variant", "ms/step", "min", "tokens/s", "peak MB", "speed", "memory"]


@dataclass(frozen=True)
class Options:
    shapes: tuple[str, ...] = opt(("S", "M"), "what to train", choices=tuple(SHAPES))
    nanogpt: str | None = opt(None, "a checkout of karpathy/nanoGPT to compare with")
    compile: bool = opt(False, "also our model compiled")
    threads: int = opt(2, "CPU threads", low=1)
    rounds: int = opt(6, "alternations", low=1)
    steps: int = opt(3, "steps per round", low=1)
    save: str | None = opt(None, "write the table to this Markdown file")
    worker: str | None = opt(None, "internal: run this variant (JSON) and time steps on demand")


def work(spec: dict) -> None:
    """Build the model and optimizer of a variant, then time as many steps as each message asks for."""
    if not spec["nanogpt"]:
        import train  # noqa: F401  first, since it sets how torch's threads wait
    import torch

    from bench.steps import NanoGPT, our_step
    from nanochin.run.device import keep_freed_memory, pick_dtype

    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    shape, sequences = SHAPES[spec["shape"]]
    batch = torch.randint(shape.vocab_size, (sequences, shape.seq_len + 1))
    cpu = torch.device("cpu")
    dtype, _ = pick_dtype(spec["dtype"], cpu, shape)
    if spec["nanogpt"]:
        step = NanoGPT(spec["nanogpt"], shape, sequences, cpu, dtype)
        if spec["compile"]:
            step.forward = torch.compile(step.model)
    else:
        keep_freed_memory()
        step = our_step("compile" if spec["compile"] else "eager", shape, sequences, cpu, dtype)
    for steps, answer in messages():
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            loss = step(batch, 1e-3)[0].item()
            seconds.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer({"seconds": seconds, "peak_bytes": peak, "loss": loss, "dtype": str(dtype).split(".")[1]})


def measure(name: str, options: Options) -> list[list[str]]:
    """The table's rows of a shape."""
    variants = {"nanochin eager": (None, False)} | ({"nanochin compiled": (None, True)} if options.compile else {})
    if options.nanogpt:
        variants |= {"nanoGPT eager": (options.nanogpt, False), "nanoGPT compiled": (options.nanogpt, True)}
    fixed = {"shape": name, "dtype": "auto", "threads": options.threads}
    workers = {
        who: Worker("bench.train_throughput", fixed | {"nanogpt": checkout, "compile": compiled})
        for who, (checkout, compiled) in variants.items()
    }
    for worker in workers.values():
        worker.ask(3)  # warm up, compile
    rounds = [{who: worker.ask(options.steps) for who, worker in workers.items()} for _ in range(options.rounds)]
    for worker in workers.values():
        worker.close()
    seconds = {who: [s for answers in rounds for s in answers[who]["seconds"]] for who in workers}
    medians = {who: statistics.median(times) for who, times in seconds.items()}
    peaks = {who: answer["peak_bytes"] for who, answer in rounds[-1].items()}
    best = min((who for who in workers if who.startswith("nanoGPT")), key=medians.get, default=None)
    shape, sequences = SHAPES[name]
    rows = []
    for who, median in medians.items():
        speed = count(sequences * shape.seq_len / median)
        numbers = [f"{1e3 * median:.0f}", f"{1e3 * min(seconds[who]):.0f}", speed, f"{peaks[who] / 1e6:.0f}"]
        ratios = [f"{medians[best] / median:.2f}x", f"{peaks[who] / peaks[best]:.2f}x"] if best else ["-", "-"]
        rows.append([f"{name} {who} {rounds[-1][who]['dtype']}", *numbers, *ratios])
    return rows


def main() -> None:
    options = parse(Options, prog="python -m bench.train_throughput", description=__doc__)
    if options.worker:
        return work(json.loads(options.worker))
    text = format_columns([HEADING, *(row for name in options.shapes for row in measure(name, options))])
    print(text)
    if options.save:
        note = f"{options.threads} threads; speed and memory are ratios to nanoGPT's fastest variant"
        save(options.save, "bench.train_throughput", note, text)


if __name__ == "__main__":
    run_command(main, "python -m bench.train_throughput")
