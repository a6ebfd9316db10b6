"""Causal attention as Triton kernels: softmax(Q K^T / sqrt(D)) V on packed qkv (B, T, 3C), never storing T x T scores.

What is computed is `kernels.reference.attention`. How, for one head, with Q, K, V (T, D) and c = log2(e) / sqrt(D):

Forward. A program owns BLOCK_M queries and walks over the keys in blocks of BLOCK_N. With S = Q K^T it keeps for each
query `top`, the maximum so far of c S, `total`, the sum of P = 2^(c S - top), and `acc`, the sum of P V; when a block
raises top, the old sums are multiplied by 2^(old top - new top) (Milakov and Gimelshein 2018; FlashAttention, Dao et
al. 2022). At the end O = acc / total, and L = top + log2 total, one number a query, is kept for the backward. Keys
before the block of queries need no mask, so they have a loop of their own; the masked loop covers the diagonal alone.

Backward. P = 2^(c S - L) is computed again. With dO the gradient of O,

    dV = P^T dO      dP = dO V^T      delta = rowsum(dO * O)      dS = P * (dP - delta)
    dQ = dS K / sqrt(D)      dK = dS^T Q / sqrt(D)

in two kernels: one owns a block of queries, makes delta on its way and sums dQ over the keys; the other owns a block of
keys and sums dK and dV over the queries, working on S^T so that no product needs a transposed sum. Scores are computed
in both (7 products rather than 5), but no sum crosses programs: no atomics, no float32 buffer for dQ, and the same bits
every time.

A head is read where it lies, qkv being (B, T, 3H heads, D), and the gradients are written into the same places of one
packed dqkv: no transpose, no copy. On Hopper and Blackwell tiles move by TMA descriptors of (B, heads, T, D) views,
which fill with zeros past the end of a sequence or of a narrow head and store nothing there; elsewhere by pointers with
masks. Sums are in float32 whatever the inputs are.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = tl.constexpr(1.4426950408889634)


# ---------------------------------------------------------------------------------------------------------------------
# Tiles: ROWS rows, from `row` on, of one of the `heads` of sequence b, in x (B, T, heads D)


@triton.jit
def _load(x, b, head, row, T, heads, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
          INSIDE: tl.constexpr):  # fmt: skip
    """(ROWS, BLOCK_D), zeros past T and past D. INSIDE: all rows are known to lie before T."""
    if TMA:
        tile = x.load([b, head, row, 0]).reshape(ROWS, BLOCK_D)
    else:
        rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
        place = x + (b.to(tl.int64) * T + row) * (heads * D) + head * D + (rows * (heads * D) + columns)
        if INSIDE and D == BLOCK_D:
            tile = tl.load(place)
        elif INSIDE:
            tile = tl.load(place, mask=columns < D, other=0.0)
        elif D == BLOCK_D:
            tile = tl.load(place, mask=rows < T - row, other=0.0)
        else:
            tile = tl.load(place, mask=(rows < T - row) & (columns < D), other=0.0)
    return tile


@triton.jit
def _store(x, tile, b, head, row, T, heads, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
           TMA: tl.constexpr):  # fmt: skip
    """Rows before T and columns before D of `tile`."""
    if TMA:
        x.store([b, head, row, 0], tile.reshape(1, 1, ROWS, BLOCK_D))
    else:
        rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
        place = x + (b.to(tl.int64) * T + row) * (heads * D) + head * D + (rows * (heads * D) + columns)
        tl.store(place, tile, mask=(rows < T - row) & (columns < D))


# ---------------------------------------------------------------------------------------------------------------------
# Forward


@triton.jit(do_not_specialize=["T", "H"])
def _forward(qkv_m, qkv_n, o_m, lse, T, H, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """O (B, T, C) and L (B, H, T). Arguments ending in _m are read or written BLOCK_M rows at a time, _n BLOCK_N."""
    h, b = tl.program_id(0), tl.program_id(2)
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the last queries see most keys: longest first
    q = _load(qkv_m, b, h, start, T, 3 * H, D, BLOCK_M, BLOCK_D, TMA, False)
    rows = start + tl.arange(0, BLOCK_M)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.full((BLOCK_M,), 0.0, tl.float32)
    acc = tl.full((BLOCK_M, BLOCK_D), 0.0, tl.float32)
    diagonal = start // BLOCK_N * BLOCK_N
    end = tl.minimum(start + BLOCK_M, T)
    acc, total, top = _attend(acc, total, top, q, qkv_n, rows, 0, diagonal, b, h, T, H, scale,
                              D, BLOCK_D, BLOCK_N, TMA, False)  # fmt: skip
    acc, total, top = _attend(acc, total, top, q, qkv_n, rows, diagonal, end, b, h, T, H, scale,
                              D, BLOCK_D, BLOCK_N, TMA, True)  # fmt: skip
    _store(o_m, (acc / total[:, None]).to(q.dtype), b, h, start, T, H, D, BLOCK_M, BLOCK_D, TMA)
    tl.store(lse + (b * H + h).to(tl.int64) * T + rows, top + tl.log2(total), mask=rows < T)


@triton.jit
def _attend(acc, total, top, q, qkv_n, rows, begin, end, b, h, T, H, scale, D: tl.constexpr, BLOCK_D: tl.constexpr,
            BLOCK_N: tl.constexpr, TMA: tl.constexpr, DIAGONAL: tl.constexpr):  # fmt: skip
    """The running sums after the keys begin .. end."""
    for n in tl.range(begin, end, BLOCK_N):
        k = _load(qkv_n, b, H + h, n, T, 3 * H, D, BLOCK_N, BLOCK_D, TMA, not DIAGONAL)
        s = tl.dot(q, k.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if DIAGONAL:
            s = tl.where(rows[:, None] >= n + tl.arange(0, BLOCK_N)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * (scale * LOG2E))
        p = tl.exp2(s * (scale * LOG2E) - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = _load(qkv_n, b, 2 * H + h, n, T, 3 * H, D, BLOCK_N, BLOCK_D, TMA, not DIAGONAL)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, total, top


# ---------------------------------------------------------------------------------------------------------------------
# Backward


@triton.jit(do_not_specialize=["T", "H"])
def _backward_q(qkv_m, qkv_n, o_m, do_m, lse, delta, dqkv_m, T, H, scale, D: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """delta (B, H, T) and the queries' third of dqkv."""
    h, b = tl.program_id(0), tl.program_id(2)
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    of_head = (b * H + h).to(tl.int64) * T
    do = _load(do_m, b, h, start, T, H, D, BLOCK_M, BLOCK_D, TMA, False)
    o = _load(o_m, b, h, start, T, H, D, BLOCK_M, BLOCK_D, TMA, False)
    dl = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + of_head + rows, dl, mask=rows < T)
    q = _load(qkv_m, b, h, start, T, 3 * H, D, BLOCK_M, BLOCK_D, TMA, False)
    L = tl.load(lse + of_head + rows, mask=rows < T, other=float("inf"))
    dq = tl.full((BLOCK_M, BLOCK_D), 0.0, tl.float32)
    diagonal = start // BLOCK_N * BLOCK_N
    dq = _sum_dq(dq, q, do, L, dl, qkv_n, rows, 0, diagonal, b, h, T, H, scale, D, BLOCK_D, BLOCK_N, TMA, False)
    end = tl.minimum(start + BLOCK_M, T)
    dq = _sum_dq(dq, q, do, L, dl, qkv_n, rows, diagonal, end, b, h, T, H, scale, D, BLOCK_D, BLOCK_N, TMA, True)
    _store(dqkv_m, (dq * scale).to(q.dtype), b, h, start, T, 3 * H, D, BLOCK_M, BLOCK_D, TMA)


