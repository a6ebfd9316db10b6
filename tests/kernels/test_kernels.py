"""PyTorch operations against the explicit mathematics in float64, that mathematics, and the edge cases of all three
implementations. The Triton kernels' own tests are in the other files."""

import inspect
import math
from functools import partial

import pytest
import torch
from interpreted import DEVICE, MARKS, load_all
from numerics import EPS, compare, draw_targets, parameters, randn, sdpa, torch_add_norm, torch_loss, torch_norm

import kernels
from kernels import fallback, ops, reference

NAMES = ["reference", "fallback", pytest.param("triton", marks=MARKS)]
every_implementation = pytest.mark.parametrize("name", NAMES)


def implementation(name):
    """{operation: function}."""
    if name == "triton":
        load_all()
    return ops.implementations(name)


def cases():
    """Operation, PyTorch's own (None: the reference at the dtype), inputs, further arguments."""
    for B, T, H, D in [(1, 1, 1, 2), (2, 7, 3, 8), (1, 129, 2, 48), (2, 64, 4, 32), (1, 300, 1, 64)]:
        qkv = randn(B, T, 3 * H * D)
        yield "attention", partial(sdpa, n_heads=H), [qkv], {"n_heads": H}
        for theta, qk_norm in ((1e4, False), (1e4, True), (None, True)):
            for operation in ("attention", "rotary"):
                yield operation, None, [qkv], {"n_heads": H, "theta": theta, "qk_norm": qk_norm}
    for size in [(1, 8), (7, 96), (3, 129, 64), (2, 5, 33)]:
        x, residual = randn(*size, scale=3.0), randn(*size, seed=1)
        weight, bias = randn(size[-1], seed=2), randn(size[-1], seed=3)
        for weights, options in (
            ([weight], {"bias": None, "kind": "rmsnorm"}),
            ([weight, bias], {"kind": "layernorm"}),
        ):
            yield "norm", partial(torch_norm, **options), [x, *weights], options
            yield "add_norm", partial(torch_add_norm, **options), [x, residual, *weights], options
    for kind in ("gelu", "gelu_tanh", "relu2", "swiglu"):
        yield "activation", None, [randn(7, 66, scale=3.0)], {"kind": kind}
    for M, C, V in [(1, 8, 5), (7, 16, 257), (700, 24, 9000), (64, 32, 256)]:
        for z_loss in (0.0, 1e-2):
            options = {"targets": draw_targets(M, V), "z_loss": z_loss}
            inputs = [randn(M, C), randn(V, C, seed=1, scale=0.3)]
            yield "linear_cross_entropy", partial(torch_loss, **options), inputs, options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation, theirs, inputs, options", [*cases()])
def test_fallback(operation, theirs, inputs, options, dtype):
    """Values and gradients of every operation."""
    exact = partial(getattr(reference, operation), **options)
    compare(partial(getattr(fallback, operation), **options), theirs or exact, exact, inputs, dtype)


@every_implementation
def test_eps_of_norms(name):
    """eps is added to the mean square or the variance: where these are eps / 3, the result is a half."""
    norms, one = implementation(name), torch.tensor([[1.0, -1.0]], device=DEVICE)
    for kind, eps in EPS.items():
        x, how = one * (eps / 3) ** 0.5, (one[0] ** 2, None, kind)
        torch.testing.assert_close(norms["norm"](x, *how), 0.5 * one)
        torch.testing.assert_close(norms["add_norm"](x, 0 * x, *how)[0], 0.5 * one)


@every_implementation
def test_loss_at_the_edges(name):
    """No targets: loss 0 and gradient 0. Huge logits stay finite, equal logits give ln V, rows without a target do not
    count, and without gradients the loss is the same."""
    loss = implementation(name)["linear_cross_entropy"]
    h, w = parameters((6, 8), (11, 8))
    none = loss(h, w, torch.full((6,), -1, device=DEVICE))
    assert none == 0 and all(not g.any() for g in torch.autograd.grad(none, (h, w)))
    targets = torch.tensor([0, 3, 10, 5, 5, 1], device=DEVICE)
    huge = loss(1e4 * h, w, targets)
    assert huge.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(huge, (h, w)))
    assert loss(0 * h, w, targets).item() == pytest.approx(math.log(11), rel=1e-6)
    kept = targets != 5
    some = torch.where(kept, targets, -1)
    ignored = loss(h, w, some)
    torch.testing.assert_close(ignored, loss(h[kept], w, targets[kept]))
    with torch.no_grad():
        evaluated = loss(h, w, some)
    assert torch.equal(evaluated, ignored) and not evaluated.requires_grad


@every_implementation
def test_gradients_scale_with_the_incoming_gradient(name):
    """Gradients computed in the forward are scaled by a factor on the loss (gradient accumulation); a second backward
    through the same graph gives the same ones."""
    h, w = parameters((5, 8), (9, 8))
    loss = implementation(name)["linear_cross_entropy"](h, w, torch.tensor([0, 1, 2, 3, 8], device=DEVICE))
    once, twice, half = (torch.autograd.grad(f * loss, (h, w), retain_graph=True) for f in (1.0, 1.0, 0.5))
    assert all(torch.equal(a, b) and torch.equal(0.5 * a, c) for a, b, c in zip(once, twice, half, strict=True))


@every_implementation
def test_every_implementation_has_every_operation(name):
    """With the same arguments and defaults as in `ops`."""
    for operation, function in implementation(name).items():
        assert inspect.signature(function) == inspect.signature(getattr(ops, operation))


def test_a_table_cached_in_inference_mode_works_in_training():
    """Sampling under inference mode does not break the cached table for a later training step."""
    qkv = randn(1, 9, 3 * 26).float()
    with torch.inference_mode():
        fallback.rotary(qkv, 1, 777.0)
    fallback.rotary(qkv.requires_grad_(), 1, 777.0).sum().backward()
    assert qkv.grad.isfinite().all()


def test_use_swaps_and_restores():
    """`use` selects another implementation only in its block, also if the block fails. In a nested block "auto" keeps
    the current one, and a function given by name takes precedence."""
    x, how = randn(5, 33, scale=3.0).float(), (randn(33, seed=1).float(), None, "rmsnorm")

    def by(module) -> bool:
        return torch.equal(ops.norm(x, *how), module.norm(x, *how))

    assert by(fallback) and not by(reference)
    with pytest.raises(ZeroDivisionError), kernels.use("reference"):
        assert by(reference)
        with kernels.use("auto"):
            assert by(reference)
        with kernels.use("fallback", norm=lambda x, *_: x):
            assert torch.equal(ops.norm(x, *how), x)
        assert by(reference)
        1 / 0  # noqa: B018
    assert by(fallback)
