"""What a training step keeps between its forward and its backward pass, counted from shapes without computing.

python -m bench.saved_memory          124M, 32 sequences of 1024, by tensor

Counts each storage that autograd saves once, except parameters. The model runs on Triton operations with fake tensors,
which have shapes but no numbers.
"""

from collections.abc import Callable

from bench.common import NoOptions
from nanochin.base.cli import UserError, parse, run_command

if __name__ == "__main__":
    parse(NoOptions, prog="python -m bench.saved_memory", description=__doc__)  # --help needs no torch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from bench.gpu_check import SIZES
from kernels.fallback import rotary_table
from nanochin.base.console import markdown
from nanochin.config import Shape
from nanochin.model import GPT, ROTARY_THETA

SHAPE = SIZES["124M"]
SEQUENCES = 32


def saved(step: Callable[[], Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
    """What autograd saves while `step` computes a loss: one tensor per storage."""
    owned = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, Tensor] = {}  # by storage; keeping the tensor prevents the storage's reuse

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in owned:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return list(kept.values())


def total(tensors: list[Tensor]) -> int:
    """Bytes."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def of_ours(shape: Shape, sequences: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Saved by our model on Triton operations."""
    # The cached table of angles must not be fake.
    rotary_table(shape.seq_len, shape.head_size, ROTARY_THETA, torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True), kernels.use("triton"):
        model, tokens = GPT(shape, dtype=dtype), torch.zeros(sequences, shape.seq_len, dtype=torch.long)
        return saved(lambda: model(tokens, tokens), list(model.parameters()))


def table(tensors: list[Tensor], tokens: int) -> str:
    """Markdown, by shape and dtype, what exceeds a thousandth of the total; the largest first."""
    groups: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tuple(tensor.shape), tensor.dtype), []).append(tensor)
    everything = total(tensors)
    rows = [["shape", "dtype", "tensors", "GiB", "bytes per token"]]
    for (shape, dtype), group in sorted(groups.items(), key=lambda item: -total(item[1])):
        if (size := total(group)) > everything / 1000:
            rows.append([" x ".join(map(str, shape)), str(dtype).split(".")[1], str(len(group))])
            rows[-1] += [f"{size / 2**30:.3f}", f"{size / tokens:,.0f}"]
    return markdown([*rows, ["all", "", "", f"{everything / 2**30:.2f}", f"{everything / tokens:,.0f}"]])


def main() -> None:
    if not kernels.has_triton():
        raise UserError("counting what Triton operations keep needs triton: pip install triton")
    print(f"{SHAPE}, V {SHAPE.vocab_size:,}, {SEQUENCES} sequences of {SHAPE.seq_len}, bf16")
    print(table(of_ours(SHAPE, SEQUENCES), SEQUENCES * SHAPE.seq_len))


if __name__ == "__main__":
    run_command(main, "python -m bench.saved_memory")
