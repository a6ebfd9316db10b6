"""The fused output layer and loss in Triton (interpreted without a GPU) against float64 and PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from interpreted import CUDA, DEVICE, DTYPES, MARKS, compare, flop_formulas, load, poisoned, randn, repeats
from torch.utils.flop_counter import FlopCounterMode

from kernels import reference

pytestmark = MARKS
cross_entropy = load("cross_entropy")
linear_cross_entropy = cross_entropy.linear_cross_entropy

SIZES = [(1, 8, 5), (7, 96, 257), (70, 24, 300), (3, 16, 50257), (64, 32, 4096)]  # M, C, V
SIZES += [(4096, 768, 50257), (8191, 320, 8192), (65536, 64, 256)] if CUDA else []


def draw_targets(M, V, seed=2):
    """Some targets are ignored if there are enough rows."""
    targets = torch.randint(V, (M,), generator=torch.Generator().manual_seed(seed))
    targets[1 : M // 3] = -1
    targets[-1] = V - 1
    return targets.to(DEVICE)


def torch_loss(h, weight, targets, z_loss, ignore_index=-1):
    """PyTorch's operations on materialised float32 logits."""
    logits = F.linear(h, weight).float()
    keep = targets != ignore_index
    nll = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    return (nll + z_loss * logits.logsumexp(-1).square()[keep].sum()) / keep.sum().clamp(min=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_loss_and_gradients(size, z_loss, dtype):
    """Loss and both gradients, some targets ignored, V with and without padding."""
    M, C, V = size
    targets = draw_targets(M, V)
    compare(lambda h, w: linear_cross_entropy(h, w, targets, z_loss=z_loss),
            lambda h, w: torch_loss(h, w, targets, z_loss),
            lambda h, w: reference.linear_cross_entropy(h, w, targets, z_loss=z_loss),
            [randn(M, C), randn(V, C, seed=1, scale=0.3)], dtype)  # fmt: skip


@pytest.mark.parametrize("size", [(7, 96, 257), (64, 32, 4096)], ids=str)
def test_a_float32_weight_with_half_precision_h(size):
    """The parameter itself may be given: it is multiplied in the dtype of h and gets a float32 gradient that, unlike
    PyTorch's, was never rounded to half precision."""
    M, C, V = size
    targets = draw_targets(M, V)
    h, weight = randn(M, C).to(DEVICE, torch.float16), randn(V, C, seed=1, scale=0.3).half().float().to(DEVICE)

    def gradients(loss, dtype):
        xs = [h.to(dtype).requires_grad_(), weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_()]
        return torch.autograd.grad(loss(*xs), xs)

    ours = gradients(lambda h, w: linear_cross_entropy(h, w, targets), torch.float16)
    theirs = gradients(lambda h, w: torch_loss(h, w.to(h.dtype), targets, 0.0), torch.float16)
    exact = gradients(lambda h, w: reference.linear_cross_entropy(h, w, targets), torch.float64)
    assert [x.dtype for x in ours] == [torch.float16, torch.float32] == [x.dtype for x in theirs]
    for got, peer, want in zip(ours, theirs, exact, strict=True):
        assert (got.double() - want).abs().max() <= 2 * (peer.double() - want).abs().max()
    assert not torch.equal(ours[1], ours[1].half().float())


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_chunks(rows, monkeypatch):
    """In chunks of few rows, the last one shorter, the loss and its gradients are the same."""
    M, C, V = 33, 24, 100
    h, weight, targets = randn(M, C), randn(V, C, seed=1), draw_targets(M, V)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", rows * 128 * 4)
    compare(lambda h, w: linear_cross_entropy(h, w, targets), lambda h, w: torch_loss(h, w, targets, 0.0),
            lambda h, w: reference.linear_cross_entropy(h, w, targets), [h, weight], torch.float32)  # fmt: skip


def test_chunks_of_whole_tiles(monkeypatch):
    """Large chunks, except the last, are a multiple of 128 rows; loss and gradients are correct."""
    M, C, V, sizes, add = 400, 8, 60, [], cross_entropy._add_product
    h, weight, targets = randn(M, C), randn(V, C, seed=1), draw_targets(M, V)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 150 * 64 * 4)
    monkeypatch.setattr(cross_entropy, "_add_product", lambda total, a, *rest, **first: (
        sizes.append(len(a)), add(total, a, *rest, **first)))  # fmt: skip
    compare(lambda h, w: linear_cross_entropy(h, w, targets), lambda h, w: torch_loss(h, w, targets, 0.0),
            lambda h, w: reference.linear_cross_entropy(h, w, targets), [h, weight], torch.float32)  # fmt: skip
    assert sizes == [256, 144]


