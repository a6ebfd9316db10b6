import math

import pytest
import torch
from torch import nn

from nanochin.base.cli import UserError
from nanochin.config import Config
from nanochin.run.optim import FINAL_LR, Adam, learning_rate


def rate(step, steps=100, warmup=0.0, schedule="cosine", final=None, **options):
    """The learning rate of a run of one token per step."""
    final = FINAL_LR[schedule] if final is None else final
    options |= {"tokens": float(steps), "batch_tokens": 1, "warmup_tokens": warmup}
    return learning_rate(Config(schedule=schedule, final_lr=final, **options), step)


def adam_by_hand(w, gradients, lrs, beta1, beta2, decoupled, l2):
    """Kingma & Ba 2015, Algorithm 1, with decay in the weight (decoupled) or in the gradient (l2)."""
    m = v = torch.zeros_like(w)
    for t, (g, lr) in enumerate(zip(gradients, lrs, strict=True), start=1):
        g = g + l2 * w
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
        w = w - lr * decoupled * w - lr * update
    return w


@pytest.mark.parametrize("kind", ["adamw", "adam"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_steps_follow_the_formula(kind, as_tensor):
    """Six steps equal Adam written out by hand, with decay only on the matrix; the tied matrix is updated once. The
    learning rate is a number, or a tensor that is overwritten."""
    torch.manual_seed(0)
    model, lrs = nn.Linear(5, 3).double(), 2 * (0.01, 0.003, 0.07)
    model.tied = model.weight
    matrix, vector = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = Adam(model, kind, 0.0, (0.8, 0.95), 0.3, False)
    assert [tuple(p.shape) for p in optimizer.parameters] == [(3, 5), (3,)]
    tensor = torch.zeros((), dtype=torch.float64)
    gradients = [(torch.randn(3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)) for _ in lrs]
    for lr, gradient in zip(lrs, gradients, strict=True):
        optimizer.lr = tensor.fill_(lr) if as_tensor else lr
        model.weight.grad, model.bias.grad = (g.clone() for g in gradient)
        optimizer.step()
    decay = {"decoupled": 0.3 if kind == "adamw" else 0.0, "l2": 0.3 if kind == "adam" else 0.0}
    want_matrix = adam_by_hand(matrix, [g for g, _ in gradients], lrs, 0.8, 0.95, **decay)
    want_vector = adam_by_hand(vector, [g for _, g in gradients], lrs, 0.8, 0.95, decoupled=0.0, l2=0.0)
    torch.testing.assert_close(model.weight.detach(), want_matrix, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model.bias.detach(), want_vector, rtol=1e-12, atol=1e-14)


def test_rounded_weights():
    """Weights have bfloat16's precision after each step: a small update is lost, a large one is rounded to nearest."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0]]))
    optimizer = Adam(model, "adamw", 1e-4, (0.9, 0.95), 0.0, True)
    for lr, want in ((1e-4, 1.0), (0.01, 0.98828125)):  # next below 1: 1 - 2^-8; 0.99 is nearest to 1 - 3 * 2^-8
        optimizer.lr = lr
        model.weight.grad = torch.ones(1, 2)
        optimizer.step()
        assert model.weight.tolist() == [[want, want]]


def test_the_compiler_is_not_imported(command):
    """Making and stepping an optimizer does not import torch._dynamo, which takes seconds."""
    code = """
import sys, torch
from nanochin.run.optim import Adam
layer = torch.nn.Linear(2, 2)
optimizer = Adam(layer, "adamw", 1e-3, (0.9, 0.95), 0.1, False)
layer(torch.ones(1, 2)).sum().backward()
optimizer.step()
sys.exit("torch._dynamo" in sys.modules)
"""
    assert command("-c", code).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# The schedule


@pytest.mark.parametrize(
    ("schedule", "step", "value", "options"),
    [
        ("cosine", 0, 1.0, {}),
        ("cosine", 50, 0.55, {}),  # half way between 1 and 0.1
        ("cosine", 25, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, {}),
        ("cosine", 100, 0.25, {"final": 0.25}),
        ("cosine", 50, 0.1, {"cycle": 0.5}),
        ("cosine", 50, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, {"cycle": 2.0}),
        ("cosine", 55, 0.55, {"warmup": 10.0}),  # half way from the end of the warm-up
        ("linear", 55, 0.5, {"warmup": 10.0}),
        ("linear", 100, 0.25, {"final": 0.25}),
        ("wsd", 80, 1.0, {"warmup": 10.0}),
        ("wsd", 85, 0.5, {}),  # 1 - sqrt(1/4)
        ("wsd", 100, 0.25, {"final": 0.25}),
        ("wsd", 36, 1.0, {"cooldown": 0.0}),
        ("wsd", 36, 1 - math.sqrt(0.36), {"cooldown": 1.0}),
        ("constant", 99, 1.0, {}),
    ],
)
def test_rates_by_hand(schedule, step, value, options):
    """100 steps without warm-up, at steps whose rate is easily computed by hand."""
    assert rate(step, schedule=schedule, **options) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("schedule", FINAL_LR)
def test_warmup_is_linear_from_above_zero(schedule):
    """A warm-up of 4 steps: 1/5, 2/5, 3/5, 4/5, then the peak; the same rule for 2.5 steps."""
    assert [rate(s, warmup=4, schedule=schedule) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [rate(s, warmup=2.5, schedule=schedule) for s in range(3)] == pytest.approx([2 / 7, 4 / 7, 6 / 7])


@pytest.mark.parametrize("schedule", FINAL_LR)
@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.0), (100, 13.7), (7, 3.0), (1, 0.0), (10, 9.5)])
def test_rates_rise_then_fall(schedule, steps, warmup):
    """Rates are in (0, 1] with one peak, and reach the final rate after the last step."""
    rates = [rate(s, steps, warmup, schedule) for s in range(steps)]
    peak = rates.index(max(rates))
    assert all(0 < r <= 1 for r in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rate(steps, steps, warmup, schedule) == pytest.approx(FINAL_LR[schedule], abs=1e-12)


@pytest.mark.parametrize("schedule, cycle", [("wsd", 1.0), ("constant", 1.0), ("cosine", 0.5)])
def test_warmup_longer_than_the_schedule(schedule, cycle):
    """Raises UserError, which names the option."""
    with pytest.raises(UserError, match="`warmup_tokens`"):
        rate(0, steps=100, warmup=100 * cycle, schedule=schedule, cycle=cycle)
