"""Causal attention in Triton (interpreted without a GPU) against a float64 reference."""

import math
from functools import partial
from itertools import product

import pytest
import torch
from interpreted import CUDA, DEVICE, MARKS, load
from numerics import compare, gradients, randn, repeats, sdpa

from kernels import fallback, reference

pytestmark = MARKS
kernels = load("attention")
attention = kernels.attention
HERE = kernels.target_of(DEVICE)
TARGETS = list(dict.fromkeys(("sm_80", HERE))) if CUDA else ["sm_80", "sm_90"]  # the same order in all xdist processes

# (B, T, heads, head size): one token, padded heads, ends of sequences within a block; heads of narrow models
SIZES = [(1, 1, 1, 8), (2, 7, 3, 24), (1, 100, 2, 64), (2, 129, 1, 40), (1, 300, 1, 128)]
NARROW = [(2, 40, 2, 2), (1, 70, 2, 10), (1, 20, 3, 12), (2, 33, 1, 14), (1, 67, 2, 20), (1, 65, 1, 56)]
POINTERS = [(size, dtype, "sm_80") for size in SIZES for dtype in (torch.float32, torch.float16)]
POINTERS += [(size, torch.float16, "sm_90") for size in NARROW]  # 56 by descriptors, which the others do not support
DESCRIPTORS = [(size, torch.float16, "sm_90") for size in SIZES[2:]] + [((2, 21, 2, 24), torch.float16, "sm_90")]
ROTATED = [(size, dtype, "sm_80") for size in SIZES[:3] for dtype in (torch.float32, torch.float16)]
ROTATED += [((2, 33, 1, 14), torch.float16, "sm_80"), ((1, 70, 2, 10), torch.float32, "sm_80")]
DESCRIBED = [(1, 20, 5, 16), (1, 130, 2, 64), (2, 129, 1, 40), (1, 70, 1, 96), (2, 21, 2, 2)]  # 5: not a group of four
ROTATED += [(size, torch.float16, "sm_90") for size in DESCRIBED]
LARGE = [(3, 1000, 2, 64), (2, 1024, 12, 64), (1, 1000, 3, 128), (1, 4096, 2, 128), (1, 4096, 2, 40), (2, 777, 5, 96)]
COMPILED = [*product(SIZES + NARROW + LARGE, (torch.float32, torch.float16, torch.bfloat16), TARGETS)]


def check(qkv: torch.Tensor, n_heads: int, dtype: torch.dtype, at_least: float = 0.0, **positions) -> None:
    def theirs(x):
        return sdpa(reference.rotary(x, n_heads, **positions) if positions else x, n_heads)

    ours, exact = (partial(f, n_heads=n_heads, **positions) for f in (attention, reference.attention))
    compare(ours, theirs, exact, [qkv], dtype, at_least=at_least)


@pytest.mark.parametrize("size, dtype, target", COMPILED if CUDA else POINTERS + DESCRIPTORS, ids=str)
def test_attention(size, dtype, target, monkeypatch):
    """Values and gradients, by pointers and by descriptors, into memory that held NaN."""
    monkeypatch.setattr(kernels, "target_of", lambda device: target)
    B, T, H, D = size
    check(randn(B, T, 3 * H * D), H, dtype)


