"""The operations that the model calls, and the one place that chooses who computes them.

They are Triton kernels for tensors on a CUDA device, and PyTorch operations (`kernels.fallback`) elsewhere; with
TRITON_INTERPRET=1 in the environment Triton interprets its kernels, slowly, on any device. `backend` says which it is
and why; `use("reference")` swaps in another implementation for the length of a `with` block. All are out of place and
differentiable. B batch, T sequence, C width, V vocabulary, F feed-forward width.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels import fallback


def attention(qkv: Tensor, n_heads: int, theta: float | None = None, qk_norm: bool = False) -> Tensor:
    """Causal self-attention on packed qkv (B, T, 3C) -> (B, T, C), with scores divided by the root of the head size.
    `theta` first rotates queries and keys to positions 0..T-1; `qk_norm` divides them by their root mean square before
    that. Positions need an even head size."""
    fits = qkv.shape[-1] <= 3 * n_heads * 128  # the largest head that the tiles of our kernel hold
    return _implementation("attention", qkv, fits)(qkv, n_heads, theta, qk_norm)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) * weight over the last dimension: x (..., C), weight (C,) -> (..., C)."""
    return _implementation("rms_norm", x)(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / std * weight + bias over the last dimension: x (..., C), weight and bias (C,) -> (..., C)."""
    return _implementation("layer_norm", x)(x, weight, bias, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both (..., C)."""
    return _implementation("add_rms_norm", x)(x, residual, weight, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual), both (..., C)."""
    return _implementation("add_layer_norm", x)(x, residual, weight, bias, eps)


def activation_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """activation(x) weight^T + bias, the activation being `gelu` (erf), `gelu_tanh` (GPT-2's approximation), `relu2`
    (ReLU squared) or `swiglu`: x (..., F), or (..., 2F) for swiglu, weight (C, F), bias (C,) -> (..., C)."""
    return _implementation("activation_linear", x)(x, weight, bias, kind)


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -1, z_loss: float = 0.0
) -> Tensor:
    """Mean over the targets that are not `ignore_index` of -log softmax(h weight^T)[target] + z_loss log(Z)^2, 0 if
    there is none: h (M, C), weight (V, C), targets (M,) -> scalar, at least float32."""
    return _implementation("linear_cross_entropy", h)(h, weight, targets, ignore_index, z_loss)


# ---------------------------------------------------------------------------------------------------------------------
# Who computes

TRITON_FILES = {  # by operation
    "attention": "attention",
    "rms_norm": "norms",
    "layer_norm": "norms",
    "add_rms_norm": "norms",
    "add_layer_norm": "norms",
    "activation_linear": "activation",
    "linear_cross_entropy": "cross_entropy",
}


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton was told to interpret: it looks when a kernel is defined, so the variable must be set before."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def backend(device: torch.device, asked: str = "auto") -> tuple[str, str]:
    """(name, why) of what computes the operations on this device: "triton", "interpreter" or "fallback"."""
    if asked != "auto":
        return asked, "as asked"
    if not has_triton():
        return "fallback", "PyTorch operations: triton is not installed (it has no build for this platform)"
    if interpreting():
        return "interpreter", "Triton kernels, interpreted because TRITON_INTERPRET is set: slow, for tests; not bf16"
    if device.type != "cuda":
        return "fallback", f"PyTorch operations: Triton kernels need a CUDA device, this is {device.type}"
    if torch.version.hip:
        return "fallback", "PyTorch operations: Triton kernels are tuned for NVIDIA GPUs, this is AMD's"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return (
            "fallback",
            f"PyTorch operations: our Triton kernels need sm_80 (A100) or later, this is sm_{major}{minor}",
        )
    return "triton", f"Triton {importlib.import_module('triton').__version__} kernels on sm_{major}{minor}"


def implementations(name: str) -> dict[str, Callable]:
    """All operations by "reference", "fallback" or "triton"."""
    files = {operation: file if name == "triton" else name for operation, file in TRITON_FILES.items()}
    return {
        operation: getattr(importlib.import_module(f"kernels.{file}"), operation) for operation, file in files.items()
    }


@contextmanager
def use(name: str, **instead: Callable) -> Iterator[None]:
    """Inside the block every operation is that of "reference", "fallback" or "triton", whatever the device; with "auto"
    it stays what it is outside. A function given under an operation's name takes that operation's place."""
    before = dict(_swapped)
    _swapped.update(({} if name == "auto" else implementations(name)) | instead)
    try:
        yield
    finally:
        _swapped.clear()
        _swapped.update(before)


def _implementation(operation: str, x: Tensor, fits: bool = True) -> Callable:
    """What `use` put in the operation's place, else our Triton kernel if it suits the tensor, else PyTorch's."""
    if operation in _swapped:
        return _swapped[operation]
    return TRITON[operation] if fits and _suits_triton(x) else getattr(fallback, operation)


def _suits_triton(x: Tensor) -> bool:
    if x.dtype == torch.float64:
        return False
    if _INTERPRETING:
        return x.dtype != torch.bfloat16  # which Triton interprets as integers
    return x.device.type == "cuda" and x.device.index in _CAPABLE


_swapped: dict[str, Callable] = {}  # by operation; empty outside of `use`
# Known before torch.compile looks, which would compile again for a change. Without CUDA triton is not imported.
_INTERPRETING = has_triton() and interpreting()
_CAPABLE = [i for i in range(torch.cuda.device_count()) if backend(torch.device("cuda", i))[0] == "triton"]
TRITON = implementations("triton") if _INTERPRETING or _CAPABLE else {}  # by operation
