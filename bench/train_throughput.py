"""Speed and memory of a training step: ours, by one or several processes, and optionally nanoGPT's.

    python -m bench.train_throughput                                     ours, eager
    python -m bench.train_throughput --nanogpt ~/nanoGPT --compile       also compiled; nanoGPT's eager and compiled
    python -m bench.train_throughput --processes 1 2 --threads 1         by one process and by two, with the same batch
    python -m bench.train_throughput --device cuda --shapes 124M --processes 1 2 4 8         by CUDA graphs, on 8 GPUs

Each variant has its own processes, and rounds alternate between variants, so that a change of the machine's speed
affects all. A step is forward, backward, clip, AdamW, loss read, in the dtype that train.py chooses. Quote the ratios
to nanoGPT's fastest variant, or without one to the first, which are of medians within one run.
"""

import multiprocessing
import os
import resource
import socket
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

from bench.common import save
from bench.gpu_check import SIZES, STEP_TOKENS
from nanochin.base.cli import UserError, opt, parse, run_command
from nanochin.base.console import count, format_columns
from nanochin.config import make_shape

# (shape, sequences per step). S and M are like nanoGPT's; t96 is near the default run on a CPU, with fewer heads.
SHAPES = {
    "S": (make_shape(128, 4, vocab_size=4096, seq_len=256, head_size=32), 12),
    "M": (make_shape(384, 6, vocab_size=4096, seq_len=256, head_size=64), 12),
    "t96": (make_shape(96, 2, vocab_size=256, seq_len=256, head_size=48), 15),
    "124M": (SIZES["124M"], 512),
}
HEADING = ["shape, variant", "ms/step", "min", "tokens/s", "peak MB", "speed", "memory"]


@dataclass(frozen=True)
class Options:
    shapes: tuple[str, ...] = opt(("S", "M"), "what to train", choices=tuple(SHAPES))
    nanogpt: str | None = opt(None, "a checkout of karpathy/nanoGPT to compare with")
    compile: bool = opt(False, "also our model compiled")
    processes: tuple[int, ...] = opt((1,), "numbers of processes that train our model together", low=1)
    device: str = opt("cpu", "what runs the steps", choices=("cpu", "cuda"))
    threads: int = opt(2, "CPU threads of each process", low=1)
    rounds: int = opt(6, "alternations", low=1)
    steps: int = opt(3, "steps per round", low=1)
    save: str | None = opt(None, "write the table to this Markdown file")


@dataclass(frozen=True)
class Variant:
    kind: str
    nanogpt: str | None = None
    processes: int = 1

    def __str__(self) -> str:
        several = f", {self.processes} processes" * (self.processes > 1)
        return f"{'nanoGPT' if self.nanogpt else 'nanochin'} {self.kind}{several}"


def variants_of(options: Options) -> list[Variant]:
    kinds = ["eager" if options.device == "cpu" else "graph"] + ["compile"] * options.compile
    ours = [Variant(kind, processes=size) for kind in kinds for size in options.processes]
    return ours + [Variant(kind, options.nanogpt) for kind in ("eager", "compile") if options.nanogpt]


# ---------------------------------------------------------------------------------------------------------------------
# Processes that take steps when asked


def work(pipe: Connection, name: str, variant: Variant, options: Options, environment: dict[str, str]) -> None:
    """Build the model and optimizer, then time as many steps as each message asks for; 0 ends. Answers (seconds of
    each, peak memory in bytes, dtype)."""
    os.environ |= environment
    if not variant.nanogpt:
        import train  # noqa: F401  first, since it sets how torch's threads wait
    import torch

    from bench.steps import NanoGPT, our_step
    from nanochin.run import parallel
    from nanochin.run.device import keep_freed_memory, pick_device, pick_dtype

    with parallel.started():
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        (shape, sequences), device = SHAPES[name], pick_device(options.device)
        batch = torch.randint(shape.vocab_size, (len(parallel.share(sequences)), shape.seq_len + 1))
        dtype, _ = pick_dtype("auto", device, shape)
        if variant.nanogpt:
            step = NanoGPT(variant.nanogpt, shape, sequences, device, dtype)
            if variant.kind == "compile":
                step.forward = torch.compile(step.model)
        else:
            keep_freed_memory()
            step = our_step(variant.kind, shape, sequences, device, dtype)
        step.set_micro_batch(min(sequences, STEP_TOKENS // shape.seq_len))
        while steps := pipe.recv():
            seconds = []
            for _ in range(steps):
                start = time.perf_counter()
                step(batch, 1e-3)[0].item()
                seconds.append(time.perf_counter() - start)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            pipe.send((seconds, peak, str(dtype).removeprefix("torch.")))


def start(name: str, variant: Variant, options: Options) -> list[Connection]:
    """Pipes to the processes of a variant."""
    context, pipes, group = multiprocessing.get_context("spawn"), [], {}
    if variant.processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        group |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(variant.processes))
    for rank in range(variant.processes):
        here, there = context.Pipe()
        environment = group | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) if group else {}
        context.Process(target=work, args=(there, name, variant, options, environment), daemon=True).start()
        there.close()
        pipes.append(here)
    return pipes


def ask(pipes: list[Connection], steps: int) -> tuple[list[float], int, str]:
    """The first one's answer of processes that take steps together. Raises UserError if one has ended."""
    try:
        for pipe in pipes:
            pipe.send(steps)
        return [pipe.recv() for pipe in pipes][0]
    except (EOFError, OSError):
        raise UserError("the process of a variant ended early (see above)") from None


def measure(name: str, options: Options) -> list[list[str]]:
    """The table's rows of a shape."""
    groups = {variant: start(name, variant, options) for variant in variants_of(options)}
    for pipes in groups.values():
        ask(pipes, 5)  # warm up, compile, capture
    rounds = [{variant: ask(pipes, options.steps) for variant, pipes in groups.items()} for _ in range(options.rounds)]
    for pipe in sum(groups.values(), []):
        pipe.send(0)
    seconds = {variant: [s for answers in rounds for s in answers[variant][0]] for variant in groups}
    medians = {variant: statistics.median(times) for variant, times in seconds.items()}
    best = min((variant for variant in groups if variant.nanogpt), key=medians.get, default=next(iter(groups)))
    shape, sequences = SHAPES[name]
    rows = []
    for variant, (_, peak, dtype) in rounds[-1].items():
        median, speed = medians[variant], count(sequences * shape.seq_len / medians[variant])
        numbers = [f"{1e3 * median:.1f}", f"{1e3 * min(seconds[variant]):.1f}", speed, f"{peak / 1e6:.0f}"]
        ratios = [f"{medians[best] / median:.2f}x", f"{peak / rounds[-1][best][1]:.2f}x"]
        rows.append([f"{name} {variant} {dtype}", *numbers, *ratios])
    return rows


def main() -> None:
    options = parse(Options, prog="python -m bench.train_throughput", description=__doc__)
    text = format_columns([HEADING, *(row for name in options.shapes for row in measure(name, options))])
    print(text)
    if options.save:
        to = "nanoGPT's fastest variant" if options.nanogpt else "the first variant"
        note = f"{options.threads} threads per process; peak memory of the first process; ratios are to {to}"
        save(options.save, "bench.train_throughput", note, text)


if __name__ == "__main__":
    run_command(main, "python -m bench.train_throughput")
