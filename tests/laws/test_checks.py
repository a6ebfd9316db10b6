import math
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from chinchilla import BUDGETS, RATIOS, chinchilla, isoflop_grid, noisy_grid

from nanochin.laws import BESIROGLU, NotIdentified, bootstrap, checks, fit_isoflop, fit_parametric


def fits(found) -> dict:
    """{change: fit}."""
    return {other.change: other.fit for other in found}


def test_leaving_out_the_highest_losses_of_chinchilla():
    """B and a as published: five of 245 rows move B from 12846 to 2143."""
    table = fits(checks.leave_out_highest(fit_parametric(*chinchilla(245)), (0, 1, 3, 5, 8)))
    for k, B, a in ((0, 12846, 0.565), (1, 5466, 0.544), (3, 2938, 0.524), (5, 2143, 0.514), (8, 1787, 0.509)):
        assert table[k].n == 245 - k
        assert pytest.approx(B, abs=1) == table[k].law.B
        assert table[k].law.a == pytest.approx(a, abs=6e-4)


def test_leaving_out_too_many_rows():
    """The options of the fit are kept, and with too few rows left the reason is given."""
    fit = fit_parametric(*noisy_grid(0.004), tied=True, delta=0.01)
    table = fits(checks.leave_out_highest(fit, (0, 4, 44)))
    assert table[0].law == fit.law and table[4].options == fit.options
    assert "at least 6 usable rows" in str(table[44])


def test_runs_near_the_minimum():
    """Of sizes from 1/6 to 6 times the best, four of eight per budget are within 2.2 times, all within 6.1. Losses of a
    law give the same fit for every factor; ends that are 2% worse move E, and without them it is back."""
    N, D, loss = isoflop_grid(BESIROGLU, BUDGETS, RATIOS)
    ends = np.tile(np.abs(np.log(RATIOS)) > math.log(3), len(BUDGETS))
    for bent in (loss, np.where(ends, 1.02 * loss, loss)):
        fit, isoflop = fit_parametric(N, D, bent), fit_isoflop(N, D, bent, 6 * N * D)
        table = fits(checks.near_minimum(fit, isoflop, (8.0, 2.4)))
        assert list(table) == [(8.0, 48), (2.4, 24)]
        assert table[8.0, 48].law.E == pytest.approx(fit.law.E, rel=1e-9)
        assert table[2.4, 24].law.E == pytest.approx(BESIROGLU.E, rel=1e-6)
    assert abs(fit.law.E / BESIROGLU.E - 1) > 0.01
    fixed = fits(checks.near_minimum(fit, replace(isoflop, budgets=isoflop.budgets[:1]), (8.0,)))
    assert isinstance(fixed[8.0, 8], NotIdentified)  # eight runs of one budget


def test_delta_sensitivity():
    """One fit per delta; without noise they all agree."""
    table = fits(checks.delta_sensitivity(fit_parametric(*noisy_grid(0.0))))
    assert list(table) == [1e-6, 1e-4, 1e-3, 1e-2, 1e-1, math.inf]
    for delta, fit in table.items():
        assert fit.options["delta"] == delta and fit.law.beta == pytest.approx(BESIROGLU.beta, rel=1e-7)
    a = [other.fit.law.a for other in checks.delta_sensitivity(fit_parametric(*chinchilla()))]
    assert a == pytest.approx([0.5126, 0.5126, 0.5139, 0.5184, 0.5298, 0.5298], abs=6e-5)


