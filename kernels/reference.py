"""The explicit mathematics of every operation: slow, memory-hungry, correct in any dtype (tests run it in float64).

Same signatures and shapes as `kernels.ops`; the Triton kernels and the PyTorch fallback are tested against these
functions.
"""

import torch
from torch import Tensor


def attention(qkv: Tensor, n_heads: int, theta: float | None = None, qk_norm: bool = False) -> Tensor:
    """Causal softmax(Q K^T / sqrt(D)) V. Queries and keys first pass `rotary` with `theta` and `qk_norm`."""
    B, T, C3 = qkv.shape
    D = C3 // 3 // n_heads
    qkv = rotary(qkv, n_heads, theta, qk_norm)
    q, k, v = qkv.view(B, T, 3, n_heads, D).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    scores = (q @ k.transpose(-2, -1)) * D**-0.5  # (B, H, T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(B, T, C3 // 3)


def rotary(qkv: Tensor, n_heads: int, theta: float | None, qk_norm: bool = False) -> Tensor:
    """Rotary positions 0..T-1 on the queries and keys of packed qkv (B, T, 3C), in the halves convention of
    GPT-NeoX and Llama: (x1, x2) -> (x1 cos - x2 sin, x1 sin + x2 cos), frequency i = theta^(-2i/D). `qk_norm` first
    divides each query and key head by its root mean square."""
    B, T, C3 = qkv.shape
    D = C3 // 3 // n_heads
    q, k, v = qkv.view(B, T, 3, n_heads, D).unbind(2)  # each (B, T, H, D)
    if qk_norm:
        q, k = (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    if theta is not None:
        cos, sin = rotary_table(T, D, theta, qkv.device)[:, None].to(qkv.dtype).chunk(2, dim=-1)  # (T, 1, D/2) each
        halves = [x.chunk(2, dim=-1) for x in (q, k)]
        q, k = (torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1) for x1, x2 in halves)
    return torch.stack((q, k, v), dim=2).view(B, T, C3)


def rotary_table(T: int, D: int, theta: float, device: torch.device) -> Tensor:
    """cos | sin of position x frequency, (T, D) in float32. Angles are computed in float64: float32 angles are off by
    2e-4 at position 4096."""
    where = "cpu" if device.type == "mps" else device  # MPS has no float64
    frequency = theta ** (-torch.arange(0, D, 2, device=where, dtype=torch.float64) / D)
    angle = torch.arange(T, device=where, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=1).float().to(device)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def activation(x: Tensor, kind: str) -> Tensor:
    """(..., F) -> (..., F); for swiglu (..., 2F) -> (..., F), silu(gate) * up of the two halves (gate, up)."""
    if kind == "gelu":
        return 0.5 * x * (1 + torch.erf(x * 2**-0.5))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    if kind == "relu2":
        return x.clamp(min=0).square()
    gate, up = x.chunk(2, dim=-1)
    return gate * gate.sigmoid() * up


def activation_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    y = activation(x, kind) @ weight.T
    return y if bias is None else y + bias


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -1, z_loss: float = 0.0
) -> Tensor:
    keep = targets != ignore_index
    logits = (h @ weight.to(h.dtype).T)[keep]  # (kept, V)
    log_z = logits.logsumexp(-1)
    nll = log_z - logits.gather(1, targets[keep][:, None])[:, 0]
    return (nll + z_loss * log_z.square()).sum() / keep.sum().clamp(min=1)