def test_all_targets_ignored():
    """Loss 0 and gradients 0, not NaN."""
    h, weight = (randn(*s).float().to(DEVICE).requires_grad_() for s in ((6, 8), (11, 8)))
    with poisoned():
        loss = linear_cross_entropy(h, weight, torch.full((6,), -1, device=DEVICE))
        grads = torch.autograd.grad(loss, (h, weight))
    assert loss == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_large_and_equal_logits():
    """Logits of 1e4 and more are as accurate as in PyTorch; a row of equal logits gives log V; without gradients the
    loss is bit-identical."""
    h, weight, targets = randn(9, 16), randn(500, 16, seed=1), draw_targets(9, 500)
    ours, theirs = (lambda h, w: linear_cross_entropy(h, w, targets)), (lambda h, w: torch_loss(h, w, targets, 0.0))
    for scale in (3e3, 1e6):
        compare(ours, theirs, lambda h, w: reference.linear_cross_entropy(h, w, targets), [scale * h, weight],
                torch.float32)  # fmt: skip
    h, weight = (t.float().to(DEVICE).requires_grad_() for t in (h, weight))
    assert linear_cross_entropy(0 * h, weight, targets).item() == pytest.approx(math.log(500), rel=1e-6)
    with torch.no_grad():
        without = linear_cross_entropy(h, weight, targets)
    assert torch.equal(without, linear_cross_entropy(h, weight, targets)) and not without.requires_grad


def test_targets_outside_the_vocabulary():
    """They make the loss NaN instead of reading out of bounds."""
    h, weight = randn(4, 8).float().to(DEVICE), randn(10, 8).float().to(DEVICE)
    for wrong in (10, -2, 2**40):
        assert linear_cross_entropy(h, weight, torch.tensor([1, 2, 3, wrong], device=DEVICE)).isnan()


def test_too_few_targets_are_refused():
    """Each row needs a target."""
    with pytest.raises(ValueError, match="3 rows"):
        linear_cross_entropy(torch.ones(3, 8, device=DEVICE), torch.ones(5, 8, device=DEVICE), torch.zeros(2))


def test_another_ignore_index():
    """Any index may be ignored; the mean is over the other targets."""
    h, weight = randn(6, 8).float().to(DEVICE), randn(11, 8).float().to(DEVICE)
    targets = torch.tensor([0, 5, 10, 5, 5, 1], device=DEVICE)
    kept = targets != 5
    ours = linear_cross_entropy(h, weight, targets, ignore_index=5)
    torch.testing.assert_close(ours, linear_cross_entropy(h[kept], weight, targets[kept]))


def test_gradients_scale_with_the_incoming_gradient():
    """Gradients computed in the forward are scaled by a factor on the loss, such as that of accumulation, and a second
    backward through the same graph gives the same ones."""
    h, weight = (randn(*s).float().to(DEVICE).requires_grad_() for s in ((5, 8), (9, 8)))
    loss = linear_cross_entropy(h, weight, draw_targets(5, 9))
    once, twice, half = (torch.autograd.grad(f * loss, (h, weight), retain_graph=True) for f in (1.0, 1.0, 0.5))
    assert all(torch.equal(a, b) and torch.equal(0.5 * a, c) for a, b, c in zip(once, twice, half, strict=True))


def test_repeats_and_compiles(monkeypatch):
    """Bit-identical when repeated, also under torch.compile, over several chunks."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 8 * 64 * 4)
    targets = draw_targets(20, 50)
    h, weight = (randn(*s).float().to(DEVICE).requires_grad_() for s in ((20, 8), (50, 8)))
    repeats(lambda h, w: linear_cross_entropy(h, w, targets, z_loss=1e-3), h, weight)


@pytest.mark.parametrize("train", [True, False])
def test_opcheck_and_flops(train):
    """torch.library's checks; three matrix products of M x C x V in training, one in evaluation."""
    h, weight = (randn(*s).float().to(DEVICE).requires_grad_(train) for s in ((6, 8), (20, 8)))
    targets = draw_targets(6, 20)
    torch.library.opcheck(cross_entropy.head, (h, weight, targets, -1, 1e-3, train))
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        linear_cross_entropy(h, weight, targets)
    assert counter.get_total_flops() == (3 if train else 1) * 2 * 6 * 8 * 20


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_memory():
    """At V = 50,257 the peak, with gradients, is below a quarter of that of materialised float32 logits."""
    M, C, V = 16384, 768, 50257
    h, weight = (randn(*s).to(DEVICE, torch.bfloat16).requires_grad_() for s in ((M, C), (V, C)))
    targets, peaks = draw_targets(M, V), []
    for loss in (linear_cross_entropy, lambda h, w, t: torch_loss(h, w, t, 0.0)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(loss(h, weight, targets), (h, weight))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < peaks[1] / 4
