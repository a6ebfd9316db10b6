"""Operations to be timed, each at the shape that its caller names, by our kernel and by its best peers.

T is the context, D the head size, C the width, F the feed-forward width, V the vocabulary, M the tokens of the output
layer; the other operations take TOKENS. `OPERATIONS` has a function for each operation that makes its `Case`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import fallback, ops
from kernels.activation import activate
from kernels.reference import rotary_table

TOKENS = 65_536
TINY = {"T": 16, "D": 16, "C": 24, "F": 40, "V": 65, "M": 8}  # shape of a dry run


@dataclass(frozen=True)
class Bench:
    """Where things run, and until when."""

    device: torch.device
    dtype: torch.dtype
    dry: bool  # on a CPU: tiny shapes
    deadline: float = math.inf  # on the monotonic clock

    def randn(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(size, device=self.device, dtype=dtype or self.dtype, requires_grad=True)

    @property
    def tokens(self) -> int:
        return 16 if self.dry else TOKENS


@dataclass(frozen=True)
class Case:
    """One operation at one shape."""

    contenders: dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], list[Tensor]]]  # function, its inputs
    work: dict[str, float]  # FLOPs or bytes by direction: forward, backward, or both at once
    ceiling: str  # "flops" or "bytes": which of the two bounds it


def make_case(bench: Bench, operation: str, shape: dict[str, int]) -> Case:
    return OPERATIONS[operation](bench, **({name: TINY[name] for name in shape} if bench.dry else shape))


# ---------------------------------------------------------------------------------------------------------------------
# Attention: FLOPs are those of the causal half, 2 B H T^2 D forward and 2.5 times that backward


def attention(bench: Bench, D: int, T: int) -> Case:
    """Without positions; the peers get queries, keys and values as they like them, without packing."""
    H = 1 if bench.dry else 2048 // D
    qkv = bench.randn(bench.tokens // T, T, 3 * H * D)
    parts = qkv.detach().view(-1, T, 3, H, D).unbind(2)
    parts = [x.contiguous().transpose(1, 2).requires_grad_() for x in parts]  # (B, H, T, D)

    def sdpa(q, k, v, backend):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    contenders = {"ours": (lambda qkv: ops.attention(qkv, H), [qkv])}
    contenders |= {who: (partial(sdpa, backend=backend), parts) for who, backend in SDPA.items()}
    return Case(contenders, _attention_flops(bench.tokens * H * T * D), "flops")


def rotary_attention(bench: Bench, D: int, T: int) -> Case:
    """As the model calls it; the peers rotate packed qkv first, compiled."""
    H = 1 if bench.dry else 768 // D
    qkv = bench.randn(bench.tokens // T, T, 3 * H * D)
    cos, sin = rotary_table(T, D, 10_000.0, bench.device)[:, None].to(bench.dtype).chunk(2, dim=-1)  # (T, 1, D/2) each
    rotate = torch.compile(_rotate, dynamic=False)

    def sdpa(qkv, backend):
        with sdpa_kernel(backend):
            return fallback.attention(rotate(qkv, cos, sin, H), H)

    contenders = {"ours": (lambda qkv: ops.attention(qkv, H, 10_000.0), [qkv])}
    contenders |= {who: (partial(sdpa, backend=backend), [qkv]) for who, backend in SDPA.items()}
    return Case(contenders, _attention_flops(bench.tokens * H * T * D), "flops")


SDPA = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}


def _attention_flops(scores: float) -> dict[str, float]:
    return {"forward": 2 * scores, "backward": 5 * scores}


def _rotate(qkv: Tensor, cos: Tensor, sin: Tensor, H: int) -> Tensor:
    """Rotary positions on packed qkv (B, T, 3C)."""
    qk, v = qkv.unflatten(-1, (3 * H, -1)).split((2 * H, H), dim=2)
    x1, x2 = qk.chunk(2, dim=-1)
    qk = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    return torch.cat((qk, v), dim=2).flatten(2)


# ---------------------------------------------------------------------------------------------------------------------
# What memory bounds: bytes are those that must be read and written once


def norm(bench: Bench, C: int, name: str) -> Case:
    """rms_norm, layer_norm and both with the residual added before."""
    function, eps = (F.rms_norm, 1e-6) if name.endswith("rms_norm") else (F.layer_norm, 1e-5)

    def eager(x, *more):
        residual, parameters = (more[0], more[1:]) if name.startswith("add") else (None, more)
        total = x if residual is None else x + residual
        normed = function(total, (C,), *(p.to(x.dtype) for p in parameters), eps=eps)
        return normed if residual is None else (normed, total)

    add, centred = name.startswith("add"), name.endswith("layer_norm")
    inputs = [bench.randn(bench.tokens, C) for _ in range(1 + add)]
    inputs += [bench.randn(C, dtype=torch.float32) for _ in range(1 + centred)]
    size = inputs[0].nbytes
    return Case(
        _beside_torch(getattr(ops, name), eager, inputs),
        {"forward": (4 if add else 2) * size, "backward": (4 if add else 3) * size},
        "bytes",
    )


def activation(bench: Bench, F: int, kind: str) -> Case:
    ups = 2 if kind == "swiglu" else 1
    x = bench.randn(bench.tokens, ups * F)
    size = x.nbytes // ups
    contenders = _beside_torch(partial(activate, kind=kind), EAGER_ACTIVATIONS[kind], [x])
    return Case(contenders, {"forward": (1 + ups) * size, "backward": (1 + 2 * ups) * size}, "bytes")


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


EAGER_ACTIVATIONS = {"gelu": F.gelu, "swiglu": _swiglu}


def _beside_torch(ours: Callable, eager: Callable, inputs: list[Tensor]) -> dict[str, tuple[Callable, list[Tensor]]]:
    compiled = torch.compile(eager, dynamic=False)
    return {"ours": (ours, inputs), "eager": (eager, inputs), "torch.compile": (compiled, inputs)}


# ---------------------------------------------------------------------------------------------------------------------
# The output layer with its loss: FLOPs are those of its three matrix products


def linear_cross_entropy(bench: Bench, C: int, V: int, M: int) -> Case:
    h, targets = bench.randn(M, C), torch.randint(V, (M,), device=bench.device)
    weight = (0.02 * bench.randn(V, C)).detach().requires_grad_()
    padded = F.pad(weight.detach(), (0, 0, 0, -V % 64)).requires_grad_()  # rows at round addresses, as ours has them

    def eager(h, weight, targets):
        return F.cross_entropy(F.linear(h, weight).float(), targets)

    contenders = _beside_torch(ops.linear_cross_entropy, eager, [h, weight, targets])
    contenders["matrix products alone"] = (_ThreeProducts.apply, [h, padded])
    if hasattr(F, "linear_cross_entropy"):
        chunked = partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())
        contenders["F.linear_cross_entropy"] = (chunked, [h, weight, targets])
    return Case(contenders, {"both": 6 * M * C * V}, "flops")


class _ThreeProducts(torch.autograd.Function):
    """What the output layer cannot do without: logits, and from something of their size both gradients."""

    @staticmethod
    def forward(ctx, h, weight):
        logits = h @ weight.T
        ctx.save_for_backward(h, weight, logits)
        return logits[0, 0].float()

    @staticmethod
    def backward(ctx, grad):
        h, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.T @ h


OPERATIONS = {
    "attention": attention,
    "rotary attention": rotary_attention,
    **{name: partial(norm, name=name) for name in ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")},
    **{kind: partial(activation, kind=kind) for kind in EAGER_ACTIVATIONS},
    "linear_cross_entropy": linear_cross_entropy,
}
