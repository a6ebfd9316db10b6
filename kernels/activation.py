"""Activations of the feed-forward layer in Triton, one pass forward and one backward (`reference.activation`).

    kind         forward                                      derivative
    gelu         x P,  P = (1 + erf(x / sqrt 2)) / 2          P + x exp(-x^2 / 2) / sqrt(2 pi)
    gelu_tanh    x s,  s = sigmoid(2 u),                      s + x s (1 - s) 2 u'
                 u = sqrt(2 / pi) (x + 0.044715 x^3)
    relu2        max(x, 0)^2                                  2 max(x, 0)
    swiglu       a s u,  s = sigmoid(a),                      by a: u s (1 + a (1 - s));  by u: a s
                 (a, u) the halves of x

(0.5 (1 + tanh u) = sigmoid(2 u).) All in float32; only x is saved for the backward.

In `activation_linear` a matrix product follows. Its weight gradient needs the output of the activation, the widest
tensor of a block. The backward recomputes it from x, which it reads anyway: this saves 2F bytes per token and layer
(bf16) and writes them once more.

The activation is not fused with the neighbouring matrix products: our own product would have to be within 3 % of
cuBLAS to gain 1-3 % of a step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = ("gelu", "gelu_tanh", "relu2", "swiglu")


@triton.jit
def _sigmoid(x):
    """s and s (1 - s), both accurate where s is close to 1; nothing overflows."""
    e = tl.exp(-tl.abs(x))
    r = 1 / (1 + e)
    return tl.where(x < 0, e * r, r), e * r * r


@triton.jit
def _value(x, KIND: tl.constexpr):
    if KIND == "gelu":
        return x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))[0]
    else:  # relu2; tl.where, since maximum would hide a NaN
        x = tl.where(x < 0, 0.0, x)
        return x * x


@triton.jit
def _slope(x, KIND: tl.constexpr):
    if KIND == "gelu":
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == "gelu_tanh":
        s, ds = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * ds * 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        return 2 * tl.where(x < 0, 0.0, x)


@triton.jit
def _tile(M, F, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows and columns of this program in the (M, F) outputs, and the mask of those that exist."""
    blocks = tl.cdiv(F, BLOCK)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return rows[:, None], cols[None, :], (rows < M)[:, None] & (cols < F)[None, :]


@triton.jit
def _forward(X, Y, M, F, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, cols, inside = _tile(M, F, ROWS, BLOCK)
    if KIND == "swiglu":
        at = rows * (2 * F) + cols
        gate = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(X + at + F, mask=inside, other=0.0).to(tl.float32)
        y = gate * _sigmoid(gate)[0] * up
    else:
        x = tl.load(X + rows * F + cols, mask=inside, other=0.0).to(tl.float32)
        y = _value(x, KIND)
    tl.store(Y + rows * F + cols, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(G, X, DX, Y, M, F, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of x, and the output of the forward unless Y is None."""
    rows, cols, inside = _tile(M, F, ROWS, BLOCK)
    g = tl.load(G + rows * F + cols, mask=inside, other=0.0).to(tl.float32)
    if KIND == "swiglu":
        at = rows * (2 * F) + cols
        gate = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(X + at + F, mask=inside, other=0.0).to(tl.float32)
        s, ds = _sigmoid(gate)
        tl.store(DX + at, (g * up * (s + gate * ds)).to(DX.dtype.element_ty), mask=inside)
        tl.store(DX + at + F, (g * gate * s).to(DX.dtype.element_ty), mask=inside)
        y = gate * s * up
    else:
        x = tl.load(X + rows * F + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + rows * F + cols, (g * _slope(x, KIND)).to(DX.dtype.element_ty), mask=inside)
        y = _value(x, KIND)
    if Y is not None:
        tl.store(Y + rows * F + cols, y.to(Y.dtype.element_ty), mask=inside)


def _config(F: int) -> dict:
    """2048 numbers on 128 threads: 16 per thread, two 16-byte accesses in bf16."""
    block = min(2048, triton.next_power_of_2(F))
    return {"ROWS": 2048 // block, "BLOCK": block, "num_warps": 4}


def _launch(kernel, *tensors: Tensor | None, like: Tensor, kind: str) -> None:
    """Launch over the (M, F) outputs, which have the shape of `like`. Without a gate all numbers form one row."""
    F = like.shape[-1] if kind == "swiglu" else like.numel()
    M = like.numel() // F
    config = _config(F)
    programs = triton.cdiv(M, config["ROWS"]) * triton.cdiv(F, config["BLOCK"])
    kernel[(programs,)](*tensors, M, F, KIND=kind, **config)


@torch.library.custom_op("nanochin::activation", mutates_args=())
def activate(x: Tensor, kind: str) -> Tensor:
    """x (..., F), or (..., 2F) for swiglu -> (..., F)."""
    x = x.contiguous()
    y = _output(x, kind)
    _launch(_forward, x, y, like=y, kind=kind)
    return y


@activate.register_fake
def _output(x, kind):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2 if kind == "swiglu" else x.shape[-1]))


@torch.library.custom_op("nanochin::activation_backward", mutates_args=())
def activate_backward(grad: Tensor, x: Tensor, kind: str, recompute: bool) -> tuple[Tensor, Tensor]:
    """-> gradient of x; activate(x), empty unless `recompute`."""
    grad, x = grad.contiguous(), x.contiguous()
    dx, y = _backward_outputs(grad, x, kind, recompute)
    _launch(_backward, grad, x, dx, y if recompute else None, like=grad, kind=kind)
    return dx, y


@activate_backward.register_fake
def _backward_outputs(grad, x, kind, recompute):
    return x.new_empty(x.shape), x.new_empty(grad.shape if recompute else 0)


def _setup_context(ctx, inputs, output):
    x, ctx.kind = inputs
    ctx.save_for_backward(x)


def _autograd(ctx, grad):
    return activate_backward(grad, *ctx.saved_tensors, ctx.kind, False)[0], None


activate.register_autograd(_autograd, setup_context=_setup_context)


class _ActivationLinear(torch.autograd.Function):
    """y = a W^T + b with a = activation(x):  dx from da = g W,  dW = g^T a,  db = sum over rows of g."""

    @staticmethod
    def forward(ctx, x, weight, bias, kind):
        ctx.kind, ctx.bias = kind, bias is not None
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.linear(activate(x, kind), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        train_weight = ctx.needs_input_grad[1]
        dx, a = activate_backward(grad @ weight, x, ctx.kind, train_weight)
        rows = grad.flatten(0, -2)
        return dx, rows.T @ a.flatten(0, -2) if train_weight else None, rows.sum(0) if ctx.bias else None, None


def activation_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """`kernels.ops.activation_linear`; saves only x and weight for the backward. x has at least two dimensions; weight
    and bias have its dtype."""
    return _ActivationLinear.apply(x, weight, bias, kind)
