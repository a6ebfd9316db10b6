import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nanochin.base.cli import UserError
from nanochin.run.optim import Adam, default_final, lr_at

SCHEDULES = ("cosine", "wsd", "linear", "constant")


def rate(step, steps=100, warmup=0.0, schedule="cosine", cycle=1.0, final=None, cooldown=0.2):
    final = default_final(schedule) if final is None else final
    return lr_at(step, steps, warmup, schedule, cycle, final, cooldown)


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


class Tiny(nn.Module):
    """One matrix used twice, as a tied head is, and one vector."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(3, 5, dtype=torch.float64, generator=generator))
        self.vector = nn.Parameter(torch.randn(5, dtype=torch.float64, generator=generator))
        self.tied = self.matrix


def adam_by_hand(w, gradients, lr, beta1, beta2, decoupled, l2):
    """Kingma & Ba 2015, Algorithm 1, with decay in the weight (decoupled) or in the gradient (l2)."""
    m = v = torch.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        g = g + l2 * w
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
        w = w - lr * decoupled * w - lr * update
    return w


@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_steps_follow_the_formula(kind):
    """Five steps equal Adam written out by hand, decay on the matrix alone."""
    model = Tiny()
    matrix, vector = model.matrix.detach().clone(), model.vector.detach().clone()
    optimizer = Adam(model, kind, lr=0.02, betas=(0.8, 0.95), weight_decay=0.3)
    torch.manual_seed(1)
    gradients = [(torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)) for _ in range(5)]
    for gradient in gradients:
        model.matrix.grad, model.vector.grad = (g.clone() for g in gradient)
        optimizer.step()
    decay = {"decoupled": 0.3 if kind == "adamw" else 0.0, "l2": 0.3 if kind == "adam" else 0.0}
    want_matrix = adam_by_hand(matrix, [g for g, _ in gradients], 0.02, 0.8, 0.95, **decay)
    want_vector = adam_by_hand(vector, [g for _, g in gradients], 0.02, 0.8, 0.95, decoupled=0.0, l2=0.0)
    torch.testing.assert_close(model.matrix.detach(), want_matrix, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model.vector.detach(), want_vector, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_steps_equal_those_of_torch(kind):
    """Ten float32 steps of a small network equal torch.optim's own to the bit."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 3))
    theirs = copy.deepcopy(ours)
    optimizer = Adam(ours, kind, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    groups = [{"params": [p for p in theirs.parameters() if (p.ndim >= 2) == matrices], "weight_decay": decay}
              for matrices, decay in ((True, 0.1), (False, 0.0))]  # fmt: skip
    reference = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[kind](groups, 0.01, (0.9, 0.95), fused=True)
    for _ in range(10):
        x = torch.randn(5, 7)
        for model, optim in ((ours, optimizer), (theirs, reference)):
            model(x).square().mean().backward()
            optim.step()
            optim.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_the_rate_may_be_a_tensor(kind):
    """Steps with the rates in a tensor that is overwritten are those with the same numbers, to the bit."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 3))
    other = copy.deepcopy(plain)
    first, second = (Adam(model, kind, 0.0, (0.9, 0.95), 0.1) for model in (plain, other))
    second.lr = torch.zeros((), dtype=torch.float64)
    for rate in (0.01, 0.003, 0.07):
        x = torch.randn(5, 7)
        first.lr = rate
        second.lr.fill_(rate)
        for model, optimizer in ((plain, first), (other, second)):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), other.parameters(), strict=True))


def test_a_tied_matrix_is_updated_once():
    """The matrix that a model holds under two names is there once."""
    optimizer = Adam(Tiny(), "adamw", 1e-3, (0.9, 0.95), 0.1)
    assert [tuple(p.shape) for p in optimizer.parameters] == [(3, 5), (5,)]


def test_the_compiler_is_not_imported():
    """Making an optimizer and stepping it does not load torch._dynamo, which takes seconds."""
    code = """
import sys, torch
from nanochin.run.optim import Adam
layer = torch.nn.Linear(2, 2)
optimizer = Adam(layer, "adamw", 1e-3, (0.9, 0.95), 0.1)
layer(torch.ones(1, 2)).sum().backward()
optimizer.step()
optimizer.zero_grad()
assert layer.weight.grad is None
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# The schedule


@pytest.mark.parametrize(
    ("schedule", "step", "value"),
    [
        ("cosine", 0, 1.0),
        ("cosine", 50, 0.55),  # half way between 1 and 0.1
        ("cosine", 25, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),
        ("cosine", 100, 0.1),
        ("linear", 25, 0.75),
        ("linear", 99, 0.01),
        ("linear", 100, 0.0),
        ("wsd", 80, 1.0),
        ("wsd", 85, 0.5),  # 1 - sqrt(1/4)
        ("wsd", 100, 0.0),
        ("constant", 99, 1.0),
    ],
)
def test_values_worked_out_by_hand(schedule, step, value):
    """100 steps without warm-up, at moments whose value can be worked out in the head."""
    assert rate(step, schedule=schedule) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_climbs_in_equal_steps_from_above_zero(schedule):
    """A warm-up of 4 steps: 1/5, 2/5, 3/5, 4/5, and the peak after it; 2.5 steps: the same rule."""
    assert [rate(s, warmup=4, schedule=schedule) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [rate(s, warmup=2.5, schedule=schedule) for s in range(3)] == pytest.approx([2 / 7, 4 / 7, 6 / 7])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.0), (100, 13.7), (7, 3.0), (1, 0.0), (10, 9.5)])
def test_rates_rise_then_never_rise_again(schedule, steps, warmup):
    """Within (0, 1], one peak, and for every step of the run above its end value."""
    rates = [rate(s, steps, warmup, schedule) for s in range(steps)]
    peak = rates.index(max(rates))
    assert all(0 < r <= 1 for r in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rate(steps, steps, warmup, schedule) == pytest.approx(default_final(schedule), abs=1e-12)


def test_final_fraction_is_where_the_schedule_ends():
    """Any final fraction between 0 and 1, not only the default."""
    for schedule in ("cosine", "wsd", "linear"):
        assert rate(100, schedule=schedule, final=0.25) == pytest.approx(0.25)


def test_a_longer_cycle_ends_the_run_on_the_way_down():
    """With cycle 2 a run of 50 steps is the first half of one of 100; with 0.5 it rests at the final rate."""
    for step in range(50):
        assert rate(step, steps=50, warmup=5, cycle=2.0) == pytest.approx(rate(step, steps=100, warmup=5))
    assert [rate(s, cycle=0.5) for s in (50, 70, 99)] == pytest.approx([0.1] * 3)


@pytest.mark.parametrize("cooldown", [0.0, 1.0])
def test_wsd_without_flat_part_or_without_cooldown(cooldown):
    """A cooldown share of 0 is a constant rate, of 1 a cooldown from the first step."""
    want = 1.0 if cooldown == 0 else 1 - math.sqrt(0.36)
    assert rate(36, schedule="wsd", cooldown=cooldown) == pytest.approx(want)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_longer_than_the_run_is_refused(schedule):
    """One line that names the option."""
    with pytest.raises(UserError, match="`warmup_tokens`: warm-up of 100 steps"):
        rate(0, steps=100, warmup=100, schedule=schedule)


def test_warmup_longer_than_a_short_cycle_is_refused():
    """A cosine of half the run leaves no room for a warm-up of 60%."""
    with pytest.raises(UserError, match="schedule of 50"):
        rate(0, steps=100, warmup=60, cycle=0.5)
