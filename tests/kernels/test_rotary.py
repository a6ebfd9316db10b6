"""Rotary positions and QK-norm before attention in Triton (interpreted without a GPU) against float64; and the
table of angles. The gradients are in test_attention.py."""

import math

import pytest
import torch
from interpreted import CUDA, DEVICE, DTYPES, MARKS, load
from numerics import poisoned, randn

from kernels import fallback, reference

pytestmark = MARKS
rotary = load("rotary")

# (B, T, heads, head size): one token, odd sizes, blocks over several sequences, heads that do not fill a group of four
SIZES = [(1, 1, 1, 2), (2, 7, 3, 8), (1, 31, 5, 48), (2, 20, 1, 128)]
SIZES += [(2, 33, 2, 2), (1, 9, 2, 10), (3, 5, 5, 14), (1, 21, 8, 20)]  # heads of narrow models
SIZES += [(8, 1024, 12, 64), (2, 4096, 5, 128), (3, 1000, 7, 96)] if CUDA else []


def rotate(qkv, n_heads, theta, qk_norm=False):
    """Queries and keys (B, T, 2C), halves ordered as in `reference.rotary`; inverse root mean squares."""
    B, T, C3 = qkv.shape
    table = None if theta is None else fallback.rotary_table(T, C3 // 3 // n_heads, theta, DEVICE)
    with poisoned():
        qk = qkv.new_empty(B, T, C3 // 3 * 2)
        r = qkv.new_empty(B, T, 2 * n_heads, dtype=torch.float32) if qk_norm else None
    rotary.rotate_qk(qkv, table, qk, r, n_heads)
    return qk.view(B, T, 2 * n_heads, -1, 2).transpose(3, 4).reshape(qk.shape), r


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("theta, qk_norm", [(10_000.0, False), (10_000.0, True), (None, True)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rotary(size, theta, qk_norm, dtype):
    """Rotated and normalised queries and keys: at most twice the error of PyTorch's operations at that dtype, plus four
    units in the last place."""
    B, T, H, D = size
    qkv = randn(B, T, 3 * H * D).to(DEVICE, dtype)
    got, r = rotate(qkv, H, theta, qk_norm)
    peer, want = (reference.rotary(x, H, theta, qk_norm)[..., : 2 * H * D].double() for x in (qkv, qkv.double()))
    unit = 4 * torch.finfo(dtype).eps * want.abs().max()
    assert got.dtype == dtype and (got.double() - want).abs().max() <= 2 * (peer - want).abs().max() + unit
    if qk_norm:
        heads = qkv[..., : 2 * H * D].double().view(B, T, 2 * H, D)
        torch.testing.assert_close(r.double(), (heads.square().mean(-1) + 1e-6).rsqrt(), rtol=1e-6, atol=0)


def test_far_positions():
    """At position 4095 the angles still have float32 precision: a rotated unit query is the cosine and sine that Python
    computes."""
    T, D, theta = 4096, 8, 10_000.0
    qkv = torch.zeros(1, T, 3 * D, device=DEVICE)
    qkv[..., : D // 2] = 1.0  # first halves of the query
    y = rotate(qkv, 1, theta)[0][0, -1, :D].tolist()
    angles = [4095 * theta ** (-2 * i / D) for i in range(D // 2)]
    assert y == pytest.approx([*map(math.cos, angles), *map(math.sin, angles)], abs=2e-7)


def test_large_and_zero_heads():
    """QK-norm gives huge heads a root mean square of 1 and zero heads 0."""
    x = torch.cat((torch.full((1, 3, 48), 1e15), torch.zeros(1, 3, 48)), dim=1).to(DEVICE)
    y, r = rotate(x, 2, 100.0, qk_norm=True)
    rms = y[0, :3].view(3, 4, 8).square().mean(-1)
    torch.testing.assert_close(rms, torch.ones_like(rms))
    assert not y[0, 3:].any() and r.isfinite().all()


def test_cached_tables_keep_their_address():
    """A captured step reads its table in place, whatever other lengths were used since; 200 lengths need only one table
    per power of two."""
    tables = [fallback.rotary_table(T, 6, 3.0, DEVICE) for T in (48, *range(1, 201), 48)]
    assert tables[0].data_ptr() == tables[-1].data_ptr() and len(tables[-1]) == 48
    assert len({table.data_ptr() for table in tables}) == 9
