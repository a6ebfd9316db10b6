"""nanochin/sweep/cells.py: sweep files and their cells, against counts by hand."""

import math
from collections import Counter

import pytest
from conftest import ROOT
from sweep_files import LONG, PLAIN, toml

from nanochin.base.cli import UserError
from nanochin.config import make_shape
from nanochin.plan.flops import count_flops, count_params
from nanochin.sweep.cells import Cell, extend_budgets, open_side, plan_cells
from nanochin.sweep.spec import Sweep, read_sweep


@pytest.fixture
def read(tmp_path):
    """`read(kind="trunk", ...)`: the sweep of a file with PLAIN and these keys; None leaves a key out."""

    def read(**keys) -> Sweep:
        path = tmp_path / "some.toml"
        path.write_text(toml({key: v for key, v in (PLAIN | keys).items() if v is not None}))
        return read_sweep(path)

    return read


def cells(sweep: Sweep, **more) -> list[Cell]:
    return plan_cells(sweep, 256, **more)


# ---------------------------------------------------------------------------------------------------------------------
# The file


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"budgetz": [1e9]}, "unknown key budgetz; did you mean budgets?"),
        ({"weight_decai": 0.1}, "unknown key weight_decai; did you mean weight_decay?"),
        ({"name": "x"}, "name: set by the sweep itself"),
        ({"seed": 1}, "seed: use seeds in a sweep file"),
        ({"kind": None}, "kind: missing"),
        ({"seq_len": None}, "seq_len: missing"),
        ({"budgets": None}, "budgets: missing"),
        ({"budgets": []}, "budgets: expected a value or a list of values"),
        ({"budgets": [1e11, 1e10]}, "budgets: must be ascending"),
        ({"seeds": [1, 1]}, "seeds: duplicate value"),
        ({"centre_seeds": [0]}, "centre_seeds: must not repeat values of seeds"),
        ({"centre": [1e4]}, "centre: one number for each of budgets"),
        ({"extend": [True]}, "extend: expected one value, not a list"),
        ({"tokenizer": ["bytes", "bpe"]}, "tokenizer: expected one value, not a list"),
        ({"seq_len": [32, 64]}, "seq_len: expected one value, not a list"),
        ({"paired": True}, "paired: only for kind grid, but this sweep is isoflop"),
        ({"kind": "trunk", "extend": True}, "extend: only for kind isoflop, but this sweep is trunk"),
        ({"span": 16}, "span: only for kind horizons or trunk"),
        ({"kind": "horizons", "budgets": [1e11]}, "budgets: needs two or more"),
        ({"batch-tokens": 64, "batch_tokens": 64}, "batch-tokens: given twice"),
        ({"kind": "grid"}, "models: missing"),
        ({"kind": "grid", "models": ["16x1"], "paired": True}, "paired: needs as many models as budgets"),
        # Plans that train.py would reject.
        ({"models": ["16by1"]}, "`model` 16by1"),
        ({"models": ["13x1"]}, "width 13"),
        ({"batch_tokens": 50}, "`batch_tokens` 50"),
        ({"warmup_times": [1000]}, "`warmup_tokens`"),
        ({"kind": "trunk", "cooldown": 1}, "too few for warm-up"),
        ({"budgets": [1e4]}, "too small"),
    ],
)
def test_invalid_sweeps(read, keys, words):
    """An invalid sweep is rejected before any training, in one line that names the file once and the key."""
    with pytest.raises(UserError) as error:
        cells(read(**keys))
    message = str(error.value)
    assert words in message and message.count("some.toml") == 1 and "\n" not in message


def test_names_are_folders(read):
    """A path among the varied values makes no subfolder of the folder of runs."""
    laws = [str(ROOT / "results" / name / "laws.json") for name in ("mini", "books")]
    assert all("/" not in cell.name for cell in cells(read(law=laws)))


