"""What a step keeps for its backward pass: counted from shapes, and on the real thing."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from interpreted import DEVICE, MARKS, load_all

import kernels
from bench.saved_memory import SEQUENCES, SHAPE, of_ours, saved, total
from nanochin.config import make_shape
from nanochin.model import GPT

pytestmark = MARKS
load_all()


def bytes_per_layer(shape, sequences: int) -> int:
    one, two = (total(of_ours(replace(shape, layers=layers), sequences)) for layers in (1, 2))
    return two - one


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "norm": "layernorm"}, {"activation": "swiglu"}])
def test_shapes_alone_give_what_a_step_saves(options):
    """A step in float16 saves as many bytes with fake tensors as with real ones."""
    shape = make_shape(32, 2, vocab_size=77, seq_len=40, head_size=16, **options)
    model, tokens = GPT(shape, dtype=torch.float16).to(DEVICE), torch.zeros(2, 40, dtype=torch.long, device=DEVICE)
    with kernels.use("triton"):
        real = saved(lambda: model(tokens, tokens), list(model.parameters()))
    assert total(of_ours(shape, 2, torch.float16)) == total(real)


@pytest.mark.parametrize("activation, ups", [("gelu", 1), ("relu2", 1), ("swiglu", 2)])
def test_bytes_a_token_and_layer(activation, ups):
    """By hand, in half precision: packed qkv 3C, rotated queries and keys 2C, attention's result C, two sums of the
    residual stream 2C, both normalised 2C, the feed-forward before its activation F or 2F; in float32 a number a head
    for softmax and one for each norm. Not the activation, which is as large as what it is made from. Beside them the
    matrices in half precision."""
    C, H, T = 64, 4, 128
    shape = make_shape(C, 1, vocab_size=77, seq_len=T, head_size=16, activation=activation)
    weights = 2 * (4 * C * C + C * shape.ffn * (ups + 1))
    assert bytes_per_layer(shape, 3) == weights + 3 * T * (2 * (10 * C + ups * shape.ffn) + 4 * (H + 2))


def test_it_sees_what_pytorch_saves():
    """exp saves its result, a product both factors, a sum nothing. A parameter does not count, nor does a storage that
    is seen a second time."""
    w, x = torch.nn.Parameter(torch.ones(8)), torch.ones(8, requires_grad=True)
    assert total(saved(lambda: x.exp().sum(), [w])) == 32
    assert total(saved(lambda: (w * x).sum(), [w])) == 32
    assert total(saved(lambda: (w * x * x.view(2, 4).view(8)).sum(), [w])) == 64
    assert saved(lambda: x.sum(), [w]) == []


def numbers(line: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", line)]


def test_the_page_says_what_is_saved():
    """docs/memory.md: bytes per token and layer of 124M, their sum, and GiB of the whole model."""
    page = (ROOT / "docs" / "memory.md").read_text()
    rows = [line.split("|")[1:-1] for line in page[: page.index("## Moved")].splitlines() if line.startswith("|")]
    *parts, (_, _, _, together) = [row for row in rows if len(row) == 4][2:]
    per_token = (bytes_per_layer(SHAPE, 1) - 2 * 12 * SHAPE.width**2) / SHAPE.seq_len  # without the weights
    assert sum(numbers(row[3])[0] for row in parts) == numbers(together)[0] == per_token
    (ours,) = [row for row in rows if row[0].strip() == "ours"]
    assert numbers(ours[1])[0] == round(total(of_ours(SHAPE, SEQUENCES)) / 2**30, 2)
    (eager,) = [row for row in rows if row[0].strip() == "nanoGPT, eager"]
    assert numbers(eager[2])[0] == pytest.approx(numbers(ours[1])[0] / numbers(eager[1])[0], abs=1e-3)
