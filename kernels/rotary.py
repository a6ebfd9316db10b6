"""Rotary positions and QK-norm, one pass each way; `kernels.reference.rotary` in Triton.

Forward, for the halves (x1, x2) of each query and key head of size D, at position t, all in float32:
    n  =  x (mean(x^2) + 1e-6)^(-1/2)                                        (only with QK-norm; else n = x)
    y  =  (n1 cos - n2 sin, n1 sin + n2 cos),  angle t theta^(-2i/D) for i < D/2      (theta None: y = n)
Backward, g the gradient of y: the rotation by the opposite angle, then the derivative of the norm:
    h  =  (g1 cos + g2 sin, g2 cos - g1 sin)
    dx =  r (h - n mean(n h)),  r the inverse root mean square
Attention calls `rotate_qk`, which writes queries and keys alone and interleaves the halves of each head, x1[0] x2[0]
x1[1] ...: this changes no product of a query and a key. A pair then lies in neighbouring columns of the accumulators of
attention's backward, which rotates it back itself. `rotary` is for heads too large for our attention kernels: it has a
backward of its own and returns a packed tensor, values copied.

A program takes a block of tokens and a few heads: the table is read once for all of them, and what neighbouring
programs read lies side by side.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

EPS = 1e-6


@triton.jit
def _forward(X, Table, Y, R, M, T, H,
             ROTATE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, APART: tl.constexpr,
             D: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Y: packed like X; or APART, queries and keys alone, halves interleaved, and R (B T, 2H) the norm's r."""
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
        for part in tl.static_range(2 if APART else 3):  # queries, keys, values
            at = rows.to(tl.int64)[:, None] * (3 * H * D) + (part * H + head) * D + cols[None, :]
            x1 = tl.load(X + at, mask=here, other=0.0).to(tl.float32)
            x2 = tl.load(X + at + HALF, mask=here, other=0.0).to(tl.float32)
            if part < 2:
                if NORM:
                    r = (1 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, 1) / D + EPS))[:, None]
                    x1, x2 = x1 * r, x2 * r
                    if APART:
                        at_r = rows.to(tl.int64)[:, None] * (2 * H) + part * H + head
                        tl.store(R + at_r, r, mask=tl.where(head < H, rows < M, False)[:, None])
                if ROTATE:
                    x1, x2 = x1 * cos - x2 * sin, x1 * sin + x2 * cos
            if APART:
                both = tl.interleave(x1, x2).to(Y.dtype.element_ty)  # (ROWS, 2 BLOCK)
                pairs = tl.arange(0, 2 * BLOCK)[None, :]
                at = rows.to(tl.int64)[:, None] * (2 * H * D) + (part * H + head) * D + pairs
                tl.store(Y + at, both, mask=tl.where(head < H, (rows < M)[:, None] & (pairs < D), False))
            else:
                tl.store(Y + at, x1.to(Y.dtype.element_ty), mask=here)
                tl.store(Y + at + HALF, x2.to(Y.dtype.element_ty), mask=here)


