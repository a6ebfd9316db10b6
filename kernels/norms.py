"""RMSNorm and LayerNorm over the last dimension of x or of x + residual, in Triton (see `kernels.reference`).

Forward, per row of C numbers, all in float32:
    x  <- x + residual, rounded to its dtype                            (only with a residual)
    m  =  mean(x) for LayerNorm, 0 for RMSNorm
    r  =  (mean((x - m)^2) + eps)^(-1/2)
    n  =  (x - m) r,    y = n w + b
Backward, with g the gradient of y and t that of the sum (0 without a residual):
    dx =  r (w g - mean(w g) - n mean(w g n)) + t,  also the gradient of the residual
    dw =  sum over rows of g n,    db = sum over rows of g
without the term mean(w g) for RMSNorm, whose m is constant.

Both directions are memory-bound: a row is read once, kept in registers, and written once. The backward runs two
programs per multiprocessor. Each sums over many rows; one reduction adds the partial sums, always in the same order.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 32768  # a row must fit the registers of one program


@triton.jit
def _forward(X, Residual, W, B, Y, Total, Stats, M, C, eps,
             CENTRED: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
             ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (cols < C)[None, :]
    at = rows.to(tl.int64)[:, None] * C + cols[None, :]

    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)  # (ROWS, BLOCK)
    if ADD:
        total = (x + tl.load(Residual + at, mask=inside, other=0.0).to(tl.float32)).to(Total.dtype.element_ty)
        tl.store(Total + at, total, mask=inside)
        x = total.to(tl.float32)  # the backward sees the rounded sum
    if CENTRED:
        mean = tl.sum(x, 1) / C
        tl.store(Stats + M + rows, mean, mask=rows < M)
        x = tl.where(inside, x - mean[:, None], 0.0)
    r = 1 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
    tl.store(Stats + rows, r, mask=rows < M)

    y = x * r[:, None] * tl.load(W + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        y += tl.load(B + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(G, GTotal, X, W, Stats, DX, Partial, M, C,
              CENTRED: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
              ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK)
    w = tl.load(W + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    db = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in tl.range(program * ROWS, M, programs * ROWS, num_stages=2):  # prefetch the next rows
        rows = start + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & (cols < C)[None, :]
        at = rows.to(tl.int64)[:, None] * C + cols[None, :]
        g = tl.load(G + at, mask=inside, other=0.0).to(tl.float32)
        n = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(Stats + rows, mask=rows < M, other=0.0)[:, None]
        if CENTRED:  # g is 0 outside, so n does not matter there
            n -= tl.load(Stats + M + rows, mask=rows < M, other=0.0)[:, None]
        n *= r
        dw += g * n
        if BIAS:
            db += g
        g *= w
        dx = g - n * (tl.sum(g * n, 1) / C)[:, None]
        if CENTRED:
            dx -= (tl.sum(g, 1) / C)[:, None]
        dx *= r
        if ADD:
            dx += tl.load(GTotal + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=inside)
    at = program.to(tl.int64) * C + cols  # Partial is (1 or 2, programs, C): weight, bias
    tl.store(Partial + at, tl.sum(dw, 0), mask=cols < C)
    if BIAS:
        tl.store(Partial + programs.to(tl.int64) * C + at, tl.sum(db, 0), mask=cols < C)


# Whole rows, 4096 numbers in all: 32 per thread forward (4 warps) and 16 backward (8 warps), so that all stay in
# registers (bench/results/kernels_aot_*.md). Wider rows take more warps.


def _forward_config(C: int) -> dict:
    block = triton.next_power_of_2(C)
    warps = 4 if block <= 4096 else 8 if block <= 8192 else 16
    return {"ROWS": min(32, max(1, 4096 // block)), "BLOCK": block, "num_warps": warps}


def _backward_config(C: int) -> dict:
    config = _forward_config(C)
    return config | {"num_warps": 8 if config["BLOCK"] <= 4096 else 16}


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@torch.library.custom_op("nanochin::norm", mutates_args=())
def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> normed (..., C); x + residual (..., C), empty without a residual; 1/std (and mean) of each row, (1 or 2, M).

    Raises ValueError for rows wider than MAX_WIDTH and for mismatched shapes or dtypes.
    """
    x, residual, weight, bias = _contiguous(x, residual, weight, bias)
    M, C = x.numel() // x.shape[-1], x.shape[-1]
    if C > MAX_WIDTH:
        raise ValueError(f"norm over {C} numbers: at most {MAX_WIDTH} fit one program")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(f"norm: residual is {residual.dtype} {tuple(residual.shape)}, x is {x.dtype} {tuple(x.shape)}")
    if any(p is not None and p.shape != (C,) for p in (weight, bias)):
        raise ValueError(f"norm over {C} numbers: needs {C} weights, not {tuple(weight.shape)}")
    normed, total, stats = _norm_outputs(x, residual, weight, bias, eps, centred)
    config = _forward_config(C)
    _forward[(triton.cdiv(M, config["ROWS"]),)](
        x, residual, weight, bias, normed, total, stats, M, C, eps,
        CENTRED=centred, ADD=residual is not None, BIAS=bias is not None, **config)  # fmt: skip
    return normed, total, stats


@norm.register_fake
def _norm_outputs(x, residual, weight, bias, eps, centred):
    M = x.numel() // x.shape[-1]
    total = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), total, x.new_empty((1 + centred, M), dtype=torch.float32)


@torch.library.custom_op("nanochin::norm_backward", mutates_args=())
def norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, stats: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """-> gradient of x and of the residual (..., C); gradients of weight (and bias), float32 (1 or 2, C)."""
    grad, grad_total, x, weight, stats = _contiguous(grad, grad_total, x, weight, stats)
    M, C = x.numel() // x.shape[-1], x.shape[-1]
    config = _backward_config(C)
    programs = min(triton.cdiv(M, config["ROWS"]), 2 * _processors(x.device))
    dx = torch.empty_like(x)
    partial = x.new_empty((1 + bias, programs, C), dtype=torch.float32)
    _backward[(programs,)](
        grad, grad_total, x, weight, stats, dx, partial, M, C,
        CENTRED=len(stats) == 2, ADD=grad_total is not None, BIAS=bias, **config)  # fmt: skip
    return dx, partial.sum(1)


@norm_backward.register_fake
def _(grad, grad_total, x, weight, stats, bias):
    return x.new_empty(x.shape), x.new_empty((1 + bias, x.shape[-1]), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, _, _ = inputs
    _, total, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats)
    ctx.residual, ctx.bias = residual is not None, None if bias is None else bias.dtype
    ctx.save_for_backward(x if residual is None else total, weight, stats)


def _autograd(ctx, grad, grad_total, _):
    x, weight, stats = ctx.saved_tensors
    if not ctx.residual:
        grad_total = None
    if grad is None:  # only the sum was used
        return grad_total, grad_total, None, None, None, None
    dx, dparameters = norm_backward(grad, grad_total, x, weight, stats, ctx.bias is not None)
    dweight = dparameters[0].to(weight.dtype)
    dbias = None if ctx.bias is None else dparameters[1].to(ctx.bias)
    return dx, dx if ctx.residual else None, dweight, dbias, None, None


norm.register_autograd(_autograd, setup_context=_setup_context)


def _contiguous(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


# The functions that `kernels.ops` documents


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return norm(x, None, weight, None, eps, False)[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    return norm(x, None, weight, bias, eps, True)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    return norm(x, residual, weight, None, eps, False)[:2]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    return norm(x, residual, weight, bias, eps, True)[:2]
