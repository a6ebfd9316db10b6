"""The law with gamma: solver against finite differences and scipy, noiseless recovery, optima by brute force."""

import math

import numpy as np
import pytest
from chinchilla import chinchilla
from scipy.optimize import minimize

from nanochin.laws import Law, NotIdentified, bootstrap, compute_for_loss, fit_parametric, inference_optimal
from nanochin.laws.gamma import make_surface
from nanochin.laws.parametric import reference_objective
from nanochin.laws.solver import Surface


def law_of(gamma: float, E: float = 0.7) -> Law:
    """alpha gamma and beta gamma, the slopes of the loss, are those of small models for any gamma."""
    return Law("known", E, math.exp(4 / gamma), math.exp(5 / gamma), 0.3 / gamma, 0.25 / gamma, gamma)


def runs(law: Law, noise: float = 0.0, n: int = 60, seed: int = 0):
    rng = np.random.default_rng(seed)
    N, D = np.exp(rng.uniform(9, 14, n)), np.exp(rng.uniform(12, 17, n))
    return N, D, law.loss(N, D) * np.exp(noise * rng.standard_normal(n))


def theta_of(law: Law, k: int | None = None) -> np.ndarray:
    """The six unknowns of `reference_objective`, of replicate k if there are some."""
    v = {name: float(np.asarray(getattr(law, name)).reshape(-1)[k or 0]) for name in law.constants}
    return np.array([math.log(v["A"]), math.log(v["B"]), math.log(v["E"]), v["alpha"], v["beta"], math.log(v["gamma"])])


@pytest.mark.parametrize("delta", [1e-2, math.inf])
def test_gradient_and_hessian(delta):
    """Against central differences; at gamma = 1 all but its own row equals the objective of Approach 3."""
    N, D, loss = runs(law_of(0.3), 0.01)
    surface, still, ones = make_surface(N, D, loss, gamma=None), np.zeros(3), np.ones(60)
    z = np.array([[0.4, 0.3, 0.5, 0.25, 0.6, math.log(0.4)], [0.1, 0.2, 0.1, 0.4, 0.3, 0.4], [1, 0.5, -1, 0.3, 0.1, 0]])
    _, gradient, hessian = surface(z, still, ones, delta)
    for i, step in enumerate(1e-6 * np.eye(6)):
        (above, g_above, _), (below, g_below, _) = (surface(z + s, still, ones, delta) for s in (step, -step))
        assert gradient[:, i] == pytest.approx((above - below) / 2e-6, abs=1e-7 * np.abs(gradient).max())
        assert hessian[:, i].ravel() == pytest.approx(
            ((g_above - g_below) / 2e-6).ravel(), abs=1e-7 * np.abs(hessian).max()
        )
    plain = Surface.of(N, D, loss)(z[2:, :5], still[2:], ones, delta)
    for ours, theirs in zip((gradient[2:, :5], hessian[2:, :5, :5]), plain[1:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("gamma, E", [(0.1, 0.7), (0.3, 0.0), (0.8, 0.2), (1.0, 1.2), (2.0, 0.7)])
def test_noiseless_recovery(gamma, E):
    """gamma, exponents and E to 1e-6 from 60 runs without noise, all starts at one optimum. E = 0 is an answer."""
    truth = law_of(gamma, E)
    fit = fit_parametric(*runs(truth), gamma=None)
    assert fit.starts_agreeing == fit.starts == 12
    for name in ("gamma", "alpha", "beta"):
        assert getattr(fit.law, name) == pytest.approx(getattr(truth, name), rel=1e-6)
    assert fit.law.E == pytest.approx(E, abs=1e-6)
    assert fit.at_bound == (() if E else ("E",))


def test_chinchilla_and_scipy():
    """All starts agree; L-BFGS from our optimum and from five others finds nothing lower; gamma = 1 is excluded."""
    N, D, loss = chinchilla()
    fit, rows = fit_parametric(N, D, loss, gamma=None), np.log([N, D, loss])
    here = theta_of(fit.law)
    assert fit.starts_agreeing == 12 and fit.objective == pytest.approx(9.541845e-4, rel=1e-6)
    assert reference_objective(here, *rows)[0] == pytest.approx(fit.objective, rel=1e-9)
    for seed in range(6):
        start = here + 0.3 * (seed > 0) * np.random.default_rng(seed).standard_normal(6)
        found = minimize(reference_objective, start, (*rows,), "L-BFGS-B", jac=True, options={"ftol": 1e-15})
        assert found.fun >= fit.objective * (1 - 1e-9)
    low, high = bootstrap(fit, replicates=400).interval("gamma")
    assert 0.6 < low < 0.78 < high < 0.95


def test_replicates_are_optima():
    """Bootstrap replicates against L-BFGS on the same draws: nothing lower. All are verified."""
    N, D, loss = runs(law_of(0.3, 0.7), 0.002, n=45)
    fit = fit_parametric(N, D, loss, gamma=None)
    boot = bootstrap(fit, replicates=100, verify=20)
    assert boot.failed == boot.worse == 0 and boot.verified == 100 and boot.checked == 20
    drawn = np.random.default_rng(0).multinomial(45, np.full(45, 1 / 45), 100)
    for k in range(5):
        here, rows = theta_of(boot.law, k), (*np.log([N, D, loss]), 1e-3, drawn[k])
        found = minimize(reference_objective, here, rows, "L-BFGS-B", jac=True, options={"ftol": 1e-15})
        assert found.fun >= reference_objective(here, *rows)[0] * (1 - 1e-9)


@pytest.mark.parametrize("gamma", [0.2, 1.5])
def test_optima_by_brute_force(gamma):
    """The optimum of a budget, the compute for its loss, and the cheapest model to serve, on a fine grid of N."""
    law, C = law_of(gamma), 1e15
    N = np.exp(np.linspace(math.log(1e4), math.log(1e10), 200_001))
    best = N[np.argmin(law.loss(N, C / (6 * N)))]
    found, tokens = law.optimal(C)
    assert found == pytest.approx(best, rel=1e-3) and 6 * found * tokens == pytest.approx(C)
    loss = float(law.loss(found, tokens))
    assert compute_for_loss(law, loss) == pytest.approx(C, rel=1e-9)
    terms = (loss - law.E) ** (1 / gamma) - law.A * N**-law.alpha
    N, terms = N[terms > 0], terms[terms > 0]
    D = (law.B / terms) ** (1 / law.beta)
    cheapest = np.argmin(6 * N * D + 2 * N * 1e10)
    assert inference_optimal(law, loss, 1e10) == pytest.approx((N[cheapest], D[cheapest]), rel=1e-3)


def test_refusals():
    """A loss that gamma cannot fit within its bounds is refused by name, as are options that it has no form for."""
    N, D, _ = runs(law_of(1.0))
    steep = np.maximum(3 * (N / 1e5) ** -0.3, 3 * (D / 1e6) ** -0.3)  # gamma -> 0
    with pytest.raises(NotIdentified, match="gamma"):
        fit_parametric(N, D, steep, gamma=None)
    for options in ({"space": "linear"}, {"tied": True}):
        with pytest.raises(ValueError, match="gamma"):
            make_surface(N, D, steep, gamma=None, **options)
