"""What a training step keeps between its forward and its backward pass, counted from shapes: nothing is computed.

    python -m bench.saved_memory                        124M, 32 sequences of 1024, by tensor
    python -m bench.saved_memory --nanogpt PATH         and a checkout of nanoGPT beside it, eager and compiled

Counted is every storage that autograd saves, once, parameters left out: `torch.autograd.graph.saved_tensors_hooks`.
Ours is the model on Triton operations with fake tensors, which have shapes and no numbers. nanoGPT's runs under bf16
autocast on a CPU, as its train.py does on a GPU; its eager form is fake, too, its compiled one is real, at sizes from
which the full one follows: bytes are linear in layers and in tokens.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from bench.steps import nanogpt_model
from kernels.fallback import rotary_table
from nanochin.base.cli import UserError, opt, parse, run_command
from nanochin.config import Shape, make_shape
from nanochin.model import GPT, ROTARY_THETA

SHAPE = make_shape(768, 12, vocab_size=50_304, seq_len=1024, head_size=64)
SEQUENCES = 32
SMALL = 256  # tokens in a sequence of the compiled model that is run


@dataclass(frozen=True)
class Saved:
    """Tensors of one shape and dtype that a step saves."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    count: int
    bytes: int  # of all of them


def saved(step: Callable[[], Tensor], parameters: list[nn.Parameter]) -> list[Saved]:
    """What autograd saves while `step` makes a loss, the largest first."""
    owned = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, Tensor] = {}  # by storage; a tensor that is kept also keeps its storage from being used again

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in owned:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = step()
    del loss
    groups: dict[tuple, list[int]] = {}
    for tensor in kept.values():
        groups.setdefault((tuple(tensor.shape), tensor.dtype), []).append(tensor.untyped_storage().nbytes())
    found = [Saved(*kind, count=len(sizes), bytes=sum(sizes)) for kind, sizes in groups.items()]
    return sorted(found, key=lambda group: -group.bytes)


def total(groups: list[Saved]) -> int:
    return sum(group.bytes for group in groups)


def of_ours(shape: Shape, sequences: int, dtype: torch.dtype = torch.bfloat16) -> list[Saved]:
    """Our model's on Triton operations."""
    # The table of angles is kept for good, and must not be fake.
    rotary_table(shape.seq_len, shape.head_size, ROTARY_THETA, torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True), kernels.use("triton"):
        model, tokens = GPT(shape, dtype=dtype), torch.zeros(sequences, shape.seq_len, dtype=torch.long)
        return saved(lambda: model(tokens, tokens), list(model.parameters()))


def of_nanogpt(folder: str, shape: Shape, sequences: int, *, compiled: bool) -> list[Saved]:
    """nanoGPT's at the same size."""
    torch._dynamo.reset()
    with contextlib.nullcontext() if compiled else FakeTensorMode():
        model, tokens = nanogpt_model(folder, shape), torch.zeros(sequences, shape.seq_len, dtype=torch.long)
        run = torch.compile(model) if compiled else model
        with torch.autocast("cpu", torch.bfloat16):
            return saved(lambda: run(tokens, tokens)[1], list(model.parameters()))


def extrapolate(count: Callable[[int, int], int], layers: int, sequences: int) -> int:
    """`count(layers, sequences)`, linear in each, from its values at 1 and 2."""

    def along(sequences: int) -> int:
        one, two = count(1, sequences), count(2, sequences)
        return one + (layers - 1) * (two - one)

    one, two = along(1), along(2)
    return one + (sequences - 1) * (two - one)


def table(groups: list[Saved], tokens: int) -> str:
    """Markdown: what is above a thousandth of all."""
    lines = ["| shape | dtype | tensors | GiB | bytes a token |", "|---|---|---|---|---|"]
    for group in groups:
        if group.bytes > total(groups) / 1000:
            lines.append(
                f"| {' x '.join(map(str, group.shape))} | {str(group.dtype).split('.')[1]} | {group.count} | "
                f"{group.bytes / 2**30:.3f} | {group.bytes / tokens:,.0f} |"
            )
    return "\n".join([*lines, f"| all | | | {total(groups) / 2**30:.2f} | {total(groups) / tokens:,.0f} |"])


@dataclass(frozen=True)
class Options:
    nanogpt: str = opt("", "a checkout of nanoGPT to compare with")


def main() -> None:
    options = parse(
        Options, prog="python -m bench.saved_memory", description="What a step keeps for its backward pass."
    )
    if not kernels.has_triton():
        raise UserError("counting what Triton operations keep needs triton: pip install triton")
    ours = of_ours(SHAPE, SEQUENCES)
    print(f"768x12, V {SHAPE.vocab_size:,}, {SEQUENCES} sequences of {SHAPE.seq_len}, bf16\n")
    print(table(ours, SEQUENCES * SHAPE.seq_len))
    if options.nanogpt:
        eager = total(of_nanogpt(options.nanogpt, SHAPE, SEQUENCES, compiled=False))

        def count(layers: int, sequences: int) -> int:
            shape = make_shape(768, layers, vocab_size=SHAPE.vocab_size, seq_len=SMALL, head_size=64)
            return total(of_nanogpt(options.nanogpt, shape, sequences, compiled=True))

        compiled = extrapolate(count, SHAPE.layers, SEQUENCES * SHAPE.seq_len // SMALL)
        print()
        for name, size in (("eager", eager), ("compiled for a CPU", compiled)):
            print(f"nanoGPT {name}: {size / 2**30:.2f} GiB; ours is {total(ours) / size:.3f} of it")


if __name__ == "__main__":
    run_command(main, "python -m bench.saved_memory")
