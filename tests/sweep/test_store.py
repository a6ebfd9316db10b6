"""The run store: what the folders of runs say, which run is next, and what becomes of the answers of workers."""

import dataclasses
import json
import shutil

import pytest
from sweep_files import LONG, PLAIN, toml

from nanochin.base.cli import UserError
from nanochin.config import Config
from nanochin.run.curves import CURVES, to_csv_gz
from nanochin.runrow import RunRow
from nanochin.sweep import cells as grid
from nanochin.sweep import store as schedule
from nanochin.sweep.pool import Answer
from nanochin.sweep.store import Book, End, Schedule

FACTS = {"data_sha": "text", "val_sha": "other text"}


@pytest.fixture
def cells(tmp_path) -> list[grid.Cell]:
    """Trunks of three sizes, with four cooldowns each."""
    path = tmp_path / "some.toml"
    path.write_text(toml(PLAIN | LONG | {"kind": "trunk"}))
    return grid.plan_cells(grid.read_sweep(path), 256)


@pytest.fixture
def book(tmp_path) -> Book:
    return Book(tmp_path / "out", tmp_path / "results", FACTS)


def begun(book: Book, cell: grid.Cell, facts: dict = FACTS) -> None:
    """The folder of a run as train.py leaves it when it begins."""
    book.of(cell).mkdir(parents=True)
    options = {f.name: getattr(cell.config, f.name) for f in dataclasses.fields(Config) if f.metadata["result"]}
    shape = cell.plan.shape
    resolved = {"vocab_size": shape.vocab_size, "head_size": shape.head_size, "ffn": shape.ffn, "dtype": "float32"}
    (book.of(cell) / "config.json").write_text(json.dumps({"identity": options | resolved | facts}))


def finished(book: Book, cell: grid.Cell, facts: dict = FACTS) -> None:
    begun(book, cell, facts)
    (book.of(cell) / "summary.json").write_text('{"loss": 1.5}')
    for step in cell.config.save_steps:
        book.checkpoint(cell.name, step).mkdir(parents=True)


def scheduled(book: Book, cells: list[grid.Cell]) -> Schedule:
    found = Schedule(book)
    found.add(cells)
    return found


def spent(cell: grid.Cell) -> float:
    return cell.spent


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_look(book, cells):
    """A run has no end while it has not begun or runs; then its summary or its failure. Other text is refused."""
    waiting, running, done, failed, other, broken = cells[:6]
    begun(book, running)
    finished(book, done)
    book.failed(failed, "it diverged")
    begun(book, other, FACTS | {"val_sha": "changed"})
    assert book.look(waiting) is None and book.look(running) is None
    assert book.look(done).loss == 1.5 and book.look(failed) == End(reason="it diverged")
    with pytest.raises(UserError, match="val_sha = changed, the sweep now asks for other text"):
        book.look(other)
    begun(book, broken)
    (book.of(broken) / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run with"):
        book.look(broken)


@pytest.mark.parametrize("table, words", [
    ("name,loss\na,1\n", "no column run"), ("run,loss\n{0},1\n\xff", "cannot be read"),
    ("run,status,data_sha,val_sha,cell,loss\n{0},finished,text,other text,{1},\n", "is finished and has no loss"),
])  # fmt: skip
def test_kept_rows_that_are_none(book, cells, table, words):
    """A table under results/ that is no sweep's, or a row without a loss, is named and refused."""
    book.results.mkdir()
    table = table.format(cells[0].name, cells[0].digest(**FACTS))
    (book.results / "runs.csv").write_bytes(table.encode("latin-1"))
    with pytest.raises(UserError, match=words) as error:
        Book(book.folder, book.results, book.facts).look(cells[0])
    assert str(book.results / "runs.csv") in str(error.value) and "\n" not in str(error.value)


def test_failed_beside_a_kept_row(book, cells):
    """A run that failed stays failed where a kept row of other text, or one of the failure, counts for nothing."""
    book.results.mkdir()
    (book.results / "runs.csv").write_text(f"run,status\n{cells[0].name},failed\n")
    book.failed(cells[0], "it diverged")
    assert Book(book.folder, book.results, book.facts).look(cells[0]) == End(reason="it diverged")


def test_curves(book, cells):
    """Of a run that was trained here its log, else what was kept with its row, in a file or, of old, in logs. Finished
    runs come in the order of the rows, then their trunks; a run whose curve nobody has is left empty."""
    trunk, first, second, third, failed = cells[:5]

    def log(folder, loss) -> None:
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text(json.dumps({"step": 1, "loss": loss, "mfu": 0.1}) + "\n")

    log(book.of(first), 1.0)
    log(book.of(failed), 9.0)
    rows = [RunRow(cell.name, trunk=trunk.name) for cell in (second, first, third)]
    rows.append(RunRow(failed.name, status="failed"))
    for cell, loss in ((trunk, 2.0), (first, 3.0), (second, 4.0)):
        log(book.results / "runs" / cell.name, loss)

    def losses() -> list:
        return [[name, *(point["loss"] for point in points)] for name, points in book.curves(rows).items()]

    assert losses() == [[second.name, 4.0], [first.name, 1.0], [third.name], [trunk.name, 2.0]]
    kept = {cell.name: [{"step": 1, "loss": loss}] for cell, loss in ((trunk, 5.0), (first, 6.0), (second, 7.0))}
    (book.results / CURVES).write_bytes(to_csv_gz(kept))
    assert losses() == [[second.name, 7.0], [first.name, 1.0], [third.name], [trunk.name, 5.0]]
    (book.results / CURVES).write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match="cannot be read as training curves"):
        book.curves(rows)
    assert book.curves([RunRow(first.name)]) == {first.name: [{"step": 1, "loss": 1.0}]}


