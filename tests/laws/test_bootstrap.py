import math
import tracemalloc

import numpy as np
import pytest
from chinchilla import BUDGETS, chinchilla, isoflop_grid, noisy_grid

from nanochin.laws import BESIROGLU, Law, NotIdentified, fit_isoflop, fit_parametric
from nanochin.laws.bootstrap import bootstrap, bootstrap_seed_noise
from nanochin.laws.law import CONSTANTS
from nanochin.laws.solver import Surface


def drawn(replicates: int) -> np.ndarray:
    """(replicates, 48): how often each run of noisy_grid is drawn with seed 0."""
    return np.random.default_rng(0).multinomial(48, np.full(48, 1 / 48), replicates)


def peak_bytes(call) -> int:
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_intervals_on_chinchilla():
    """95% intervals of Besiroglu et al., from 4000 resamples of 240 rows: ends within 0.005, of E within 0.01."""
    boot = bootstrap(fit_parametric(*chinchilla()))
    for name, interval, within in (("alpha", (0.317, 0.372), 0.005), ("beta", (0.333, 0.414), 0.005),
                                   ("E", (1.770, 1.869), 0.01), ("a", (0.481, 0.557), 0.005)):  # fmt: skip
        assert boot.interval(name) == pytest.approx(interval, abs=within), name
    assert boot.interval("a", 80) == pytest.approx((0.492, 0.541), abs=0.005)
    # Two published standard deviations: of other replicates, and of Epoch's.
    for name, sd in (("alpha", 0.0148), ("beta", 0.0202), ("E", 0.0252), ("A", 117.7)):
        assert getattr(boot.law, name).std() == pytest.approx(sd, rel=0.05), name
    assert (boot.replicates, boot.units, boot.unit, boot.failed, boot.at_bound) == (4000, 240, "row", 0, 0)
    assert (boot.checked, boot.worse, boot.verified) == (200, 0, 4000)
    assert boot.gradient_norm < 1e-5


def test_every_replicate_is_verified():
    """At each replicate's law the gradient, by differences of a Huber sum written out here, is negligible against its
    terms, and the Hessian is positive definite; the surface uses both to tell a saddle from a minimum."""
    N, D, loss = noisy_grid(0.004)
    boot = bootstrap(fit_parametric(N, D, loss), replicates=40, verify=0)
    assert boot.verified == 40 - boot.failed == boot.to_json()["bootstrap"]["verified"] == 40

    def terms(theta, w):  # (48,) of the sum; theta: log A, alpha, log B, beta, E, as the surface has them at its centre
        x, y = np.log(N) - np.log(N).mean(), np.log(D) - np.log(D).mean()
        r = np.log(np.exp(theta[0] - theta[1] * x) + np.exp(theta[2] - theta[3] * y) + theta[4]) - np.log(loss)
        return w * np.where(np.abs(r) < 1e-3, r * r / 2, 1e-3 * (np.abs(r) - 5e-4))

    surface = Surface.of(N, D, loss)
    laws = [Law("", *row) for row in zip(*(getattr(boot.law, k) for k in CONSTANTS), strict=True)]
    rng, h, saddles = np.random.default_rng(1), 1e-6, 0
    for w, law in zip(drawn(40), laws, strict=True):
        at = surface.z(law)
        slopes = np.array([(terms(at + h * e, w) - terms(at - h * e, w)) / (2 * h) for e in np.eye(5)])
        assert (np.abs(slopes.sum(1)) < 1e-3 * np.abs(slopes).sum(1)).all()
        for z in (at, at + 0.3 * rng.standard_normal(5) * [1, 0.2, 1, 0.2, 0.3]):
            H = np.array([[sum(a * b * terms(z + 1e-6 * (a * e + b * f), w).sum() for a in (1, -1) for b in (1, -1))
                           for f in np.eye(5)] for e in np.eye(5)]) / 4e-12  # fmt: skip
            lowest = np.linalg.eigvalsh(H / np.sqrt(np.outer(*[np.abs(np.diag(H))] * 2))).min()
            saddles += lowest < -1e-3
            if abs(lowest) > 1e-3:
                positive = surface.curves_up(z[None], w[None].astype(float), np.zeros((1, 5), bool))[0]
                assert positive == (lowest > 0)
    assert saddles > 5


