import math

import pytest
import torch

from nanochin.config import make_shape
from nanochin.model import GPT

pytestmark = pytest.mark.usefixtures("one_thread")

V, T = 61, 12
VARIANTS = {
    "chinchilla": {},
    "layernorm": {"norm": "layernorm"},
    "bias": {"bias": True},
    "relu2": {"activation": "relu2"},
    "swiglu": {"activation": "swiglu"},
    "untied": {"tied": False},
    "qk_norm": {"qk_norm": True},
    "small heads": {"head_size": 2, "ffn": 10},
    "one head": {"head_size": 24},
    "gpt2": {"norm": "layernorm", "positions": "learned", "bias": True, "activation": "gelu_tanh"},
    "llama": {"activation": "swiglu", "tied": False},
    "all at once": {"norm": "layernorm", "positions": "learned", "bias": True, "activation": "swiglu", "tied": False,
                    "qk_norm": True, "head_size": 12},
}  # fmt: skip
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def shape_of(options, width=24, layers=2):
    return make_shape(width, layers, **{"vocab_size": V, "seq_len": T, "head_size": 8} | options)


def make(options, **rest):
    """A model with random norm weights and biases instead of the initial ones and zeros, so that they matter."""
    model = GPT(shape_of(options), **rest)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def some_tokens(*size, seed=3):
    return torch.randint(V, size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# The same model as in the papers: one sequence, one head, one position at a time, in float64


def papers(shape, weights, tokens):
    """Logits (T, V) of one sequence, in textbook order: x + attention(norm(x)), x + feed_forward(norm(x)), norm."""

    def norm(x, name):
        if shape.norm == "rmsnorm":  # Zhang & Sennrich 2019, equation 4
            return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * weights[f"{name}.weight"]
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)  # Ba et al. 2016
        y = (x - mean) / torch.sqrt(variance + 1e-5) * weights[f"{name}.weight"]
        return y + weights[f"{name}.bias"] if shape.bias else y

    def linear(x, name):
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if shape.bias else y

    def rotate(x):
        """(T, D): Su et al. 2021, section 3.2: complex number i of position t is rotated by t * 10000^(-2i/D)."""
        if shape.qk_norm:  # Henry et al. 2020, with the root mean square and no gain
            x = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6)
        if shape.positions == "rotary":
            D = shape.head_size
            theta = 10000.0 ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D)
            angle = torch.arange(len(x), dtype=torch.float64)[:, None] * theta
            y = torch.complex(x[:, : D // 2], x[:, D // 2 :]) * torch.polar(torch.ones_like(angle), angle)
            x = torch.cat((y.real, y.imag), dim=-1)
        return x

    def attention(x, name):  # Vaswani et al. 2017, section 3.2
        q, k, v = linear(x, f"{name}.qkv").split(shape.width, dim=-1)
        heads = []
        for head in range(shape.heads):
            part = slice(head * shape.head_size, (head + 1) * shape.head_size)
            qh, kh, vh = rotate(q[:, part]), rotate(k[:, part]), v[:, part]
            rows = []
            for t in range(len(x)):
                weight = torch.softmax(kh[: t + 1] @ qh[t] / math.sqrt(shape.head_size), dim=0)
                rows.append(weight @ vh[: t + 1])
            heads.append(torch.stack(rows))
        return linear(torch.cat(heads, dim=-1), f"{name}.out")

    def feed_forward(x, name):
        up = linear(x, f"{name}.up")
        if shape.activation == "gelu":  # Hendrycks & Gimpel 2016, section 2: x Phi(x)
            up = up * torch.special.ndtr(up)
        elif shape.activation == "gelu_tanh":  # the same section, the form that GPT-2 uses
            up = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        elif shape.activation == "relu2":  # So et al. 2021
            up = torch.relu(up) ** 2
        else:  # Shazeer 2020: the first half of the matrix is the gate
            gate, up = up.split(shape.ffn, dim=-1)
            up = gate / (1 + torch.exp(-gate)) * up
        return linear(up, f"{name}.down")

    x = weights["embed.weight"][tokens]
    if shape.positions == "learned":
        x = x + weights["positions.weight"][: len(tokens)]
    next_norm = "norm"
    for i in range(shape.layers):
        x = x + attention(norm(x, next_norm), f"blocks.{i}.attention")
        x = x + feed_forward(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.feed_forward")
        next_norm = f"blocks.{i}.norm2"
    return norm(x, next_norm) @ weights["embed.weight" if shape.tied else "head.weight"].T


@every_variant
def test_model_matches_the_papers(options):
    """The logits, the loss and its gradient in every parameter equal those of the float64 textbook model; so do the
    logits of shorter sequences."""
    model, tokens = make(options), some_tokens(2, T + 1)
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    for inputs in (tokens[:1, :1], tokens[:, :5], tokens[:, :-1]):
        expected = torch.stack([papers(model.shape, weights, row) for row in inputs])
        logits = model(inputs)
        assert logits.shape == (*inputs.shape, V) and logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert loss.shape == () and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        grad, exact = parameter.grad.double(), weights[name].grad
        assert exact.norm() > 1e-7, name
        assert (grad - exact).norm() < 1e-5 * exact.norm() + 1e-8, name


def test_z_loss_is_not_part_of_the_evaluated_loss():
    """In training z_loss log(Z)^2 is added; without gradients the loss is plain nats, comparable between runs."""
    model, tokens, targets = make({}, z_loss=0.01), some_tokens(2, T), some_tokens(2, T, seed=4)
    logits = model(tokens).double()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    extra = 0.01 * logits.exp().sum(-1).log().square().mean().item()
    assert extra > 0.1
    assert model(tokens, targets).item() == pytest.approx(nats + extra, rel=1e-5)
    with torch.no_grad():
        assert model(tokens, targets).item() == pytest.approx(nats, rel=1e-5)


@every_variant
def test_no_position_sees_the_future(options):
    """Another token at t changes the logits at t; all logits before t are bit-identical."""
    model, tokens = make(options), some_tokens(1, T)
    with torch.no_grad():
        before = model(tokens)[0]
        for t in (0, 1, T // 2, T - 1):
            other = tokens.clone()
            other[0, t] = (other[0, t] + 1) % V
            after = model(other)[0]
            assert torch.equal(after[:t], before[:t])
            assert not torch.equal(after[t], before[t])


def test_weights_depend_only_on_the_seed():
    """The same seed gives the same bits, with any global generator state or dtype; another seed other matrices."""
    torch.manual_seed(1)
    first = GPT(shape_of({}))
    torch.manual_seed(2)
    again, other = GPT(shape_of({}), dtype=torch.bfloat16), GPT(shape_of({}), seed=2)
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.ndim < 2 or not torch.equal(a, c)


@pytest.mark.parametrize("options", [VARIANTS["chinchilla"], VARIANTS["all at once"]], ids=["tied", "untied"])
def test_scale_of_the_initial_weights(options):
    """Matrices have standard deviation sqrt(2 / 5C), over sqrt(2 layers) for the two that write to the residual stream;
    norms are 1 and biases 0."""
    model = GPT(shape_of(options | {"vocab_size": 512, "seq_len": 64, "head_size": 16}, width=64, layers=3))
    for name, p in model.named_parameters():
        if p.ndim < 2:
            assert torch.equal(p, torch.full_like(p, 0.0 if name.endswith("bias") else 1.0)), name
            continue
        residual = "attention.out" in name or "down" in name
        expected = math.sqrt(2 / (5 * 64)) / (math.sqrt(6) if residual else 1)
        assert p.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * p.numel())), name
        assert abs(p.mean().item()) < 5 * expected / math.sqrt(p.numel()), name


@pytest.mark.parametrize("options", [VARIANTS["chinchilla"], VARIANTS["all at once"]], ids=["default", "all"])
def test_bf16_computes_on_float32_weights(options):
    """In bf16 weights and gradients stay float32; loss and gradients are within 2% of float32."""
    exact, rounded = make(options), make(options, dtype=torch.bfloat16)
    tokens = some_tokens(2, T + 1)
    losses = [model(tokens[:, :-1], tokens[:, 1:]) for model in (exact, rounded)]
    for loss in losses:
        loss.backward()
    assert losses[1].dtype == torch.float32 and losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)
    assert losses[0].item() != losses[1].item()  # or nothing was computed in bf16
    assert {p.dtype for p in rounded.parameters()} == {p.grad.dtype for p in rounded.parameters()} == {torch.float32}
    a, b = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (exact, rounded))
    assert (a - b).norm() < 0.02 * a.norm()