@triton.jit
def _sum_dq(dq, q, do, L, dl, qkv_n, rows, begin, end, b, h, T, H, scale, D: tl.constexpr, BLOCK_D: tl.constexpr,
            BLOCK_N: tl.constexpr, TMA: tl.constexpr, DIAGONAL: tl.constexpr):  # fmt: skip
    """dQ sqrt(D) after the keys begin .. end."""
    for n in tl.range(begin, end, BLOCK_N):
        k = _load(qkv_n, b, H + h, n, T, 3 * H, D, BLOCK_N, BLOCK_D, TMA, not DIAGONAL)
        v = _load(qkv_n, b, 2 * H + h, n, T, 3 * H, D, BLOCK_N, BLOCK_D, TMA, not DIAGONAL)
        s = tl.dot(q, k.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if DIAGONAL:
            s = tl.where(rows[:, None] >= n + tl.arange(0, BLOCK_N)[None, :], s, float("-inf"))
        p = tl.exp2(s * (scale * LOG2E) - L[:, None])
        dp = tl.dot(do, v.T, input_precision="ieee")
        ds = p * (dp - dl[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["T", "H"])
def _backward_kv(qkv_m, qkv_n, do_m, lse, delta, dqkv_n, T, H, scale, D: tl.constexpr, BLOCK_D: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """The keys' and the values' third of dqkv. Here the first block is the longest: all queries see its keys."""
    h, start, b = tl.program_id(0), tl.program_id(1) * BLOCK_N, tl.program_id(2)
    k = _load(qkv_n, b, H + h, start, T, 3 * H, D, BLOCK_N, BLOCK_D, TMA, False)
    v = _load(qkv_n, b, 2 * H + h, start, T, 3 * H, D, BLOCK_N, BLOCK_D, TMA, False)
    of_head = (b * H + h).to(tl.int64) * T
    lse += of_head
    delta += of_head
    dk = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    dv = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    first = start // BLOCK_M * BLOCK_M
    past = (start + BLOCK_N + BLOCK_M - 1) // BLOCK_M * BLOCK_M  # from here on every query sees every key
    dk, dv = _sum_dkv(dk, dv, k, v, qkv_m, do_m, lse, delta, start, first, tl.minimum(past, T), b, h, T, H, scale,
                      D, BLOCK_D, BLOCK_M, BLOCK_N, TMA, True)  # fmt: skip
    dk, dv = _sum_dkv(dk, dv, k, v, qkv_m, do_m, lse, delta, start, past, T, b, h, T, H, scale,
                      D, BLOCK_D, BLOCK_M, BLOCK_N, TMA, False)  # fmt: skip
    _store(dqkv_n, (dk * scale).to(k.dtype), b, H + h, start, T, 3 * H, D, BLOCK_N, BLOCK_D, TMA)
    _store(dqkv_n, dv.to(k.dtype), b, 2 * H + h, start, T, 3 * H, D, BLOCK_N, BLOCK_D, TMA)


@triton.jit
def _sum_dkv(dk, dv, k, v, qkv_m, do_m, lse, delta, start, begin, end, b, h, T, H, scale, D: tl.constexpr,
             BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
             DIAGONAL: tl.constexpr):  # fmt: skip
    """dK sqrt(D) and dV after the queries begin .. end."""
    for m in tl.range(begin, end, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        q = _load(qkv_m, b, h, m, T, 3 * H, D, BLOCK_M, BLOCK_D, TMA, False)
        L = tl.load(lse + rows, mask=rows < T, other=float("inf"))  # makes P zero past T
        s = tl.dot(k, q.T, input_precision="ieee")  # S^T (BLOCK_N, BLOCK_M)
        if DIAGONAL:
            s = tl.where(rows[None, :] >= start + tl.arange(0, BLOCK_N)[:, None], s, float("-inf"))
        p = tl.exp2(s * (scale * LOG2E) - L[None, :])
        do = _load(do_m, b, h, m, T, H, D, BLOCK_M, BLOCK_D, TMA, False)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dl = tl.load(delta + rows, mask=rows < T, other=0.0)
        dp = tl.dot(v, do.T, input_precision="ieee")
        ds = p * (dp - dl[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


# ---------------------------------------------------------------------------------------------------------------------
# Which tiles


class Tile(NamedTuple):
    m: int  # BLOCK_M, queries
    n: int  # BLOCK_N, keys
    warps: int
    stages: int  # of the software pipeline


# By target and head size (64 serves the smaller ones too), for _forward, _backward_q and _backward_kv. None spills
# registers on sm_80 and sm_90 (bench/results/kernels_aot.md), where two blocks of the first two fit on a multiprocessor
# at D = 64, one at D = 128.
TILES = {
    ("sm_90", 64): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 3)),
    ("sm_90", 128): (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 3)),
    ("sm_100", 64): (Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    ("sm_100", 128): (Tile(128, 64, 4, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    ("sm_80", 64): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(32, 64, 4, 2)),
    ("sm_80", 128): (Tile(128, 32, 8, 3), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
    # head sizes that are no multiple of 8, whose heads start at odd places: pointers, on any target
    ("odd", 64): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 64, 4, 2)),
    ("odd", 128): (Tile(128, 32, 8, 3), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    # sequences of at most 64, on any target
    ("short", 64): (Tile(64, 64, 4, 2), Tile(64, 32, 4, 3), Tile(32, 64, 4, 2)),
    ("short", 128): (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 3)),
    # float32, whose products run without tensor cores, on any target
    ("float32", 64): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    ("float32", 128): (Tile(32, 16, 8, 2), Tile(32, 16, 8, 2), Tile(16, 32, 8, 2)),
}
KERNELS = (_forward, _backward_q, _backward_kv)


@functools.cache
def target_of(device: torch.device) -> str:
    """The rows of TILES for a device. Consumer cards (sm_86, sm_89, sm_120) have less shared memory than sm_80, whose
    tiles fit them."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def configure(kernel, target: str, dtype: torch.dtype, T: int, D: int) -> dict:
    """The constexprs and launch options of a kernel for a sequence length and head size."""
    half, aligned = dtype != torch.float32, D % 8 == 0  # aligned: heads start at multiples of 16 bytes
    tma = half and aligned and target != "sm_80"
    rows = "float32" if not half else "odd" if not aligned else "short" if T <= 64 else target
    tile = TILES[rows, 64 if D <= 64 else 128][KERNELS.index(kernel)]
    return {"D": D, "BLOCK_D": max(16, triton.next_power_of_2(D)), "BLOCK_M": tile.m, "BLOCK_N": tile.n, "TMA": tma,
            "num_warps": tile.warps, "num_stages": tile.stages}  # fmt: skip


GATE = {(90, 128), (90, 64), (90, 32), (90, 96), (80, 128), (80, 64)}  # most used: capability and head size


def aot():
    """For bench.aot: every row of TILES on every target, and head sizes that need padding."""
    cases = [(torch.bfloat16, 1024, D) for D in (128, 64, 32, 16, 96, 24, 90, 50, 26, 10)]
    cases += [(dtype, T, D) for dtype, T in ((torch.bfloat16, 64), (torch.float32, 1024)) for D in (128, 64)]
    for capability in (90, 80, 100):
        for dtype, T, D in cases:
            for kernel in KERNELS:
                options = configure(kernel, f"sm_{capability}", dtype, T, D)
                name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
                yield {
                    "label": f"{kernel.__name__[1:]} {name} D{D} T{'<=' if T == 64 else '>'}64",
                    "kernel": kernel,
                    "signature": {arg: _type_of(arg, name, options) for arg in kernel.arg_names if arg not in options},
                    "constexprs": {arg: options[arg] for arg in kernel.arg_names if arg in options},
                    "num_warps": options["num_warps"],
                    "num_stages": options["num_stages"],
                    "capabilities": (capability,),
                    "gate": (capability, D) in GATE and name == "bf16" and T > 64,
                    "odd": ("T", "H"),
                }


def _type_of(argument: str, dtype: str, options: dict) -> str:
    if argument in ("T", "H"):
        return "i32"
    if argument in ("scale", "lse", "delta"):
        return "fp32" if argument == "scale" else "*fp32"
    rows = options[f"BLOCK_{argument[-1].upper()}"]
    return f"tensordesc<{dtype}[1, 1, {rows}, {options['BLOCK_D']}]>" if options["TMA"] else f"*{dtype}"


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def _launch(kernel, qkv: Tensor, n_heads: int, **tensors: Tensor) -> None:
    """One program for each block of each head; those of a batch element run together, for they share its rows."""
    B, T, C3 = qkv.shape
    D = C3 // 3 // n_heads
    options = configure(kernel, target_of(qkv.device), qkv.dtype, T, D)
    options["TMA"] &= all(x.data_ptr() % 16 == 0 for x in tensors.values())
    if options["TMA"]:
        for name in [name for name in tensors if name[-2:] in ("_m", "_n")]:
            heads = tensors[name].view(B, T, -1, D).transpose(1, 2)  # (B, heads, T, D)
            block = [1, 1, options[f"BLOCK_{name[-1].upper()}"], options["BLOCK_D"]]
            tensors[name] = TensorDescriptor(heads, list(heads.shape), list(heads.stride()), block)
    rows = options["BLOCK_N" if kernel is _backward_kv else "BLOCK_M"]
    kernel[n_heads, triton.cdiv(T, rows), B](**tensors, T=T, H=n_heads, scale=D**-0.5, **options)


@torch.library.custom_op("nanochin::attention", mutates_args=())
def _attention(qkv: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    B, T, C3 = qkv.shape
    qkv = qkv.contiguous()
    o, lse = qkv.new_empty(B, T, C3 // 3), qkv.new_empty(B, n_heads, T, dtype=torch.float32)
    _launch(_forward, qkv, n_heads, qkv_m=qkv, qkv_n=qkv, o_m=o, lse=lse)
    return o, lse


@_attention.register_fake
def _(qkv, n_heads):
    B, T, C3 = qkv.shape
    return qkv.new_empty(B, T, C3 // 3), qkv.new_empty(B, n_heads, T, dtype=torch.float32)


@torch.library.custom_op("nanochin::attention_backward", mutates_args=())
def _attention_backward(do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, n_heads: int) -> Tensor:
    do, qkv, o = do.contiguous(), qkv.contiguous(), o.contiguous()
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    _launch(_backward_q, qkv, n_heads, qkv_m=qkv, qkv_n=qkv, o_m=o, do_m=do, lse=lse, delta=delta, dqkv_m=dqkv)
    _launch(_backward_kv, qkv, n_heads, qkv_m=qkv, qkv_n=qkv, do_m=do, lse=lse, delta=delta, dqkv_n=dqkv)
    return dqkv


@_attention_backward.register_fake
def _(do, qkv, o, lse, n_heads):
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output):
    (qkv, ctx.n_heads), (o, lse) = inputs, output
    ctx.save_for_backward(qkv, o, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, do, _):
    return _attention_backward(do, *ctx.saved_tensors, ctx.n_heads), None


_attention.register_autograd(_backward, setup_context=_setup_context)


def _forward_flops(qkv, n_heads, *_, **__) -> int:
    B, T, C3 = qkv
    return 4 * B * T * T * (C3 // 3)


def _backward_flops(do, qkv, *_, **__) -> int:
    return 2 * _forward_flops(qkv, None)


# For FlopCounterMode(custom_mapping=...): two products of T x T x D a head, not halved for the mask, nor counting what
# the backward computes again.
FLOP_FORMULAS = {
    torch.ops.nanochin.attention: _forward_flops,
    torch.ops.nanochin.attention_backward: _backward_flops,
}


def attention(qkv: Tensor, n_heads: int) -> Tensor:
    """Causal self-attention on packed qkv (B, T, 3C) -> (B, T, C), in float32, float16 or bfloat16.

    Raises ValueError for another dtype, and if qkv does not hold three times `n_heads` heads of at most 128.
    """
    C3 = qkv.shape[-1]
    if C3 % (3 * n_heads) or C3 // (3 * n_heads) > 128:
        raise ValueError(f"attention: qkv of width {C3} is not 3 x {n_heads} heads of at most 128 numbers")
    if qkv.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"attention: qkv is {qkv.dtype}, the kernels compute in float32, float16 and bfloat16")
    return _attention(qkv, n_heads)[0]