def test_delta_of_few_and_noisy_rows():
    """The table says if delta is too small for an optimum; at 1e-6, which is almost a sum of absolute values, there is
    one, also for the twelve runs of a tiny sweep."""
    N = [1986, 2840, 4836, 1986, 2840, 4836, 7216, 2840, 3790, 7216, 10320, 14820]
    D = [60800, 43520, 26304, 182592, 130048, 79104, 54400, 433920, 330304, 180864, 116480, 84096]
    loss = [2.826, 2.839, 2.881, 2.661, 2.671, 2.613, 2.650, 2.514, 2.408, 2.406, 2.389, 2.423]
    table = fits(checks.delta_sensitivity(fit_parametric(N, D, loss), (1e-12, 1e-6, 1e-3)))
    assert "starts converged" in str(table[1e-12]) and table[1e-3].options["delta"] == 1e-3
    sums = {delta: np.abs(table[delta].residuals).sum() for delta in (1e-6, 1e-3)}
    assert sums[1e-6] < sums[1e-3] and np.sort(np.abs(table[1e-6].residuals))[4] < 2e-6  # five constants fit five rows


def test_refits_have_intervals():
    """Each refit is resampled: its interval is that of a bootstrap of the same rows by runs."""
    N, D, loss = noisy_grid(0.004)
    options, runs = {"replicates": 60, "seed": 3}, np.arange(48) // 2
    (other,) = checks.leave_out_highest(fit_parametric(N, D, loss), (5,), runs=runs, **options)
    kept = np.sort(np.argsort(loss)[:-5])
    own = bootstrap(fit_parametric(N[kept], D[kept], loss[kept]), runs=runs[kept], **options)
    assert other.boot.units == len(set(runs[kept])) < 43
    assert other.boot.interval("a") == pytest.approx(own.interval("a"), rel=1e-6)


def test_profile_of_e():
    """Lowest at the fitted E, rising on both sides; each point is the optimum of a fit with that E."""
    fit = fit_parametric(*noisy_grid(0.004))
    E, objective = checks.profile_e(fit, points=25)
    assert E[0] == 0 and E[-1] < fit.loss.min()
    assert (objective >= fit.objective * (1 - 1e-12)).all()
    lowest = int(np.argmin(objective))
    assert abs(E[lowest] - fit.law.E) <= E[1]
    assert (np.diff(objective[: lowest + 1]) < 0).all() and (np.diff(objective[lowest:]) > 0).all()
    for i in (5, 18, 22):
        alone = fit_parametric(fit.N, fit.D, fit.loss, E=float(E[i]), allow_bound=("E",))
        assert objective[i] == pytest.approx(alone.objective, rel=1e-6)


def test_residuals_by_compute():
    """Thirds of the runs by C, with the planted bias and noise."""
    rng = np.random.default_rng(0)
    N, D = np.exp(rng.uniform(15, 22, 900)), np.exp(rng.uniform(19, 26, 900))
    third = np.searchsorted(np.quantile(N * D, (1 / 3, 2 / 3)), N * D)
    noise = np.array([0.002, 0.004, 0.016])[third]
    fit = fit_parametric(N, D, BESIROGLU.loss(N, D) * np.exp(noise * rng.standard_normal(900)))
    table = checks.residuals_by_compute(fit)
    assert [row["n"] for row in table] == [300, 300, 300]
    assert [row["sd"] for row in table] == pytest.approx([0.002, 0.004, 0.016], rel=0.2)
    assert all(abs(row["median"]) < 0.002 for row in table)
    assert table[0]["flops_high"] <= table[1]["flops_low"] < table[2]["flops_high"] == (6 * N * D).max()


def test_hold_out_on_chinchilla():
    """Fitted up to a tenth of the largest budget: median log error .0090 beyond it against .0032 inside, mostly
    over-prediction, as published."""
    N, D, loss = chinchilla()
    C = 6 * N * D
    held = checks.hold_out(N, D, loss, budget=C > C.max() / 10, replicates=100)
    assert (held.error, held.in_sample_error) == pytest.approx((0.0090, 0.0032), abs=2e-4)
    assert held.bias > 0 and held.reach > 9


