"""Every operation against the explicit mathematics in float64: values, gradients, and the choice of implementation."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from interpreted import flop_formulas, load_all
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import fallback, ops, reference
from nanochin.config import make_shape
from nanochin.model import GPT
from nanochin.plan.flops import count_flops

# Odd and round sizes: (rows..., C), and (B, T, heads, head size)
ROWS = [(1, 8), (7, 96), (3, 129, 64), (2, 5, 33)]
HEADS = [(1, 1, 1, 2), (2, 7, 3, 8), (1, 129, 2, 48), (2, 64, 4, 32), (1, 300, 1, 64)]


def randn(*size, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(size, generator=generator, dtype=torch.float64)


def compare(ours, theirs, exact, inputs, dtype, ulps=4):
    """Our value and gradients against `exact` in float64: at most twice the error of PyTorch's operations (`theirs`) at
    that dtype, plus a few units in the last place of the largest value."""

    def run(function, dtype):
        xs = [x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in inputs]
        out = function(*xs)
        outs = out if isinstance(out, tuple) else (out,)
        seeds = [randn(*o.shape, seed=9 + i).to(o.dtype) for i, o in enumerate(outs)]
        wanted = [x for x in xs if x.is_floating_point()]
        return [*outs, *torch.autograd.grad(outs, wanted, seeds)]

    for got, peer, want in zip(run(ours, dtype), run(theirs, dtype), run(exact, torch.float64), strict=True):
        assert got.dtype == peer.dtype
        error, allowed = (got.double() - want).abs().max(), (peer.double() - want).abs().max()
        unit = ulps * torch.finfo(dtype).eps * want.abs().max()
        assert error <= 2 * allowed + unit, f"error {error:.2e}, PyTorch's {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", HEADS)
def test_attention(size, dtype):
    """Causal attention on packed qkv."""
    B, T, H, D = size

    def sdpa(qkv):
        q, k, v = qkv.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, H * D)

    inputs = [randn(B, T, 3 * H * D)]
    compare(lambda x: fallback.attention(x, H), sdpa, lambda x: reference.attention(x, H), inputs, dtype)


@pytest.mark.parametrize("theta, qk_norm", [(100.0, False), (100.0, True), (None, True)])
def test_attention_with_positions_is_rotary_then_attention(theta, qk_norm):
    """Bit-identical to the two operations in sequence, in fallback and reference."""
    qkv = randn(2, 7, 3 * 3 * 8).float()
    for by in (fallback, reference):
        apart = by.attention(by.rotary(qkv, 3, theta, qk_norm), 3)
        assert torch.equal(by.attention(qkv, 3, theta, qk_norm), apart)
        assert not torch.equal(apart, by.attention(qkv, 3))


def test_reference_attention_is_the_formula():
    """The reference itself, against loops over batch, head and position."""
    B, T, H, D = 2, 5, 3, 4
    qkv = randn(B, T, 3 * H * D)
    q, k, v = (part.reshape(B, T, H, D) for part in qkv.chunk(3, dim=-1))
    want = torch.zeros(B, T, H, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                weights = torch.stack([(q[b, t, h] * k[b, s, h]).sum() / D**0.5 for s in range(t + 1)]).exp()
                want[b, t, h] = sum(w * v[b, s, h] for s, w in enumerate(weights / weights.sum()))
    torch.testing.assert_close(reference.attention(qkv, H), want.flatten(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("theta", [10_000.0, None])
@pytest.mark.parametrize("size", HEADS)
def test_rotary(size, theta, qk_norm, dtype):
    """Rotation and QK-norm of queries and keys; values are unchanged."""
    B, T, H, D = size
    inputs = [randn(B, T, 3 * H * D)]
    exact = lambda x: reference.rotary(x, H, theta, qk_norm)  # noqa: E731
    compare(lambda x: fallback.rotary(x, H, theta, qk_norm), exact, exact, inputs, dtype)
    x = inputs[0].to(dtype)
    assert torch.equal(fallback.rotary(x, H, theta, qk_norm)[..., 2 * H * D :], x[..., 2 * H * D :])


def test_rotary_scores_depend_on_distance_only():
    """With equal queries and equal keys at all positions, the score of (t, s) depends only on t - s."""
    T, D = 12, 16
    q, k = randn(D, seed=1), randn(D, seed=2)
    qkv = torch.cat((q, k, torch.zeros(D, dtype=torch.float64))).expand(1, T, 3 * D)
    turned = reference.rotary(qkv, 1, 100.0)[0]
    scores = turned[:, :D] @ turned[:, D : 2 * D].T
    for distance in range(T):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ROWS)
def test_norms(size, dtype):
    """RMSNorm and LayerNorm, alone and with the residual added first."""
    x, residual = randn(*size, scale=3.0), randn(*size, seed=1)
    weight, bias = randn(size[-1], seed=2), randn(size[-1], seed=3)
    C = (size[-1],)
    compare(lambda x, w: fallback.rms_norm(x, w), lambda x, w: F.rms_norm(x, C, w, 1e-6),
            lambda x, w: reference.rms_norm(x, w), [x, weight], dtype)  # fmt: skip
    compare(lambda *a: fallback.layer_norm(*a), lambda x, w, b: F.layer_norm(x, C, w, b),
            lambda *a: reference.layer_norm(*a), [x, weight, bias], dtype)  # fmt: skip
    compare(lambda *a: fallback.add_rms_norm(*a), lambda x, r, w: (F.rms_norm(x + r, C, w, 1e-6), x + r),
            lambda *a: reference.add_rms_norm(*a), [x, residual, weight], dtype)  # fmt: skip
    compare(lambda *a: fallback.add_layer_norm(*a), lambda x, r, w, b: (F.layer_norm(x + r, C, w, b), x + r),
            lambda *a: reference.add_layer_norm(*a), [x, residual, weight, bias], dtype)  # fmt: skip


@pytest.mark.parametrize("module", [fallback, reference])
def test_eps_of_norms(module):
    """eps is added to the mean square or the variance: here both are 1, and 1 / sqrt(1 + 3) is a half."""
    x, weight = torch.tensor([[1.0, -1.0]]), torch.ones(2)
    assert module.rms_norm(x, weight, 3.0).tolist() == module.layer_norm(x, weight, None, 3.0).tolist() == [[0.5, -0.5]]
    assert module.add_rms_norm(x, 0 * x, weight, 3.0)[0].tolist() == [[0.5, -0.5]]
    assert module.add_layer_norm(x, 0 * x, weight, None, 3.0)[0].tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "relu2", "swiglu"])
def test_activation(kind, dtype):
    """GELU, its tanh form, ReLU squared and SwiGLU."""
    exact = lambda x: reference.activation(x, kind)  # noqa: E731
    compare(lambda x: fallback.activation(x, kind), exact, exact, [randn(7, 66, scale=3.0)], dtype)


def plain_loss(h, w, targets, ignore, z_loss):
    """PyTorch's own operations on materialised float32 logits (float64 stays)."""
    logits = F.linear(h, w).to(torch.promote_types(h.dtype, torch.float32))
    keep = targets != ignore
    nll = F.cross_entropy(logits, targets, ignore_index=ignore, reduction="sum")
    return (nll + z_loss * logits.logsumexp(-1).square()[keep].sum()) / keep.sum().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("size", [(1, 8, 5), (7, 16, 257), (700, 24, 9000), (64, 32, 256)])
