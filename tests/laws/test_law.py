import copy
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from chinchilla import isoflop_grid
from damage import change

from nanochin.base.cli import UserError
from nanochin.laws import BESIROGLU, HOFFMANN, bootstrap, fit_envelope, fit_isoflop, fit_parametric
from nanochin.laws.law import CONSTANTS, FormError, Law, NotIdentified, PowerLaw, laws_json, laws_text, load_law

META = {"params_convention": "total", "flops_convention": "6nd", "tokenizer": "bytes"}
GRID = [1e18, 1e19, 1e20, 1e21], [0.2, 0.4, 0.7, 1, 1.5, 2.5, 5]  # budgets, sizes over the optimum


def test_known_tokens_per_parameter():
    """Published D/N at five budgets, from the two published sets of constants."""
    budgets = (1e18, 1e19, 1e20, 1e21, 5.76e23)
    for law, ratios in ((HOFFMANN, (18.6, 22.7, 27.8, 33.9, 58.9)), (BESIROGLU, (25.7, 24.2, 22.9, 21.6, 18.4))):
        for C, ratio in zip(budgets, ratios, strict=True):
            N, D = law.optimal(C)
            assert round(D / N, 1) == ratio


def test_known_losses():
    """Chinchilla (70B on 1.4T tokens) against Gopher (280B on 300B), and the published exponents."""
    for law, chinchilla, gopher, a in ((HOFFMANN, 1.921, 1.967, 0.4565), (BESIROGLU, 1.974, 2.000, 0.5126)):
        assert round(law.loss(70e9, 1.4e12), 3) == chinchilla
        assert round(law.loss(280e9, 300e9), 3) == gopher
        assert round(law.a, 4) == a


def test_power_law_by_hand():
    """k C^a with round numbers, and its inverses."""
    law = PowerLaw("by hand", k_N=2.0, a=0.5, k_D=3.0, b=0.25)
    assert law.optimal(1e8) == pytest.approx((2e4, 3e2), rel=1e-12)
    assert (law.params_for(3e2), law.tokens_for(2e4)) == pytest.approx((2e4, 3e2), rel=1e-12)