@pytest.mark.parametrize("keys, words", [({"kind": "isoflops"}, "isoflops"), ({"lr": [0.1, -1]}, "must be above 0"),
                                         ({"sizes": 2.5}, "is not an integer")])  # fmt: skip
def test_errors_of_the_parser(read, capsys, keys, words):
    """Types, choices and bounds are those of the command line, and the error names the file."""
    with pytest.raises(SystemExit) as exit:
        read(**keys)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and words in err and "some.toml" in err and err.count("\n") == 1


@pytest.mark.parametrize("text, words", [("kind = ", "not TOML"), (None, "No such file")])
def test_unreadable(tmp_path, text, words):
    """A file that is missing or not TOML."""
    if text is not None:
        (tmp_path / "x.toml").write_text(text)
    with pytest.raises(UserError, match=f"x.toml: {words}"):
        read_sweep(tmp_path / "x.toml")


def test_overrides(read):
    """Data options on the command line override the file's."""
    sweep = read(data=None)
    assert sweep.base.data is None
    assert read_sweep(sweep.path, data=("a", "b"), val=None).base.data == ("a", "b")


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.toml")), ids=lambda path: path.stem)
def test_named_sweeps(path):
    """Every sweep in sweeps/ can be planned and says what its hours assume; cells of one budget differ in size."""
    sweep = read_sweep(path)
    found = cells(sweep, corpus_tokens=sweep.spec.corpus_tokens) if sweep.base.tokenizer == "bytes" else []
    assert (sweep.spec.throughput is None) == (sweep.spec.assumes is None)
    if sweep.spec.kind == "isoflop" and found:
        for budget in sweep.spec.budgets:
            assert len({c.plan.shape for c in found if c.budget == budget}) >= 4 - (path.stem == "smoke")


# ---------------------------------------------------------------------------------------------------------------------
# isoflop


def test_isoflop(read):
    """Every cell spends its budget within half a step; the sizes of a budget are ascending and reach from the centre /
    spread to the centre x spread."""
    sweep = read(centre=[5e3, 2e4], spread=3)
    found = cells(sweep)
    assert Counter(cell.budget for cell in found) == {1e10: 5, 1e11: 5}
    for cell in found:
        shape = make_shape(cell.plan.shape.width, cell.plan.shape.layers, vocab_size=256, seq_len=64)
        spent = count_flops(shape, cell.config.tokens)["physical"]
        assert abs(spent / cell.budget - 1) <= 0.5 / cell.plan.steps
        assert cell.spent == spent and cell.config.tokens == cell.plan.steps * cell.config.batch_tokens
    for budget, centre in ((1e10, 5e3), (1e11, 2e4)):
        sizes = [cell.plan.params.total for cell in found if cell.budget == budget]
        assert sizes == sorted(sizes)
        assert 1 / 1.3 < sizes[0] / (centre / 3) < 1.3 and 1 / 1.3 < sizes[-1] / (centre * 3) < 1.3


def test_seeds(read):
    """Every cell has every seed, the one closest to the centre also `centre_seeds`; names and digests differ."""
    found = cells(read(centre=[5e3, 2e4], seeds=[3, 4], centre_seeds=[7]))
    assert Counter(cell.config.seed for cell in found) == {3: 10, 4: 10, 7: 2}
    for cell in found:
        if cell.config.seed == 7:
            centre = {1e10: 5e3, 1e11: 2e4}[cell.budget]
            others = [c.plan.params.total for c in found if c.budget == cell.budget]
            nearest = min(others, key=lambda N: abs(math.log(N / centre)))
            assert cell.plan.params.total == nearest
    assert len({cell.name for cell in found}) == len({cell.digest("a", "b") for cell in found}) == len(found)


def test_digest(read):
    """The hash of a cell depends on the options that change the run and on its text, and on nothing else."""
    (first, *_), (same, *_), (other, *_) = (cells(read(**keys)) for keys in ({}, {"save_every": 1}, {"beta1": 0.8}))
    assert first.digest("a", "b") == same.digest("a", "b") != other.digest("a", "b") != first.digest("a", "c")


