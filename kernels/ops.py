"""The operations that the model calls, and the choice of their implementation.

Triton kernels where supported, else PyTorch operations (`kernels.fallback`). With TRITON_INTERPRET=1 in the environment
Triton interprets its kernels, slowly, on any device. `backend` returns the choice and its reason; `use("reference")`
selects another implementation for a `with` block. All operations are out of place and differentiable. B batch,
T sequence, C width, V vocabulary, F feed-forward width.
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
    """Causal self-attention on packed qkv (B, T, 3C) -> (B, T, C), scores divided by the square root of the head size.
    `qk_norm` first divides queries and keys by their root mean square; `theta` then rotates them to positions 0..T-1,
    which needs an even head size."""
    fits = qkv.shape[-1] <= 3 * n_heads * 128  # the largest heads of the Triton kernel
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
    """activation(x) weight^T + bias with activation `gelu` (erf), `gelu_tanh` (GPT-2's approximation), `relu2`
    (ReLU squared) or `swiglu`: x (..., F), or (..., 2F) for swiglu, weight (C, F), bias (C,) -> (..., C)."""
    return _implementation("activation_linear", x)(x, weight, bias, kind)


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -1, z_loss: float = 0.0
) -> Tensor:
    """Mean over the targets that are not `ignore_index` of -log softmax(h weight^T)[target] + z_loss log(Z)^2, 0 if
    there are none: h (M, C), weight (V, C), targets (M,) -> scalar, at least float32."""
    return _implementation("linear_cross_entropy", h)(h, weight, targets, ignore_index, z_loss)


# ---------------------------------------------------------------------------------------------------------------------
# The implementation

TRITON_FILES = {"attention": "attention", "activation_linear": "activation", "linear_cross_entropy": "cross_entropy"}
TRITON_FILES |= dict.fromkeys(("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"), "norms")


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton interprets. It reads the variable when a kernel is defined, so it must be set before."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def backend(device: torch.device, asked: str = "auto") -> tuple[str, str]:
    """(name, reason) of the implementation for this device: "triton", "interpreter" or "fallback"."""
    if asked != "auto":
        return asked, "as requested"
    if not has_triton():
        return "fallback", "PyTorch operations: triton is not installed (it has no build for this platform)"
    if interpreting():
        return "interpreter", "Triton kernels, interpreted because TRITON_INTERPRET is set: slow, for tests; not bf16"
    if device.type != "cuda":
        return "fallback", f"PyTorch operations: Triton kernels need a CUDA device, this is {device.type}"
    if torch.version.hip:
        return "fallback", "PyTorch operations: Triton kernels are tuned for NVIDIA GPUs, this is an AMD GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return "fallback", f"PyTorch operations: Triton kernels need sm_80 (A100) or later, this is sm_{major}{minor}"
    return "triton", f"Triton {importlib.import_module('triton').__version__} kernels on sm_{major}{minor}"


def implementations(name: str) -> dict[str, Callable]:
    """{operation: function} of "reference", "fallback" or "triton"."""
    return {
        operation: getattr(importlib.import_module(f"kernels.{file if name == 'triton' else name}"), operation)
        for operation, file in TRITON_FILES.items()
    }


@contextmanager
def use(name: str, **instead: Callable) -> Iterator[None]:
    """In the block all operations use "reference", "fallback" or "triton", on any device; "auto" keeps the current
    implementations. `instead` replaces single operations, by name."""
    before = dict(_swapped)
    _swapped.update(({} if name == "auto" else implementations(name)) | instead)
    try:
        yield
    finally:
        _swapped.clear()
        _swapped.update(before)


def _implementation(operation: str, x: Tensor, fits: bool = True) -> Callable:
    """The function set by `use`, else the Triton kernel if it supports the tensor, else the PyTorch operation."""
    if operation in _swapped:
        return _swapped[operation]
    return TRITON[operation] if fits and _triton_supports(x) else getattr(fallback, operation)


def _triton_supports(x: Tensor) -> bool:
    if x.dtype == torch.float64:
        return False
    if _INTERPRETING:
        return x.dtype != torch.bfloat16  # which the interpreter treats as integers
    return x.device.type == "cuda" and x.device.index in _CAPABLE


_swapped: dict[str, Callable] = {}  # by operation; empty outside of `use`
# Computed at import: torch.compile would recompile when they change. Without CUDA triton is not imported.
_INTERPRETING = has_triton() and interpreting()
_CAPABLE = [i for i in range(torch.cuda.device_count()) if backend(torch.device("cuda", i))[0] == "triton"]
TRITON = implementations("triton") if _INTERPRETING or _CAPABLE else {}  # by operation
