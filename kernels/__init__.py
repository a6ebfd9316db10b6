"""The operations that the model is made of, and the one place that chooses who computes them.

`kernels.attention` and its sisters are what model.py calls. `backend()` says which implementation they are and
why; `use("reference")` swaps in another one for the length of a `with` block (tests, FLOP counting).
"""

import importlib.util
from contextlib import contextmanager

import torch

from kernels.fallback import (
    activation,
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
OPERATIONS = [name for name in __all__ if name not in ("backend", "flop_formulas", "has_triton", "use")]


def backend(device: torch.device) -> tuple[str, str]:
    """(name, why) of what computes the operations on this device."""
    if not has_triton():
        return "fallback", "PyTorch operations: triton is not installed (it has no build for this platform)"
    if device.type != "cuda":
        return "fallback", f"PyTorch operations: Triton kernels need a CUDA device, this is {device.type}"
    return "fallback", "PyTorch operations: this version has no Triton kernels yet"


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def flop_formulas() -> dict:
    """For FlopCounterMode(custom_mapping=...): operations whose cost torch does not know, or counts with what their
    backward recomputes. Attention in full T x T, backward = 2 x forward."""

    def forward(q, k, *_, **__) -> int:  # shapes (B, H, T, D): two products, scores and values
        B, H, T, D = q
        return 4 * B * H * T * T * D

    def backward(grad, q, *_, **__) -> int:
        return 2 * forward(q, q)

    aten = torch.ops.aten
    return {aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}  # fmt: skip


@contextmanager
def use(name: str):
    """Compute every operation by `kernels.<name>` ("reference" or "fallback") inside the block."""
    module = importlib.import_module(f"kernels.{name}")
    before = {op: globals()[op] for op in OPERATIONS}
    globals().update({op: getattr(module, op) for op in OPERATIONS})
    try:
        yield
    finally:
        globals().update(before)
