import json
import math
import random
from functools import partial

import pytest

from nanochin.base.cli import UserError
from nanochin.config import make_shape
from nanochin.laws import BESIROGLU, HOFFMANN, PowerLaw
from nanochin.plan.flops import count_flops, count_params
from nanochin.plan.ladder import LADDER, isoflop, plan
from nanochin.plan.rules import rule_batch, rule_beta2, rule_lr, rule_warmup

make = partial(make_shape, vocab_size=256, seq_len=128)
# Table A9 of Hoffmann et al. 2022, from 44M to the last below 1.2B parameters.
TABLE_A9 = """512x8 576x9 640x10 640x13 640x16 768x12 768x15 768x18 896x14 896x16 896x18 1024x16 1024x18 1024x20 1280x18
1280x21 1408x18 1280x24 1408x21 1536x19 1408x24 1536x22 1536x25 1792x20 1792x23 1792x26"""


@pytest.mark.parametrize("vocab_size", [256, 1024, 4096, 32_000, 50_304, 151_936])
def test_steps_of_the_ladder(vocab_size):
    """Neighbours differ by at most 1.5x in with_head, 12 L C^2 + V C, for any vocabulary."""
    sizes = sorted(12 * layers * width**2 + vocab_size * width for width, layers in LADDER)
    assert max(after / before for before, after in zip(sizes, sizes[1:], strict=False)) <= 1.5


def test_ends_of_the_ladder():
    """From about 2 thousand parameters with bytes to about a billion, with the paper's shapes and no duplicates."""
    smallest, largest = (count_params(make(*LADDER[i])).with_head for i in (0, -1))
    assert 1_800 < smallest < 2_200 and 0.9e9 < largest < 1.1e9
    assert {tuple(map(int, shape.split("x"))) for shape in TABLE_A9.split()} <= set(LADDER)
    assert len(set(LADDER)) == len(LADDER)


def test_head_sizes_of_the_ladder():
    """Two heads at width 8 and 12 as measured, head size 16 up to width 128, eight heads up to 512, then the paper's
    64. No step of the ladder halves the heads, which would distort the curves. Head size 128: only multiples."""
    measured = {16: 8, 24: 12, 32: 16, 40: 20, 48: 16, 64: 16, 96: 16, 128: 16, 192: 24, 256: 32, 384: 48}
    for width, layers in LADDER:
        size = make(width, layers).head_size
        assert size == measured.get(width, size) and width % size == 0
        assert width < 512 or size == 64
    heads = [make(width, 1).heads for width in sorted({width for width, _ in LADDER if width >= 16})]
    assert all(after > before / 2 for before, after in zip(heads, heads[1:], strict=False))
    shape = plan(partial(make, head_size=128), budget=1e17).shape
    assert shape.head_size == 128 and shape.width % 128 == 0


def test_rules_at_known_points():
    """Batch within 2x of the best in sweeps and within 1.3x of Step Law's 297k and 1.11M where that was fitted;
    learning rate by hand; caps and thresholds."""
    for D, best in ((453e3, 256), (1.45e6, 512), (5.65e6, 1024)):
        assert best / 2 < rule_batch(D) < 2 * best
    for D in (1e10, 1e11):
        assert 1 / 1.3 < rule_batch(D) / (0.58 * D**0.571) < 1.3
    for C, B, N, lr in ((16, 256, 10_320, 0.011), (64, 1024, 164_288, 0.0055), (1280, 229_000, 472e6, 0.00279)):
        assert rule_lr(C, B, N) == pytest.approx(lr, rel=1e-3)
    # By width and batch, as sweeps found it.
    best = {(16, 128): 0.0065, (16, 1024): 0.037, (40, 512): 0.0045, (40, 1920): 0.018, (64, 128): 0.0018,
            (64, 2700): 0.008, (128, 384): 0.002}  # fmt: skip
    for (C, B), lr in best.items():
        assert 1 / 1.7 < rule_lr(C, B, 12 * C * C * 2) / lr < 1.7
    assert rule_warmup(1_000, 1_000_000) == 1_000
    assert rule_warmup(1_000_000, 1_000_000) == 50_000
    assert (rule_beta2(262_144), rule_beta2(262_145)) == (0.99, 0.95)


@pytest.mark.parametrize("convention", ["physical", "causal", "appendix_f", "table_a4", "6nd", "kaplan"])
def test_budgets_are_spent(convention):
    """Over 15 decades: whole steps, at least 100, whole sequences, and within 0.5% of the budget."""
    rng = random.Random(convention)
    for _ in range(12):
        budget = 10 ** rng.uniform(9, 24)
        bound = partial(make_shape, vocab_size=rng.choice((256, 4096, 50_304)), seq_len=rng.choice((16, 100, 256)))
        try:
            p = plan(bound, budget=budget, convention=convention)
        except UserError as error:
            assert "too small for every shape" in str(error)
            continue
        assert p.flops == count_flops(p.shape, p.tokens)
        assert abs(p.flops[convention] / budget - 1) <= 0.005
        assert p.tokens == p.steps * p.batch_tokens and p.steps >= 100 and p.batch_tokens % p.shape.seq_len == 0