def test_after_a_missed_optimum_all_replicates_are_checked():
    """Resamples of 24 noisy runs have several minima: if one of the sample missed its optimum, all replicates are
    minimised from other starts, and each is counted."""
    N, D, loss = isoflop_grid(BESIROGLU, np.geomspace(1e17, 1e19, 4), np.geomspace(1 / 4, 4, 6))
    loss = loss * np.exp(0.02 * np.random.default_rng(1).standard_normal(24))
    fit = fit_parametric(N, D, loss, allow_bound=("E",))
    boot, whole = (bootstrap(fit, replicates=300, verify=verify) for verify in (60, 300))
    assert boot.worse > 0
    assert boot.checked + boot.unconfirmed + boot.failed == 300
    assert whole.law.alpha == pytest.approx(boot.law.alpha, rel=1e-5) and whole.worse == boot.worse


def test_a_replicate_is_a_fit_of_the_drawn_rows():
    """Replicates equal the fits, from twelve starts, of their rows repeated as often as drawn."""
    N, D, loss = noisy_grid(0.005)
    law = bootstrap(fit_parametric(N, D, loss), replicates=20, verify=0).law
    for k, counts in enumerate(drawn(20)):
        rows = np.repeat(np.arange(48), counts)
        alone = fit_parametric(N[rows], D[rows], loss[rows]).law
        assert law.alpha[k] == pytest.approx(alone.alpha, rel=1e-6)
        assert law.B[k] == pytest.approx(alone.B, rel=1e-5)


def test_whole_runs_are_resampled():
    """Checkpoints of a run are correlated: by rows the interval is far too narrow; by runs there is a warning."""
    n = np.repeat(np.tile(np.geomspace(1e7, 1e9, 10), 3), 12)
    D = n * np.tile(np.geomspace(4, 40, 12), 30) * np.repeat([1, 2, 3], 120)
    run = np.repeat(np.arange(30), 12)
    luck = np.repeat(0.02 * np.random.default_rng(1).standard_normal(30), 12)
    fit = fit_parametric(n, D, BESIROGLU.loss(n, D) * np.exp(luck), delta=math.inf)
    by_row, by_run = bootstrap(fit, replicates=400), bootstrap(fit, runs=run, replicates=400)
    width = [high - low for low, high in (by_row.interval("alpha"), by_run.interval("alpha"))]
    assert width[1] > 2 * width[0]
    assert (by_run.unit, by_run.units) == ("run", 30)
    assert "360 rows belong to 30 runs" in by_run.warnings[0]
    assert by_row.warnings == ()


def test_intervals_cover_the_truth():
    """In 60 made-up sweeps the 80% interval of a contains the true a about 80% of the time."""
    hits = 0
    for seed in range(60):
        fit = fit_parametric(*noisy_grid(0.004, seed), allow_bound=("E",))
        low, high = bootstrap(fit, replicates=200, seed=seed, verify=0).interval("a", 80)
        hits += low <= BESIROGLU.a <= high
    assert 36 <= hits <= 57  # 48 expected; half or twice the width would be outside this range


def test_any_quantity_has_an_interval():
    """Functions of the law, and all quantities in JSON; a, b and the optimum follow from the same replicates."""
    boot = bootstrap(fit_parametric(*noisy_grid(0.005)), replicates=100)
    low, high = boot.interval(lambda law: law.optimal(1e22)[0], 80)
    by_hand = sorted(boot.law.G[k] * (1e22 / 6) ** boot.law.a[k] for k in range(100))
    assert by_hand[9] <= low <= by_hand[11] and by_hand[88] <= high <= by_hand[90]
    found = boot.to_json()
    assert set(found["ci"]) == {*CONSTANTS, "a", "b", "G"}
    for name, ends in found["ci"].items():
        assert ends[0] <= found["ci80"][name][0] < found["ci80"][name][1] <= ends[1]
    assert found["ci"]["a"][0] == pytest.approx(1 - found["ci"]["b"][1], abs=1e-12)


def test_options_of_the_fit_hold_in_every_replicate():
    """Tied exponents stay tied, a fixed E stays fixed, and least squares of the loss works."""
    rows = noisy_grid(0.005)
    options = {"tied": True}, {"E": 1.7}, {"space": "linear", "delta": math.inf}
    tied, fixed, linear = (bootstrap(fit_parametric(*rows, **changed), replicates=50) for changed in options)
    assert (tied.law.alpha == tied.law.beta).all() and tied.law.alpha.std() > 0
    assert (fixed.law.E == 1.7).all()
    assert linear.failed == 0 and linear.law.alpha.std() > 0


