"""Causal attention as Triton kernels: softmax(Q K^T / sqrt(D)) V on packed qkv (B, T, 3C), without storing the T x T
scores; optionally with rotary positions and QK-norm.

`kernels.reference.attention` is the mathematics. For one head, with Q, K, V (T, D) and c = log2(e) / sqrt(D):

Forward. A program owns BLOCK_M queries and loops over the keys in blocks of BLOCK_N. With S = Q K^T it keeps for each
query `top`, the running maximum of c S, `total`, the sum of P = 2^(c S - top), and `acc`, the sum of P V. When a block
raises top, the sums are multiplied by 2^(old top - new top) (Milakov and Gimelshein 2018; FlashAttention, Dao et al.
2022). At the end O = acc / total, and L = top + log2 total, one number per query, is saved for the backward. Keys
before the block of queries need no mask and have their own loop; the masked loop covers only the diagonal.

Backward. P = 2^(c S - L) is recomputed. With dO the gradient of O,

    dV = P^T dO      dP = dO V^T      delta = rowsum(dO * O)      dS = P * (dP - delta)
    dQ = dS K / sqrt(D)      dK = dS^T Q / sqrt(D)

in two kernels. One owns a block of queries, computes delta and sums dQ over the keys. The other owns a block of keys
and sums dK and dV over the queries; it works on S^T, so that no product needs a transposed sum. Both compute the scores
(7 products instead of 5), but no sum crosses programs: no atomics, no float32 buffer for dQ, bit-identical results.

Heads are read in place from qkv (B, T, 3H heads, D), and gradients are written to the same places of one packed dqkv:
no transpose, no copy. On Hopper and Blackwell, tiles are moved by TMA descriptors of (B, heads, T, D) views, which read
zeros and store nothing past the end of a sequence or narrow head. Other GPUs use pointers with masks. L and delta are
padded to whole tiles, (B, H, T rounded up to PAD), and need no mask. Sums are float32 for all input dtypes.

Rotary positions and QK-norm. A pass before attention (`rotary.rotate_qk`) writes the rotated queries and keys to a
separate tensor, qk (B, T, 2H heads, D); values stay in qkv. With y = R n a rotated head, R the rotation, n = r x the
normalised head (n = x without QK-norm) and g the gradient of y, the two backward kernels store

    dx = r R^T (g - y mean(y g))              (without QK-norm: R^T g)

directly from their accumulators. R preserves inner products, so mean(y g) is the mean(n R^T g) of the norm's
derivative, and x is not needed. In qk the halves of a head are interleaved: the two numbers of a rotated pair are
adjacent.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.fallback import rotary_table
from kernels.rotary import rotate_qk

LOG2E = tl.constexpr(1.4426950408889634)
PAD = tl.constexpr(128)  # L and delta are padded to multiples of this


# ---------------------------------------------------------------------------------------------------------------------
# Tiles: ROWS rows, starting at `row`, of head `head` of sequence b, in x (B, T, heads D)


@triton.jit
def _load(x, b, head, row, T, heads, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
          INSIDE: tl.constexpr):  # fmt: skip
    """(ROWS, BLOCK_D), zeros past T and past D. INSIDE: all rows are known to be before T."""
    if TMA:
        tile = x.load([b, head, row, 0]).reshape(ROWS, BLOCK_D)
    else:
        rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
        place = x + (b.to(tl.int64) * T + row) * (heads * D) + head * D + (rows * (heads * D) + columns)
        if INSIDE and D == BLOCK_D:
            tile = tl.load(place)
        else:
            inside = columns < D if INSIDE else rows < T - row if D == BLOCK_D else (rows < T - row) & (columns < D)
            tile = tl.load(place, mask=inside, other=0.0)
    return tile


@triton.jit
def _store(
    x, tile, b, head, row, T, heads, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr
):
    """Store the rows before T and the columns before D of `tile`."""
    if TMA:
        x.store([b, head, row, 0], tile.reshape(1, 1, ROWS, BLOCK_D))
    else:
        rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
        place = x + (b.to(tl.int64) * T + row) * (heads * D) + head * D + (rows * (heads * D) + columns)
        tl.store(place, tile, mask=(rows < T - row) & (columns < D))


@triton.jit
def _row_places(x, head, row, T, ROWS: tl.constexpr):
    """Pointers to ROWS numbers of L or delta (B H, T rounded up); `head` is an index into B H."""
    tl.static_assert(PAD % ROWS == 0)
    return x + head.to(tl.int64) * (tl.cdiv(T, PAD) * PAD) + row + tl.arange(0, ROWS)


@triton.jit
def _load_rows(x, head, row, T, ROWS: tl.constexpr, TMA: tl.constexpr):
    return x.load([head, row]).reshape(ROWS) if TMA else tl.load(_row_places(x, head, row, T, ROWS))


@triton.jit
def _store_rotated_back(dqkv, g, qk, table, r, b, head, row, T, H, D: tl.constexpr, ROWS: tl.constexpr,
                        BLOCK_D: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Store the gradient of query or key head `head` of 2H, from the gradient g (ROWS, BLOCK_D) of the rotated head."""
    HALF: tl.constexpr = D // 2
    rows, columns = row + tl.arange(0, ROWS), tl.arange(0, BLOCK_D // 2)
    inside = (rows < T)[:, None] & (columns < HALF)[None, :]
    if r is not None:  # QK-norm
        y = _load(qk, b, head, row, T, 2 * H, D, ROWS, BLOCK_D, TMA, False).to(tl.float32)
        g -= y * (tl.sum(y * g, 1) / D)[:, None]
        g *= tl.load(r + (b.to(tl.int64) * T + rows) * (2 * H) + head, mask=rows < T, other=0.0)[:, None]
    g1, g2 = tl.split(g.reshape(ROWS, BLOCK_D // 2, 2))
    if table is not None:
        at = rows[:, None] * D + columns[None, :]
        cos = tl.load(table + at, mask=inside, other=0.0)
        sin = tl.load(table + at + HALF, mask=inside, other=0.0)
        g1, g2 = g1 * cos + g2 * sin, g2 * cos - g1 * sin
    place = dqkv + (b.to(tl.int64) * T + row) * (3 * H * D) + head * D
    place += tl.arange(0, ROWS)[:, None] * (3 * H * D) + columns[None, :]
    tl.store(place, g1.to(dqkv.dtype.element_ty), mask=inside)
    tl.store(place + HALF, g2.to(dqkv.dtype.element_ty), mask=inside)


# Arguments ending in _m are read or written BLOCK_M rows at a time, those in _n BLOCK_N rows; with TMA they are
# descriptors. qk is qkv itself, or the tensor of rotated queries and keys if ROTATED.


@triton.jit(do_not_specialize=["T", "H"])
def _forward(qk_m, qk_n, v_n, o_m, lse, T, H, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, TMA: tl.constexpr, ROTATED: tl.constexpr):  # fmt: skip
    """O (B, T, C) and L (B, H, T rounded up); rows of L past T are finite."""
    h, b = tl.program_id(0), tl.program_id(2)
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # longest first: the last queries have most keys
    qk_heads = (2 if ROTATED else 3) * H
    q = _load(qk_m, b, h, start, T, qk_heads, D, BLOCK_M, BLOCK_D, TMA, False)
    rows = start + tl.arange(0, BLOCK_M)
    acc = tl.full((BLOCK_M, BLOCK_D), 0.0, tl.float32)
    total = tl.full((BLOCK_M,), 0.0, tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    diagonal = start // BLOCK_N * BLOCK_N
    end = tl.minimum(start + BLOCK_M, T)
    for DIAGONAL in tl.static_range(2):
        for n in tl.range(diagonal if DIAGONAL else 0, end if DIAGONAL else diagonal, BLOCK_N):
            k = _load(qk_n, b, H + h, n, T, qk_heads, D, BLOCK_N, BLOCK_D, TMA, not DIAGONAL)
            s = tl.dot(q, k.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
            if DIAGONAL:
                s = tl.where(rows[:, None] >= n + tl.arange(0, BLOCK_N)[None, :], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1) * (scale * LOG2E))
            p = tl.exp2(s * (scale * LOG2E) - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            v = _load(v_n, b, 2 * H + h, n, T, 3 * H, D, BLOCK_N, BLOCK_D, TMA, not DIAGONAL)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            top = new_top
    _store(o_m, (acc / total[:, None]).to(q.dtype), b, h, start, T, H, D, BLOCK_M, BLOCK_D, TMA)
    L = top + tl.log2(total)
    tl.store(_row_places(lse, b * H + h, start, T, BLOCK_M), L)


@triton.jit(do_not_specialize=["T", "H"])
def _backward_q(qk_m, qk_n, v_n, o_m, do_m, lse, delta, dqkv, dqkv_m, table, r, T, H, scale, D: tl.constexpr,
                BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
                ROTATED: tl.constexpr):  # fmt: skip
    """delta (B, H, T rounded up) and the query third of dqkv."""
    h, b = tl.program_id(0), tl.program_id(2)
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    qk_heads = (2 if ROTATED else 3) * H
    rows = start + tl.arange(0, BLOCK_M)
    do = _load(do_m, b, h, start, T, H, D, BLOCK_M, BLOCK_D, TMA, False)
    o = _load(o_m, b, h, start, T, H, D, BLOCK_M, BLOCK_D, TMA, False)
    dl = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(_row_places(delta, b * H + h, start, T, BLOCK_M), dl)
    q = _load(qk_m, b, h, start, T, qk_heads, D, BLOCK_M, BLOCK_D, TMA, False)
    L = tl.load(_row_places(lse, b * H + h, start, T, BLOCK_M))
    dq = tl.full((BLOCK_M, BLOCK_D), 0.0, tl.float32)
    diagonal = start // BLOCK_N * BLOCK_N
    end = tl.minimum(start + BLOCK_M, T)
    for DIAGONAL in tl.static_range(2):
        for n in tl.range(diagonal if DIAGONAL else 0, end if DIAGONAL else diagonal, BLOCK_N):
            k = _load(qk_n, b, H + h, n, T, qk_heads, D, BLOCK_N, BLOCK_D, TMA, not DIAGONAL)
            v = _load(v_n, b, 2 * H + h, n, T, 3 * H, D, BLOCK_N, BLOCK_D, TMA, not DIAGONAL)
            s = tl.dot(q, k.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
            if DIAGONAL:
                s = tl.where(rows[:, None] >= n + tl.arange(0, BLOCK_N)[None, :], s, float("-inf"))
            p = tl.exp2(s * (scale * LOG2E) - L[:, None])
            dp = tl.dot(do, v.T, input_precision="ieee")
            ds = p * (dp - dl[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq *= scale
    if ROTATED:
        _store_rotated_back(dqkv, dq, qk_m, table, r, b, h, start, T, H, D, BLOCK_M, BLOCK_D, TMA)
    else:
        _store(dqkv_m, dq.to(q.dtype), b, h, start, T, 3 * H, D, BLOCK_M, BLOCK_D, TMA)


@triton.jit(do_not_specialize=["T", "H"])
def _backward_kv(qk_m, qk_n, v_n, do_m, lse_m, delta_m, dqkv, dqkv_n, table, r, T, H, scale, D: tl.constexpr,
                 BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
                 ROTATED: tl.constexpr):  # fmt: skip
    """The key and value thirds of dqkv. The first block is the longest: all queries see its keys. Queries past T add
    nothing: their dO and delta are 0."""
    h, start, b = tl.program_id(0), tl.program_id(1) * BLOCK_N, tl.program_id(2)
    qk_heads = (2 if ROTATED else 3) * H
    k = _load(qk_n, b, H + h, start, T, qk_heads, D, BLOCK_N, BLOCK_D, TMA, False)
    v = _load(v_n, b, 2 * H + h, start, T, 3 * H, D, BLOCK_N, BLOCK_D, TMA, False)
    dk = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    dv = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    first = start // BLOCK_M * BLOCK_M
    past = (start + BLOCK_N + BLOCK_M - 1) // BLOCK_M * BLOCK_M  # from here on every query sees every key
    for DIAGONAL in tl.static_range(1, -1, -1):
        for m in tl.range(first if DIAGONAL else past, tl.minimum(past, T) if DIAGONAL else T, BLOCK_M):
            q = _load(qk_m, b, h, m, T, qk_heads, D, BLOCK_M, BLOCK_D, TMA, False)
            L = _load_rows(lse_m, b * H + h, m, T, BLOCK_M, TMA)
            s = tl.dot(k, q.T, input_precision="ieee")  # S^T (BLOCK_N, BLOCK_M)
            if DIAGONAL:
                rows = m + tl.arange(0, BLOCK_M)
                s = tl.where(rows[None, :] >= start + tl.arange(0, BLOCK_N)[:, None], s, float("-inf"))
            p = tl.exp2(s * (scale * LOG2E) - L[None, :])
            do = _load(do_m, b, h, m, T, H, D, BLOCK_M, BLOCK_D, TMA, False)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dl = _load_rows(delta_m, b * H + h, m, T, BLOCK_M, TMA)
            dp = tl.dot(v, do.T, input_precision="ieee")
            ds = p * (dp - dl[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    _store(dqkv_n, dv.to(v.dtype), b, 2 * H + h, start, T, 3 * H, D, BLOCK_N, BLOCK_D, TMA)
    dk *= scale
    if ROTATED:
        _store_rotated_back(dqkv, dk, qk_n, table, r, b, H + h, start, T, H, D, BLOCK_N, BLOCK_D, TMA)
    else:
        _store(dqkv_n, dk.to(k.dtype), b, H + h, start, T, 3 * H, D, BLOCK_N, BLOCK_D, TMA)


# ---------------------------------------------------------------------------------------------------------------------
# Tile sizes

# (BLOCK_M queries, BLOCK_N keys, warps, pipeline stages) of _forward, _backward_q and _backward_kv, by target and head
# size; smaller heads use 64. No kernel spills registers on sm_80 and sm_90 (bench/results/kernels_aot_*.md);
# there two blocks of the first two fit a multiprocessor at D = 64, one at D = 128. BLOCK_M of _backward_kv must divide
# that of the other two: it reads L and delta in whole blocks, also past T, which they must have written.
TILES = {
    ("sm_90", 64): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 3)),
    ("sm_90", 128): ((128, 128, 8, 2), (128, 64, 8, 2), (32, 128, 8, 3)),
    ("sm_100", 64): ((128, 64, 4, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
    ("sm_100", 128): ((128, 64, 4, 2), (128, 64, 8, 2), (64, 128, 8, 2)),
    ("sm_80", 64): ((128, 64, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2)),
    ("sm_80", 128): ((128, 32, 8, 3), (128, 32, 8, 2), (64, 64, 8, 2)),
    # head sizes that are not multiples of 8, whose heads are not aligned: pointers, on any target
    ("odd", 64): ((128, 64, 8, 2), (128, 32, 8, 2), (32, 64, 8, 2)),
    ("odd", 128): ((64, 32, 8, 2), (64, 32, 8, 2), (16, 64, 8, 2)),
    # sequences of at most 64, on any target
    ("short", 64): ((64, 64, 4, 2), (64, 32, 4, 3), (32, 64, 8, 2)),
    ("short", 128): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 3)),
    # float32, multiplied without tensor cores, on any target
    ("float32", 64): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("float32", 128): ((32, 16, 8, 2), (32, 16, 8, 2), (16, 32, 8, 2)),
}
KERNELS = (_forward, _backward_q, _backward_kv)
TARGETS = {9: "sm_90", 10: "sm_100"}  # by major compute capability, all others sm_80


@functools.cache
def target_of(device: torch.device) -> str:
    """The target in TILES for a device. Consumer GPUs (sm_86, sm_89, sm_120) have less shared memory than sm_80, but
    its tiles fit them."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return TARGETS.get(major, "sm_80")


def configure(kernel, target: str, dtype: torch.dtype, T: int, D: int) -> dict:
    """The constexprs and launch options of a kernel for a sequence length and head size."""
    half, aligned = dtype != torch.float32, D % 8 == 0  # aligned: heads start at multiples of 16 bytes
    tma = half and aligned and target != "sm_80"
    tiles = "float32" if not half else "odd" if not aligned else "short" if T <= 64 else target
    tile = TILES[tiles, 64 if D <= 64 else 128][KERNELS.index(kernel)]
    options = dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tile, strict=True))
    return options | {"D": D, "BLOCK_D": max(16, triton.next_power_of_2(D)), "TMA": tma}


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def _launch(kernel, qkv: Tensor, n_heads: int, **arguments: Tensor | None) -> None:
    """One program per block and head; those of one sequence run together, since they share its rows."""
    B, T, C3 = qkv.shape
    D = C3 // 3 // n_heads
    options = configure(kernel, target_of(qkv.device), qkv.dtype, T, D)
    options["ROTATED"] = arguments["qk_m"] is not qkv
    options["TMA"] &= all(x is None or x.data_ptr() % 16 == 0 for x in arguments.values())
    if options["TMA"]:
        for name in [name for name in arguments if name[-2:] in ("_m", "_n")]:
            rows = options[f"BLOCK_{name[-1].upper()}"]
            if name in ("lse_m", "delta_m"):
                view, block = arguments[name].flatten(0, 1), [1, rows]  # (B H, T rounded up)
            else:
                view = arguments[name].view(B, T, -1, D).transpose(1, 2)  # (B, heads, T, D)
                block = [1, 1, rows, options["BLOCK_D"]]
            arguments[name] = TensorDescriptor(view, list(view.shape), list(view.stride()), block)
    rows = options["BLOCK_N" if kernel is _backward_kv else "BLOCK_M"]
    grid = n_heads, triton.cdiv(T, rows), B
    kernel[grid](**arguments, T=T, H=n_heads, scale=D**-0.5, **options)


@torch.library.custom_op("nanochin::attention", mutates_args=())
def _attention(qkv: Tensor, table: Tensor | None, n_heads: int, qk_norm: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> O (B, T, C), L (B, H, T rounded up), and the outputs of `rotary.rotate_qk`, empty without rotation or norm."""
    q = qkv = qkv.contiguous()
    o, lse, qk, r = _outputs(qkv, table, n_heads, qk_norm)
    if table is not None or qk_norm:
        q = qk
        rotate_qk(qkv, table, qk, r if qk_norm else None, n_heads)
    _launch(_forward, qkv, n_heads, qk_m=q, qk_n=q, v_n=qkv, o_m=o, lse=lse)
    return o, lse, qk, r


@_attention.register_fake
def _outputs(qkv, table, n_heads, qk_norm):
    B, T, C3 = qkv.shape
    rotated = table is not None or qk_norm
    float32 = functools.partial(qkv.new_empty, dtype=torch.float32)
    padded = (T + PAD.value - 1) // PAD.value * PAD.value
    o, lse = qkv.new_empty(B, T, C3 // 3), float32((B, n_heads, padded))
    qk, r = (B, T, C3 // 3 * 2) if rotated else 0, (B, T, 2 * n_heads) if qk_norm else 0
    return o, lse, qkv.new_empty(qk), float32(r)


@torch.library.custom_op("nanochin::attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor, qkv: Tensor, table: Tensor | None, o: Tensor, lse: Tensor, qk: Tensor, r: Tensor, n_heads: int
) -> Tensor:
    """The gradient of qkv."""
    do, qkv, o = do.contiguous(), qkv.contiguous(), o.contiguous()
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    q, r = qk if qk.numel() else qkv, r if r.numel() else None
    both = {"qk_m": q, "qk_n": q, "v_n": qkv, "do_m": do, "dqkv": dqkv, "table": table, "r": r}
    _launch(_backward_q, qkv, n_heads, **both, o_m=o, lse=lse, delta=delta, dqkv_m=dqkv)
    _launch(_backward_kv, qkv, n_heads, **both, lse_m=lse, delta_m=delta, dqkv_n=dqkv)
    return dqkv


@_attention_backward.register_fake
def _(do, qkv, table, o, lse, qk, r, n_heads):
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output):
    qkv, table, ctx.n_heads, _ = inputs
    o, *kept = output
    ctx.save_for_backward(qkv, table, o, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _backward(ctx, do, *_):
    return _attention_backward(do, *ctx.saved_tensors, ctx.n_heads), None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)


def attention(qkv: Tensor, n_heads: int, theta: float | None = None, qk_norm: bool = False) -> Tensor:
    """`kernels.ops.attention` in float32, float16 and bfloat16. Raises ValueError unless qkv is 3 x `n_heads` heads of
    an even size of at most 128."""
    _, T, C3 = qkv.shape
    D, rest = divmod(C3, 3 * n_heads)
    if rest or D % 2 or D > 128:
        raise ValueError(f"attention: qkv width {C3} is not 3 x {n_heads} heads of an even size of at most 128")
    table = None if theta is None else rotary_table(T, D, theta, qkv.device)
    return _attention(qkv, table, n_heads, qk_norm)[0]