@pytest.mark.parametrize("law", [BESIROGLU, HOFFMANN], ids=lambda law: law.name)
@pytest.mark.parametrize("budget", [1e13, 2e16, 7e18])
def test_the_law_chooses(law, budget):
    """The chosen shape has the lowest L(N, D) of the ladder, with N and FLOPs per token computed here."""

    def loss(width: int, layers: int) -> float:
        matrices = 12 * layers * width**2 + 256 * width
        N = matrices + (2 * layers + 1) * width
        D = budget / (6 * matrices + 12 * layers * width * 128)
        return law.E + law.A / N**law.alpha + law.B / D**law.beta

    p = plan(make, budget=budget, law=law)
    assert (p.shape.width, p.shape.layers) == min(LADDER, key=lambda rung: loss(*rung))
    assert p.predicted_loss == pytest.approx(loss(p.shape.width, p.shape.layers), rel=1e-3)
    # The ladder is fine enough to come close to the continuous optimum.
    N, D = p.params.total, p.tokens
    assert p.predicted_loss < law.loss(*law.optimal(6 * N * D)) * 1.005


def test_conventions_of_the_law():
    """A law of non-embedding parameters uses those: with a vocabulary of 50k it chooses another shape."""
    bound = partial(make_shape, vocab_size=50_304, seq_len=128)
    blocks = type(BESIROGLU)("blocks", 1.8, 482.0, 2085.0, 0.35, 0.37, params_convention="non_embedding")
    p = plan(bound, budget=1e17, law=blocks)
    assert p.predicted_loss == pytest.approx(blocks.loss(p.params.non_embedding, p.tokens), rel=1e-12)
    assert p.params.non_embedding > plan(bound, budget=1e17).params.non_embedding


def test_power_laws_choose_in_their_own_conventions():
    """Closest in log N to k_N C^a, with N and C in the law's conventions, whatever the budget's."""
    law = PowerLaw("power", 0.3, 0.5, 0.5, 0.5, params_convention="with_head", flops_convention="kaplan")
    p = plan(make, budget=1e16, law=law, convention="causal")
    off = {}
    for width, layers in LADDER:
        shape = make(width, layers)
        tokens = 1e16 / (count_flops(shape, 128)["causal"] / 128)
        C = 6 * count_params(shape).non_embedding * tokens
        off[width, layers] = abs(math.log((12 * layers * width**2 + 256 * width) / (0.3 * math.sqrt(C))))
    assert (p.shape.width, p.shape.layers) == min(off, key=off.get)
    assert p.predicted_loss is None


def test_any_two_fix_the_third():
    """Budget + model, model + tokens and budget + tokens give the same run."""
    by_budget = plan(make, budget=1e14, model=(128, 4))
    by_tokens = plan(make, model=(128, 4), tokens=by_budget.tokens)
    by_both = plan(make, budget=by_budget.flops["physical"], tokens=by_budget.tokens)
    assert by_budget.shape == by_tokens.shape == by_both.shape == make(128, 4)
    assert by_budget.tokens == by_tokens.tokens == by_both.tokens
    # by hand: 6 (12 x 4 x 128^2 + 256 x 128) + 12 x 4 x 128 x 128 per token
    assert by_budget.tokens == pytest.approx(1e14 / 5_701_632, rel=0.005)
    all_three = plan(make, budget=1.005 * by_budget.flops["physical"], model=(128, 4), tokens=by_budget.tokens)
    assert all_three.tokens == by_budget.tokens


def test_model_or_tokens_alone():
    """The law's optimum: alpha A N^-alpha = beta B D^-beta."""
    law = BESIROGLU
    p = plan(make, model=(256, 4))
    by_hand = (law.beta * law.B / (law.alpha * law.A) * p.params.total**law.alpha) ** (1 / law.beta)
    assert p.tokens == pytest.approx(by_hand, rel=0.005)
    assert plan(make, tokens=p.tokens).shape == p.shape


def test_at_least_100_steps():
    """For any sequence length, the derived batch of the shortest allowed run leaves 100 steps. 99.6 sequences round to
    100 steps, within 0.5%; 99.4 do not."""
    for T in (2, 16, 128, 1024, 8192):
        p = plan(partial(make_shape, vocab_size=256, seq_len=T), model=(8, 1), tokens=100 * T)
        assert (p.batch_tokens, p.steps) == (T, 100)
    assert plan(make, model=(8, 1), tokens=99.6 * 128).steps == 100
    with pytest.raises(UserError, match="fewer than 100 steps"):
        plan(make, model=(8, 1), tokens=99.4 * 128)


