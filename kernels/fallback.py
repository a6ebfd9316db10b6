"""Every operation in PyTorch, for platforms without Triton (CPU, macOS, Windows). `kernels.ops` documents them.

PyTorch's own operation is used where it is fast (attention, layer norm, activations). RMSNorm, rotary positions and the
loss have their own forward and backward, which pass over memory less often; the gain is in
bench/results/train_throughput_cpu.md and LOG.md.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference


def attention(qkv: Tensor, n_heads: int, theta: float | None = None, qk_norm: bool = False) -> Tensor:
    B, T, C3 = qkv.shape
    qkv = rotary(qkv, n_heads, theta, qk_norm)
    q, k, v = qkv.view(B, T, 3, n_heads, C3 // 3 // n_heads).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(B, T, C3 // 3)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    # On a CPU PyTorch's RMSNorm is a chain of elementwise operations, and so is its derivative.
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


class _RMSNorm(torch.autograd.Function):
    """y = w x r with r = (x.x / C + eps)^(-1/2):  dx = r w g - x r^3 (w g . x) / C,  dw = sum over rows of g x r."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x))
        r = (norm.square() / x.shape[-1] + eps).rsqrt()  # (..., 1)
        ctx.save_for_backward(x, weight, r)
        # A new tensor: torch.compile in 2.11 gives no gradient to an output that is also an intermediate result.
        return (x * r).mul_(weight).to(x.dtype).view_as(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, r = ctx.saved_tensors
        C, weight = x.shape[-1], weight.to(r.dtype)
        gx = (grad * x.to(r.dtype)).view(-1, C)
        dweight = torch.mv(gx.T, r.view(-1))  # (C,)
        dot = (gx @ weight).view_as(r)  # (..., 1)
        dx = (grad * weight).mul_(r).addcmul_(x, dot * r**3, value=-1 / C)
        return dx.to(x.dtype), dweight, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def rotary(qkv: Tensor, n_heads: int, theta: float | None, qk_norm: bool = False, start: int = 0) -> Tensor:
    """As `reference.rotary`, for positions from `start`."""
    B, T, C3 = qkv.shape
    D = C3 // 3 // n_heads
    if qk_norm:
        qk, v = qkv.view(B, T, 3 * n_heads, D).split((2 * n_heads, n_heads), dim=2)  # (B, T, 2H, D), (B, T, H, D)
        qkv = torch.cat((F.rms_norm(qk, (D,), eps=1e-6), v), dim=2).view(B, T, C3)
    if theta is not None:
        factors = _kept(_rotation_factors, start + T, n_heads, D, theta, qkv.device, qkv.dtype)[start:]
        qkv = _Rotation.apply(qkv, factors, D // 2)
    return qkv


def rotary_table(T: int, D: int, theta: float, device: torch.device) -> Tensor:
    """cos | sin (T, D) of position x frequency."""
    return _kept(reference.rotary_table, T, D, theta, device)


def _kept(make: Callable[..., Tensor], T: int, *others) -> Tensor:
    """make(T, *others), whose rows are positions, made once for each power of two."""
    # A compiled graph computes the table itself: CUDA graphs reuse memory, so its tensors must not outlive the graph.
    if torch.compiler.is_compiling():
        return make(T, *others)
    return _made_once(make, 1 << (T - 1).bit_length(), *others)[:T]  # sampling uses every T


@functools.cache  # never freed, since a captured step reads it in place: 28 MB at C 768, T 1024
@torch.inference_mode(False)  # a table made while sampling may be used in training later
def _made_once(make: Callable[..., Tensor], T: int, *others) -> Tensor:
    return make(T, *others)


def _rotation_factors(T: int, n_heads: int, D: int, theta: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(T, 3, 3C): what multiplies each number of packed qkv itself, the number half a head after it, and the one half
    a head before it. v is not rotated."""
    cos, sin = reference.rotary_table(T, D, theta, device).to(dtype).chunk(2, dim=-1)  # (T, D/2) each
    zero = torch.zeros_like(sin)
    qk = torch.stack((cos, cos, -sin, zero, zero, sin), dim=1).view(T, 3, D).repeat(1, 1, 2 * n_heads)
    v = torch.eye(3, 1, dtype=dtype, device=device).expand(T, 3, n_heads * D)
    return torch.cat((qk, v), dim=-1)


class _Rotation(torch.autograd.Function):
    """The derivative of a rotation is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx, qkv, factors, half):
        ctx.save_for_backward(factors)
        ctx.half = half
        return _rotate(qkv, factors, half, 1)

    @staticmethod
    def backward(ctx, grad):
        return _rotate(grad, *ctx.saved_tensors, ctx.half, -1), None, None


def _rotate(qkv: Tensor, factors: Tensor, half: int, sign: int) -> Tensor:
    """Rotate q and k of packed qkv (B, T, 3C) by the angles, or by their opposites (sign -1)."""
    itself, after, before = factors.unbind(1)  # (T, 3C) each
    y, end = qkv * itself, qkv.shape[-1] // 3 * 2  # q and k
    # Whole rows, shifted by half a head: with a view of each half, the loops over D / 2 numbers take up to 3x as long.
    y[..., : end - half].addcmul_(qkv[..., half:end], after[:, : end - half], value=sign)
    y[..., half:end].addcmul_(qkv[..., : end - half], before[:, half:end], value=sign)
    return y


def activation(x: Tensor, kind: str) -> Tensor:
    if kind in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    if kind == "relu2":
        return F.relu(x).square()
    gate, up = x.chunk(2, dim=-1)  # swiglu
    return F.silu(gate) * up


def activation_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return F.linear(activation(x, kind), weight, bias)


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -1, z_loss: float = 0.0
) -> Tensor:
    # Inside the Function gradients are always off, and weights require them in evaluation too.
    train = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(h, weight, targets, ignore_index, z_loss, train)


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward computes loss and gradients in chunks, where gradients replace the logits; the backward only scales
    them. (The idea of Liger-Kernel, Hsu et al. 2024.)"""

    @staticmethod
    def forward(ctx, h, weight, targets, ignore_index, z_loss, train):
        wide = _wide(h)
        keep = targets != ignore_index
        targets = torch.where(keep, targets, 0)[:, None]
        keep = keep.to(wide)
        loss = torch.zeros((), dtype=wide, device=h.device)
        dh = torch.empty_like(h) if train else h
        ctx.dtype, weight = weight.dtype, weight.to(h.dtype)  # float32 is multiplied in the dtype of h
        dweight = torch.zeros_like(weight, dtype=wide) if train else None
        # A few MB of logits, about the size of a core's cache; at least 256 rows, for fast products.
        rows = max(256, 2**20 // len(weight))
        for x, target, kept, dx in zip(*(t.split(rows) for t in (h, targets, keep, dh)), strict=True):
            p = (x @ weight.T).to(wide)  # logits (rows, V), then softmax, then gradient
            top, right = p.amax(-1), p.gather(1, target)[:, 0]
            p = torch.softmax(p, -1, out=p)
            log_z = top - p.amax(-1).log()  # the largest probability is exp(top) / Z, at least 1/V
            loss += kept @ (log_z - right + z_loss * log_z.square())
            if train:
                p.mul_((kept * (1 + 2 * z_loss * log_z))[:, None]).scatter_add_(1, target, -kept[:, None])
                p = p.to(h.dtype)
                torch.mm(p, weight, out=dx)
                dweight += p.T @ x
        count = keep.sum().clamp(min=1)
        ctx.save_for_backward(dh, dweight, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dh, dweight, count = ctx.saved_tensors
        scale = grad / count
        return dh * scale.to(dh.dtype), (dweight * scale).to(ctx.dtype), None, None, None, None


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of sums: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)