def test_few_runs_are_refused_or_warned_about():
    """Two runs are too few to resample; seven give a warning."""
    fit = fit_parametric(*noisy_grid(0.01))
    with pytest.raises(NotIdentified, match="2 independent runs"):
        bootstrap(fit, runs=np.arange(48) % 2)
    boot = bootstrap(fit, runs=np.arange(48) % 7, replicates=50)
    assert any("only 7 independent runs" in w for w in boot.warnings)


def test_memory_is_bounded():
    """No dozens of arrays of rows x starts or rows x replicates: of 1e5 rows, and of 400 splines."""
    rng = np.random.default_rng(0)
    N, D = np.exp(rng.uniform(14, 22, 100_000)), np.exp(rng.uniform(18, 26, 100_000))
    loss = BESIROGLU.loss(N, D) * np.exp(0.01 * rng.standard_normal(100_000))
    assert peak_bytes(lambda: bootstrap(fit_parametric(N, D, loss, delta=0.1), replicates=40, verify=0)) < 400e6
    spline = fit_isoflop(*isoflop_grid(BESIROGLU, [1e18, 1e20], np.geomspace(1 / 6, 6, 750)), method="akima")
    assert peak_bytes(lambda: bootstrap_seed_noise(spline, noise=1e-4, replicates=400)) < 250e6


def test_runs_of_approach_2():
    """Vertices of resampled runs: the interval contains the true exponent, and one replicate is checked."""
    N, D, loss = noisy_grid(0.003, seed=2)
    boot = bootstrap(fit_isoflop(N, D, loss), replicates=300)
    low, high = boot.interval("a")
    assert low < BESIROGLU.a < high and 0.005 < high - low < 0.2
    counts, vertices = drawn(300)[0], []
    for i in range(6):
        rows = np.repeat(np.arange(8 * i, 8 * i + 8), counts[8 * i : 8 * i + 8])
        p, q, _ = np.polyfit(np.log(N[rows]), loss[rows], 2)
        vertices.append(-q / (2 * p))
    assert boot.law.a[0] == pytest.approx(np.polyfit(np.log(BUDGETS), vertices, 1)[0], rel=1e-6)


@pytest.mark.parametrize("method", ["parabola", "akima"])
def test_seed_noise(method):
    """No noise: no width; more noise: a wider interval with the truth in it."""
    fit = fit_isoflop(*noisy_grid(0.0), method=method)
    none = bootstrap_seed_noise(fit, noise=0.0, replicates=50)
    assert none.unit == "seed noise" and none.law.a == pytest.approx(fit.law.a, abs=1e-9)
    widths = []
    for noise in (0.0005, 0.002):
        low, high = bootstrap_seed_noise(fit, noise=noise).interval("a")
        assert low < BESIROGLU.a < high
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_seed_noise_contains_its_estimate():
    """Unequal noise of the budgets on a bent frontier: the interval is that of the unweighted estimate."""
    i, width = np.arange(6)[:, None], np.repeat([16, 3], 3)[:, None]
    ratio = width ** np.linspace(-1, 1, 9)
    N = 1e7 * 10 ** (0.5 * i + 0.03 * i * i) * ratio
    fit = fit_isoflop(N.ravel(), (BUDGETS[:, None] / (6 * N)).ravel(), (3 + 0.03 * np.log(ratio) ** 2).ravel())
    low, high = bootstrap_seed_noise(fit, noise=0.0005).interval("a")
    assert low < fit.law.a < high


def test_seed_noise_matches_repeated_sweeps():
    """The spread of a over 200 sweeps with different seeds agrees with the interval from one of them."""
    slopes = [fit_isoflop(*noisy_grid(0.001, seed)).law.a for seed in range(200)]
    fit = fit_isoflop(*noisy_grid(0.001, 1000))
    assert fit.noise == pytest.approx(0.001, rel=0.4)
    assert bootstrap_seed_noise(fit, noise=0.001).law.a.std() == pytest.approx(np.std(slopes), rel=0.2)
