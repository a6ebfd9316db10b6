"""Optima if C is not 6ND: every answer against a scan over sizes."""

import json
from functools import partial

import numpy as np
import pytest
from made_up_sweep import BUDGETS, LAW, sweep

from nanochin import laws
from nanochin.base.cli import UserError
from nanochin.config import make_shape
from nanochin.laws import BESIROGLU, Cost, Law, compute_for_loss, inference_optimal, off_optimum
from nanochin.laws.cost import SIX_ND
from nanochin.plan.flops import count_params, flops_per_token
from nanochin.plan.ladder import LADDER

SIZES = np.exp(np.linspace(np.log(1e2), np.log(1e13), 400_001))  # neighbours 6e-5 apart
# Logits that matter at small sizes; a large table that is only looked up; a constant factor.
COSTS = pytest.mark.parametrize("cost", [Cost(18.6, 0.35), Cost(60.0, 0.5, -1), Cost(0.3, 0.0), SIX_ND], ids=str)


def made_up(cost: Cost) -> Law:
    return Law("made up", **LAW, cost=cost)


def best_by_scan(law: Law, C: float) -> float:
    factor = (1 + law.cost.c * SIZES**-law.cost.q) ** law.cost.s
    return SIZES[np.argmin(law.loss(SIZES, C / (6 * SIZES * factor)))]


@COSTS
@pytest.mark.parametrize("C", [1e11, 3e13, 1e19])
def test_the_optimum_is_the_lowest_loss_at_its_cost(cost, C):
    """Against 400,001 sizes, each with the tokens that cost C. The optimum costs C; its N, its D and its loss give the
    same optimum back."""
    law = made_up(cost)
    N, D = law.optimal(C)
    assert N == pytest.approx(best_by_scan(law, C), rel=2e-4)
    assert 6 * N * D * (1 + cost.c * N**-cost.q) ** cost.s == pytest.approx(C, rel=1e-12)
    assert law.tokens_for(N) == pytest.approx(D, rel=1e-9)
    assert law.params_for(D) == pytest.approx(N, rel=1e-9)
    assert compute_for_loss(law, law.loss(N, D)) == pytest.approx(C, rel=1e-9)
    assert off_optimum(law, C, N).compute_factor == pytest.approx(1, abs=1e-9)
    assert off_optimum(law, C, 3 * N).D == pytest.approx(C / (18 * N * cost.at(3 * N)[0]))


def test_eq_4_is_the_optimum_of_6nd():
    """Without a cost the law uses the closed form of the paper."""
    a, b, G = BESIROGLU.a, BESIROGLU.b, BESIROGLU.G
    for C in (1e11, 5.76e23):
        assert BESIROGLU.optimal(C) == pytest.approx((G * (C / 6) ** a, (C / 6) ** b / G), rel=1e-13)
    assert laws.exponents(BESIROGLU, 1e11, 1e14) == pytest.approx((a, b), rel=1e-12)


@COSTS
def test_replicates_at_once(cost):
    """50 laws in one call give the same as one by one; nan for a loss that one of them cannot reach."""
    rng = np.random.default_rng(0)
    drawn = {name: value * np.exp(0.1 * rng.standard_normal(50)) for name, value in LAW.items()}
    many, each = Law("", **drawn, cost=cost), [Law("", *v, cost=cost) for v in zip(*drawn.values(), strict=True)]
    C, target = 1e13, 1.15
    loss = many.loss(*many.optimal(C))
    for ask in (
        lambda law, own: law.optimal(C),
        lambda law, own: laws.exponents(law, 1e11, 1e14),
        lambda law, own: inference_optimal(law, own, 1e10),
    ):
        alone = [ask(law, loss[i]) for i, law in enumerate(each)]
        np.testing.assert_allclose(ask(many, loss), np.transpose(alone), rtol=1e-9)
    unreachable = many.E >= target
    assert 0 < unreachable.sum() < 50
    np.testing.assert_array_equal(np.isnan(compute_for_loss(many, target)), unreachable)


@COSTS
@pytest.mark.parametrize("served", [0, 1e8, 1e11])
def test_serving_costs_a_third_of_training(cost, served):
    """The cheapest of all sizes that reach the loss, for training and serving together."""
    law = made_up(cost)
    loss = law.loss(*law.optimal(1e13))
    left = loss - law.E - law.A * SIZES**-law.alpha
    N = SIZES[left > 0]
    D = (law.B / left[left > 0]) ** (1 / law.beta)
    spent = 6 * N * (D + served / 3) * (1 + cost.c * N**-cost.q) ** cost.s
    found, tokens = inference_optimal(law, loss, served)
    assert found == pytest.approx(N[np.argmin(spent)], rel=5e-4) and law.loss(found, tokens) == pytest.approx(loss)


