"""The operations that the model is made of, and the one place that chooses who computes them.

`kernels.attention` and its sisters are what model.py calls. They are Triton kernels for tensors on a CUDA device, and
PyTorch operations (kernels.fallback) elsewhere; with TRITON_INTERPRET=1 in the environment Triton interprets its
kernels, slowly, on any device. `backend()` says which it is and why; `use("reference")` swaps in another implementation
for the length of a `with` block (tests, FLOP counting).
"""

import importlib
import importlib.util
import os
import sys
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels import fallback
from kernels.fallback import (
    activation,
    activation_linear,
    add_layer_norm,
    add_rms_norm,
    attention,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    rotary,
    swiglu,
)

__all__ = [
    "activation",
    "activation_linear",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "backend",
    "flop_formulas",
    "has_triton",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "swiglu",
    "use",
]
TRITON_MODULES = {
    "activation": ("activation", "activation_linear", "swiglu"),
    "attention": ("attention",),
    "cross_entropy": ("linear_cross_entropy",),
    "norms": ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"),
    "rotary": ("rotary",),
}
OPERATIONS = [name for names in TRITON_MODULES.values() for name in names]


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


def flop_formulas() -> dict:
    """For FlopCounterMode(custom_mapping=...): operations whose cost torch does not know, or counts with what their
    backward recomputes. Attention in full T x T, backward = 2 x forward."""

    def forward(q, k, *_, **__) -> int:  # shapes (B, H, T, D): two products, scores and values
        B, H, T, D = q
        return 4 * B * H * T * T * D

    def backward(grad, q, *_, **__) -> int:
        return 2 * forward(q, q)

    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    for name in TRITON_MODULES:
        formulas |= getattr(sys.modules.get(f"kernels.{name}"), "FLOP_FORMULAS", {})
    return formulas


@contextmanager
def use(name: str, **instead):
    """Inside the block every operation is that of "reference", "fallback" or "triton", whatever the device; with "auto"
    it stays what it is outside. A function given under an operation's name takes that operation's place."""
    before = {op: globals()[op] for op in OPERATIONS}
    if name == "auto":
        inside = {}
    elif name == "triton":
        inside = _triton_operations()
    else:
        module = importlib.import_module(f"kernels.{name}")
        inside = {op: getattr(module, op) for op in OPERATIONS}
    globals().update(inside | instead)
    try:
        yield
    finally:
        globals().update(before)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing. Without CUDA the names above stay PyTorch's and triton is not imported.


def _triton_operations() -> dict:
    before = {op: globals()[op] for op in OPERATIONS}
    operations = {}
    for name, names in TRITON_MODULES.items():
        module = importlib.import_module(f"kernels.{name}")
        operations |= {op: getattr(module, op) for op in names}
    globals().update(before)  # importing kernels.rotary has put that module where the function was
    return operations


def _choosing(ours, theirs, suits):
    """The operation that is `ours` for the tensors that suit it and `theirs` for all others."""

    def operation(x, *args, **kwargs):
        return (ours if suits(x, *args, **kwargs) else theirs)(x, *args, **kwargs)

    return operation


def _runs_triton(x: Tensor, *_, **__) -> bool:
    if x.dtype == torch.float64:
        return False
    if _INTERPRETING:
        return x.dtype != torch.bfloat16  # which Triton interprets as integers
    return x.device.type == "cuda" and _CAPABLE[x.device.index]


def _runs_triton_attention(qkv: Tensor, n_heads: int, *_, **__) -> bool:
    return _runs_triton(qkv) and qkv.shape[-1] <= 3 * n_heads * 128  # the largest head that its tiles hold


def _torch_attention(qkv: Tensor, n_heads: int, theta: float | None = None, qk_norm: bool = False) -> Tensor:
    """PyTorch's, after whichever rotary suits the tensor."""
    return fallback.attention(rotary(qkv, n_heads, theta, qk_norm), n_heads)


_INTERPRETING = interpreting()
_CAPABLE: list[bool] = []  # by device index; known before torch.compile looks, which would compile again for a change

if has_triton() and (_INTERPRETING or torch.cuda.is_available()):
    _CAPABLE += [backend(torch.device("cuda", i))[0] == "triton" for i in range(torch.cuda.device_count())]
    for _name, _ours in _triton_operations().items():
        _theirs, _suits = getattr(fallback, _name), _runs_triton
        if _name == "attention":
            _theirs, _suits = _torch_attention, _runs_triton_attention
        globals()[_name] = _choosing(_ours, _theirs, _suits)
