"""RMSNorm and LayerNorm in Triton (interpreted without a GPU) against a float64 reference."""

from functools import partial

import pytest
import torch
from interpreted import CUDA, DEVICE, DTYPES, MARKS, load
from numerics import compare, parameters, randn, repeats, torch_add_norm, torch_norm

from kernels import reference

pytestmark = MARKS
norms = load("norms")

# (rows..., C): one row, odd sizes, several blocks of rows per program, the widest of our models
SIZES = [(1, 8), (7, 96), (3, 43, 64), (1, 6), (2, 5, 33), (3, 1000), (2, 8192)]
SIZES += [(64, 1024, 768), (16384, 2048), (8191, 8192), (100, 32768), (300_000, 96)] if CUDA else []


ALONE = norms.norm, torch_norm, reference.norm
ADDED = norms.add_norm, torch_add_norm, reference.add_norm


def check(functions, inputs, kind, dtype=torch.float32, weights=(), bias=True) -> None:
    """`compare` ours, PyTorch's and the exact mathematics."""
    fixed = {"kind": kind} if bias else {"kind": kind, "bias": None}
    compare(*(partial(function, **fixed) for function in functions), inputs, dtype, weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_all_four(size, dtype):
    """Values and gradients of both norms, alone and with the residual added first."""
    x, residual = randn(*size, scale=3.0), randn(*size, seed=1)
    weight, bias = randn(size[-1], seed=2), randn(size[-1], seed=3)
    for kind, weights in (("rmsnorm", [weight]), ("layernorm", [weight, bias])):
        for functions, inputs in ((ALONE, [x]), (ADDED, [x, residual])):
            check(functions, inputs, kind, dtype, weights, bias=kind == "layernorm")


def test_layer_norm_without_bias():
    """Only x and the weight get gradients."""
    check(ALONE, [randn(5, 24), randn(24, seed=1)], "layernorm", bias=False)


@pytest.mark.parametrize("scale, offset", [(1e4, 0.0), (1e-4, 0.0), (1.0, 1e3), (0.0, 3.0)])
def test_extreme_scales(scale, offset):
    """Large, small, far from zero and without variance: statistics are as accurate as PyTorch's."""
    x, weight, bias = randn(6, 200, scale=scale) + offset, randn(200, seed=1), randn(200, seed=2)
    check(ALONE, [x, weight], "rmsnorm", bias=False)
    check(ALONE, [x, weight, bias], "layernorm")


def test_only_one_of_two_outputs_is_used():
    """If only the sum or only the norm is used, the gradient is that of this output alone."""
    x, residual, weight = parameters((3, 16), (3, 16), (16,))
    _, total = norms.add_norm(x, residual, weight, None, "rmsnorm")
    assert torch.equal(torch.autograd.grad(total.sum(), x)[0], torch.ones_like(x))
    normed, _ = norms.add_norm(x, residual, weight, None, "rmsnorm")
    exact = reference.norm(x + residual, weight, None, "rmsnorm")
    got, want = (torch.autograd.grad(y.square().sum(), (x, residual, weight)) for y in (normed, exact))
    torch.testing.assert_close(got, want)


def test_other_strides():
    """A transposed input and an expanded gradient give the same results as contiguous copies."""
    x, weight = randn(32, 7).float().to(DEVICE).T.requires_grad_(), randn(32, seed=1).float().to(DEVICE)
    how = weight, None, "rmsnorm"
    got = norms.norm(x, *how)
    assert torch.equal(got, norms.norm(x.contiguous(), *how))
    (grad,) = torch.autograd.grad(got.sum(), x)  # the gradient of a sum is one number, expanded
    (want,) = torch.autograd.grad(reference.norm(x, *how), x, torch.ones(7, 32, device=DEVICE))
    torch.testing.assert_close(grad, want)


def test_repeats_and_compiles():
    """Bit-identical when repeated, also under torch.compile."""
    x, residual, weight, bias = parameters((70, 24), (70, 24), (24,), (24,))
    repeats(lambda x, weight: norms.norm(x, weight, None, "rmsnorm"), x, weight)
    repeats(lambda *xs: norms.add_norm(*xs, "layernorm"), x, residual, weight, bias)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_opcheck(kind):
    """torch.library's checks of schema, fake tensors and autograd registration."""
    x, residual, weight = parameters((5, 24), (5, 24), (24,))
    bias = weight if kind == "layernorm" else None
    torch.library.opcheck(torch.ops.nanochin.norm, (x, residual, weight, bias, kind))
    torch.library.opcheck(torch.ops.nanochin.norm, (x, None, weight, None, kind))


def test_bad_shapes_are_refused():
    """Rows too wide for a program and mismatched tensors raise instead of reading out of bounds."""
    x, ones = torch.zeros(2, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    wide = torch.zeros(1, 32769, device=DEVICE)
    for inputs in ((wide, wide, wide[0]), (x, x[:1], ones), (x, x.half(), ones), (x, x, ones[:4])):
        with pytest.raises(ValueError, match="norm"):
            norms.add_norm(*inputs, None, "rmsnorm")
