"""nanochin/sweep/attempts.py: attempts of runs, published once, with processes that stop and wake up."""

import json
import os
from pathlib import Path

import pytest
from filelock import FileLock
from sweep_files import LONG, PLAIN, toml

from nanochin.base.cli import RunError, UserError
from nanochin.base.files import write_json
from nanochin.config import Config
from nanochin.run.folder import open_run, run_identity
from nanochin.sweep.attempts import begin, publish, train_runs
from nanochin.sweep.cells import Cell, plan_cells
from nanochin.sweep.spec import read_sweep
from nanochin.sweep.store import RunStore

FINGERPRINTS = {"data_sha": "text", "val_sha": "other text"}


@pytest.fixture
def cells(tmp_path) -> list[Cell]:
    """A trunk and its four cooldowns."""
    path = tmp_path / "some.toml"
    path.write_text(toml(PLAIN | LONG | {"kind": "trunk", "models": ["16x1"]}))
    return plan_cells(read_sweep(path), 256)


@pytest.fixture
def store(tmp_path, monkeypatch) -> RunStore:
    monkeypatch.setattr(RunStore, "_check_same", lambda *_: None)  # its options are not those of a run
    (tmp_path / "out" / "runs").mkdir(parents=True)
    return RunStore(tmp_path / "out", tmp_path / "results", FINGERPRINTS)


def start(config: Config) -> Path:
    """What train.py writes before the first step and at its first checkpoint."""
    folder = Path(config.out) / config.name
    (folder / "checkpoints" / "step-7").mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"identity": run_identity(config, **FINGERPRINTS)})
    return folder


def finish(config: Config, loss: float = 1.5) -> None:
    """A run of no steps."""
    (start(config) / "summary.json").write_text(json.dumps({"loss": loss}))


def diverge(config: Config) -> None:
    start(config)
    raise RunError("the run diverged")


def test_published(store, cells):
    """Runs end in runs/, one after the other, and no attempt is left; those with an outcome are not trained."""
    trained = []
    train_runs(lambda config: (trained.append(config.name), finish(config)), store, cells[:2])
    train_runs(lambda config: (trained.append(config.name), finish(config)), store, cells[:3])
    assert trained == [cell.name for cell in cells[:3]]
    assert [store.outcome(cell).loss for cell in cells[:3]] == [1.5] * 3
    assert not list((store.folder / "attempts").iterdir())


def test_failed(store, cells):
    """A run that diverges is published with its reason, and the next is trained; a full disk stops all."""
    train_runs(lambda config: (diverge if config.name == cells[0].name else finish)(config), store, cells[:2])
    assert store.outcome(cells[0]).reason == "the run diverged" and store.outcome(cells[1]).loss == 1.5

    def invalid(config: Config) -> None:
        raise UserError("--lr 0: must be above 0")

    with pytest.raises(UserError, match="--lr 0"):
        train_runs(invalid, store, cells[2:])
    assert store.outcome(cells[2]) is None


def test_taken_over(store, cells):
    """The next attempt has the checkpoints of the last, of a failed run to be tried again, and of a run that the local
    launcher has left."""
    cell = cells[0]
    local = start(Config(name=cell.name, out=str(store.folder / "runs")))
    first = begin(store, cell)
    assert (first / cell.name / "checkpoints" / "step-7").exists() and not local.exists()
    second = begin(store, cell)
    assert (second / cell.name / "checkpoints" / "step-7").exists() and not first.exists()
    assert store.attempts(cell.name) == [second] and store.saved_step(cell.name) == 7


@pytest.mark.parametrize("wakes", ["before", "after"])
def test_woken_process(store, cells, wakes):
    """A process that sleeps while another takes its run over changes nothing when it wakes up, before or after the
    other has published, whether its run then ends well or fails."""
    cell = cells[0]
    for how in (finish, diverge):

        def sleeps(config: Config, how=how) -> None:
            start(config)
            other = begin(store, cell)
            if wakes == "after":
                finish(Config(name=cell.name, out=str(other)), loss=2.5)
                publish(store, cell.name, other)
            Path(config.out, config.name).mkdir(parents=True, exist_ok=True)  # as saving a checkpoint does
            how(config)

        with pytest.raises(RunError, match="another process has taken over"):
            train_runs(sleeps, store, [cell])
        if wakes == "after":
            assert store.outcome(cell).loss == 2.5
            os.rename(store.run_folder(cell.name), store.folder / f"published-{how.__name__}")
        else:
            assert store.outcome(cell) is None and len(store.attempts(cell.name)) == 1
            finish(Config(name=cell.name, out=str(store.attempts(cell.name)[0])), loss=2.5)


def test_publish_once(store, cells):
    """A second folder for the same run is refused, and stays."""
    first, second = (store.folder / "attempts" / "x" / name for name in ("1", "2"))
    for out, loss in ((first, 1.5), (second, 2.5)):
        finish(Config(name=cells[0].name, out=str(out)), loss)
    os.rename(first / cells[0].name, store.run_folder(cells[0].name))
    with pytest.raises(RunError, match="not empty"):
        publish(store, cells[0].name, second)
    assert json.loads((store.run_folder(cells[0].name) / "summary.json").read_text())["loss"] == 1.5


def test_cooldown_finds_its_trunk(store, cells):
    """In the folder of an attempt, the name of the trunk leads to the published one."""
    trunk, cooldown = cells[:2]
    train_runs(finish, store, [trunk])
    assert (begin(store, cooldown) / trunk.name / "checkpoints" / "step-7").exists()


def test_no_lock_in_an_attempt(store, cells):
    """train.py opens a run in an attempt's folder without a lock."""
    config = Config(name=cells[0].name, out=str(begin(store, cells[0])))
    folder = start(config)
    record = {"identity": run_identity(config, **FINGERPRINTS)}
    with FileLock(folder / ".lock"), open_run(config.out, config.name, record):
        pass
