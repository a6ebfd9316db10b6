"""Activations in Triton (interpreted without a GPU) against PyTorch's in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from interpreted import CUDA, DEVICE, DTYPES, MARKS, load
from numerics import compare, parameters, randn, repeats

pytestmark = MARKS
activation = load("activation")


def swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


TORCH = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "swiglu": swiglu}
TORCH["relu2"] = lambda x: F.relu(x).square()
SIZES = [(1, 2), (7, 66), (3, 5, 200), (2, 6000)]
SIZES += [(65536, 2 * 2048), (4096, 2 * 2731), (70_000, 48)] if CUDA else []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", TORCH)
def test_activation(kind, size, dtype):
    """Values and gradients of all four kinds."""
    compare(partial(activation.activate, kind=kind), TORCH[kind], TORCH[kind], [randn(*size, scale=3.0)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", TORCH)
def test_activation_linear(kind, bias, dtype):
    """Activation and matrix product: values and the gradients of x, weight and bias."""
    F_, C = 48, 24
    inputs = [randn(2, 21, F_ * (1 + (kind == "swiglu"))), randn(C, F_, seed=1), *[randn(C, seed=2)] * bias]
    exact = lambda x, w, b=None: F.linear(TORCH[kind](x), w, b)  # noqa: E731
    compare(lambda x, w, b=None: activation.activation_linear(x, w, b, kind), exact, exact, inputs, dtype)


def test_activation_linear_saves_only_its_input():
    """Only x and the weight are saved for the backward. The gradients are as if the activation were saved, also if the
    weight is frozen."""
    x, weight = parameters((10, 36), (8, 36))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = activation.activation_linear(x, weight, None, "gelu")
    assert [t.data_ptr() for t in saved] == [x.data_ptr(), weight.data_ptr()]
    want = torch.autograd.grad(F.linear(activation.activate(x, "gelu"), weight).sum(), (x, weight))
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), (x, weight)), want))
    frozen = activation.activation_linear(x, weight.detach(), None, "gelu")
    assert torch.equal(torch.autograd.grad(frozen.sum(), x)[0], want[0])
    repeats(lambda x, w: activation.activation_linear(x, w, None, "gelu"), x, weight)


@pytest.mark.parametrize("kind", TORCH)
def test_extremes(kind):
    """Large numbers of either sign give finite values and gradients; NaN stays NaN."""
    x = torch.tensor([[3e4, -3e4, 0.0, -0.0, 100.0, -100.0]], device=DEVICE, requires_grad=True)
    y = activation.activate(x, kind)
    assert y.isfinite().all() and torch.autograd.grad(y.sum(), x)[0].isfinite().all()
    torch.testing.assert_close(y, TORCH[kind](x))
    assert activation.activate(torch.full((1, 4), torch.nan, device=DEVICE), kind).isnan().all()


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_repeats_compiles_and_passes_opcheck(kind):
    """Bit-identical when repeated, compiled or transposed; torch.library's checks pass."""
    (x,) = parameters((10, 36))
    repeats(lambda x: activation.activate(x, kind), x)
    repeats(lambda x: activation.activate(x.T, kind), x)
    torch.library.opcheck(activation.activate, (x, kind))
    grad = torch.ones(10, 18 if kind == "swiglu" else 36, device=DEVICE)
    torch.library.opcheck(activation.activate_backward, (grad, x.detach(), kind, True))