def test_linear_cross_entropy(size, z_loss, dtype):
    """Loss and gradients of the output layer, one chunk of logits or several, some targets ignored."""
    M, C, V = size
    h, w = randn(M, C), randn(V, C, seed=1, scale=0.3)
    targets = torch.randint(V, (M,), generator=torch.Generator().manual_seed(2))
    targets[1 : M // 3] = -1
    compare(lambda h, w, t: fallback.linear_cross_entropy(h, w, t, z_loss=z_loss),
            lambda h, w, t: plain_loss(h, w, t, -1, z_loss),
            lambda h, w, t: reference.linear_cross_entropy(h, w, t, z_loss=z_loss), [h, w, targets], dtype)  # fmt: skip


@pytest.mark.parametrize("module", [fallback, reference])
def test_linear_cross_entropy_at_the_edges(module):
    """No targets: loss 0 and gradient 0. Huge logits stay finite, equal logits give ln V, another ignore index works,
    and without gradients the loss is the same."""
    h, w = randn(6, 8).float().requires_grad_(), randn(11, 8, seed=1).float().requires_grad_()
    loss = module.linear_cross_entropy(h, w, torch.full((6,), -1))
    assert loss == 0 and all(not g.any() for g in torch.autograd.grad(loss, (h, w)))
    targets = torch.tensor([0, 3, 10, 5, 5, 1])
    huge = module.linear_cross_entropy(1e4 * h, w, targets)
    assert huge.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(huge, (h, w)))
    flat = module.linear_cross_entropy(torch.zeros(6, 8), w, targets)
    assert flat.item() == pytest.approx(2.3978952728, rel=1e-6)  # ln 11
    ignored = module.linear_cross_entropy(h, w, targets, ignore_index=5)
    kept = targets != 5
    assert ignored.item() == pytest.approx(module.linear_cross_entropy(h[kept], w, targets[kept]).item(), rel=1e-6)
    with torch.no_grad():
        assert module.linear_cross_entropy(h, w, targets, ignore_index=5).item() == pytest.approx(ignored.item())


