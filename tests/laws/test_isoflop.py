import math
import time

import numpy as np
import pytest
from chinchilla import chinchilla, isoflop_grid

from nanochin.laws import BESIROGLU, Law, NotIdentified, bootstrap, bootstrap_seed_noise, fit_isoflop, group_budgets

TIED = Law("tied", E=1.8, A=480.0, B=1500.0, alpha=0.35, beta=0.35)
ROUNDED = Law("as printed", E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
SKEWED = Law("skewed", E=1.7, A=400.0, B=400.0, alpha=0.465, beta=0.155)
BUDGETS = np.geomspace(1e17, 1e21, 5)


def window(width: float, sizes: int = 15) -> np.ndarray:
    return np.geomspace(1 / width, width, sizes)


@pytest.mark.parametrize(
    "law, errors, within",
    [  # published error of D extrapolated to 1e24 (Czech et al. 2026), for windows of +-2x, 4x, 8x, 16x
        (ROUNDED, (-0.003, -0.013, -0.029, -0.051), 0.004),
        (SKEWED, (-0.017, -0.065, -0.139, -0.231), 0.004),
        (TIED, (0, 0, 0, 0), 1e-9),  # with alpha = beta the curve is symmetric
    ],
)
def test_bias_of_the_parabola(law, errors, within):
    """Unequal exponents shift the vertex by a constant factor: correct slopes, constants off as published."""
    for width, error in zip((2, 4, 8, 16), errors, strict=True):
        found = fit_isoflop(*isoflop_grid(law, BUDGETS, window(width)), window=math.inf).law
        assert (found.a, found.b) == pytest.approx((law.a, law.b), abs=1e-9)
        assert found.optimal(1e24)[1] / law.optimal(1e24)[1] - 1 == pytest.approx(error, abs=within)


def test_a_drifting_grid_biases_the_parabola_but_not_the_spline():
    """Centres that drift by 3x over the budgets: a is biased by parabolas through all sizes, three times less by
    those through the sizes within 8x of the minimum, and not by splines."""
    grid = isoflop_grid(SKEWED, BUDGETS, window(16, 41), drift=3)
    parabola, spline = fit_isoflop(*grid, window=math.inf).law, fit_isoflop(*grid, method="akima").law
    assert abs(parabola.a - SKEWED.a) > 0.005
    assert abs(fit_isoflop(*grid).law.a - SKEWED.a) < 2e-3
    assert spline.a == pytest.approx(SKEWED.a, abs=1e-3)
    assert spline.optimal(1e24)[0] == pytest.approx(SKEWED.optimal(1e24)[0], rel=0.02)


def test_sizes_far_from_the_minimum_are_not_fitted():
    """Losses more than 8x from the minimum change nothing, those within it do; with fewer sizes all are fitted."""
    N, D, loss = isoflop_grid(BESIROGLU, BUDGETS, window(20, 31))
    distance = np.abs(np.log(N / np.repeat(BESIROGLU.optimal(BUDGETS)[0], 31)))
    plain = fit_isoflop(N, D, loss)
    far, near = distance > math.log(8.5), distance > math.log(6)
    steeper = loss + np.maximum(distance - math.log(8.5), 0)
    assert fit_isoflop(N, D, np.where(far, steeper, loss)).law == plain.law
    assert fit_isoflop(N, D, np.where(near, loss + 0.01, loss)).law.k_N != plain.law.k_N
    assert all(len(b.fitted) < len(b.rows) == 31 for b in plain.budgets)
    wide = fit_isoflop(*isoflop_grid(BESIROGLU, BUDGETS, window(300, 5)))
    assert all(len(b.fitted) == 5 for b in wide.budgets)


def test_equal_losses_drop_no_budget():
    """Rounded losses tie: if the lowest run is one of several, a minimum between them is inside, in any order of rows,
    with weights too. Lowest at the edge alone it is not."""
    N = np.tile([1e6, 2e6, 4e6, 8e6], 2)
    D, loss = np.repeat([1e18, 1e19], 4) / (6 * N), np.array([2.31, 2.31, 2.35, 2.45, 2.2, 2.1, 2.1, 2.2])
    budget = np.repeat([1.0, 2.0], 4)
    first = fit_isoflop(N, D, loss, budget=budget)
    assert [b.bracketed for b in first.budgets] == [True, True]
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(8)
        again = fit_isoflop(N[order], D[order], loss[order], budget=budget[order])
        assert [b.params_opt for b in again.budgets] == pytest.approx([b.params_opt for b in first.budgets], rel=1e-12)
    with pytest.raises(NotIdentified, match="minimum is at or beyond"):
        fit_isoflop(N, D, np.where(N == 1e6, loss.min() - 0.01, loss), budget=budget)


def test_vertices_by_hand():
    """Against numpy's polynomial fit of one noisy budget, D by C / 6N; the window and its centre are reported."""
    N, D, loss = isoflop_grid(BESIROGLU, [1e18, 1e20], window(5, 7), drift=1.5)
    loss = loss + 0.01 * np.random.default_rng(0).standard_normal(14)
    for budget, rows in zip(fit_isoflop(N, D, loss).budgets, (slice(0, 7), slice(7, 14)), strict=True):
        p, q, r = np.polyfit(np.log(N[rows]), loss[rows], 2)
        assert budget.bracketed and budget.reason == "" and budget.n_runs == 7
        assert budget.parabola == pytest.approx((p, q, r), rel=1e-6)
        assert budget.params_opt == pytest.approx(math.exp(-q / (2 * p)), rel=1e-8)
        assert budget.loss_opt == pytest.approx(r - q * q / (4 * p), rel=1e-9)
        assert budget.tokens_opt == pytest.approx(budget.flops / (6 * budget.params_opt), rel=1e-9)
        assert budget.width == pytest.approx(25)
        assert budget.off_centre == pytest.approx(budget.params_opt / math.sqrt(N[rows][0] * N[rows][-1]))


def test_exponents_need_not_sum_to_one():
    """FLOPs that are not 6 N D: a and b are fitted separately."""
    N, D, loss = isoflop_grid(BESIROGLU, BUDGETS, window(4))
    law = fit_isoflop(N, D, loss, (6 * N * D) ** 1.1, budget=np.repeat(BUDGETS**1.1, 15)).law
    assert law.a + law.b == pytest.approx(1 / 1.1, rel=1e-9)


def test_thousands_of_budgets_are_fast():
    """50,000 budgets of two rows each, in any order: each row gets the geometric mean C of its pair, without the 5e9
    comparisons of a loop."""
    rng, start = np.random.default_rng(0), time.process_time()
    order, C = rng.permutation(100_000), rng.uniform(1e18, 1e20, (50_000, 2))
    found = group_budgets(C.ravel()[order], budget=np.repeat(rng.permutation(np.arange(50_000.0)), 2)[order])
    np.testing.assert_allclose(found, np.repeat(np.sqrt(C[:, 0] * C[:, 1]), 2)[order])
    assert time.process_time() - start < 3


@pytest.mark.parametrize("unit", [1e-18, -3.7])
def test_a_column_of_budgets_only_groups(unit):
    """Budgets in units of 1e18 FLOPs, or numbered downwards: the law is in units of C, as without the column."""
    N, D, loss = isoflop_grid(BESIROGLU, BUDGETS, window(4))
    alone, grouped = fit_isoflop(N, D, loss), fit_isoflop(N, D, loss, budget=np.repeat(BUDGETS * unit, 15))
    assert grouped.law.optimal(1e22) == pytest.approx(alone.law.optimal(1e22), rel=1e-9)
    assert [b.flops for b in grouped.budgets] == pytest.approx(list(BUDGETS), rel=1e-9)


@pytest.mark.parametrize("method", ["parabola", "akima"])
def test_minima_at_the_edge_are_refused(method):
    """A budget that stops before its minimum has none; the others still give a law, and the reason is given."""
    N, D, loss = isoflop_grid(BESIROGLU, BUDGETS, window(8, 9))
    kept = ~((BESIROGLU.optimal(1e21)[0] > N) & (6 * N * D > 9e20))
    fit = fit_isoflop(N[kept], D[kept], loss[kept], method=method)
    assert [b.bracketed for b in fit.budgets] == [True] * 4 + [False]
    assert "beyond the smallest or largest size" in fit.budgets[-1].reason and math.isnan(fit.budgets[-1].params_opt)
    assert fit.law.a == pytest.approx(BESIROGLU.a, abs=1e-3)
    found, _ = bootstrap_seed_noise(fit, noise=0.01, replicates=100).optima  # some draws bracket the last budget
    assert np.isnan(found[:, -1]).all() and np.isfinite(found[:, 0]).any()


def test_too_little_is_refused():
    """Five rows; one budget; two sizes."""
    N, D, loss = isoflop_grid(TIED, BUDGETS, window(4))
    for rows, says in ((5, "6 usable rows, but has 5"), (15, "2 budgets with a bracketed minimum, but has 1 of 1")):
        with pytest.raises(NotIdentified, match=says):
            fit_isoflop(N[:rows], D[:rows], loss[:rows])
    with pytest.raises(NotIdentified, match="3 different model sizes, but has 2"):
        fit_isoflop(np.where(np.arange(75) % 2, 1e7, 1e8), D, loss)


def test_an_error_about_many_budgets_is_one_short_line():
    """Of forty budgets without a minimum three are named per reason and the others counted."""
    N, D, loss = isoflop_grid(TIED, np.geomspace(1e15, 1e25, 40), [3.0, 5.0, 8.0, 13.0])
    concave = np.arange(160) // 4 >= 38
    with pytest.raises(NotIdentified, match="^.*0 of 40.*and 35 more FLOPs.*concave.*$") as error:
        fit_isoflop(N, D, np.where(concave, 9 - loss, loss))
    assert len(str(error.value)) < 300


def test_budgets_are_found_by_clustering_c():
    """Clusters of nearly equal C, jittered by 3% as by whole batches; runs in between belong to none and are not
    fitted."""
    rng = np.random.default_rng(0)
    budgets = np.repeat([1e15, 1.3e15, 1e16], 7)
    C = np.append(budgets * np.exp(rng.uniform(-0.03, 0.03, 21)), [3e15, 5e15, 7e17])
    shuffled = rng.permutation(24)
    nominal = np.empty(24)
    nominal[shuffled] = group_budgets(C[shuffled])
    assert np.isnan(nominal[21:]).all()
    for i in range(3):
        rows = slice(7 * i, 7 * i + 7)
        assert nominal[rows] == pytest.approx(np.exp(np.log(C[rows]).mean()), rel=1e-12)
    N, D, loss = isoflop_grid(TIED, BUDGETS, window(4))
    fit = fit_isoflop(np.append(N, 1e8), np.append(D, 7e11), np.append(loss, 2.5))
    assert [b.n_runs for b in fit.budgets] == [15] * 5


def test_chinchilla_by_parabolas():
    """The digitised runs cluster at the paper's budgets and give its a = 0.49, inside its interval (0.462, 0.534)."""
    fit = fit_isoflop(*chinchilla())
    found, budgets = np.log([b.flops for b in fit.budgets]), np.log([6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21])
    assert 0.462 < fit.law.a < 0.534
    assert np.abs(found - budgets[:, None]).min(1).max() < 0.12


def test_minima_have_intervals():
    """For every budget, as wide as the spread of the vertices of 300 tables with the same noise; none for a budget that
    most resamples do not bracket; to_json includes them."""
    N, D, exact = isoflop_grid(BESIROGLU, BUDGETS, window(6))
    rng, noise = np.random.default_rng(0), 0.003
    tables = [fit_isoflop(N, D, exact * np.exp(noise * rng.standard_normal(len(N)))) for _ in range(300)]
    scatter = np.std([[math.log(b.params_opt) for b in fit.budgets] for fit in tables], axis=0)
    boot = [bootstrap(fit, replicates=300) for fit in tables[:8]]
    for i in range(len(BUDGETS)):
        ends = np.array([one.at_budget(i)["params_opt"] for one in boot])
        width = np.log(ends[:, 1] / ends[:, 0]) / 3.92
        assert width.mean() == pytest.approx(scatter[i], rel=0.35)
        assert all(low < fit.budgets[i].params_opt < high for (low, high), fit in zip(ends, tables, strict=False))
    written = tables[0].to_json(boot[0])["budgets"]
    assert [one["ci"]["params_opt"] for one in written] == [boot[0].at_budget(i)["params_opt"] for i in range(5)]
    assert all(one["ci"]["tokens_opt"][0] < one["tokens_opt"] < one["ci"]["tokens_opt"][1] for one in written)
    far = fit_isoflop(N[10:], D[10:], exact[10:])  # only sizes that are too large for the first budget
    assert not far.budgets[0].bracketed and bootstrap(far, replicates=100).at_budget(0) == {}


def test_laws_without_some_budgets():
    """The power law through the remaining minima, against numpy's line; one minimum is too few."""
    fit = fit_isoflop(*isoflop_grid(BESIROGLU, BUDGETS, window(6)))
    rest = fit.budgets[2:]
    slope = np.polyfit(np.log([b.flops for b in rest]), np.log([b.params_opt for b in rest]), 1)[0]
    assert fit.without(fit.budgets[:2]).a == pytest.approx(slope, rel=1e-9)
    with pytest.raises(NotIdentified, match="2 budgets"):
        fit.without(fit.budgets[1:])
