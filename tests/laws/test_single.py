"""The law of one variable, against the law that made the losses."""

import math

import numpy as np
import pytest

from nanochin.laws import BESIROGLU, NotIdentified
from nanochin.laws.single import falls, fit_single, hold_out

E, A, B, ALPHA, BETA = (getattr(BESIROGLU, name) for name in ("E", "A", "B", "alpha", "beta"))
SIZE, TOKENS = 124e6, np.geomspace(1e8, 3e10, 14)
BUDGETS = np.array([1e18, 3e18, 1e19, 3e19, 1e20, 3e20, 1e21])


def of_size(D):
    return BESIROGLU.loss(SIZE, D)


def of_compute(C):
    return BESIROGLU.loss(*BESIROGLU.optimal(C))


def noisy(law, x, noise: float, seed: int):
    return law(x) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(x)))


def test_noiseless_losses_give_their_law():
    """One size: E + A / N^alpha, B and beta. The optimum of C: c = alpha beta / (alpha + beta). Nothing is off beyond
    the data."""
    fit = fit_single(TOKENS, of_size(TOKENS), replicates=0)
    assert (fit.law.E, fit.law.K, fit.law.c) == pytest.approx((E + A / SIZE**ALPHA, B, BETA), rel=1e-6)
    assert len(fit.hold_out) == 4 and max(one.error for one in fit.hold_out) < 1e-9 and fit.forecast(1e12) is None
    fit = fit_single(BUDGETS, of_compute(BUDGETS), replicates=0)
    assert (fit.law.E, fit.law.c) == pytest.approx((E, ALPHA * BETA / (ALPHA + BETA)), rel=1e-6)
    assert fit.law.loss(1e24) == pytest.approx(of_compute(1e24), rel=1e-9)
    assert fit.law.reaching(of_compute(1e24)) == pytest.approx(1e24, rel=1e-6)
    with pytest.raises(NotIdentified, match="E = 1.8172"):
        fit.law.reaching(1.8)


def test_the_optimum_is_that_of_a_grid():
    """With noise: no constants on a grid about the fit have a lower sum of Huber losses."""
    loss = noisy(of_size, TOKENS, 0.003, 0)
    fit = fit_single(TOKENS, loss, replicates=0)

    def objective(E, K, c):
        r = np.abs(np.log(E + K * TOKENS**-c) - np.log(loss))
        return np.where(r < 1e-3, r * r / 2, 1e-3 * (r - 5e-4)).sum()

    assert fit.objective == pytest.approx(objective(fit.law.E, fit.law.K, fit.law.c), rel=1e-9)
    for e in np.linspace(-0.02, 0.02, 9):
        for c in np.linspace(-0.01, 0.01, 9):
            for k in np.linspace(-0.1, 0.1, 41) + 22 * c:  # K and c are nearly one
                near = objective(fit.law.E + e, fit.law.K * math.exp(k), fit.law.c + c)
                assert near >= fit.objective * (1 - 1e-12)


def test_no_irreducible_loss_is_an_answer():
    """A pure power law gives E = 0 exactly; a fixed E is kept."""
    loss = 7 * TOKENS**-0.05
    law = fit_single(TOKENS, loss, replicates=0).law
    assert law.E == 0 and (law.K, law.c) == pytest.approx((7, 0.05), rel=1e-6)
    assert fit_single(TOKENS, loss, replicates=0, E=1.0).law.E == 1


@pytest.mark.parametrize("law, x, draws", [(of_compute, BUDGETS, 24), (of_size, TOKENS, 16)], ids=["C", "D"])
def test_coverage_of_the_predicted_loss(law, x, draws):
    """Noise of 0.3%: at least 85% of the 95% intervals contain a new run 10 and 100 times beyond the data, and they are
    no wider than a fifth either way."""
    inside = []
    for seed in range(draws):
        fit = fit_single(x, noisy(law, x, 0.003, seed), replicates=100)
        ends = [fit.forecast(far * x[-1]) for far in (10, 100)]
        reached = noisy(law, x[-1] * np.array([10, 100]), 0.003, 1000 + seed)
        inside.append([low < one < high for (low, high), one in zip(ends, reached, strict=True)])
        assert ends[1][1] / ends[1][0] < 1.4 or len(x) == 7
    assert (np.mean(inside, 0) >= 0.85).all()


def test_hold_out():
    """Each point by a fit to those below it; runs within 25% are one point; what the law may get wrong leaves out the
    noise of single runs, and grows linearly in log x."""
    loss = noisy(of_size, TOKENS, 0.003, 3)
    fit = fit_single(TOKENS, loss, replicates=0)
    for one, k in zip(fit.hold_out, range(10, 14), strict=True):
        law = fit_single(TOKENS[:k], loss[:k], replicates=0).law
        assert one.error == pytest.approx(abs(math.log(law.loss(TOKENS[k]) / loss[k])), rel=1e-6)
        assert (one.x, one.step) == pytest.approx((TOKENS[k], TOKENS[1] / TOKENS[0]))
    error, rms = fit.form_error, np.sqrt(np.mean([one.error**2 for one in fit.hold_out]))
    assert error.sd**2 == pytest.approx(max(rms**2 - np.sum(fit.residuals**2) / 11, 0))
    assert fit.is_tested(TOKENS[-1] * 1.5) and not fit.is_tested(TOKENS[-1] * 2)
    near = np.append(TOKENS, TOKENS * 1.01)
    assert len(hold_out(near, of_size(near))) == 4
    assert fit_single(BUDGETS[:4], of_compute(BUDGETS[:4]), replicates=0).form_error is None


def test_replicates_resample_runs():
    """Two rows of a run are drawn together: twice the rows give the same intervals."""
    loss = noisy(of_size, TOKENS, 0.003, 0)
    once = fit_single(TOKENS, loss, replicates=200)
    runs = np.tile(np.arange(14), 2)
    twice = fit_single(np.tile(TOKENS, 2), np.tile(loss, 2), replicates=200, runs=runs)
    assert twice.to_json()["ci"]["E"] == pytest.approx(once.to_json()["ci"]["E"], rel=1e-4)


def test_a_loss_that_does_not_fall():
    """Too few points, chance, a rise, and a fixed E above the losses are refused; one outlier is not."""
    rng = np.random.default_rng(0)
    for x, loss, says in (
        (BUDGETS[:3], of_compute(BUDGETS[:3]), "only 3 different"),
        (BUDGETS, 3 + 0.01 * rng.standard_normal(7), "does not fall"),
        (BUDGETS, of_compute(BUDGETS)[::-1], "does not fall"),
        (BUDGETS, np.full(7, 3.0), "does not fall"),
    ):
        with pytest.raises(NotIdentified, match=says):
            fit_single(x, loss)
    with pytest.raises(NotIdentified, match="fixed at 3"):
        fit_single(BUDGETS, of_compute(BUDGETS), E=3.0)
    wrong = of_size(TOKENS)
    wrong[5] *= 3
    assert falls(TOKENS, wrong)
    assert fit_single(TOKENS, wrong, replicates=0).law.c == pytest.approx(BETA, rel=0.02)
