"""The operations that the model is made of.

`ops` has them and chooses who computes them; `reference` is their mathematics, `fallback` PyTorch's operations, and
every other file a Triton kernel.
"""

from kernels.ops import backend, has_triton, use

__all__ = ["backend", "has_triton", "use"]