@triton.jit
def _backward(G, X, Table, DX, M, T, H,
              ROTATE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
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
        for part in tl.static_range(3):
            at = rows.to(tl.int64)[:, None] * (3 * H * D) + (part * H + head) * D + cols[None, :]
            g1 = tl.load(G + at, mask=here, other=0.0).to(tl.float32)
            g2 = tl.load(G + at + HALF, mask=here, other=0.0).to(tl.float32)
            if part < 2:
                if ROTATE:
                    g1, g2 = g1 * cos + g2 * sin, g2 * cos - g1 * sin
                if NORM:
                    n1 = tl.load(X + at, mask=here, other=0.0).to(tl.float32)
                    n2 = tl.load(X + at + HALF, mask=here, other=0.0).to(tl.float32)
                    r = (1 / tl.sqrt(tl.sum(n1 * n1 + n2 * n2, 1) / D + EPS))[:, None]
                    n1, n2 = n1 * r, n2 * r
                    dot = (tl.sum(n1 * g1 + n2 * g2, 1) / D)[:, None]
                    g1, g2 = r * (g1 - n1 * dot), r * (g2 - n2 * dot)
            tl.store(DX + at, g1.to(DX.dtype.element_ty), mask=here)
            tl.store(DX + at + HALF, g2.to(DX.dtype.element_ty), mask=here)


def _config(H: int, D: int) -> dict:
    """1024 pairs in 128 threads: 8 a thread are one access of 16 bytes in bf16."""
    block = triton.next_power_of_2(D // 2)
    return {"D": D, "HEADS": min(4, H), "ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": 4}


def _launch(kernel, *tensors: Tensor | None, like: Tensor, n_heads: int, **options) -> None:
    """`like` (B, T, 3C)."""
    B, T, C3 = like.shape
    config = _config(n_heads, C3 // 3 // n_heads)
    programs = triton.cdiv(B * T, config["ROWS"]) * triton.cdiv(n_heads, config["HEADS"])
    kernel[(programs,)](*tensors, B * T, T, n_heads, EPS=EPS, **options, **config)


def rotate_qk(qkv: Tensor, table: Tensor | None, qk: Tensor, r: Tensor | None, n_heads: int) -> None:
    """For attention. Fills qk (B, T, 2C) with the queries and keys of qkv (B, T, 3C), normalised and rotated by a table
    (T, D) of cos | sin, interleaved. r (B, T, 2H) float32 asks for QK-norm and gets r of each head."""
    _launch(
        _forward, qkv, table, qk, r, like=qkv, n_heads=n_heads, ROTATE=table is not None, NORM=r is not None, APART=True
    )


@torch.library.custom_op("nanochin::rotary", mutates_args=())
def rotate(qkv: Tensor, table: Tensor | None, n_heads: int, qk_norm: bool) -> Tensor:
    """Packed qkv (B, T, 3C) with queries and keys normalised and rotated by a table (T, D) of cos | sin."""
    qkv = qkv.contiguous()
    out = torch.empty_like(qkv)
    _launch(
        _forward, qkv, table, out, None, like=qkv, n_heads=n_heads, ROTATE=table is not None, NORM=qk_norm, APART=False
    )
    return out


@torch.library.custom_op("nanochin::rotary_backward", mutates_args=())
def rotate_backward(grad: Tensor, qkv: Tensor | None, table: Tensor | None, n_heads: int) -> Tensor:
    """Gradient of qkv (B, T, 3C); `qkv` itself only with QK-norm."""
    grad, qkv = grad.contiguous(), None if qkv is None else qkv.contiguous()
    out = torch.empty_like(grad)
    _launch(
        _backward, grad, qkv, table, out, like=grad, n_heads=n_heads, ROTATE=table is not None, NORM=qkv is not None
    )
    return out


@rotate.register_fake
def _(qkv, table, n_heads, qk_norm):
    return qkv.new_empty(qkv.shape)


@rotate_backward.register_fake
def _(grad, qkv, table, n_heads):
    return grad.new_empty(grad.shape)


def _setup_context(ctx, inputs, output):
    qkv, table, ctx.n_heads, qk_norm = inputs
    ctx.save_for_backward(qkv if qk_norm else None, table)


def _autograd(ctx, grad):
    return rotate_backward(grad, *ctx.saved_tensors, ctx.n_heads), None, None, None


rotate.register_autograd(_autograd, setup_context=_setup_context)


def aot():
    """The shipped configurations for bench.aot, bf16."""
    for D in (64, 128):
        for norm in (False, True):
            config = _config(12, D)
            warps = config.pop("num_warps")
            options = {"ROTATE": True, "NORM": norm, "EPS": EPS} | config
            ints = {"M": "i32", "T": "i32", "H": "i32"}
            forward = {"X": "*bf16", "Table": "*fp32", "Y": "*bf16"} | ints
            backward = {"G": "*bf16", "Table": "*fp32", "DX": "*bf16"} | ints | ({"X": "*bf16"} if norm else {})
            for direction, kernel, signature, constexprs in (
                (
                    "for attention",
                    _forward,
                    forward | ({"R": "*fp32"} if norm else {}),
                    options | {"APART": True} | ({} if norm else {"R": None}),
                ),
                ("forward", _forward, forward, options | {"APART": False, "R": None}),
                ("backward", _backward, backward, options if norm else options | {"X": None}),
            ):
                label = f"rotary{' and qk-norm' if norm else ''} {direction} bf16 D{D}"
                yield {
                    "label": label,
                    "kernel": kernel,
                    "signature": signature,
                    "constexprs": constexprs,
                    "num_warps": warps,
                    "num_stages": 3,
                    "odd": ("H",),
                    "gate": direction == "for attention" and D == 64,
                }


# ---------------------------------------------------------------------------------------------------------------------
# Public function


def rotary(qkv: Tensor, n_heads: int, theta: float | None, qk_norm: bool = False) -> Tensor:
    """Queries and keys of packed qkv (B, T, 3C) rotated to positions 0..T-1 and, with `qk_norm`, divided by their
    root mean square first; `theta` None does only that."""
    if theta is None and not qk_norm:
        return qkv
    return rotate(qkv, table_for(qkv, n_heads, theta), n_heads, qk_norm)


def table_for(qkv: Tensor, n_heads: int, theta: float | None) -> Tensor | None:
    """cos | sin (T, D) for the positions of packed qkv (B, T, 3C); None without rotation."""
    _, T, C3 = qkv.shape
    # A compiled graph makes the table itself, once for all layers: a tensor of its own that outlives it would be a
    # hazard under CUDA graphs, whose memory is reused.
    make = _table if torch.compiler.is_compiling() else _kept_table
    return None if theta is None else make(T, C3 // 3 // n_heads, theta, qkv.device)


def _table(T: int, D: int, theta: float, device: torch.device) -> Tensor:
    """cos | sin of position x frequency, (T, D). The angles are float64: at position 4096 those of float32 are off by
    2e-4."""
    frequency = theta ** (-torch.arange(0, D, 2, device=device, dtype=torch.float64) / D)
    angle = torch.arange(T, device=device, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()


def _kept_table(T: int, D: int, theta: float, device: torch.device) -> Tensor:
    return _made_table(triton.next_power_of_2(T), D, theta, device)[:T]  # sampling asks for every T


@functools.cache  # for good: a recorded step reads it where it lies
@torch.inference_mode(False)  # a table made while sampling may serve a training step later
def _made_table(T: int, D: int, theta: float, device: torch.device) -> Tensor:
    return _table(T, D, theta, device)
