"""PyTorch operations against the explicit mathematics in float64, that mathematics, and the edge cases of all three
implementations. The Triton kernels' own tests are in the other files."""

import inspect
import math
from functools import partial

import pytest
import torch
from interpreted import DEVICE, MARKS, load_all
from numerics import compare, draw_targets, parameters, randn, sdpa, torch_loss, torch_norm

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
        xs, ws = [randn(*size, scale=3.0), randn(*size, seed=1)], [randn(size[-1], seed=2), randn(size[-1], seed=3)]
        for name, inputs in (("rms_norm", [xs[0], ws[0]]), ("layer_norm", [xs[0], *ws])):
            yield name, torch_norm(name), inputs, {}
            yield f"add_{name}", torch_norm(f"add_{name}"), [*xs, *inputs[1:]], {}
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
    """eps is added to the mean square or the variance: here both are 1, and 1 / sqrt(1 + 3) is a half."""
    norms, x = implementation(name), torch.tensor([[1.0, -1.0]], device=DEVICE)
    for norm, weights in (("rms_norm", [x[0] ** 2]), ("layer_norm", [x[0] ** 2, None])):
        assert norms[norm](x, *weights, 3.0).tolist() == [[0.5, -0.5]]
        assert norms[f"add_{norm}"](x, 0 * x, *weights, 3.0)[0].tolist() == [[0.5, -0.5]]


@every_implementation
def test_loss_at_the_edges(name):
    """No targets: loss 0 and gradient 0. Huge logits stay finite, equal logits give ln V, another ignore index works,
    and without gradients the loss is the same."""
    loss = implementation(name)["linear_cross_entropy"]
    h, w = parameters((6, 8), (11, 8))
    none = loss(h, w, torch.full((6,), -1, device=DEVICE))
    assert none == 0 and all(not g.any() for g in torch.autograd.grad(none, (h, w)))
    targets = torch.tensor([0, 3, 10, 5, 5, 1], device=DEVICE)
    huge = loss(1e4 * h, w, targets)
    assert huge.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(huge, (h, w)))
    assert loss(0 * h, w, targets).item() == pytest.approx(math.log(11), rel=1e-6)
    ignored, kept = loss(h, w, targets, ignore_index=5), targets != 5
    torch.testing.assert_close(ignored, loss(h[kept], w, targets[kept]))
    with torch.no_grad():
        evaluated = loss(h, w, targets, ignore_index=5)
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
    x, weight = randn(5, 33, scale=3.0).float(), randn(33, seed=1).float()

    def by(module) -> bool:
        return torch.equal(ops.rms_norm(x, weight), module.rms_norm(x, weight))

    assert by(fallback) and not by(reference)
    with pytest.raises(ZeroDivisionError), kernels.use("reference"):
        assert by(reference)
        with kernels.use("auto"):
            assert by(reference)
        with kernels.use("fallback", rms_norm=lambda x, *_: x):
            assert torch.equal(ops.rms_norm(x, weight), x)
        assert by(reference)
        1 / 0  # noqa: B018
    assert by(fallback)
