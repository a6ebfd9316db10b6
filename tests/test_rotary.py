"""Rotary positions and QK-norm in Triton, interpreted where there is no GPU, against the mathematics in float64."""

import math

import pytest
import torch
from interpreted import CUDA, DEVICE, DTYPES, MARKS, compare, load, poisoned, randn, repeats

from kernels import fallback, reference

pytestmark = MARKS
rotary = load("rotary")

# (B, T, heads, head size): one token, odd sizes, heads that do not fill a group of four
SIZES = [(1, 1, 1, 2), (2, 7, 3, 8), (1, 31, 5, 48), (2, 20, 1, 128)]
SIZES += [(2, 33, 2, 2), (1, 9, 2, 10), (3, 5, 5, 14), (1, 21, 8, 20)]  # heads as narrow models have them
SIZES += [(8, 1024, 12, 64), (2, 4096, 5, 128), (3, 1000, 7, 96)] if CUDA else []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("theta, qk_norm", [(10_000.0, False), (10_000.0, True), (None, True)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rotary(size, theta, qk_norm, dtype):
    """Rotation and QK-norm of queries and keys, and the gradient; values pass untouched, both ways."""
    B, T, H, D = size
    compare(lambda x: rotary.rotary(x, H, theta, qk_norm), lambda x: reference.rotary(x, H, theta, qk_norm),
            lambda x: reference.rotary(x, H, theta, qk_norm), [randn(B, T, 3 * H * D)], dtype)  # fmt: skip
    x = randn(B, T, 3 * H * D).to(DEVICE, dtype).requires_grad_()
    y = rotary.rotary(x, H, theta, qk_norm)
    (grad,) = torch.autograd.grad(y, x, x.detach())
    values = slice(2 * H * D, None)
    assert torch.equal(y[..., values], x[..., values]) and torch.equal(grad[..., values], x[..., values])


def test_far_positions():
    """At position 4095 the angles still have float32's digits: a unit query turned by them is the cosine and sine that
    Python computes."""
    T, D, theta = 4096, 8, 10_000.0
    qkv = torch.zeros(1, T, 3 * D, device=DEVICE)
    qkv[..., : D // 2] = 1.0  # first halves of the query
    y = rotary.rotary(qkv, 1, theta)[0, -1, :D].tolist()
    angles = [4095 * theta ** (-2 * i / D) for i in range(D // 2)]
    assert y == pytest.approx([*map(math.cos, angles), *map(math.sin, angles)], abs=2e-7)


def test_nothing_to_do():
    """Neither positions nor norm: the input itself."""
    qkv = torch.ones(1, 3, 24)
    assert rotary.rotary(qkv, 2, None) is qkv


def test_large_and_zero_heads():
    """QK-norm of huge heads is finite and of unit root mean square, of zero heads zero with a finite gradient."""
    x = torch.cat((torch.full((1, 3, 48), 1e15), torch.zeros(1, 3, 48)), dim=1).to(DEVICE).requires_grad_()
    y = rotary.rotary(x, 2, 100.0, qk_norm=True)
    rms = y[0, :3, :32].view(3, 4, 8).square().mean(-1)
    torch.testing.assert_close(rms, torch.ones_like(rms))
    assert not y[0, 3:].any()
    assert torch.autograd.grad(y, x, torch.ones_like(y))[0].isfinite().all()


def test_sequences_of_a_batch_do_not_mix():
    """Each sequence starts at position 0, also where a block of tokens spans several: alone it gives the same bits."""
    x = randn(5, 9, 3 * 16).float().to(DEVICE)
    together = rotary.rotary(x, 2, 10.0)
    for b in range(5):
        with poisoned():
            assert torch.equal(rotary.rotary(x[b : b + 1], 2, 10.0)[0], together[b])


@pytest.mark.parametrize("by", [rotary, fallback], ids=["triton", "fallback"])
def test_tables_stay_in_their_place(by):
    """A recorded step reads a table where it lay, however many other lengths were asked for since; 200 lengths need but
    a table for each power of two."""
    table = lambda T: by._kept_table(T, 6, 3.0, DEVICE) if by is rotary else (  # noqa: E731
        by._kept_table(T, 6, 3.0, DEVICE, torch.float32)[0])  # fmt: skip
    first = table(48).data_ptr()
    places = {table(T).data_ptr() for T in range(1, 201)}
    assert table(48).data_ptr() == first and len(places) == 9 and len(table(48)) == 48


def test_a_table_made_without_gradients_serves_training():
    """Sampling first, under inference mode, does not spoil what is cached for the training step after it."""
    x = randn(1, 9, 3 * 26).float().to(DEVICE)
    with torch.inference_mode():
        rotary.rotary(x, 1, 777.0)
    rotary.rotary(x.requires_grad_(), 1, 777.0).sum().backward()
    assert x.grad.isfinite().all()


def test_repeats_and_compiles():
    """Bits repeat, also under torch.compile, which makes its own table."""
    x = randn(2, 20, 3 * 32).float().to(DEVICE).requires_grad_()
    repeats(lambda x: rotary.rotary(x, 2, 10_000.0, qk_norm=True), x)
    repeats(lambda x: rotary.rotary(x.transpose(0, 1), 4, 10_000.0), x)


def test_opcheck():
    """torch.library's own checks of schema, fake tensors and autograd registration."""
    x = randn(2, 5, 48).float().to(DEVICE).requires_grad_()
    table = rotary._table(5, 8, 10.0, DEVICE)
    for arguments in ((x, table, 2, True), (x, table, 2, False), (x, None, 2, True)):
        torch.library.opcheck(rotary.rotate, arguments)
