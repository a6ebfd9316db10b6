"""nanochin/sweep/cells.py: sweep files and their cells, against counts by hand."""

import itertools
import math
from collections import Counter

import pytest
from conftest import ROOT
from sweep_files import LONG, PLAIN, toml

from nanochin.base.cli import UserError
from nanochin.plan.flops import count_flops
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


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"budgetz": [1e9]}, "unknown key budgetz; did you mean budgets?"),
        ({"name": "x"}, "name: set by the sweep"),
        ({"seed": 1}, "seed: use seeds"),
        ({"kind": None}, 'kind = "isoflop"'),
        ({"seq_len": None}, "seq_len = 256"),
        ({"budgets": None}, "budgets = [1e11, 1e12]"),
        ({"budgets": []}, "budgets: expected"),
        ({"budgets": [1e11, 1e10]}, "budgets: must be ascending"),
        ({"seeds": [1, 1]}, "seeds: duplicate"),
        ({"centre_seeds": [0]}, "centre_seeds: "),
        ({"centre": [1e4]}, "centre: one number"),
        ({"seq_len": [32, 64]}, "seq_len: expected one value"),
        ({"span": 16}, "span: only for kind horizons or trunk"),
        ({"kind": "horizons", "budgets": [1e11]}, "budgets: needs two"),
        ({"batch-tokens": 64, "batch_tokens": 64}, "batch-tokens: given twice"),
        ({"kind": "grid"}, 'models = ["16x2", "48x2"]'),
        ({"kind": "grid", "models": ["16x1"], "paired": True}, "paired: needs"),
        ({"kind": "trunk", "schedule": "constant"}, "schedule: leave it out"),
        ({"kind": "isoflops"}, "isoflops"),
        ({"lr": [0.1, -1]}, "must be above 0"),
        # Plans that train.py would reject.
        ({"models": ["16by1"]}, "`model` 16by1"),
        ({"kind": "trunk", "cooldown": 1}, "too few for warm-up"),
    ],
)
def test_invalid_sweeps(read, capsys, keys, words):
    """An invalid sweep is rejected before any training, in one line that names the file once and the key."""
    with pytest.raises((UserError, SystemExit)) as error:
        cells(read(**keys))
    message = str(error.value) if error.type is UserError else capsys.readouterr().err.strip()
    assert words in message and message.count("some.toml") == 1 and "\n" not in message


@pytest.mark.parametrize("content", ["kind = ", None])
def test_unreadable(tmp_path, content):
    """A file that is not TOML, or missing."""
    if content is not None:
        (tmp_path / "x.toml").write_text(content)
    with pytest.raises(UserError, match="x.toml: "):
        read_sweep(tmp_path / "x.toml")


def test_names_are_folders(read):
    """A path among the varied values makes no subfolder of the folder of runs."""
    laws = [str(ROOT / "results" / name / "laws.json") for name in ("mini", "books")]
    assert all("/" not in cell.name for cell in cells(read(law=laws)))


def test_overrides(read):
    """Data options on the command line override the file's."""
    sweep = read(data=None)
    assert sweep.base.data is None
    assert read_sweep(sweep.path, data=("a", "b"), val=None).base.data == ("a", "b")


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.toml")), ids=lambda path: path.stem)
def test_named_sweeps(path):
    """Every sweep in sweeps/ can be planned and says what its hours assume."""
    sweep = read_sweep(path)
    assert cells(sweep, corpus_tokens=sweep.spec.corpus_tokens)
    assert (sweep.spec.throughput is None) == (sweep.spec.assumes is None)


def test_isoflop(read):
    """Every cell spends its budget within half a step; the sizes of a budget are ascending and reach from the centre /
    spread to the centre x spread."""
    sweep = read(centre=[5e3, 2e4], spread=3)
    found = cells(sweep)
    assert Counter(cell.budget for cell in found) == {1e10: 5, 1e11: 5}
    for cell in found:
        spent = count_flops(cell.plan.shape, cell.config.tokens)["physical"]
        assert abs(spent / cell.budget - 1) <= 0.5 / cell.plan.steps
        assert cell.spent == spent and cell.config.tokens == cell.plan.steps * cell.config.batch_tokens
    for budget, centre in ((1e10, 5e3), (1e11, 2e4)):
        sizes = [cell.plan.params.total for cell in found if cell.budget == budget]
        assert sizes == sorted(sizes)
        assert 1 / 1.3 < sizes[0] / (centre / 3) < 1.3 and 1 / 1.3 < sizes[-1] / (centre * 3) < 1.3


def test_seeds(read):
    """Every cell has every seed, the one closest to the centre also `centre_seeds`; names and digests differ."""
    centres = {1e10: 5e3, 1e11: 2e4}
    found = cells(read(centre=list(centres.values()), seeds=[3, 4], centre_seeds=[7]))
    assert Counter(cell.config.seed for cell in found) == {3: 10, 4: 10, 7: 2}
    for special in (cell for cell in found if cell.config.seed == 7):
        sizes = [cell.plan.params.total for cell in found if cell.budget == special.budget]
        assert special.plan.params.total == min(sizes, key=lambda N: abs(math.log(N / centres[special.budget])))
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


def test_product(read):
    """Two lists give every pair, in the options and in the name."""
    found = cells(read(kind="grid", models=["16x1"], budgets=[1e10], lr=[0.01, 0.02], beta2=[0.9, 0.95, 0.99]))
    assert [(c.config.lr, c.config.beta2) for c in found] == list(itertools.product([0.01, 0.02], [0.9, 0.95, 0.99]))
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
    N = found[0].plan.params.total  # the longest run of a size that is optimal for 1e10 costs reach x 1e10
    longest = cells(read(kind="horizons", **LONG | {"centre": [N, 4 * N], "models": ["16x1"]}, reach=2))[-1]
    assert longest.plan.flops["physical"] == pytest.approx(2e10, rel=0.01)


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