@COSTS
def test_limited_text_at_its_cost(cost):
    """The allocation with repeated data costs C and is the best of all sizes."""
    limited, C = laws.DataConstrained(made_up(cost)), 1e13
    unique = limited.law.optimal(C)[1] / 8
    N, D = limited.optimal(C, unique)
    assert cost.flops(N, D) == pytest.approx(C, rel=1e-12)
    sizes = np.geomspace(N / 30, N * 30, 3001)
    losses = [limited.loss(n, C / (6 * n * cost.at(n)[0]), unique) for n in sizes]
    assert sizes[np.argmin(losses)] == pytest.approx(N, rel=5e-3)


@pytest.mark.parametrize("physical", [0.6, 1.5])
def test_the_cost_curve_is_recovered(physical):
    """From runs that cost 6 N (1 + physical (1e5/N)^0.3) per token, in 7 sizes per budget and in any order."""
    rows = np.random.default_rng(0).permutation(sweep(noise=0, physical=physical))
    N, D, C = (np.array([row[name] for row in rows], float) for name in ("params", "tokens", "flops"))
    factor = 1 + physical * (1e5 / N) ** 0.3
    more, less = Cost.of(N, D, C), Cost.of(N, D, 6 * N * D / factor)
    for cost, s in ((more, 1), (less, -1)):
        assert (cost.c, cost.q, cost.s) == pytest.approx((physical * 1e5**0.3, 0.3, s), rel=1e-9)
        assert cost.misfit < 1e-9
    assert Cost.of(N, D, 6 * N * D * (1 + 1e-4)).is_6nd
    for budget in BUDGETS:
        assert made_up(more).optimal(budget)[0] == pytest.approx(best_by_scan(made_up(more), budget), rel=2e-4)


def test_costs_that_do_not_follow_the_curve():
    """One size, a constant factor, a cost with jumps: each gets a curve; the last one reports its misfit, and still has
    one optimum per budget."""
    one = np.full(5, 1e6)
    assert Cost.of(one, one, 9 * one * one).at(1e6)[0] == pytest.approx(1.5)
    N = np.geomspace(1e4, 1e7, 9)
    assert Cost.of(N, N, 9 * N * N).at(1e12) == pytest.approx((1.5, 1))
    jumping = made_up(Cost.of(N, N, 6 * N * N * np.where(np.arange(9) % 2, 2, 0.7)))
    assert jumping.cost.misfit > 0.2
    assert best_by_scan(jumping, 1e13) == pytest.approx(jumping.optimal(1e13)[0], rel=2e-4)


def test_ratio_of_a_size_is_the_median_of_its_runs():
    """Sizes with one, two and three runs, in any order, against numpy's median."""
    rng = np.random.default_rng(0)
    N = rng.permutation(np.repeat([1e5, 3e5, 7e5], [1, 2, 3]))
    D, ratio = rng.uniform(1e6, 1e7, 6), rng.uniform(0.8, 1.6, 6)
    x, found = laws.ratios(N, D, ratio * 6 * N * D)
    assert np.exp(x) == pytest.approx(np.unique(N))
    assert found == pytest.approx([np.median(np.log(ratio[n == N])) for n in np.unique(N)], rel=1e-12)


def test_the_cost_is_stored_with_the_law(tmp_path):
    """load_law plans in the FLOPs of the fit; without the key, as in older files, in 6ND; invalid costs are refused."""
    path, meta = tmp_path / "laws.json", {"params_convention": "total", "flops_convention": "physical"}
    cost = {"c": 18.6, "q": 0.35, "s": 1, "misfit": 0.05}
    for own, expected in (({"cost": cost}, Cost(**cost)), ({}, SIX_ND)):
        path.write_text(json.dumps({"approach3": LAW | own, "meta": meta}))
        assert laws.load_law(path).tokens_for(1e5) == made_up(expected).tokens_for(1e5)
    for wrong in ({"q": 2}, {"c": -1}, {"s": 0}, {"d": 1}):
        path.write_text(json.dumps({"approach3": LAW | {"cost": cost | wrong}, "meta": meta}))
        with pytest.raises(UserError, match="needs a cost of c >= 0"):
            laws.load_law(path)


def test_real_shapes_agree_with_the_optimum():
    """Of real shapes with exact FLOPs, the one of lowest loss is next to the smooth optimum, also at a thousand times
    the compute of the runs to which the cost was fitted; their losses agree within 0.01."""
    shapes = [partial(make_shape, vocab_size=256, seq_len=128)(*rung) for rung in LADDER]
    N = np.array([count_params(shape).total for shape in shapes], float)
    price = np.array([flops_per_token(shape, "physical") for shape in shapes])
    seen = (N > 5e3) & (N < 1e6)
    law = made_up(Cost.of(N[seen], N[seen], price[seen] * N[seen]))
    assert 0 < law.cost.misfit < 0.06
    for C in (1e11, 1e12, 1e13, 1e14, 1e16):
        losses, optimum = law.loss(N, C / price), law.optimal(C)
        assert abs(np.log(N[np.argmin(losses)] / optimum[0])) < np.log(1.5)
        assert law.loss(*optimum) == pytest.approx(losses.min(), abs=0.01)
