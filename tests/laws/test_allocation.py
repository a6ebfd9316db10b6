from dataclasses import replace

import numpy as np
import pytest

from nanochin.laws import BESIROGLU, Cost, NotIdentified
from nanochin.laws.allocation import (
    DataConstrained,
    compute_for_loss,
    inference_optimal,
    loss_of_compute,
    off_optimum,
)
from nanochin.laws.published import HOFFMANN, HOFFMANN_1, HOFFMANN_2, KAPLAN, MUENNIGHOFF, TABLE_3


def test_no_compute_reaches_the_irreducible_loss():
    """A loss of E or less raises an error that names E."""
    for ask in (lambda: compute_for_loss(BESIROGLU, 1.8172), lambda: inference_optimal(BESIROGLU, 1.5, 1e12)):
        with pytest.raises(NotIdentified, match="E is 1.8172"):
            ask()


def test_cost_of_being_off_the_optimum():
    """At four times N_opt: the published extra loss, and as much compute wasted as an optimum of that loss saves."""
    for C, gap in ((1e16, 0.48), (1e17, 0.32), (1e18, 0.21), (1e19, 0.14)):
        N, D = BESIROGLU.optimal(C)
        far = off_optimum(BESIROGLU, C, 4 * N)
        assert far.extra_loss == pytest.approx(gap, abs=0.006)
        assert (far.D, far.loss) == pytest.approx((D / 4, BESIROGLU.loss(4 * N, D / 4)))
        assert BESIROGLU.loss(*BESIROGLU.optimal(C / far.compute_factor)) == pytest.approx(far.loss, rel=1e-9)


def test_published_losses_of_repeated_data():
    """The two losses asserted in the authors' code, to the last digit."""
    law = DataConstrained()
    assert law.loss(6.34e9, 242e9, 25e9) == pytest.approx(2.2256440889984477, rel=1e-14)
    assert law.loss(8.67e9, 178e9, 25e9) == pytest.approx(2.2269634075087867, rel=1e-14)


def test_published_allocation_of_repeated_data():
    """1e22 FLOPs and 25B unique tokens: the published grid search is reproduced; ours is finer."""
    law, C, U = DataConstrained(), 1e22, 25e9
    N0, D0 = law.law.optimal(C)
    factors = np.linspace(1.0001, 3, 500)
    grid = [(N0 * f, D0 / f) for f in factors] + [(N0 / f, D0 * f) for f in factors]
    N, D = min(grid, key=lambda pair: law.loss(*pair, U))
    assert (N, D) == pytest.approx((7_022_364_735.9, 237_336_955_477.55), rel=1e-6)
    n, d = law.optimal(C, U)
    assert law.loss(n, d, U) <= law.loss(N, D, U)
    assert d == pytest.approx(D, rel=2e-3)
    assert 6 * n * d == pytest.approx(C, rel=1e-12)
    assert d / U == pytest.approx(9.4935, abs=0.02)


def test_enough_unique_tokens_change_nothing():
    """With as many unique tokens as the optimum needs, law and optimum are the unconstrained ones."""
    law = DataConstrained()
    N, D = MUENNIGHOFF.optimal(1e21)
    assert law.optimal(1e21, 2 * D) == (N, D)
    assert law.loss(N, D, 2 * D) == pytest.approx(MUENNIGHOFF.loss(N, D), rel=1e-12)


def test_repeats_have_diminishing_value():
    """A few repeats are nearly as good as new tokens, many have no value. If a billion tokens are far too few, the loss
    no longer depends on the allocation. (test_cost.py compares the optimum with a scan.)"""
    law, (N, D) = DataConstrained(), MUENNIGHOFF.optimal(1e22)
    losses = [law.loss(N, D, D / epochs) for epochs in (1, 2, 4, 16, 64)]
    assert losses == sorted(losses)
    assert losses[2] - losses[0] < 0.02 < losses[4] - losses[0]
    with pytest.raises(NotIdentified, match="more than 1e\\+09 unique tokens can use"):
        law.optimal(1e26, 1e9)


def test_laws_from_table_3_reproduce_it():
    """Approaches 1 and 2: exponents as printed, every row within a few percent; 6 N D is about C."""
    assert [round(v, 2) for v in (HOFFMANN_1.a, HOFFMANN_1.b, HOFFMANN_2.a, HOFFMANN_2.b)] == [0.50, 0.50, 0.49, 0.51]
    for N, *columns in TABLE_3:
        for law, C, D in ((HOFFMANN_1, *columns[:2]), (HOFFMANN_2, *columns[2:4])):
            assert law.optimal(C) == pytest.approx((N, D), rel=0.06)
        for C, D in zip(columns[::2], columns[1::2], strict=True):
            assert pytest.approx(C, rel=0.08) == 6 * N * D


def test_known_budgets():
    """Gopher's budget: 40B parameters by Approach 3; GPT-3's size needs 3.7T and 4.3T tokens by the others."""
    assert HOFFMANN.optimal(5.76e23)[0] == pytest.approx(40e9, rel=0.01)
    assert HOFFMANN_1.tokens_for(175e9) == pytest.approx(3.7e12, rel=0.03)
    assert HOFFMANN_2.tokens_for(175e9) == pytest.approx(4.3e12, rel=0.05)
    assert MUENNIGHOFF.optimal(1e20)[1] / MUENNIGHOFF.optimal(1e20)[0] == pytest.approx(19.6, abs=0.05)


def test_kaplan():
    """10x compute: 5.4x parameters, 1.9x tokens; 1.3e9 parameters for one PF-day; C is 6 N D."""
    (n1, d1), (n10, d10) = KAPLAN.optimal(8.64e19), KAPLAN.optimal(8.64e20)
    assert n1 == pytest.approx(1.3e9, rel=1e-9)
    assert (n10 / n1, d10 / d1) == pytest.approx((10**0.73, 10**0.27), rel=1e-9)
    assert 6 * n10 * d10 == pytest.approx(8.64e20, rel=1e-9)


@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_loss_of_the_optimum(gamma):
    """6ND: K and c by the formula of the docstring, from any two budgets. Another cost: the losses at both ends, and
    within 0.1% of the loss between them. Replicates give arrays."""
    law = replace(BESIROGLU, gamma=gamma)
    A, B, alpha, beta, G = law.A, law.B, law.alpha, law.beta, law.G
    c = gamma * alpha * beta / (alpha + beta)
    expected = law.E, 6**c * (A * G**-alpha + B * G**beta) ** gamma, c
    assert loss_of_compute(law, 1e18, 1e21) == pytest.approx(expected, rel=1e-9)
    assert loss_of_compute(law, 1e22, 2e22) == pytest.approx(expected, rel=1e-9)
    costly = replace(law, cost=Cost(c=30.0, q=0.3))
    E, K, c = loss_of_compute(costly, 1e18, 1e21)
    for C, off in ((1e18, 1e-12), (3e19, 1e-3), (1e21, 1e-12)):
        assert E + K * C**-c == pytest.approx(costly.loss(*costly.optimal(C)), rel=off)
    E, K, c = loss_of_compute(replace(law, A=A * np.ones(3)), 1e18, 1e21)
    assert K == pytest.approx(np.full(3, expected[1]), rel=1e-9)