@pytest.mark.parametrize("theta, qk_norm", [(10_000.0, False), (100.0, True), (None, True)])
@pytest.mark.parametrize("size, dtype, target", COMPILED if CUDA else ROTATED, ids=str)
def test_rotary_and_qk_norm(size, dtype, target, theta, qk_norm, monkeypatch):
    """Rotated and normalised queries and keys, and their gradients: heads with and without padding, halves at even and
    odd offsets, by pointers and by descriptors."""
    monkeypatch.setattr(kernels, "target_of", lambda device: target)
    B, T, H, D = size
    check(randn(B, T, 3 * H * D), H, dtype, theta=theta, qk_norm=qk_norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_logits(dtype):
    """Scores in the hundreds, where softmax picks one key."""
    check(randn(1, 70, 3 * 32, scale=10.0), 1, dtype, at_least=1e-4)  # half an ulp of a score of 1000 is 3e-5


def test_repeated_runs_are_bit_identical():
    """Two runs and one under torch.compile."""
    x = randn(2, 70, 3 * 2 * 16).to(DEVICE, torch.float16).requires_grad_()
    repeats(lambda x: attention(x, 2), x)
    repeats(lambda x: attention(x, 2, 100.0, True), x)


@pytest.mark.parametrize("positions", [(), (100.0, True)], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_sequences_are_independent(target, positions, monkeypatch):
    """A sequence of NaN does not affect the bits of others, although its rows follow in the same block."""
    monkeypatch.setattr(kernels, "target_of", lambda device: target)
    clean = randn(2, 70, 3 * 2 * 16).to(DEVICE, torch.float16)
    mixed = torch.stack((clean[0], clean[1] * torch.nan))
    (out, grad), (other, other_grad) = (
        gradients(lambda x: attention(x, 2, *positions), [x.requires_grad_()]) for x in (clean, mixed)
    )
    assert torch.equal(other[0], out[0]) and torch.equal(other_grad[0], grad[0])
    assert other[1].isnan().all()


@pytest.mark.parametrize("positions", [(), (100.0, True)], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_written_past_the_end(target, positions, monkeypatch):
    """A margin after every new tensor is unchanged, at a length and head size that end inside tiles."""
    margins = []

    def guarded(size, **options):
        whole = torch.full((math.prod(size) + 8192,), 7.0, **options)
        margins.append(whole[math.prod(size) :])
        return whole[: math.prod(size)].view(size)

    def new_empty(x, *size, dtype=None, **others):
        if others:  # called by Triton's interpreter
            return plain(x, *size, **others)
        size = size if isinstance(size[0], int) else size[0]
        return guarded(size, dtype=dtype or x.dtype, device=x.device)

    plain = torch.Tensor.new_empty
    monkeypatch.setattr(kernels, "target_of", lambda device: target)
    qkv = randn(1, 70, 3 * 2 * 24).to(DEVICE, torch.float16).requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        patch.setattr(torch, "empty_like", lambda x: guarded(x.shape, dtype=x.dtype, device=x.device))
        attention(qkv, 2, *positions).sum().backward()
    # o, lse, delta, dqkv; rotated queries and keys, their root mean squares (empty without positions)
    assert len(margins) == 6 and all((margin == 7).all() for margin in margins)


def test_any_strides():
    """A slice of a wider tensor and an expanded gradient give the same results as contiguous copies."""
    wide = randn(2, 9, 100).to(DEVICE, torch.float32)
    part, whole = wide[..., 1:97].requires_grad_(), wide[..., 1:97].clone().requires_grad_()
    attention(part, 2).sum().backward()
    attention(whole, 2).backward(torch.ones(2, 9, 32, device=DEVICE))
    assert torch.equal(part.grad, whole.grad)
    assert torch.equal(attention(part, 2), attention(whole, 2))


def test_opcheck():
    """torch.library's checks of schema, fake tensors, autograd registration and tracing."""
    qkv = randn(1, 100, 3 * 2 * 8).to(DEVICE, torch.float16)  # one block of queries, so that all of L is written
    for table, qk_norm in ((None, False), (fallback.rotary_table(100, 8, 100.0, DEVICE), True)):
        forward, backward = torch.ops.nanochin.attention.default, torch.ops.nanochin.attention_backward.default
        torch.library.opcheck(forward, (qkv.clone().requires_grad_(), table, 2, qk_norm))
        o, *kept = forward(qkv, table, 2, qk_norm)
        torch.library.opcheck(backward, (o, qkv, table, o, *kept, 2))


@pytest.mark.parametrize("width, heads", [(3 * 130, 1), (3 * 32 + 3, 2), (32, 1), (15, 1)])
def test_unsupported_widths_raise(width, heads):
    """Heads above 128, widths that are not a multiple of the heads, odd heads."""
    with pytest.raises(ValueError, match=f"width {width} is not 3 x {heads} heads"):
        attention(torch.zeros(1, 2, width, device=DEVICE), heads)


def test_rows_past_the_end_are_written_before_they_are_read():
    """dK and dV read L and delta in blocks of BLOCK_M, also past the end of a sequence: these blocks divide those that
    the forward and dQ write, which divide the padding."""
    for (forward, *_), (backward_q, *_), (backward_kv, *_) in kernels.TILES.values():
        assert forward % backward_kv == backward_q % backward_kv == 0
        assert kernels.PAD.value % forward == kernels.PAD.value % backward_q == 0
