"""The choice of the form of the law, with laws that made the losses as the reference."""

import math
from dataclasses import replace

import numpy as np
import pytest
from chinchilla import BUDGETS, RATIOS, chinchilla, isoflop_grid, noisy_grid

from nanochin.laws import BESIROGLU, Law, choose_form, compute_groups, fit_form, fit_parametric
from nanochin.laws.forms import FAR, MARGIN, Choice, Form, _choose
from nanochin.laws.law import FormError, NotIdentified

JOINT = Law("joint", E=1.2, A=3e4, B=4e5, alpha=0.7, beta=0.75, gamma=0.3)
KAPLAN = Law("Kaplan's form", E=0.0, A=9e10, B=4e13, alpha=0.78, beta=1.0, gamma=0.0959)


def grid(law: Law, noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    N, D, loss = isoflop_grid(law, BUDGETS, RATIOS)
    return N, D, loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(N)))


@pytest.mark.parametrize("law", [BESIROGLU, JOINT, KAPLAN], ids=lambda law: law.name)
def test_the_law_that_made_the_losses_is_found(law):
    """Noise of 0.3%: ten times beyond the runs the chosen form is within what it may get wrong, at 95%."""
    N, D, loss = grid(law, 0.003)
    choice = choose_form(N, D, loss)
    found, C = choice.chosen.fit.law, 10 * BUDGETS[-1]
    at = law.optimal(C)
    off = math.log(found.loss(*at) / law.loss(*at))
    assert abs(off) < 1.96 * choice.error(choice.chosen).at(C) < 0.05
    assert found.a == pytest.approx(law.a, abs=0.02)
    assert choice.chosen.name != "E = 0" or law.E == 0


def test_noiseless_losses_choose_their_form():
    """The sum is predicted exactly by gamma = 1; a joint law by free gamma, which gives its gamma back."""
    assert choose_form(*grid(BESIROGLU)).chosen.last < 1e-7
    joint = choose_form(*grid(JOINT)).chosen
    assert joint.name == "free gamma" and joint.last < 1e-6
    assert joint.fit.law.gamma == pytest.approx(JOINT.gamma, rel=1e-6)


def test_errors_are_those_of_fits_to_the_smaller_budgets():
    """Each error by its own fit; the score is the root mean square of all but the last, the steps ratios of C."""
    N, D, loss = noisy_grid(0.004)
    choice = choose_form(N, D, loss)
    budget = np.repeat(np.arange(6), 8)
    for form in choice.forms[:2]:
        expected = []
        for k in (2, 3, 4, 5):
            low, at = budget < k, budget == k
            law = fit_form(form.name, N[low], D[low], loss[low]).law
            expected.append(np.median(np.abs(np.log(law.loss(N[at], D[at]) / loss[at]))))
        assert form.errors == pytest.approx(expected, rel=1e-9)
    known = np.array([form.errors[:3] for form in choice.forms if isinstance(form.fit, type(choice.forms[0].fit))])
    used = known[:, np.isfinite(known).all(0)]
    assert [*choice.scores.values()] == pytest.approx(np.sqrt((used**2).mean(1)))
    assert choice.steps == pytest.approx(4 * [BUDGETS[1] / BUDGETS[0]])
    assert choice.flops == pytest.approx(BUDGETS[2:])


def test_the_largest_budget_takes_no_part_in_the_choice():
    """Losses there that are 20% off change its error, and neither scores nor what was tested before it."""
    N, D, loss = noisy_grid(0.004)
    top = 6 * N * D > 0.9 * BUDGETS[-1]
    plain, wrong = choose_form(N, D, loss), choose_form(N, D, np.where(top, 1.2 * loss, loss))
    assert wrong.scores["gamma = 1"] == plain.scores["gamma = 1"]
    assert wrong.forms[1].last > 0.15 > 0.02 > plain.forms[1].last
    assert wrong.error(wrong.forms[1], last=False) == plain.error(plain.forms[1], last=False)
    assert wrong.error(wrong.forms[1]).sd > 5 * plain.error(plain.forms[1]).sd


def made_up(errors: dict[str, tuple], laws: dict[str, Law]) -> Choice:
    """The choice for given errors of the forms; a form without a law cannot be fitted."""
    fit = fit_parametric(*noisy_grid(0.0))
    forms = [
        Form(name, replace(fit, law=laws[name]) if name in laws else NotIdentified("as the test says"), errors[name])
        for name in errors
    ]
    return _choose(Choice(tuple(forms), (1e18, 1e19, 1e20), (10.0, 10.0, 10.0), (0.1, 0.1, 0.1)))