def test_evaluation_computes_no_gradients_of_the_output_layer():
    """Under no_grad the loss takes one matrix product, 2 M C V FLOPs, although the weight requires gradients; in
    training three. The losses are bit-identical."""
    M, C, V = 300, 16, 65
    h, weight, targets = randn(M, C), torch.nn.Parameter(randn(V, C, seed=1)), torch.arange(M) % V

    def loss_and_flops() -> tuple[float, int]:
        with FlopCounterMode(display=False) as counter:
            loss = fallback.linear_cross_entropy(h, weight, targets)
        return loss.item(), counter.get_total_flops()

    with torch.no_grad():
        evaluated, flops = loss_and_flops()
    assert flops == 2 * M * C * V
    assert loss_and_flops() == (evaluated, 3 * flops)


def test_gradients_scale_with_the_incoming_gradient():
    """Gradients computed in the forward are scaled by a factor on the loss, such as that of accumulation."""
    h, w = randn(5, 8).float().requires_grad_(), randn(9, 8, seed=1).float().requires_grad_()
    targets = torch.tensor([0, 1, 2, 3, 8])
    once = torch.autograd.grad(fallback.linear_cross_entropy(h, w, targets), (h, w))
    half = torch.autograd.grad(0.5 * fallback.linear_cross_entropy(h, w, targets), (h, w))
    for a, b in zip(once, half, strict=True):
        torch.testing.assert_close(0.5 * a, b)


def test_repeated_passes_are_bit_identical():
    """Two passes over the same batch give bit-identical losses and gradients."""
    model = GPT(make_shape(32, 2, vocab_size=300, seq_len=48))
    batch = torch.randint(300, (3, 49), generator=torch.Generator().manual_seed(0))
    passes = []
    for _ in range(2):
        loss = model(batch[:, :-1], batch[:, 1:])
        passes.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*passes, strict=True))


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


@pytest.mark.parametrize("name", ["reference", "fallback", "triton"])
def test_every_implementation_has_every_operation(name):
    """With the same arguments and defaults as in `ops`."""
    if name == "triton":
        load_all()
    for operation, function in ops.implementations(name).items():
        assert inspect.signature(function) == inspect.signature(getattr(ops, operation))


def test_backend_says_why():
    """On a CPU it is PyTorch operations, and the reason names the device."""
    name, why = kernels.backend(torch.device("cpu"))
    assert name == "fallback" and "cpu" in why or "triton is not installed" in why


@pytest.mark.parametrize("options", [{}, {"activation": "swiglu", "tied": False}, {"qk_norm": True}])
def test_flops_of_the_operations_in_use(options):
    """FlopCounterMode counts `physical` FLOPs, forward and backward, for the operations in use: unmasked attention, its
    backward twice its forward."""
    shape = make_shape(48, 2, vocab_size=77, seq_len=40, **options)
    model = GPT(shape)
    batch = torch.randint(77, (2, 41), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        model(batch[:, :-1], batch[:, 1:]).backward()
    assert counter.get_total_flops() == count_flops(shape, 2 * 40)["physical"]