LAWS = {
    "approach1": None,
    "approach2": {"k_N": 0.1, "a": 0.49, "k_D": 1.7, "b": 0.52, "a_ci": [0.4, 0.6]},
    "approach3": {"E": 1.7, "A": 400.5, "B": 2000.25, "alpha": 0.34, "beta": 0.36, "a": 0.5143},
    "meta": {"params_convention": "with_head", "flops_convention": "causal", "tokenizer": "bytes",
             "reasons": {"approach1": "no training curves were given"}},
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """`write(laws)` -> path of a laws.json."""

    def to_file(laws) -> str:
        path = tmp_path / "laws.json"
        path.write_text(laws if isinstance(laws, str) else json.dumps(laws))
        return str(path)

    return to_file


def changed(key: str, **values) -> dict:
    return LAWS | {key: LAWS[key] | values}


def test_load_law(write):
    """Constants, conventions and meta are read as written; E may be 0."""
    path = write(LAWS)
    law, power = load_law(path), load_law(path, approach=2)
    assert (law.E, law.A, law.B, law.alpha, law.beta) == (1.7, 400.5, 2000.25, 0.34, 0.36)
    assert law.params_convention == "with_head" and law.meta["tokenizer"] == "bytes"
    assert (power.k_N, power.a, power.k_D, power.b) == (0.1, 0.49, 1.7, 0.52)
    assert (power.params_convention, power.flops_convention) == ("with_head", "causal")
    assert load_law(write(changed("approach3", E=0))).E == 0


def test_the_chosen_law_is_loaded(write):
    """Without a number the key law, with gamma, replicates and what the form may get wrong; a bad one is ignored; in
    files without the key Approach 3; null with its reason."""
    error, drawn = {"sd": 0.01, "tested": 3.0, "largest": 1e19}, {name: [1.0, 1.1] for name in (*CONSTANTS, "gamma")}
    fit = LAWS["approach3"] | {"gamma": 0.3, "form": "free gamma", "replicates": drawn, "noise": 0.002}
    law = load_law(write(LAWS | {"law": fit | {"form_error": error}}))
    assert law.gamma == 0.3 and law.name.endswith("free gamma") and law.form_error == FormError(**error)
    assert law.replicates.gamma.tolist() == [1.0, 1.1] and law.forecast(1e8, 1e9)
    assert load_law(write(LAWS | {"law": fit}), 3).gamma == 1
    assert load_law(write(LAWS | {"law": fit | {"form_error": error | {"tested": 1.0}}})).form_error is None
    reasons = LAWS["meta"] | {"reasons": {"law": "no form fits"}}
    with pytest.raises(UserError, match="has no law .no form fits"):
        load_law(write(LAWS | {"law": None, "meta": reasons}))


@pytest.mark.parametrize(
    "laws, approach, says",
    [
        (None, 3, "No such file"),
        ("not json", 3, "laws.json of fit.py"),
        ("[1, 2]", 3, "laws.json of fit.py"),
        ({"approach3": {}}, 3, "needs the keys approach3 and meta"),
        (LAWS | {"meta": {}}, 1, "no approach 1"),
        (changed("approach3", A=math.nan), 3, "needs A"),
        (changed("approach3", alpha=0), 3, "needs alpha"),
        (changed("approach3", E="1.7"), 3, "needs E"),
        (changed("approach3", alpha=1e-4), 3, "too extreme"),
        (changed("approach2", k_D=None), 2, "needs k_D"),
        (changed("meta", params_convention="active"), 3, "needs params_convention"),
        (changed("meta", flops_convention=None), 2, "needs flops_convention"),
    ],
)
def test_bad_laws_are_named(write, laws, approach, says):
    """One line names the file and the error."""
    path = write(laws) if laws else "none.json"
    with pytest.raises(UserError, match=f"^`law` {path}: .*{says}.*$"):
        load_law(path, approach)


def test_numbers_that_are_not_finite():
    """JSON has none: null, at any depth."""
    found = json.loads(laws_text({"ends": [1.0, math.inf], "deep": [{"ci": (np.float64("nan"), 2)}], "n": 3}))
    assert found == {"ends": [1.0, None], "deep": [{"ci": [None, 2]}], "n": 3}


def test_damaged_laws(write):
    """Values of other types, missing and unknown keys: one line that names the file, or a law that plans and has a
    forecast of numbers or none."""
    drawn = {name: [1.0, 1.1, 1.2] for name in (*CONSTANTS, "gamma")}
    error = {"sd": 0.01, "tested": 3.0, "largest": 1e19}
    fit = LAWS["approach3"] | {"gamma": 0.3, "replicates": drawn, "noise": 0.002, "form_error": error}
    laws = LAWS | {"law": fit | {"cost": {"c": 18.6, "q": 0.35, "s": 1, "misfit": 0.05}}}
    for seed in range(300):
        draw = random.Random(seed)
        path = write(change(copy.deepcopy(laws), draw, draw.choice(("type", "remove", "add"))))
        try:
            law = load_law(path, draw.choice((None, 2, 3)))
        except UserError as problem:
            assert path in str(problem) and "\n" not in str(problem)
        else:
            assert all(math.isfinite(value) for value in law.optimal(1e18))
            interval = law.forecast(1e8, 1e9) if isinstance(law, Law) else None
            assert interval is None or all(map(math.isfinite, interval))


def test_laws_json_round_trip(write):
    """All three approaches through the file: bit-identical optima, the documented keys."""
    rows = isoflop_grid(BESIROGLU, *GRID)
    n = np.repeat(1e7 * 2 ** (np.arange(12) / 2), 30)
    d = n * np.tile(1.3 ** np.arange(30), 12)
    curves = np.repeat(np.arange(12), 30), n, d, BESIROGLU.loss(n, d)
    fits = fit_envelope(*curves), fit_isoflop(*rows), fit_parametric(*rows)
    text = laws_text(laws_json(*(fit.to_json(bootstrap(fit, replicates=50)) for fit in fits), META))
    for approach, fit in enumerate(fits, 1):
        law = load_law(write(text), approach)
        assert law.optimal(3e19) == fit.law.optimal(3e19)
    assert law.noise == fit.noise and law.replicates.E == pytest.approx(np.full(50, BESIROGLU.E))
    laws = json.loads(text)
    assert set(laws) == {"approach1", "approach2", "approach3", "meta"} and laws["meta"] == META | {"reasons": {}}
    for key in ("approach1", "approach2"):
        assert {"a", "b", "k_N", "k_D", "a_ci", "b_ci"} <= set(laws[key])
    budget = laws["approach2"]["budgets"][0]
    assert {"flops", "params_opt", "tokens_opt", "loss_opt", "bracketed", "n_runs"} <= set(budget)
    assert (budget["bracketed"], budget["n_runs"]) == (True, 7)
    third, constants = laws["approach3"], {"E", "A", "B", "alpha", "beta", "a", "b", "G"}
    assert constants | {"delta", "objective", "n", "ci", "starts_agreeing"} <= set(third)
    assert set(third["ci"]) == constants


def test_forecast():
    """By hand: identical replicates leave the scatter of single runs, 1.96 standard deviations either way; without
    scatter only the percentiles of the replicates remain; a law without replicates gives None."""
    law = Law("made up", 1.0, 400.0, 900.0, 0.33, 0.37)
    loss = law.loss(1e6, 2e7)
    boot = replace(law, replicates=replace(law, E=np.ones(50)), noise=0.01)
    assert boot.forecast(1e6, 2e7) == pytest.approx((loss * np.exp(-0.0196), loss * np.exp(0.0196)), rel=1e-3)
    spread = replace(law, replicates=replace(law, E=np.linspace(0, 2, 1001)), noise=0.0)
    assert spread.forecast(1e6, 2e7) == pytest.approx((loss - 0.95, loss + 0.95), rel=1e-3)
    assert law.forecast(1e6, 2e7) is None
    C = law.cost.flops(1e6, 2e7)
    wider = replace(boot, form_error=FormError(0.02, 10.0, C / 100))  # 4% at 100 times the largest C
    both = 1.96 * math.hypot(0.01, 0.04)
    assert wider.forecast(1e6, 2e7) == pytest.approx((loss * np.exp(-both), loss * np.exp(both)), rel=3e-3)
    within = replace(boot, form_error=FormError(0.02, 10.0, 10 * C))
    assert within.forecast(1e6, 2e7) == boot.forecast(1e6, 2e7)


def test_forecast_has_its_nominal_coverage(tmp_path):
    """In 60 noisy sweeps, fitted and written to laws.json, intervals at five times the largest budget contain the run
    about 57 times."""
    rng, inside = np.random.default_rng(0), 0
    N, D, exact = isoflop_grid(BESIROGLU, *GRID)
    n, d = BESIROGLU.optimal(5e21)
    for _ in range(60):
        noisy = np.array(exact) * np.exp(0.003 * rng.standard_normal(len(exact)))
        fit = fit_parametric(N, D, noisy, delta=math.inf)
        laws = laws_json(None, None, fit.to_json(bootstrap(fit, replicates=100, verify=0)), META)
        (tmp_path / "laws.json").write_text(laws_text(laws))
        law = load_law(tmp_path / "laws.json")
        assert law.noise == pytest.approx(0.003, rel=0.5)
        reached = BESIROGLU.loss(n, d) * np.exp(0.003 * rng.standard_normal())
        low, high = law.forecast(n, d)
        inside += low < reached < high
    assert 50 <= inside < 60


def test_what_is_not_identified_is_null_with_its_reason(write):
    """One budget: approaches 2 and 3 raise, and load_law repeats their reasons."""
    refused = [NotIdentified("no training curves")]
    for fit in (fit_isoflop, fit_parametric):
        with pytest.raises(NotIdentified) as error:
            fit(*isoflop_grid(BESIROGLU, GRID[0][:1], GRID[1]))
        refused.append(error.value)
    laws = laws_json(*refused, {"params_convention": "total"})
    for approach, says in ((1, "no training curves"), (2, "2 budgets"), (3, "one budget")):
        assert laws[f"approach{approach}"] is None
        with pytest.raises(UserError, match=says):
            load_law(write(laws), approach)
