"""nanochin/sweep/store.py: outcomes from the folders of runs, the order of runs, and the replies of workers."""

import dataclasses
import json
import shutil
from operator import attrgetter

import pytest
from sweep_files import LONG, PLAIN, toml

from nanochin.base.cli import UserError
from nanochin.base.files import write_json
from nanochin.config import Config
from nanochin.run.curves import CURVES, to_csv_gz
from nanochin.runrow import RunRow
from nanochin.sweep.cells import Cell, plan_cells
from nanochin.sweep.pool import Reply
from nanochin.sweep.spec import read_sweep
from nanochin.sweep.store import BUSY_SECONDS, DEATHS, Outcome, Queue, RunStore

FINGERPRINTS = {"data_sha": "text", "val_sha": "other text"}


spent = attrgetter("spent")


@pytest.fixture
def cells(tmp_path) -> list[Cell]:
    """Trunks of three sizes, with four cooldowns each."""
    path = tmp_path / "some.toml"
    path.write_text(toml(PLAIN | LONG | {"kind": "trunk"}))
    return plan_cells(read_sweep(path), 256)


@pytest.fixture
def store(tmp_path) -> RunStore:
    return RunStore(tmp_path / "out", tmp_path / "results", FINGERPRINTS)


def begun(store: RunStore, cell: Cell, fingerprints: dict = FINGERPRINTS) -> None:
    """The folder of a run that train.py has started."""
    store.run_folder(cell.name).mkdir(parents=True)
    options = {f.name: getattr(cell.config, f.name) for f in dataclasses.fields(Config) if f.metadata["result"]}
    shape = cell.plan.shape
    resolved = {"vocab_size": shape.vocab_size, "head_size": shape.head_size, "ffn": shape.ffn, "dtype": "float32"}
    write_json(store.run_folder(cell.name) / "config.json", {"identity": options | resolved | fingerprints})


def finished(store: RunStore, cell: Cell, fingerprints: dict = FINGERPRINTS) -> None:
    begun(store, cell, fingerprints)
    (store.run_folder(cell.name) / "summary.json").write_text('{"loss": 1.5}')
    for step in cell.config.save_steps:
        store.checkpoint(cell.name, step).mkdir(parents=True)


def test_outcome(store, cells):
    """No outcome before a run has ended, then its summary or its failure. A run of another text or with other options
    is rejected by name and value."""
    waiting, running, done, failed, other = cells[:5]
    begun(store, running)
    finished(store, done)
    store.fail(failed, "it diverged")
    begun(store, other, FINGERPRINTS | {"val_sha": "changed"})
    assert store.outcome(waiting) is None and store.outcome(running) is None
    assert store.outcome(done).loss == 1.5 and store.outcome(failed) == Outcome(reason="it diverged")
    with pytest.raises(UserError, match="val_sha = changed, the sweep now asks for other text"):
        store.outcome(other)
    with pytest.raises(UserError, match=f"{running.name} holds .* beta1 = 0.9, the sweep now asks for 0.8"):
        store.outcome(dataclasses.replace(running, config=dataclasses.replace(running.config, beta1=0.8)))


@pytest.mark.parametrize("name", ["config.json", "summary.json", "failed.json"])
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"identity": 1, "loss": "1.5", "reason": ["x"]}', None])
def test_damaged_records(store, cells, name, content):
    """One line that names the file, also if it is a folder."""
    (finished if name == "summary.json" else begun)(store, cells[0])
    store.fail(cells[0], "it diverged")
    path = store.run_folder(cells[0].name) / name
    path.unlink()
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(UserError) as error:
        Queue(store, cells[:1], retry_failed=content is None)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_kept_rows(store, cells):
    """A kept row of this cell without a loss or with other options is rejected by name. A failed run stays failed if
    its kept row does not count: a failure, or another text."""
    store.results.mkdir()
    store.fail(cells[0], "it diverged")
    path, digest = store.results / "runs.csv", cells[0].digest(**FINGERPRINTS)

    def outcome(row: str) -> Outcome:
        path.write_text(f"run,status,data_sha,val_sha,cell,loss\n{cells[0].name},{row}\n")
        return RunStore(store.folder, store.results, FINGERPRINTS).outcome(cells[0])

    failed = Outcome(reason="it diverged")
    assert outcome(f"failed,text,other text,{digest},") == outcome(f"finished,old,other text,{digest},1") == failed
    assert outcome(f"finished,text,other text,{digest},1").loss == 1
    for row, words in ((f"{digest},", "no loss"), ("another,1", "other options")):
        with pytest.raises(UserError, match=words) as error:
            outcome(f"finished,text,other text,{row}")
        assert str(path) in str(error.value)


def test_unknown_text(store, cells):
    """While the text is not known, runs and kept rows count by their options, whatever their text; kept rows with other
    options may be of another text, and do not count."""
    kept, cell, other = cells[:3]
    finished(store, cell)
    store.results.mkdir()
    rows = [f"{kept.name},finished,x,y,{kept.digest('x', 'y')},1.5", f"{other.name},finished,x,y,another,1"]
    (store.results / "runs.csv").write_text("\n".join(["run,status,data_sha,val_sha,cell,loss", *rows]))
    unknown = RunStore(store.folder, store.results, dict.fromkeys(FINGERPRINTS))
    assert [unknown.outcome(each) and unknown.outcome(each).loss for each in (kept, cell, other)] == [1.5, 1.5, None]
    with pytest.raises(UserError, match="beta1"):
        unknown.outcome(dataclasses.replace(cell, config=dataclasses.replace(cell.config, beta1=0.8)))