def test_hold_out_of_the_largest_budget():
    """Rows, predictions, intervals and N_opt against a fit and a parabola by hand."""
    N, D, loss = noisy_grid(0.003)
    held = checks.hold_out(N, D, loss, replicates=200)
    assert held.rows.tolist() == list(range(40, 48))
    alone = fit_parametric(N[:40], D[:40], loss[:40]).law
    assert held.predicted == pytest.approx(alone.loss(N[40:], D[40:]), rel=1e-9)
    assert held.observed == pytest.approx(loss[40:])
    assert held.reach == pytest.approx(BUDGETS[-1] / BUDGETS[-2])
    assert held.error == pytest.approx(np.median(np.abs(np.log(held.predicted / loss[40:]))))
    ((C, measured, predicted, (low, high)),) = held.optima
    p, q, _ = np.polyfit(np.log(N[40:]), loss[40:], 2)
    assert pytest.approx(1e21) == C
    assert measured == pytest.approx(math.exp(-q / (2 * p)), rel=1e-6)
    assert predicted == pytest.approx(alone.optimal(1e21)[0], rel=1e-6)
    assert low < predicted < high
    budget = -np.repeat(np.arange(7), [8, 8, 8, 8, 8, 5, 3])  # the largest by C, and with it the next, for four runs
    two = checks.hold_out(N, D, loss, budget=budget, replicates=0)
    assert two.rows.tolist() == list(range(40, 48)) and math.isnan(two.low[0]) and two.bootstrap is None


def test_hold_out_uses_the_actual_flops():
    """Runs that cost 6 N (1 + 300 N^-0.3) per token: without noise the predicted minimum of the held-out budget is the
    best of 4,001 sizes at that cost, not that of Eq. 4."""
    N, D, loss = noisy_grid(0.0)
    C = 6 * N * D * (1 + 300 * N**-0.3)
    held = checks.hold_out(N, D, loss, C, budget=np.repeat(BUDGETS, 8), replicates=0)
    spent, _, predicted, _ = held.optima[0]
    sizes = np.geomspace(1e8, 1e11, 4001)
    at = BESIROGLU.loss(sizes, spent / (6 * sizes * (1 + 300 * sizes**-0.3)))
    assert predicted == pytest.approx(sizes[np.argmin(at)], rel=3e-3)
    assert abs(predicted / BESIROGLU.optimal(spent)[0] - 1) > 0.04


def test_a_failed_bootstrap_does_not_discard_the_hold_out(monkeypatch):
    """The predictions are kept, and the reason for missing intervals is given."""
    plain = checks.hold_out(*noisy_grid(0.003), replicates=0)
    monkeypatch.setattr(checks, "bootstrap", Mock(side_effect=NotIdentified("as the test says")))
    held = checks.hold_out(*noisy_grid(0.003), replicates=50)
    assert held.why == "as the test says" and held.bootstrap is None and plain.why == ""
    np.testing.assert_array_equal(held.predicted, plain.predicted)
    assert np.isnan(held.low).all() and held.outside == 0


def test_prediction_intervals_cover_the_observations():
    """In 12 made-up sweeps about 95% of the held-out losses fall inside."""
    inside = []
    for seed in range(12):
        held = checks.hold_out(*noisy_grid(0.003, seed), replicates=100, seed=seed)
        inside += [*((held.low < held.observed) & (held.observed < held.high))]
    assert 0.86 < np.mean(inside) < 0.995


@pytest.mark.parametrize("budgets, says", [(1, "no budget below the largest"), (2, "all runs are at one budget")])
def test_hold_out_of_too_much_is_refused(budgets, says):
    """Nothing left to fit, or too little."""
    with pytest.raises(NotIdentified, match=says):
        checks.hold_out(*isoflop_grid(BESIROGLU, BUDGETS[:budgets], RATIOS))


