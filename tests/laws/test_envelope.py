import math

import numpy as np
import pytest

from nanochin.laws import BESIROGLU, Law, NotIdentified, bootstrap, fit_envelope
from nanochin.laws.envelope import gaussian_smooth

TIED = Law("tied", E=1.8, A=480.0, B=1500.0, alpha=0.35, beta=0.35)


def curves(law, sizes, *, points: int = 300, noise: float = 0.0):
    """Runs with a constant learning rate: loss of the law at D tokens, up to 400 tokens per parameter."""
    N = np.repeat(sizes, points)
    D = N * np.tile(np.geomspace(0.3, 400, points), len(sizes))
    luck = np.exp(noise * np.random.default_rng(0).standard_normal(len(N)))
    return np.repeat([f"run {i}" for i in range(len(sizes))], points), N, D, law.loss(N, D) * luck


def test_the_envelope_is_the_frontier():
    """Many sizes without noise: each winner is the size nearest to the optimum; the exponent is that of the law."""
    sizes = np.geomspace(1e6, 1e10, 161)
    fit = fit_envelope(*curves(TIED, sizes), smooth=0)
    inner = (fit.params > sizes[8]) & (fit.params < sizes[-9])
    optimum = TIED.optimal(fit.flops[inner])[0]
    assert np.abs(np.log(fit.params[inner] / optimum)).max() < math.log(sizes[1] / sizes[0])
    assert fit.tokens == pytest.approx(fit.flops / (6 * fit.params), rel=1e-9)
    assert fit.loss == pytest.approx(TIED.loss(fit.params, fit.tokens), rel=1e-4)
    slope = np.polyfit(np.log(fit.flops[inner]), np.log(fit.params[inner]), 1)[0]
    assert slope == pytest.approx(0.5, abs=0.01)


def test_the_lowest_run_wins_by_hand():
    """Four curves of two points each: straight lines in logs, with known crossings."""
    run = np.repeat(["a", "b", "c", "d"], 2)
    N = np.repeat([1e6, 1e7, 1e8, 1e9], 2)
    C = np.tile([1e15, 1e19], 4)
    log_loss = np.array([1.0, 0.8, 1.2, 0.6, 1.6, 0.4, 9.0, 0.5])  # in log C: slopes -0.05, -0.15, -0.30 per decade
    fit = fit_envelope(run, N, C / (6 * N), np.exp(log_loss), C, points=4001, smooth=0)
    first, second = fit.flops[np.searchsorted(fit.params, [1e7, 1e8])]
    assert math.log10(first) == pytest.approx(15 + 0.2 / 0.1, abs=2e-3)
    assert math.log10(second) == pytest.approx(15 + 0.4 / 0.15, abs=2e-3)
    # The smallest size wins up to the first crossing, without a smaller one to compare with.
    assert (fit.bracketed == (fit.flops >= first)).all()
    assert fit.late_share == pytest.approx(-math.log10(0.85) / 2, abs=1e-3)
    assert fit.to_json()["n_winners"] == 2
    used = fit.bracketed
    assert fit.law.a == pytest.approx(np.polyfit(np.log(fit.flops[used]), np.log(fit.params[used]), 1)[0], rel=1e-9)


def test_winners_need_two_sizes():
    """Where only one size has a loss there is no winner."""
    sizes = (1e5, 3e5, 1e6, 3e6, 1e7, 3e7, 1e8, 3e8, 5e6)
    spans = [(1e13, 1e15)] * 4 + [(1e17, 1e19)] * 4 + [(3e14, 2e17)]
    run, N = np.repeat(np.arange(9), 50), np.repeat(sizes, 50)
    C = np.concatenate([np.geomspace(*span, 50) for span in spans])
    fit = fit_envelope(run, N, C / (6 * N), BESIROGLU.loss(N, C / (6 * N)), C, smooth=0)
    assert fit.flops[0] == pytest.approx(1e13) and fit.flops[-1] == pytest.approx(1e19)
    assert not ((fit.flops > 1.01e15) & (fit.flops < 0.99e17)).any()


def test_smoothing():
    """A line stays a line up to its ends; in the middle the kernel is a Gaussian of sd window / 4, to 2 sd on either
    side."""
    x = np.linspace(4, 2, 60)
    assert gaussian_smooth(x, 10) == pytest.approx(x, abs=1e-12)
    impulse = np.eye(41)[20]
    weights = np.exp(-0.5 * (np.arange(-5, 6) / 2.5) ** 2)
    assert gaussian_smooth(impulse, 10)[15:26] == pytest.approx(weights / weights.sum(), abs=1e-12)


def test_noise_is_smoothed_and_resampled():
    """The exponent of noisy curves is close to the law's, and within the interval of resampled runs."""
    fit = fit_envelope(*curves(TIED, np.geomspace(1e6, 1e10, 40), noise=0.004))
    boot = bootstrap(fit, replicates=300)
    low, high = boot.interval("a")
    assert low < fit.law.a < high and fit.law.a == pytest.approx(0.5, abs=0.03)
    assert (boot.unit, boot.units) == ("run", 40)


def test_a_replicate_is_the_fit_of_its_runs():
    """The first replicates equal fits of only the drawn runs, at the same FLOPs."""
    fit = fit_envelope(*curves(BESIROGLU, np.geomspace(1e6, 1e9, 12), points=60), smooth=0)
    law = bootstrap(fit, replicates=4).law
    counts = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), 4)
    for k in range(4):
        points = []  # log C, log N of the winner
        for c, column in zip(fit.flops, fit.table.T, strict=True):
            present = [i for i in range(12) if counts[k][i] and np.isfinite(column[i])]
            best = min(present, key=lambda i: column[i], default=0)
            if present and fit.sizes[present].min() < fit.sizes[best] < fit.sizes[present].max():
                points.append((math.log(c), math.log(fit.sizes[best])))
        assert law.a[k] == pytest.approx(np.polyfit(*np.array(points).T, 1)[0], rel=1e-9)


def test_order_and_duplicates_do_not_matter():
    """Rows in any order; of two rows at the same FLOPs the later one is kept."""
    rows = curves(BESIROGLU, np.geomspace(1e6, 1e9, 8), points=40)
    a = fit_envelope(*rows).law.a
    mixed = np.random.default_rng(0).permutation(len(rows[0]))
    assert fit_envelope(*(v[mixed] for v in rows)).law.a == pytest.approx(a, rel=1e-12)
    assert fit_envelope(*(np.concatenate([v, v]) for v in rows)).law.a == pytest.approx(a, rel=1e-12)


def test_curves_without_a_frontier_are_refused():
    """Two sizes; the smallest size always lowest; three sizes without common FLOPs."""
    run, N, D, loss = curves(BESIROGLU, [1e7, 2e7, 4e7])
    apart = D * (N / 1e7) ** 9
    for says, rows in (
        ("at least 3 model sizes, but has 2", curves(BESIROGLU, [1e7, 1e8])),
        ("but has 0 of 3", (run, N, D, 1 + 1e-8 * N)),
        ("no FLOP count", (run, N, apart, loss)),
    ):
        with pytest.raises(NotIdentified, match=says):
            fit_envelope(*rows)
