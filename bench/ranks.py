"""Speed of one model on several devices against one, with the same batch.

    python -m bench.ranks                     1 and 2 processes of one CPU thread each
    python -m bench.ranks --device cuda       1, 2, 4, ... processes, up to the number of GPUs

Every number of processes has its own group, and rounds alternate between them, so that a change of the machine's speed
affects all. On a machine with one GPU the second is skipped.
"""

import os
import socket
import statistics
from dataclasses import dataclass
from multiprocessing.connection import Connection

from bench.common import save
from bench.gpu_check import SIZES
from bench.train_throughput import SHAPES, alternate, serve, start
from nanochin.base.cli import opt, parse, run_command
from nanochin.base.console import count, format_columns

SHAPES = SHAPES | {"124M": (SIZES["124M"], 512)}


@dataclass(frozen=True)
class Options:
    device: str = opt("cpu", "what runs the processes", choices=("cpu", "cuda"))
    shapes: tuple[str, ...] = opt((), "what to train; default: S and t96, on GPUs 124M", choices=tuple(SHAPES))
    rounds: int = opt(6, "alternations", low=1)
    steps: int = opt(5, "steps per round", low=1)
    save: str | None = opt(None, "write the table to this Markdown file")


def work(pipe: Connection, name: str, device: str, environment: dict[str, str]) -> None:
    """One rank: build the model, then `serve` its steps."""
    os.environ |= environment | {"OMP_WAIT_POLICY": "passive"}  # as train.py
    import torch

    from bench.steps import our_step
    from nanochin.run import parallel
    from nanochin.run.device import pick_device, pick_dtype

    with parallel.started():
        torch.set_num_threads(1)
        shape, sequences = SHAPES[name]
        where = pick_device(device)
        dtype, _ = pick_dtype("auto", where, shape)
        step = our_step("eager" if device == "cpu" else "graph", shape, sequences, where, dtype)
        step.set_micro_batch(min(sequences, max(1, (4096 if device == "cpu" else 65536) // shape.seq_len)))
        batch = torch.randint(shape.vocab_size, (len(parallel.share(sequences)), shape.seq_len + 1))
        serve(pipe, lambda: step(batch, 1e-3)[0].item(), str(dtype))


def start_group(size: int, name: str, device: str) -> list[Connection]:
    """Pipes to the processes of a group."""
    pipes = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in map(str, range(size)):
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pipes.append(start(work, name, device, where))
    return pipes


def measure(name: str, sizes: list[int], options: Options) -> list[list[str]]:
    """The table's rows of a shape."""
    groups = {size: start_group(size, name, options.device) for size in sizes}
    times, _ = alternate(groups, options.rounds, options.steps)
    shape, sequences = SHAPES[name]
    rows = []
    for size in sizes:
        median, best = statistics.median(times[size]), min(times[size])
        ratios = [f"{statistics.median(times[1]) / median:.2f}x", f"{min(times[1]) / best:.2f}x"]
        rows.append([f"{name}, {size} {options.device}", f"{1e3 * median:.1f}", f"{1e3 * best:.1f}"])
        rows[-1] += [count(sequences * shape.seq_len / median), *ratios]
    return rows


def main() -> None:
    options = parse(Options, prog="python -m bench.ranks", description=__doc__)
    sizes = [1, 2]
    if options.device == "cuda":
        import torch

        sizes = [2**i for i in range(10) if 2**i <= torch.cuda.device_count()]
        if len(sizes) < 2:
            return print(f"skipped: several GPUs are needed, there are {torch.cuda.device_count()}")
    names = options.shapes or (("S", "t96") if options.device == "cpu" else ("124M",))
    heading = ["shape, processes", "ms/step", "min", "tokens/s", "speed, of medians", "of minima"]
    text = format_columns([heading, *(row for name in names for row in measure(name, sizes, options))])
    print(text)
    if options.save:
        save(options.save, "bench.ranks", "one CPU thread per process; speed is against one process", text)


if __name__ == "__main__":
    run_command(main, "python -m bench.ranks")