def test_curves(store, cells):
    """The log of a run that was trained here, else its kept curve, from a file or from logs. Finished runs come in the
    order of the rows, then their trunks; a run without a curve is empty."""
    trunk, first, second, third, failed = cells[:5]

    def log(folder, loss) -> None:
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text(json.dumps({"step": 1, "loss": loss, "mfu": 0.1}) + "\n")

    log(store.run_folder(first.name), 1.0)
    log(store.run_folder(failed.name), 9.0)
    rows = [RunRow(cell.name, trunk=trunk.name) for cell in (second, first, third)]
    rows += [RunRow(failed.name, status="failed")]
    for cell, loss in ((trunk, 2.0), (first, 3.0), (second, 4.0)):
        log(store.results / "runs" / cell.name, loss)

    def losses() -> list:
        return [[name, *(point["loss"] for point in points)] for name, points in store.curves(rows).items()]

    assert losses() == [[second.name, 4.0], [first.name, 1.0], [third.name], [trunk.name, 2.0]]
    kept = {cell.name: [{"step": 1, "loss": loss}] for cell, loss in ((trunk, 5.0), (first, 6.0), (second, 7.0))}
    (store.results / CURVES).write_bytes(to_csv_gz(kept))
    assert losses() == [[second.name, 7.0], [first.name, 1.0], [third.name], [trunk.name, 5.0]]
    (store.results / CURVES).write_bytes(b"\x1f\x8b")  # damaged, and not needed
    assert store.curves([RunRow(first.name)]) == {first.name: [{"step": 1, "loss": 1.0}]}


def test_trunk_that_lacks_a_checkpoint(store, cells):
    """A finished trunk without the checkpoint of a cooldown (the file asks for other lengths now, or it was deleted) is
    rejected, not waited for; without its folder it is trained again. Checkpoints of finished cooldowns may go."""
    trunk, cooldown = cells[:2]
    finished(store, trunk)
    assert not Queue(store, cells).is_open(trunk)
    shutil.rmtree(store.checkpoint(trunk.name, cooldown.step))
    with pytest.raises(UserError, match=f"no checkpoint of step {cooldown.step}.*delete that folder") as error:
        Queue(store, cells)
    assert str(store.run_folder(trunk.name)) in str(error.value) and cooldown.name in str(error.value)
    shutil.rmtree(store.run_folder(trunk.name))
    assert Queue(store, cells).is_open(trunk)
    for cell in cells[:5]:
        finished(store, cell)
    shutil.rmtree(store.run_folder(trunk.name) / "checkpoints")
    assert len(Queue(store, cells).outcomes) == 5


def test_failed_trunk(store, cells):
    """Cooldowns fail with a trunk that did not reach their checkpoint; the others can be trained."""
    trunk, first, *others = cells[:5]
    store.fail(trunk, "it diverged")
    store.checkpoint(trunk.name, first.step).mkdir(parents=True)
    found = Queue(store, cells[:5])
    assert list(found.outcomes) == [trunk.name, *(cell.name for cell in others)]
    assert all("it diverged" in outcome.reason for outcome in found.outcomes.values())
    assert found.take(spent) == first and found.is_open(first) and not found.done


def test_text_that_changed_meanwhile(store, cells):
    """A run of another text than the sweep started with (a file was changed meanwhile) stops the sweep."""
    found = Queue(store, cells)
    cell = found.take(spent)
    finished(store, cell, FINGERPRINTS | {"data_sha": "changed"})
    with pytest.raises(UserError, match="data_sha = changed"):
        found.put(Reply(cell.name, "finished"))
    assert cell.name not in found.outcomes


def test_workers_that_die(store, cells):
    """A run is retried when its worker dies; at the third death it fails, on disk too."""
    found = Queue(store, cells)
    cell = found.take(spent)
    for _ in range(DEATHS - 1):
        found.put(Reply(cell.name, "died", "signal 9"))
        assert found.take(spent) == cell
    found.put(Reply(cell.name, "died", "exit code 7"))
    failed = Outcome(reason="its worker died 3 times (exit code 7)")
    assert found.outcomes[cell.name] == failed == store.outcome(cell) and found.take(spent) != cell


def test_longest_first(store, cells):
    """The longest run starts first, a cooldown only after its trunk's checkpoint, each once; a run that is busy in
    another process waits, and one that has ended meanwhile does not start."""
    found = Queue(store, cells)
    trunks = sorted((cell for cell in cells if cell.is_trunk), key=spent, reverse=True)
    assert [found.take(spent) for _ in range(4)] == [*trunks, None]
    found.put(Reply(trunks[0].name, "busy"))
    assert found.take(spent) is None and trunks[0].name not in found.running
    found.busy[trunks[0].name] -= BUSY_SECONDS
    assert found.take(spent) == trunks[0]
    finished(store, trunks[0])
    cooldowns = sorted((cell for cell in cells if cell.trunk == trunks[0].name), key=spent, reverse=True)
    finished(store, cooldowns[0])
    assert found.take(spent) == cooldowns[1] and found.outcomes[cooldowns[0].name].loss == 1.5