# ---------------------------------------------------------------------------------------------------------------------
# Trunks


def test_trunk_that_lacks_a_checkpoint(book, cells):
    """A finished trunk without the checkpoint where a cooldown is to begin (the file asks for other lengths now, or a
    disk was cleaned up) is refused rather than waited for; without its folder it is trained again."""
    trunk, cooldown = cells[:2]
    finished(book, trunk)
    assert not scheduled(book, cells).is_open(trunk)
    shutil.rmtree(book.checkpoint(trunk.name, cooldown.step))
    with pytest.raises(UserError, match=f"no checkpoint of step {cooldown.step}.*delete that folder") as error:
        scheduled(book, cells)
    assert str(book.of(trunk)) in str(error.value) and cooldown.name in str(error.value)
    shutil.rmtree(book.of(trunk))
    assert scheduled(book, cells).is_open(trunk)


def test_trunk_whose_cooldowns_are_done(book, cells):
    """Checkpoints that nothing needs any more may be gone, also while the other trunks' cooldowns are not done."""
    for cell in cells[:5]:
        finished(book, cell)
    shutil.rmtree(book.of(cells[0]) / "checkpoints")
    found = scheduled(book, cells)
    assert len(found.ends) == 5 and not found.done


def test_failed_trunk(book, cells):
    """Cooldowns whose trunk failed before their checkpoint failed with it; the others can be trained."""
    trunk, first, *others = cells[:5]
    book.failed(trunk, "it diverged")
    book.checkpoint(trunk.name, first.step).mkdir(parents=True)
    found = scheduled(book, cells[:5])
    assert {name: end.reason for name, end in found.ends.items()} == {trunk.name: "it diverged"} | {
        cell.name: f"its trunk {trunk.name} failed: it diverged" for cell in others}  # fmt: skip
    assert found.take(spent) == first and found.is_open(first) and not found.done


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def test_text_that_changed_meanwhile(book, cells):
    """A run of another text than the sweep began with (a file was changed while it ran) stops the sweep."""
    found = scheduled(book, cells)
    cell = found.take(spent)
    finished(book, cell, FACTS | {"data_sha": "changed"})
    with pytest.raises(UserError, match="data_sha = changed"):
        found.put(Answer(cell.name, "finished"))
    assert cell.name not in found.ends


def test_workers_that_die(book, cells):
    """A run is tried again when its worker died; the third death on one run is its failure, on disk too."""
    found = scheduled(book, cells)
    cell = found.take(spent)
    for _ in range(schedule.DEATHS - 1):
        found.put(Answer(cell.name, "died", "signal 9"))
        assert found.take(spent) == cell
    found.put(Answer(cell.name, "died", "exit code 7"))
    end = End(reason="its worker died 3 times (exit code 7)")
    assert found.ends[cell.name] == end == book.look(cell) and found.take(spent) != cell


def test_longest_first(book, cells):
    """Runs begin in the order of their length, cooldowns not before their trunk's checkpoint; each is given out once;
    one that another process has waits a while; one that has ended meanwhile is not given out."""
    found = scheduled(book, cells)
    trunks = sorted((cell for cell in cells if cell.is_trunk), key=spent, reverse=True)
    assert [found.take(spent) for _ in range(4)] == [*trunks, None]
    found.put(Answer(trunks[0].name, "busy"))
    assert found.take(spent) is None and trunks[0].name not in found.running
    found.busy[trunks[0].name] -= schedule.BUSY_SECONDS
    assert found.take(spent) == trunks[0]
    finished(book, trunks[0])
    cooldowns = sorted((cell for cell in cells if cell.trunk == trunks[0].name), key=spent, reverse=True)
    finished(book, cooldowns[0])
    assert found.take(spent) == cooldowns[1] and found.ends[cooldowns[0].name].loss == 1.5
