"""Every operation by the fastest PyTorch operations known to us: where Triton is not (CPU, macOS, Windows).

Same signatures as `kernels.reference`, which says what each operation means.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import rotary_table


def attention(qkv: Tensor, n_heads: int) -> Tensor:
    """Causal self-attention on packed qkv (B, T, 3C) -> (B, T, C)."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_heads, C3 // 3 // n_heads).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(B, T, C3 // 3)


def rotary(qkv: Tensor, n_heads: int, theta: float | None, qk_norm: bool = False) -> Tensor:
    """Rotary positions and QK-norm on packed qkv (B, T, 3C)."""
    B, T, C3 = qkv.shape
    D = C3 // 3 // n_heads
    qk, v = qkv.view(B, T, 3 * n_heads, D).split((2 * n_heads, n_heads), dim=2)  # (B, T, 2H, D), (B, T, H, D)
    if qk_norm:
        qk = F.rms_norm(qk, (D,), eps=1e-6)
    if theta is not None:
        cos, sin = rotary_table(T, D, theta, qkv.device)
        cos, sin = cos[:, None].to(qkv.dtype), sin[:, None].to(qkv.dtype)  # (T, 1, D/2)
        x1, x2 = qk.chunk(2, dim=-1)
        qk = torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)
    return torch.cat((qk, v), dim=2).view(B, T, C3)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def activation(x: Tensor, kind: str) -> Tensor:
    if kind == "gelu":
        return F.gelu(x, approximate="tanh")
    if kind == "relu2":
        return F.relu(x).square()
    return swiglu(x)


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -1, z_loss: float = 0.0
) -> Tensor:
    logits = F.linear(h, weight).float()  # (M, V)
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    kept = targets != ignore_index
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square()[kept].sum()
    return loss / kept.sum().clamp(min=1)
