"""Rotary positions and QK-norm of queries and keys before attention: the forward of `kernels.reference.rotary` in
Triton. The backward is in the epilogues of attention's backward kernels.

For the halves (x1, x2) of each query and key head of size D, at position t, all in float32:
    n  =  x (mean(x^2) + 1e-6)^(-1/2)                                        (only with QK-norm; else n = x)
    y  =  (n1 cos - n2 sin, n1 sin + n2 cos),  angle t theta^(-2i/D) for i < D/2      (theta None: y = n)
The halves of each head are interleaved, y1[0] y2[0] y1[1] ...: products of queries and keys do not change, and a pair
is in adjacent columns of the accumulators of attention's backward, which rotates it back.

A program handles a block of tokens and a few heads, and reads the table once for all of them.
"""

import triton
import triton.language as tl
from torch import Tensor

EPS = tl.constexpr(1e-6)


@triton.jit
def _rotate(X, Table, Y, R, M, T, H, ROTATE: tl.constexpr, NORM: tl.constexpr,
            D: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    HALF: tl.constexpr = D // 2
    groups = tl.cdiv(H, HEADS)
    rows, cols = tl.program_id(0) // groups * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (cols < HALF)[None, :]
    if ROTATE:
        at = (rows % T)[:, None] * D + cols[None, :]
        cos = tl.load(Table + at, mask=inside, other=0.0)
        sin = tl.load(Table + at + HALF, mask=inside, other=0.0)
    for i in tl.static_range(HEADS):
        head = tl.program_id(0) % groups * HEADS + i
        here = tl.where(head < H, inside, False)
        for part in tl.static_range(2):  # queries, keys
            at = rows.to(tl.int64)[:, None] * (3 * H * D) + (part * H + head) * D + cols[None, :]
            x1 = tl.load(X + at, mask=here, other=0.0).to(tl.float32)
            x2 = tl.load(X + at + HALF, mask=here, other=0.0).to(tl.float32)
            if NORM:
                r = (1 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, 1) / D + EPS))[:, None]
                x1, x2 = x1 * r, x2 * r
                at_r = rows.to(tl.int64)[:, None] * (2 * H) + part * H + head
                tl.store(R + at_r, r, mask=tl.where(head < H, rows < M, False)[:, None])
            if ROTATE:
                x1, x2 = x1 * cos - x2 * sin, x1 * sin + x2 * cos
            both = tl.interleave(x1, x2).to(Y.dtype.element_ty)  # (ROWS, 2 BLOCK)
            pairs = tl.arange(0, 2 * BLOCK)[None, :]
            at = rows.to(tl.int64)[:, None] * (2 * H * D) + (part * H + head) * D + pairs
            tl.store(Y + at, both, mask=tl.where(head < H, (rows < M)[:, None] & (pairs < D), False))


def _config(H: int, D: int) -> dict:
    """1024 pairs on 128 threads: 8 per thread, one 16-byte access in bf16."""
    block = triton.next_power_of_2(D // 2)
    return {"D": D, "HEADS": min(4, H), "ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": 4}


def rotate_qk(qkv: Tensor, table: Tensor | None, qk: Tensor, r: Tensor | None, n_heads: int) -> None:
    """Fill qk (B, T, 2C) with the queries and keys of qkv (B, T, 3C), rotated by `table` (T, D) of cos | sin and with
    interleaved halves. If r (B, T, 2H) float32 is given, QK-norm is applied and r is filled with r of each head."""
    B, T, C3 = qkv.shape
    config = _config(n_heads, C3 // 3 // n_heads)
    programs = triton.cdiv(B * T, config["ROWS"]) * triton.cdiv(n_heads, config["HEADS"])
    _rotate[(programs,)](qkv, table, qk, r, B * T, T, n_heads, ROTATE=table is not None, NORM=r is not None, **config)