def test_max_epochs(read):
    """A cell that would repeat its text too often is rejected by name."""
    sweep = read(max_epochs=1)
    longest = max(cell.config.tokens for cell in cells(sweep))
    assert cells(sweep, corpus_tokens=longest)
    with pytest.raises(UserError, match="would train for 2 epochs, max_epochs is 1"):
        cells(sweep, corpus_tokens=longest / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Lists of options


def test_product(read):
    """Two lists give every pair, in the options and in the name."""
    found = cells(read(kind="grid", models=["16x1"], budgets=[1e10], lr=[0.01, 0.02], beta2=[0.9, 0.95, 0.99]))
    assert Counter((c.config.lr, c.config.beta2) for c in found) == {(lr, b): 1 for lr in (0.01, 0.02)
                                                                   for b in (0.9, 0.95, 0.99)}  # fmt: skip
    assert found[0].name == "1e10-16x1-lr=0.01-beta2=0.9-s0"


def test_one_at_a_time(read):
    """With vary = "one" each list is varied with the others at their first value."""
    found = cells(read(kind="grid", models=["16x1"], budgets=[1e11], vary="one", lr_times=[1.0, 0.5, 2.0],
                       batch_times=[1.0, 0.5], warmup_times=[1.0, 0.0]))  # fmt: skip
    base = found[0]
    assert base.config.lr == pytest.approx(0.011 * math.sqrt(base.config.batch_tokens) / 16, rel=1e-12)
    ratio = [(c.config.lr / base.config.lr, round(c.config.batch_tokens / base.config.batch_tokens, 1),
              round(c.config.warmup_tokens / base.config.warmup_tokens, 1)) for c in found]  # fmt: skip
    assert ratio == [(1, 1, 1), (0.5, 1, 1), (2, 1, 1), (1, 0.5, 1), (1, 1, 0)]


def test_paired(read):
    """If paired, the i-th model goes only with the i-th budget."""
    keys = {"kind": "grid", "models": ["16x1", "24x2"], "budgets": [1e10, 1e11]}
    assert [(c.config.model, c.budget) for c in cells(read(**keys, paired=True))] == [("16x1", 1e10), ("24x2", 1e11)]
    assert len(cells(read(**keys))) == 4


# ---------------------------------------------------------------------------------------------------------------------
# horizons and trunk


def test_horizons(read):
    """Each size has four lengths, evenly spaced in log over 16x, the longest within the largest budget; each has a
    cosine of its length."""
    found = cells(read(kind="horizons", **LONG))
    assert len(found) == 12
    for model in LONG["models"]:
        lengths = [c.config.tokens for c in found if c.config.model == model]
        steps = [b / a for a, b in zip(lengths, lengths[1:], strict=False)]
        assert lengths[-1] / lengths[0] == pytest.approx(16, rel=0.02)
        assert steps == pytest.approx([16 ** (1 / 3)] * 3, rel=0.02)
        assert max(c.plan.flops["physical"] for c in found if c.config.model == model) < 1.005e11
    assert {c.config.schedule for c in found} == {"cosine"} and {c.config.cycle for c in found} == {1.0}


def test_reach(read):
    """The longest run of a size that is optimal for 1e10 costs reach x 1e10."""
    N = count_params(make_shape(16, 1, vocab_size=256, seq_len=64)).total
    keys = LONG | {"models": ["16x1"], "centre": [N, 4 * N]}
    assert cells(read(kind="horizons", **keys, reach=2))[-1].plan.flops["physical"] == pytest.approx(2e10, rel=0.01)


def test_trunk(read):
    """One constant-rate trunk per size, which ends where its last cooldown starts. A cooldown branches where the wsd
    rate starts to fall, has the trunk's batch, rate and warm-up, and counts as spent only from there."""
    found = cells(read(kind="trunk", **LONG, cooldown=0.25))
    assert [c.is_trunk for c in found] == [True, False, False, False, False] * 3
    for trunk, *cooldowns in (found[i : i + 5] for i in range(0, 15, 5)):
        assert trunk.config.schedule == "constant" and {c.config.schedule for c in cooldowns} == {"wsd"}
        assert trunk.config.save_steps == tuple(c.step for c in cooldowns)
        assert trunk.plan.steps == cooldowns[-1].step
        for c in cooldowns:
            assert c.trunk == trunk.name and c.config.branch_from == f"{trunk.name}@{c.step}"
            assert c.step == math.floor(0.75 * c.plan.steps)
            assert c.spent == pytest.approx(c.plan.flops["physical"] * (1 - c.step / c.plan.steps))
            for key in ("batch_tokens", "lr", "warmup_tokens", "beta2", "seed", "model"):
                assert getattr(c.config, key) == getattr(trunk.config, key)
    from_scratch = sum(c.plan.flops["physical"] for c in found if not c.is_trunk)
    relative = [16 ** (-i / 3) for i in range(4)]  # lengths / longest
    saved = (0.75 + 0.25 * sum(relative)) / sum(relative)
    assert sum(c.spent for c in found) == pytest.approx(saved * from_scratch, rel=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# extend


def bowl(found: list[Cell], centre: float) -> dict[str, float]:
    """Losses with their minimum at `centre`, for any budget."""
    return {c.name: 2 + math.log(c.plan.params.total / centre) ** 2 for c in found}


@pytest.mark.parametrize("side, centre", [(1, 1e5), (-1, 3e3)])
def test_extend(read, side, centre):
    """If the lowest loss is at an edge, one size beyond it is added, then another, until the minimum is inside; the
    same losses give the same sizes."""
    sweep = read(centre=[2e4], budgets=[1e11], sizes=3, spread=2, extend=True, extend_limit=6)
    found, rounds = cells(sweep), 0
    while more := extend_budgets(sweep, found, bowl(found, centre), 256):
        assert [c.name for c in extend_budgets(sweep, found, bowl(found, centre), 256)] == [c.name for c in more]
        sizes = [math.log(c.plan.params.total) for c in found]
        assert len(more) == 1 and side * math.log(more[0].plan.params.total) > max(side * s for s in sizes)
        found, rounds = found + more, rounds + 1
    assert 0 < rounds <= 6 and open_side(found, bowl(found, centre)) == 0


def test_extend_waits_and_stops(read):
    """No size is added before all runs of the budget have ended, beyond the limit, without `extend`, or if the minimum
    is inside; a failed run counts as tried."""
    keys = {"centre": [1e4], "budgets": [1e11], "sizes": 3, "spread": 2}
    sweep = read(**keys, extend=True, extend_limit=1)
    found = cells(sweep)
    losses = bowl(found, 1e6)
    assert not extend_budgets(sweep, found, dict(list(losses.items())[1:]), 256)
    assert not extend_budgets(read(**keys), found, losses, 256)
    assert not extend_budgets(sweep, found, bowl(found, 1e4), 256)
    more = extend_budgets(sweep, found, losses, 256)
    assert len(more) == 1
    assert not extend_budgets(sweep, found + more, losses | {more[0].name: None}, 256)
    assert not extend_budgets(sweep, found + more, bowl(found + more, 1e6), 256)


def test_open_side_takes_the_mean_over_seeds(read):
    """A lucky seed at an edge does not make its size the best."""
    found = [c for c in cells(read(centre=[5e3, 2e4], sizes=3, seeds=[0, 1])) if c.budget == 1e10]
    losses = dict(zip([c.name for c in found], [2.0, 3.0, 2.2, 2.2, 2.6, 2.6], strict=True))
    assert open_side(found, losses) == 0
    assert open_side(found, losses | {found[1].name: 2.1}) == -1
