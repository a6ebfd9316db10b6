"""RMSNorm and LayerNorm in Triton (interpreted without a GPU) against a float64 reference."""

from functools import partial

import pytest
import torch
from interpreted import CUDA, DEVICE, DTYPES, MARKS, load
from numerics import compare, parameters, randn, repeats, torch_norm

from kernels import reference

pytestmark = MARKS
norms = load("norms")

# (rows..., C): one row, odd sizes, several blocks of rows per program, the widest of our models
SIZES = [(1, 8), (7, 96), (3, 43, 64), (1, 6), (2, 5, 33), (3, 1000), (2, 8192)]
SIZES += [(64, 1024, 768), (16384, 2048), (8191, 8192), (100, 32768), (300_000, 96)] if CUDA else []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_all_four(size, dtype):
    """Values and gradients of both norms, alone and with the residual added first."""
    x, residual = randn(*size, scale=3.0), randn(*size, seed=1)
    weight, bias = randn(size[-1], seed=2), randn(size[-1], seed=3)
    for norm, weights in (("rms_norm", [weight]), ("layer_norm", [weight, bias])):
        for name, inputs in ((norm, [x]), ("add_" + norm, [x, residual])):
            compare(getattr(norms, name), torch_norm(name), getattr(reference, name), inputs, dtype, weights)


def test_layer_norm_without_bias():
    """Only x and the weight get gradients."""
    ours, exact = (partial(module.layer_norm, bias=None) for module in (norms, reference))
    compare(ours, torch_norm("layer_norm"), exact, [randn(5, 24), randn(24, seed=1)], torch.float32)


@pytest.mark.parametrize("scale, offset", [(1e4, 0.0), (1e-4, 0.0), (1.0, 1e3), (0.0, 3.0)])
def test_extreme_scales(scale, offset):
    """Large, small, far from zero and without variance: statistics are as accurate as PyTorch's."""
    x, weight, bias = randn(6, 200, scale=scale) + offset, randn(200, seed=1), randn(200, seed=2)
    compare(norms.rms_norm, torch_norm("rms_norm"), reference.rms_norm, [x, weight], torch.float32)
    compare(norms.layer_norm, torch_norm("layer_norm"), reference.layer_norm, [x, weight, bias], torch.float32)


def test_only_one_of_two_outputs_is_used():
    """If only the sum or only the norm is used, the gradient is that of this output alone."""
    x, residual, weight = parameters((3, 16), (3, 16), (16,))
    _, total = norms.add_rms_norm(x, residual, weight)
    assert torch.equal(torch.autograd.grad(total.sum(), x)[0], torch.ones_like(x))
    normed, _ = norms.add_rms_norm(x, residual, weight)
    got = torch.autograd.grad(normed.square().sum(), (x, residual, weight))
    want = torch.autograd.grad(reference.rms_norm(x + residual, weight).square().sum(), (x, residual, weight))
    torch.testing.assert_close(got, want)


def test_other_strides():
    """A transposed input and an expanded gradient give the same results as contiguous copies."""
    x, weight = randn(32, 7).float().to(DEVICE).T.requires_grad_(), randn(32, seed=1).float().to(DEVICE)
    got = norms.rms_norm(x, weight)
    assert torch.equal(got, norms.rms_norm(x.contiguous(), weight))
    (grad,) = torch.autograd.grad(got.sum(), x)  # the gradient of a sum is one number, expanded
    (want,) = torch.autograd.grad(reference.rms_norm(x, weight), x, torch.ones(7, 32, device=DEVICE))
    torch.testing.assert_close(grad, want)


def test_repeats_and_compiles():
    """Bit-identical when repeated, also under torch.compile."""
    x, residual, weight, bias = parameters((70, 24), (70, 24), (24,), (24,))
    repeats(norms.rms_norm, x, weight)
    repeats(norms.add_layer_norm, x, residual, weight, bias)


@pytest.mark.parametrize("centred", [False, True])
def test_opcheck(centred):
    """torch.library's checks of schema, fake tensors and autograd registration."""
    x, residual, weight = parameters((5, 24), (5, 24), (24,))
    torch.library.opcheck(norms.norm, (x, residual, weight, weight if centred else None, 1e-5, centred))
    torch.library.opcheck(norms.norm, (x, None, weight, None, 1e-5, centred))


def test_bad_shapes_are_refused():
    """Rows too wide for a program and mismatched tensors raise instead of reading out of bounds."""
    x, ones = torch.zeros(2, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    wide = torch.zeros(1, 32769, device=DEVICE)
    for inputs in ((wide, wide, wide[0]), (x, x[:1], ones), (x, x.half(), ones), (x, x, ones[:4])):
        with pytest.raises(ValueError, match="norm"):
            norms.add_rms_norm(*inputs)