def test_curvature_of_the_frontier():
    """Without noise a straight frontier has a quadratic term of 0; with noise its interval contains 0. The term of
    N_opt = exp(a x - 0.02 x^2), planted in parabolas, is recovered."""
    exact = checks.frontier_curvature(fit_isoflop(*noisy_grid(0.0)), replicates=100)
    assert exact.quadratic == pytest.approx(0, abs=1e-9)
    noisy = checks.frontier_curvature(fit_isoflop(*noisy_grid(0.002)))
    assert noisy.intervals[95][0] < 0 < noisy.intervals[95][1] and not noisy.significant
    x = np.log(BUDGETS / 1e19)
    N = np.outer(np.exp(20 + 0.5 * x - 0.02 * x**2), RATIOS).ravel()
    loss = 2 + 0.05 * np.tile(np.log(RATIOS), 6) ** 2 + 0.001 * np.random.default_rng(0).standard_normal(48)
    bent = checks.frontier_curvature(fit_isoflop(N, np.repeat(BUDGETS, 8) / (6 * N), loss))
    assert bent.quadratic == pytest.approx(-0.02, abs=0.003)
    assert bent.intervals[95][1] < 0 and bent.significant


def test_a_curve_of_the_frontier_needs_four_budgets():
    """A parabola fits any three points."""
    with pytest.raises(NotIdentified, match="4 budgets"):
        checks.frontier_curvature(fit_isoflop(*isoflop_grid(BESIROGLU, BUDGETS[:3], RATIOS)))


def counted_grid(vocab: int, budgets):
    """Runs of shapes with 12 d^3 / 40 non-embedding and `vocab` d embedding parameters, the same shapes at every
    budget -> non-embedding N, D, loss, nominal budget."""
    widths = np.tile(np.geomspace(40, 4000, 60), len(budgets))
    small, C = 12 * widths**3 / 40, np.repeat(budgets, 60)
    total = small + vocab * widths
    D = C / (6 * total)
    return small, D, BESIROGLU.loss(total, D), C


@pytest.mark.parametrize("vocab, a", [(256, 0.52), (8192, 0.80)])
def test_counting_non_embedding_parameters_raises_the_exponent(vocab, a):
    """Exponents of one law between 1e14 and 1e17 by counting alone, against an independent computation. Noise moves the
    measured exponent, not the simulated one."""
    N, D, loss, budget = counted_grid(vocab, np.geomspace(1e13, 1e18, 41))
    found = checks.kaplan_procedure(N, D, loss, loss, budget=budget)
    inside = (found.flops > 0.3e14) & (found.flops < 1e17)
    slope = np.polyfit(np.log(found.flops[inside]), np.log(found.params[inside]), 1)[0]
    assert slope == pytest.approx(a, abs=0.06)
    assert found.simulated == found.a and not found.between and not found.intervals
    noise = np.exp(0.0005 * np.random.default_rng(0).standard_normal(len(N)))
    noisy = checks.kaplan_procedure(N, D, loss * noise, loss, budget=budget)
    assert noisy.simulated == pytest.approx(found.simulated, abs=0.02) and noisy.a != noisy.simulated


def test_levels_between_budgets_are_used_if_needed():
    """Two budgets with too few sizes at their C_kaplan: levels between them have a minimum, and without noise it is the
    simulated one. Noise gives an interval about as wide as the spread of the exponents of 40 noisy tables."""
    N, D, loss, budget = counted_grid(2048, np.geomspace(1e15, 1e17, 2))
    rng, noise = np.random.default_rng(0), 0.0005
    found = checks.kaplan_procedure(N, D, loss, loss, budget=budget, noise=noise, replicates=200)
    assert found.between and 3 <= len(found.flops) <= found.levels == 33 and found.a == found.simulated
    draws = [loss * np.exp(noise * rng.standard_normal(len(N))) for _ in range(40)]
    tables = [checks.kaplan_procedure(N, D, draw, loss, budget=budget).a for draw in draws]
    low, high = found.intervals[95]
    assert low < found.a < high and (high - low) / (3.92 * np.std(tables)) == pytest.approx(1, abs=0.5)


def test_sizes_seen_once_cannot_be_interpolated():
    """Each size at one budget only: there is no loss at equal C_kaplan."""
    N, D, loss = isoflop_grid(BESIROGLU, BUDGETS, RATIOS)
    with pytest.raises(NotIdentified, match="Kaplan's procedure"):
        checks.kaplan_procedure(N * (1 + 1e-3 * np.arange(48)), D, loss, loss)
