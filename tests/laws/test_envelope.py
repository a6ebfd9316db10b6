import math

import numpy as np
import pytest

from nanochin.laws import BESIROGLU, Law, NotIdentified, bootstrap, fit_envelope
from nanochin.laws.envelope import gaussian_smooth

TIED = Law("tied", E=1.8, A=480.0, B=1500.0, alpha=0.35, beta=0.35)


def curves(law, sizes, *, horizon: float = 400, points: int = 300, noise: float = 0.0, seed: int = 0):
    """Runs with a constant learning rate: loss of the law at D tokens, up to `horizon` tokens per parameter."""
    rng = np.random.default_rng(seed)
    run, N, D = [], [], []
    for i, n in enumerate(sizes):
        run += [f"run {i}"] * points
        N += [n] * points
        D += list(n * np.geomspace(0.3, horizon, points))
    N, D = np.array(N), np.array(D)
    return np.array(run), N, D, law.loss(N, D) * np.exp(noise * rng.standard_normal(len(N)))


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
    """A line stays a line up to its ends; noise shrinks; short curves and small windows are unchanged."""
    x = np.linspace(4, 2, 60)
    assert gaussian_smooth(x, 10) == pytest.approx(x, abs=1e-12)
    noise = np.random.default_rng(0).standard_normal(4000)
    assert gaussian_smooth(noise, 10)[20:-20].std() < 0.5
    assert gaussian_smooth(x, 1) is x
    # The kernel in the middle: a Gaussian of sd window / 4, to 2 sd on either side.
    impulse = np.zeros(41)
    impulse[20] = 1
    weights = np.exp(-0.5 * (np.arange(-5, 6) / 2.5) ** 2)
    assert gaussian_smooth(impulse, 10)[15:26] == pytest.approx(weights / weights.sum(), abs=1e-12)


def test_noise_is_smoothed_and_resampled():
    """The exponent of noisy curves is within the interval of resampled runs."""
    rows = curves(TIED, np.geomspace(1e6, 1e10, 40), noise=0.004)
    fit = fit_envelope(*rows)
    boot = bootstrap(fit, replicates=300)
    low, high = boot.interval("a")
    assert low < fit.law.a < high
    assert fit.law.a == pytest.approx(0.5, abs=0.03)
    assert (boot.unit, boot.units) == ("run", 40)


def test_a_replicate_is_the_fit_of_its_runs():
    """The first replicates equal fits of only the drawn runs, at the same FLOPs."""
    run, N, D, loss = curves(BESIROGLU, np.geomspace(1e6, 1e9, 12), points=60)
    fit = fit_envelope(run, N, D, loss, smooth=0)
    law = bootstrap(fit, replicates=4).law
    counts = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), 4)
    for k in range(4):
        points = []  # log C, log N of the winner
        for c, column in zip(fit.flops, fit.table.T, strict=True):
            present = [i for i in range(12) if counts[k][i] and np.isfinite(column[i])]
            best = min(present, key=lambda i: column[i], default=0)
            if present and fit.sizes[present].min() < fit.sizes[best] < fit.sizes[present].max():
                points.append((math.log(c), math.log(fit.sizes[best])))
        a = np.polyfit(*np.array(points).T, 1)[0]
        assert law.a[k] == pytest.approx(a, rel=1e-9)


def test_order_and_duplicates_do_not_matter():
    """Rows in any order; of two rows at the same FLOPs the later one is kept."""
    rows = curves(BESIROGLU, np.geomspace(1e6, 1e9, 8), points=40)
    mixed = np.random.default_rng(0).permutation(len(rows[0]))
    a, b = fit_envelope(*rows).law, fit_envelope(*(v[mixed] for v in rows)).law
    assert a.a == pytest.approx(b.a, rel=1e-12)
    doubled = tuple(np.concatenate([v, v]) for v in rows)
    assert fit_envelope(*doubled).law.a == pytest.approx(a.a, rel=1e-12)


@pytest.mark.parametrize(
    "sizes, law, says",
    [
        ([1e7, 1e8], BESIROGLU, "at least 3 model sizes, but has 2"),
        ([1e7, 2e7, 4e7], Law("larger is worse", 1, 1e-6, 1e-6, 1e-3, 1e-3), "but has 0 of 3"),
    ],
)
def test_curves_without_a_frontier_are_refused(sizes, law, says):
    """Two sizes; the smallest size still in training always lowest."""
    run, N, D, loss = curves(law, sizes)
    if law is not BESIROGLU:
        loss = loss + 1e-8 * N
    with pytest.raises(NotIdentified, match=says):
        fit_envelope(run, N, D, loss)


def test_disjoint_curves_are_refused():
    """Three sizes without common FLOPs cannot be compared."""
    run, N = np.repeat(["a", "b", "c"], 2), np.repeat([1e6, 1e7, 1e8], 2)
    C = np.array([1e13, 2e13, 1e15, 2e15, 1e17, 2e17])
    with pytest.raises(NotIdentified, match="no FLOP count"):
        fit_envelope(run, N, C / (6 * N), np.full(6, 3.0), C)
