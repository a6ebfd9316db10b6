"""The fused output layer and loss in Triton (interpreted without a GPU) against float64 and PyTorch."""

from functools import partial

import pytest
import torch
from interpreted import CUDA, DEVICE, DTYPES, MARKS, load
from numerics import compare, draw_targets, parameters, randn, repeats, torch_loss

from kernels import reference

pytestmark = MARKS
cross_entropy = load("cross_entropy")
linear_cross_entropy = cross_entropy.linear_cross_entropy
LOSSES = (linear_cross_entropy, torch_loss, reference.linear_cross_entropy)

SIZES = [(1, 8, 5), (7, 96, 257), (70, 24, 300), (3, 16, 50257), (64, 32, 4096)]  # M, C, V
SIZES += [(4096, 768, 50257), (8191, 320, 8192), (65536, 64, 256)] if CUDA else []


def check(targets, inputs, dtype=torch.float32, **options):
    compare(*(partial(loss, targets=targets, **options) for loss in LOSSES), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_loss_and_gradients(size, z_loss, dtype):
    """Loss and both gradients, some targets ignored, V with and without padding."""
    M, C, V = size
    check(draw_targets(M, V), [randn(M, C), randn(V, C, seed=1, scale=0.3)], dtype, z_loss=z_loss)


@pytest.mark.parametrize("size", [(7, 96, 257), (64, 32, 4096)], ids=str)
def test_a_float32_weight_with_half_precision_h(size):
    """A float32 weight is multiplied in the dtype of h. Unlike PyTorch's, its float32 gradient was never rounded to
    half precision."""
    M, C, V = size
    ours, exact = (partial(loss, targets=draw_targets(M, V)) for loss in LOSSES[::2])
    theirs = lambda h, w: torch_loss(h, w.to(h.dtype), draw_targets(M, V))  # noqa: E731
    h, weight = randn(M, C), randn(V, C, seed=1, scale=0.3)
    compare(ours, theirs, exact, [h], torch.float16, [weight])
    xs = h.to(DEVICE, torch.float16).requires_grad_(), weight.half().float().to(DEVICE).requires_grad_()
    grad = torch.autograd.grad(ours(*xs), xs[1])[0]
    assert not torch.equal(grad, grad.half().float())


@pytest.mark.parametrize("M, rows, chunks", [(33, 5, [5] * 6 + [3]), (33, 16, [11] * 3), (400, 150, [256, 144])])
def test_chunks(M, rows, chunks, monkeypatch):
    """Over chunks of `rows` at most, large ones rounded up to a multiple of 128, loss and gradients are correct."""
    targets, sizes, add = draw_targets(M, 100), [], cross_entropy._add_product

    def counted(total, a, *rest, **first):
        sizes.append(len(a))
        add(total, a, *rest, **first)

    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", rows * 128 * 4)
    monkeypatch.setattr(cross_entropy, "_add_product", counted)
    check(targets, [randn(M, 24), randn(100, 24, seed=1)])
    assert sizes == chunks


@pytest.mark.parametrize("scale", [3e3, 1e6])
def test_large_logits(scale):
    """Logits of 1e4 and more are as accurate as in PyTorch."""
    check(draw_targets(9, 500), [randn(9, 16, scale=scale), randn(500, 16, seed=1)])


def test_bad_targets():
    """Outside the vocabulary they make the loss NaN instead of reading out of bounds; too few raise."""
    h, weight = parameters((4, 8), (10, 8))
    for wrong in (10, -2, 2**40):
        assert linear_cross_entropy(h, weight, torch.tensor([1, 2, 3, wrong], device=DEVICE)).isnan()
    with pytest.raises(ValueError, match="4 rows"):
        linear_cross_entropy(h, weight, torch.zeros(3, device=DEVICE))


def test_repeats_and_compiles(monkeypatch):
    """Bit-identical when repeated, also under torch.compile, over several chunks."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 8 * 64 * 4)
    targets = draw_targets(20, 50)
    h, weight = parameters((20, 8), (50, 8))
    repeats(lambda h, w: linear_cross_entropy(h, w, targets, z_loss=1e-3), h, weight)


@pytest.mark.parametrize("train", [True, False])
def test_opcheck(train):
    """torch.library's checks of schema, fake tensors and autograd registration."""
    h, weight = (x.requires_grad_(train) for x in parameters((6, 8), (20, 8)))
    torch.library.opcheck(cross_entropy.head, (h, weight, draw_targets(6, 20), -1, 1e-3, train))
