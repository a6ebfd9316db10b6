"""Triton kernels on a CPU, beside PyTorch operations in one process.

`load("norms")` is the module kernels.norms, its kernels compiled where there is a CUDA device and interpreted where
there is none. Triton decides that when a kernel is decorated, by TRITON_INTERPRET; set for the whole process it would
also choose the model's operations, so it is set here only while a module is imported and while its kernels run.
"""

import functools
import importlib
import os
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def load(name: str) -> ModuleType:
    """kernels.<name>, whose kernels run here. Skips the test that asks where Triton is missing."""
    pytest.importorskip("triton", reason="triton is not installed (it has no build for this platform)")
    module = f"kernels.{name}"
    if CUDA:
        return importlib.import_module(module)
    _let_launches_interpret()
    if module not in _interpreted:
        sys.modules.pop(module, None)  # decorated for a GPU, if somebody has imported it
        with _environment():
            _interpreted[module] = importlib.import_module(module)
    sys.modules[module] = _interpreted[module]
    return _interpreted[module]


_interpreted: dict[str, ModuleType] = {}


@contextmanager
def _environment():
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


@functools.cache
def _let_launches_interpret() -> None:
    """Triton's own functions (tl.sum, tl.cdiv) were decorated when somebody imported triton, mostly without the
    variable, and an interpreted launch leaves some of triton.language changed behind. So every launch finds the
    interpreted functions there, and what it changes is put back, so that the compiler works afterwards."""
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
            with _environment():
                return launch(self, *args, **kwargs)
        finally:
            for place, names in zip(places, before, strict=True):
                for name, value in names.items():
                    if vars(place)[name] is not value:
                        setattr(place, name, value)

    GridExecutor.__call__ = call
