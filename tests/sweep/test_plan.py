"""nanochin/sweep/plan.py: what `--dry-run` says is done and left, against counts by hand."""

import re

import pytest
from sweep_files import LONG, PLAIN, toml

from nanochin.runrow import RunRow
from nanochin.sweep.cells import Cell, plan_cells
from nanochin.sweep.plan import plan_table
from nanochin.sweep.spec import Sweep, read_sweep
from nanochin.sweep.store import Outcome, Queue, RunStore

KNOWN = {"data_sha": "a", "val_sha": "b"}
RATE = {"throughput": 1e10, "step_seconds": 0.01}


@pytest.fixture
def planned(tmp_path):
    """`planned(kind="trunk", ...)`: the sweep of PLAIN and these keys, with its queue."""

    def planned(**keys) -> tuple[Sweep, Queue]:
        path = tmp_path / "some.toml"
        path.write_text(toml(PLAIN | keys))
        sweep = read_sweep(path)
        store = RunStore(tmp_path / "out", tmp_path / "results", KNOWN)
        return sweep, Queue(store, plan_cells(sweep, 256))

    return planned


def said(sweep: Sweep, queue: Queue, cells: list[Cell] | None = None, workers: int = 1) -> str:
    return plan_table(sweep, queue, cells or queue.cells, 1e8, workers)


def left(text: str) -> int:
    """The seconds that are left."""
    *hours, minutes, seconds = map(int, re.search(r"time left: ([\d:]+)", text)[1].split(":"))
    return 3600 * sum(hours) + 60 * minutes + seconds


def test_what_is_left(planned):
    """Runs that have an outcome count neither as to train nor in the time; the time is that of so many workers, and at
    least that of the longest run."""
    sweep, queue = planned(**RATE)
    cells = queue.cells
    times = {cell.name: cell.spent / 1e10 + 0.01 * cell.plan.steps for cell in cells}
    assert "10 runs, 0 done, 10 to train: 5.5e+11 of 5.5e+11 FLOPs" in said(sweep, queue)
    assert left(said(sweep, queue)) == int(sum(times.values()))
    assert left(said(sweep, queue, workers=1000)) == int(max(times.values()))
    queue.outcomes[cells[0].name] = Outcome(reason="it diverged")
    queue.outcomes[cells[1].name] = Outcome(RunRow(loss=1.5))
    text = said(sweep, queue, workers=2)
    assert "10 runs, 2 done, 8 to train: 5.3e+11 of 5.5e+11 FLOPs" in text
    assert left(text) == int(sum(times[cell.name] for cell in cells[2:]) / 2)
    assert [line.split()[-1] for line in text.splitlines()[1:3]] == ["failed", "done"]
    assert "4 runs, 2 done, 2 to train" in said(sweep, queue, cells[:4])
    queue.outcomes = dict.fromkeys(times, Outcome(reason="it diverged"))
    assert "0 to train: 0 of" in said(sweep, queue) and "time left" not in said(sweep, queue)


def test_trunks_that_are_left(planned):
    """A trunk is left while a cooldown needs it, and its time is that of the trunk and the longest cooldown."""
    sweep, queue = planned(**LONG | {"kind": "trunk", "models": ["16x1"]} | RATE)
    trunk, *cooldowns = queue.cells
    assert "4 runs, 0 done, 4 to train" in said(sweep, queue)
    longest = cooldowns[-1]
    total = trunk.spent + longest.spent
    assert left(said(sweep, queue, workers=100)) == int(total / 1e10 + 0.01 * longest.plan.steps)
    for cell in cooldowns:
        queue.outcomes[cell.name] = Outcome(reason="it diverged")
    assert "4 runs, 4 done, 0 to train: 0 of" in said(sweep, queue)


def test_table(planned):
    """A line for each run, of about 100 columns; without a throughput the time is unknown, and a line says what to set
    where."""
    sweep, queue = planned(kind="grid", models=["16x1", "40x2"], lr_times=[0.5, 1], warmup_times=[1, 4])
    text = said(sweep, queue)
    table = text.partition("\n\n")[0].splitlines()
    assert len(table) == 1 + len(queue.cells) and max(map(len, table)) <= 105
    assert all(line.split()[-1] == "?" for line in table[1:])
    (line,) = (line for line in text.splitlines() if "time left" in line)
    assert "throughput" in line and sweep.path in line
