"""Triton kernels on a CPU, alongside PyTorch operations in one process.

`load("norms")` is the module kernels.norms, its kernels compiled if there is a CUDA device and interpreted if not.
Triton reads TRITON_INTERPRET when a kernel is decorated. Set for the whole process it would also switch the model's
operations, so it is set here only while a module is imported and while its kernels run.
"""

import functools
import importlib
import importlib.metadata
import sys
from types import ModuleType

import pytest
import torch

from kernels import ops

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# bf16 is wrong in the interpreter (it multiplies the bits as integers), so it is tested compiled only.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
MARKS = [pytest.mark.gpu] if CUDA else []  # where kernels are compiled, `-m gpu` selects their tests


def load(name: str) -> ModuleType:
    """kernels.<name>, its kernels ready to run here. Skips the calling test if Triton is missing."""
    pytest.importorskip("triton", reason="triton is not installed (it has no build for this platform)")
    module = f"kernels.{name}"
    if CUDA:
        return importlib.import_module(module)
    skip_if_it_cannot_interpret()
    if module not in _interpreted:
        if name == "attention":
            load("rotary")  # attention launches its kernel
        _let_launches_interpret()
        sys.modules.pop(module, None)  # an earlier import decorated it for a GPU
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            _interpreted[module] = importlib.import_module(module)
    return _interpreted[module]


def load_all() -> None:
    """Load every file of kernels, for `kernels.use("triton")`."""
    for name in ops.TRITON_FILES.values():
        load(name)


def skip_if_it_cannot_interpret() -> None:
    triton, numpy = (tuple(map(int, importlib.metadata.version(p).split(".")[:2])) for p in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 fails with numpy 2.4 and later", allow_module_level=True)


_interpreted: dict[str, ModuleType] = {}


@functools.cache
def _let_launches_interpret() -> None:
    """Triton's own functions (tl.sum, tl.cdiv) were decorated when triton was imported, usually without the variable,
    and an interpreted launch leaves parts of triton.language changed. So every launch swaps in interpreted functions
    and restores everything afterwards, so that the compiler still works."""
    import triton.language as tl
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction
    from triton.runtime.jit import JITFunction

    places = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)
    interpreted = functools.cache(lambda function: InterpretedFunction(function.fn))
    launch = GridExecutor.__call__

    def call(self, *args, **kwargs):
        before = [dict(vars(place)) for place in places]
        for place, names in zip(places, before, strict=True):
            for name, value in names.items():
                if isinstance(value, JITFunction):
                    setattr(place, name, interpreted(value))
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TRITON_INTERPRET", "1")
                return launch(self, *args, **kwargs)
        finally:
            for place, names in zip(places, before, strict=True):
                for name, value in names.items():
                    if vars(place)[name] is not value:
                        setattr(place, name, value)

    GridExecutor.__call__ = call
