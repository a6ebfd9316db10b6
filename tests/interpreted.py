"""Triton kernels on a CPU, beside PyTorch operations in one process.

`load("norms")` is the module kernels.norms, its kernels compiled where there is a CUDA device and interpreted where
there is none. Triton decides that when a kernel is decorated, by TRITON_INTERPRET; set for the whole process it would
also choose the model's operations, so it is set here only while a module is imported and while its kernels run.
"""

import functools
import importlib
import importlib.metadata
import os
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

from kernels import ops

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def load(name: str) -> ModuleType:
    """kernels.<name>, whose kernels run here. Skips the test that asks where Triton is missing."""
    pytest.importorskip("triton", reason="triton is not installed (it has no build for this platform)")
    module = f"kernels.{name}"
    if CUDA:
        return importlib.import_module(module)
    skip_if_it_cannot_interpret()
    if module not in _interpreted:
        if name == "attention":
            load("rotary")  # whose kernel it launches
        _let_launches_interpret()
        sys.modules.pop(module, None)  # decorated for a GPU, if somebody has imported it
        with _environment():
            _interpreted[module] = importlib.import_module(module)
    return _interpreted[module]


def skip_if_it_cannot_interpret() -> None:
    if _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 fails with numpy 2.4 and later", allow_module_level=True)


def load_all() -> None:
    """All of them, for `kernels.use("triton")`."""
    for name in ops.TRITON_FILES.values():
        load(name)


_interpreted: dict[str, ModuleType] = {}


def _version(package: str) -> tuple[int, int]:
    major, minor, *_ = importlib.metadata.version(package).split(".")
    return int(major), int(minor)


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


# ---------------------------------------------------------------------------------------------------------------------
# Comparing

# bf16 is wrong in the interpreter (it multiplies the bits as integers), so that it is tested compiled only.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
MARKS = [pytest.mark.gpu] if CUDA else []  # where kernels are compiled, `-m gpu` selects their tests


def randn(*size: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers in float64, the same on every device."""
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(ours, theirs, exact, inputs, dtype, parameters=(), at_least=0.0) -> None:
    """Ours against `exact` in float64, values and every gradient: at most twice the error that PyTorch's own operation
    (`theirs`) makes at that dtype, plus four units in the last place of the largest value. `at_least` of the largest
    value is allowed where one rounding already makes so much, and who makes less of it is chance.

    `inputs` are rounded to `dtype` first; `parameters` follow them, stay float32 and hold numbers of `dtype`.
    """

    def run(function, dtype, parameter_dtype):
        dtypes = [dtype] * len(inputs) + [parameter_dtype] * len(parameters)
        xs = [x.to(t).requires_grad_() for x, t in zip(rounded, dtypes, strict=True)]
        out = function(*xs)
        outs = out if isinstance(out, tuple) else (out,)
        seeds = [randn(*o.shape, seed=9 + i).to(seed_dtype).to(o) for i, o in enumerate(outs)]
        return [*outs, *torch.autograd.grad(outs, xs, seeds)]

    seed_dtype = dtype
    rounded = [x.to(DEVICE, dtype) for x in (*inputs, *parameters)]
    with poisoned():
        got = run(ours, dtype, torch.float32)
    peers, wanted = run(theirs, dtype, torch.float32), run(exact, torch.float64, torch.float64)
    for i, (a, peer, want) in enumerate(zip(got, peers, wanted, strict=True)):
        assert a.dtype == peer.dtype and a.shape == peer.shape
        error, allowed = (a.double() - want).abs().max(), (peer.double() - want).abs().max()
        unit = max(4 * torch.finfo(a.dtype).eps, at_least) * want.abs().max()
        assert error <= 2 * allowed + unit, f"output {i}: error {error:.2e}, PyTorch's {allowed:.2e}"


@contextmanager
def poisoned():
    """New memory is NaN inside, so that what a kernel forgets to write shows."""

    def poison(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return made

    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(place, name, poison(getattr(place, name)))
        yield


def repeats(function, *inputs: torch.Tensor) -> None:
    """Two runs on the same inputs agree to the bit, gradients included, as does a third one under torch.compile."""
    passes = []
    for run in (function, function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        xs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        out = run(*xs)
        outs = out if isinstance(out, tuple) else (out,)
        seeds = [randn(*o.shape, seed=i).to(o) for i, o in enumerate(outs)]
        passes.append([*outs, *torch.autograd.grad(outs, [x for x in xs if x.requires_grad], seeds)])
    for other in passes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(passes[0], other, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def flop_formulas() -> dict:
    """For FlopCounterMode(custom_mapping=...): operations whose cost torch does not know, or counts with what their
    backward recomputes. Attention in full T x T, backward twice the forward; the loss makes its gradients in the
    forward."""

    def sdpa(q, *_, **__) -> int:  # (B, H, T, D): two products, scores and values
        B, H, T, D = q
        return 4 * B * H * T * T * D

    def attention(qkv, *_, **__) -> int:  # (B, T, 3C)
        B, T, C3 = qkv
        return 4 * B * T * T * (C3 // 3)

    def loss(h, weight, targets, ignore_index, z_loss, train, **_) -> int:
        return 2 * h[0] * h[1] * weight[0] * (3 if train else 1)

    def twice(formula):
        return lambda grad, x, *_, **__: 2 * formula(x)

    aten, ours = torch.ops.aten, torch.ops.nanochin
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: sdpa,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: twice(sdpa),
    }
    if "kernels.attention" in sys.modules:  # else torch does not have our operators
        formulas |= {ours.attention: attention, ours.attention_backward: twice(attention)}
    if "kernels.cross_entropy" in sys.modules:
        formulas |= {ours.linear_cross_entropy: loss}
    return formulas