def test_given_values_are_kept():
    """Given values are unchanged; each derived value has a reason."""
    p = plan(make, model=(16, 1), tokens=5_000, batch_tokens=1024, lr=0.5, warmup_tokens=0, beta2=0.9)
    assert (p.batch_tokens, p.steps, p.tokens, p.lr, p.warmup_tokens, p.beta2) == (1024, 5, 5120, 0.5, 0, 0.9)
    assert set(p.why) == {"model", "tokens"}
    assert set(plan(make, budget=1e14).why) == {"model", "tokens", "batch_tokens", "lr", "warmup_tokens", "beta2"}


@pytest.mark.parametrize(
    "options, says",
    [
        ({}, "give `budget`, `model` or `tokens`"),
        ({"budget": math.nan}, "`budget` nan"),
        ({"tokens": 1e25}, "`tokens` 1e.25"),
        ({"model": (7, 3)}, "width 7"),
        ({"budget": 1e11, "model": (256, 4)}, "fewer than 100 steps .* it needs `tokens` 12800 .* or `seq_len` 47"),
        ({"budget": 1e15, "model": (256, 4), "tokens": 1e8}, "leave one of the three out"),
        ({"budget": 1e12, "tokens": 1e12}, "on `tokens` 1e.12; the closest, `model` 6x1,"),
        ({"budget": 1e20, "tokens": 1e6}, "on `tokens` 1e.06; the closest, `model` 1792x26,"),
        ({"budget": 1e14, "batch_tokens": 1000}, "`batch_tokens` 1000"),
        ({"model": (64, 2), "tokens": 1e6, "batch_tokens": 2**20}, "less than one step of `batch_tokens` 1048576"),
        ({"budget": 1e14, "lr": 0.0}, "`lr` 0"),
        ({"model": (64, 2), "tokens": 1e6, "warmup_tokens": 2e6}, "`warmup_tokens` 2e.06"),
    ],
)
def test_impossible_plans_are_named(options, says):
    """One line that names the option and its value and, if possible, suggests a value."""
    with pytest.raises(UserError, match=f"^.*{says}.*$"):
        plan(make, **options)


@pytest.mark.parametrize("batch_tokens", [None, 4096])
@pytest.mark.parametrize("model", [None, (256, 4)])
def test_suggested_budgets_suffice(model, batch_tokens):
    """The budget suggested by an error is accepted, and at most a tenth above the minimum."""
    with pytest.raises(UserError) as error:
        plan(make, budget=1e5, model=model, batch_tokens=batch_tokens)
    suggested = float(str(error.value).split("`budget` ")[-1].split()[0].rstrip(")"))
    assert plan(make, budget=suggested, model=model, batch_tokens=batch_tokens).steps >= 1
    with pytest.raises(UserError):
        plan(make, budget=suggested / 1.15, model=model, batch_tokens=batch_tokens)


def test_isoflop_brackets_the_optimum():
    """Seven shapes from a quarter to four times the law's choice, which is in the middle, all at one budget."""
    grid, best = isoflop(make, 1e15), plan(make, budget=1e15)
    sizes = [p.params.total for p in grid]
    assert sizes == sorted(set(sizes)) and len(sizes) == 7
    assert grid[3] == plan(make, budget=1e15, model=(best.shape.width, best.shape.layers))
    assert (4 * sizes[0], sizes[-1] / 4) == pytest.approx((best.params.total, best.params.total), rel=0.25)
    assert all(abs(p.flops["physical"] / 1e15 - 1) <= 0.005 for p in grid)
    assert [p.shape for p in isoflop(make, 1e15, sizes=1)] == [best.shape]


def test_command_prints_the_grid(cli, tmp_path):
    """Three budgets with a law from a file, with epochs of a corpus and hours."""
    constants = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.36}
    meta = {"params_convention": "total", "flops_convention": "physical"}
    (tmp_path / "laws.json").write_text(json.dumps({"approach3": constants, "meta": meta}))
    budgets, law = ("--budget", "1e15", "3e15", "1e16"), f"--law={tmp_path / 'laws.json'}"
    out = cli("ladder", *budgets, law, "--corpus-tokens=1e8", "--throughput=1e13")
    rows = [line.split() for line in out.splitlines() if "x" in line.split(" ")[0]]
    assert len(rows) == 3 * 7 and sum(row[0].endswith("*") for row in rows) == 3
    assert float(rows[0][-1]) == pytest.approx(1e15 / 1e13 / 3600, rel=0.01)
    assert "laws.json, approach 3" in out


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], "--budget: give at least one"),
        (["--budget", "1e3"], "--budget 1000: too small"),
        (["--budget", "1e12", "--law", "nowhere.json"], "--law nowhere.json"),
        (["--budget", "1e12", "--head-size", "3"], "--head-size 3"),
    ],
)
def test_bad_options_are_one_line(cli, argv, says):
    """Exit code 2 and one line that names the option and its value."""
    assert says in cli("ladder", *argv, code=2)