def test_rules_of_the_choice():
    """Free gamma unless another form is clearly better; only budgets that all forms predict count; E = 0 must agree
    with free gamma far away; forms that cannot be fitted are out; without a scored budget it is free gamma."""
    names, same = ("free gamma", "gamma = 1", "E = 0"), dict.fromkeys(("free gamma", "gamma = 1", "E = 0"), BESIROGLU)

    def chosen(*errors, laws=same):
        found = made_up(dict(zip(names, errors, strict=True)), laws)
        return found.chosen and found.chosen.name

    far, near = (0.03, 0.03, 0.9), (0.03 / MARGIN * 0.99,) * 2 + (0.9,)
    assert chosen(far, far, far) == chosen(far, (0.021, 0.021, 0.0), far) == "free gamma"
    assert chosen(far, near, far) == "gamma = 1" and chosen(far, far, near) == "E = 0"
    assert chosen(far, (math.nan, *near[1:]), far) == "gamma = 1"  # the first budget does not count
    assert chosen((math.nan, math.nan, 0.1), near, near) == "free gamma"
    assert chosen(far, near, near, laws={"E = 0": BESIROGLU}) == "E = 0"
    assert chosen(far, near, near, laws={}) is None
    lower = replace(BESIROGLU, E=0.2)  # at FAR times the largest C far below BESIROGLU
    assert abs(math.log(lower.loss(*lower.optimal(FAR * 1e20)) / BESIROGLU.loss(*lower.optimal(FAR * 1e20)))) > 0.1
    assert chosen(far, far, near[:2] + (0.01,), laws=same | {"E = 0": lower}) == "free gamma"


def test_a_fixed_e_is_kept_by_every_form():
    N, D, loss = noisy_grid(0.003)
    choice = choose_form(N, D, loss, E=1.8)
    assert [form.name for form in choice.forms] == ["free gamma", "gamma = 1"]
    assert all(form.fit.law.E == 1.8 for form in choice.forms)


def test_what_the_form_may_get_wrong():
    """0 within the runs, linear in log C, `sd` at the tested ratio; without an earlier budget the difference of the
    forms; unknown if nothing was predicted."""
    error = FormError(0.02, 10.0, 1e18)
    assert error.at(1e17) == error.at(1e18) == 0
    assert error.at(1e19) == pytest.approx(0.02) and error.at(1e20) == pytest.approx(0.04)
    assert error.is_tested(1e19) and not error.is_tested(2e19)
    found = made_up({"free gamma": (math.nan, math.nan, 0.03)}, {"free gamma": BESIROGLU})
    assert found.error(found.chosen) == FormError(pytest.approx(0.03), pytest.approx(10.0), 1e20)
    assert found.error(found.chosen, last=False) == FormError(pytest.approx(0.1), pytest.approx(10.0), 1e19)
    assert replace(found, apart=(0.1, 0.1, math.nan)).error(found.chosen, last=False) is None


def test_groups_by_compute():
    """By the column; by clusters of C if these hold all runs, else by equal bins of log C; small groups at the top are
    merged."""
    C = np.repeat(BUDGETS, 8)
    np.testing.assert_array_equal(compute_groups(C), np.repeat(np.arange(6), 8))
    np.testing.assert_array_equal(compute_groups(C, budget=-C), np.repeat(np.arange(6), 8))
    np.testing.assert_array_equal(compute_groups(C[:43]), np.minimum(np.repeat(np.arange(6), 8)[:43], 4))
    assert (compute_groups(C[:3]) == 0).all()
    spread = np.geomspace(1.0, 1e6, 62)
    np.testing.assert_array_equal(compute_groups(spread), np.minimum(np.arange(62) // 10.2, 5))
    few = compute_groups(np.append(spread, 1e9))  # the bins above 3e4 have 15 runs, 0 and 1
    np.testing.assert_array_equal(few, np.append(np.minimum(np.arange(62) // 15.3, 3), 3))


def test_chinchilla():
    """The largest sixth of log C is predicted to 0.7% by free gamma, to 0.9% by the sum and to 3.5% by E = 0, which
    cannot be fitted to all runs."""
    choice = choose_form(*chinchilla())
    free, one, zero = choice.forms
    assert choice.chosen is free
    assert (free.last, one.last, zero.last) == pytest.approx((0.0063, 0.0087, 0.0348), abs=2e-4)
    assert isinstance(zero.fit, NotIdentified)
