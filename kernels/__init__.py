"""The operations that the model is made of.

`ops` defines them and picks an implementation: `reference` is their explicit mathematics, `fallback` uses PyTorch
operations, and every other file holds Triton kernels.
"""

from kernels.ops import backend, has_triton, use

__all__ = ["backend", "has_triton", "use"]
