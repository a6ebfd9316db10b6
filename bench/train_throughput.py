"""Speed and memory of a training step on a CPU, ours and optionally nanoGPT's.

    python -m bench.train_throughput                                     ours, eager
    python -m bench.train_throughput --nanogpt ~/nanoGPT --compile       also compiled; nanoGPT's eager and compiled

Each variant has its own process, and rounds alternate between them, so that a change of the machine's speed affects
all. A step is forward, backward, clip, AdamW, loss read, in the dtype that train.py chooses. Quote the ratios to
nanoGPT's fastest variant, which are of medians within one run.
"""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from bench.common import save
from nanochin.base.cli import UserError, opt, parse, run_command
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


def work(pipe: Connection, name: str, nanogpt: str | None, compiled: bool, threads: int) -> None:
    """Build the model and optimizer of a variant, then `serve` its steps."""
    if not nanogpt:
        import train  # noqa: F401  first, since it sets how torch's threads wait
    import torch

    from bench.steps import NanoGPT, our_step
    from nanochin.run.device import keep_freed_memory, pick_dtype

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shape, sequences = SHAPES[name]
    batch = torch.randint(shape.vocab_size, (sequences, shape.seq_len + 1))
    cpu = torch.device("cpu")
    dtype, _ = pick_dtype("auto", cpu, shape)
    if nanogpt:
        step = NanoGPT(nanogpt, shape, sequences, cpu, dtype)
        if compiled:
            step.forward = torch.compile(step.model)
    else:
        keep_freed_memory()
        step = our_step("compile" if compiled else "eager", shape, sequences, cpu, dtype)
    serve(pipe, lambda: step(batch, 1e-3)[0].item(), str(dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Processes that take steps when asked


def serve(pipe: Connection, step: Callable[[], object], dtype: str) -> None:
    """Time as many steps as each message asks for; 0 ends. Answers (seconds of each, peak memory in bytes, dtype)."""
    while steps := pipe.recv():
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, dtype))


def start(work: Callable, *arguments) -> Connection:
    """A pipe to a process that runs work(pipe, *arguments)."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=work, args=(there, *arguments), daemon=True).start()
    there.close()
    return here


def ask(group: list[Connection], steps: int) -> tuple[list[float], int, str]:
    """The first one's answer of processes that take steps together. Raises UserError if one has ended."""
    try:
        for pipe in group:
            pipe.send(steps)
        return [pipe.recv() for pipe in group][0]
    except (EOFError, OSError):
        raise UserError("the process of a variant ended early (see above)") from None


def alternate(groups: dict, rounds: int, steps: int) -> tuple[dict, dict]:
    """(seconds of all steps by group, last answers), `steps` of each group in turn. Ends the processes."""
    for group in groups.values():
        ask(group, 5)  # warm up, compile, capture
    answers = [{who: ask(group, steps) for who, group in groups.items()} for _ in range(rounds)]
    for pipe in sum(groups.values(), []):
        pipe.send(0)
    return {who: [s for answer in answers for s in answer[who][0]] for who in groups}, answers[-1]


# ---------------------------------------------------------------------------------------------------------------------
# The table


def measure(name: str, options: Options) -> list[list[str]]:
    """The table's rows of a shape."""
    variants = {"nanochin eager": (None, False)} | ({"nanochin compiled": (None, True)} if options.compile else {})
    if options.nanogpt:
        variants |= {"nanoGPT eager": (options.nanogpt, False), "nanoGPT compiled": (options.nanogpt, True)}
    groups = {who: [start(work, name, *variant, options.threads)] for who, variant in variants.items()}
    seconds, last = alternate(groups, options.rounds, options.steps)
    medians = {who: statistics.median(times) for who, times in seconds.items()}
    peaks, dtypes = ({who: answer[i] for who, answer in last.items()} for i in (1, 2))
    best = min((who for who in groups if who.startswith("nanoGPT")), key=medians.get, default=None)
    shape, sequences = SHAPES[name]
    rows = []
    for who, median in medians.items():
        speed = count(sequences * shape.seq_len / median)
        numbers = [f"{1e3 * median:.0f}", f"{1e3 * min(seconds[who]):.0f}", speed, f"{peaks[who] / 1e6:.0f}"]
        ratios = [f"{medians[best] / median:.2f}x", f"{peaks[who] / peaks[best]:.2f}x"] if best else ["-", "-"]
        rows.append([f"{name} {who} {dtypes[who].removeprefix('torch.')}", *numbers, *ratios])
    return rows


def main() -> None:
    options = parse(Options, prog="python -m bench.train_throughput", description=__doc__)
    text = format_columns([HEADING, *(row for name in options.shapes for row in measure(name, options))])
    print(text)
    if options.save:
        note = f"{options.threads} threads; speed and memory are ratios to nanoGPT's fastest variant"
        save(options.save, "bench.train_throughput", note, text)


if __name__ == "__main__":
    run_command(main, "python -m bench.train_throughput")
