"""Which run of a sweep is next, and what has become of each: all of it read from and kept in the folders of the runs.

    runs/<run>/summary.json     finished (or a row of the same run in results/<sweep>/runs.csv)
               failed.json      failed, and why
               config.json      begun; another process holds its lock, or a worker resumes it

So a sweep that is killed at any moment loses nothing but the steps since the last checkpoints, and two sweeps on one
folder share its runs between them: the lock of a run keeps the second out, its summary tells it the result.
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from nanochin.base.cli import UserError
from nanochin.base.files import read_json, write_json, writing
from nanochin.config import Config
from nanochin.run.curves import CURVES, Curves, log_points, read_csv_gz
from nanochin.run.folder import first_difference, read_log
from nanochin.runrow import RunRow, read_csv, read_summary
from nanochin.sweep.cells import Cell
from nanochin.sweep.pool import Reply

DEATHS = 3  # of workers on one run, after which it counts as failed
BUSY_SECONDS = 2.0  # between two looks at a run that another process has


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: its row of runs.csv (finished), or the reason why there is none (failed)."""

    row: RunRow | None = None
    reason: str = ""

    @property
    def loss(self) -> float | None:
        return self.row.loss if self.row else None


class RunStore:
    """The ends of runs, as the disk has them."""

    def __init__(self, folder: Path, results: Path, fingerprints: dict):
        """folder: of the sweep. results: where rows that were kept may lie. fingerprints: data_sha and val_sha."""
        self.folder, self.results, self.fingerprints = folder, results, fingerprints
        self.kept = read_csv(results / "runs.csv")

    def of(self, cell: Cell) -> Path:
        return self.folder / "runs" / cell.name

    def look(self, cell: Cell) -> Outcome | None:
        """The end of a run, None if it has none yet. Raises UserError if what lies there is another run, or one of
        another text."""
        folder = self.of(cell)
        if (folder / "config.json").exists():
            self._same(cell, folder)
            if (folder / "summary.json").exists():
                return Outcome(self.row(cell, read_summary(folder / "summary.json")))
        elif (row := self.kept.get(cell.name)) and (outcome := self._from_results(cell, row)):
            return outcome
        if (folder / "failed.json").exists():
            return Outcome(reason=read_json(folder / "failed.json")["reason"])
        return None

    def _same(self, cell: Cell, folder: Path) -> None:
        theirs, shape = read_json(folder / "config.json").get("identity", {}), cell.plan.shape
        ours = {f.name: getattr(cell.config, f.name) for f in dataclasses.fields(Config) if f.metadata["result"]}
        ours |= {"vocab_size": shape.vocab_size, "head_size": shape.head_size, "ffn": shape.ffn, **self.fingerprints}
        ours = {key: value for key, value in json.loads(json.dumps(ours)).items() if value not in (None, "auto")}
        if key := first_difference({key: value for key, value in theirs.items() if key in ours}, ours):
            raise UserError(
                f"{folder} holds a run with {key} = {theirs.get(key)}, the sweep now asks for {ours[key]}: "
                "give the sweep file another name, or delete that folder"
            )

    def _from_results(self, cell: Cell, row: RunRow) -> Outcome | None:
        if row.status != "finished" or any(getattr(row, key) != sha for key, sha in self.fingerprints.items()):
            return None  # nothing, or of another text: that of `python` is another with every version of Python
        if row.cell != cell.digest(**self.fingerprints):
            raise UserError(
                f"{self.results / 'runs.csv'}: {cell.name} was run with other options than the sweep file "
                "now has: give the file another name, or `results` none"
            )
        if row.loss is None:
            raise UserError(
                f"{self.results / 'runs.csv'}: {cell.name} is finished and has no loss: "
                "put it right, or take the row out"
            )
        return Outcome(row)

    def curves(self, rows: list[RunRow]) -> Curves:
        """Training curves of the finished runs in `rows` and then of their trunks: from the log of a run that was
        trained here, else as they were kept with the rows."""
        finished = [row for row in rows if row.status == "finished"]
        runs = dict.fromkeys([*(row.run for row in finished), *(row.trunk for row in finished if row.trunk)])
        folders = {run: self.folder / "runs" / run for run in runs}
        ours = {run: folder for run, folder in folders.items() if (folder / "log.jsonl").exists()}
        kept = self._kept_curves() if len(ours) < len(runs) else {}
        return {run: log_points(ours[run]) if run in ours else kept.get(run, []) for run in runs}

    def _kept_curves(self) -> Curves:
        """Beside the rows that were kept. Older results have the logs instead."""
        if (self.results / CURVES).exists():
            return read_csv_gz(self.results / CURVES)
        return {log.parent.name: log_points(log.parent) for log in self.results.glob("runs/*/log.jsonl")}

    def row(self, cell: Cell, summary: RunRow) -> RunRow:
        """The row of runs.csv: the run's summary, with what only the sweep knows."""
        ours = {"kind": cell.kind, "budget": cell.budget, "trunk": cell.trunk, "flops_spent": cell.spent}
        return dataclasses.replace(summary, **ours, cell=cell.digest(**self.fingerprints))

    def failed(self, cell: Cell, reason: str) -> Outcome:
        with writing(self.of(cell)):
            self.of(cell).mkdir(parents=True, exist_ok=True)
        write_json(self.of(cell) / "failed.json", {"reason": reason})
        return Outcome(reason=reason)

    def clear_failure(self, cell: Cell) -> None:
        (self.of(cell) / "failed.json").unlink(missing_ok=True)

    def checkpoint(self, run: str, step: int) -> Path:
        return self.folder / "runs" / run / "checkpoints" / f"step-{step}"

    def fail_cooldowns(self, cells: list[Cell], outcomes: dict[str, Outcome]) -> None:
        """Give an end to cooldowns whose trunk failed before the checkpoint that they need. Raises UserError if it is
        finished and the checkpoint is not there: a sweep file that asks for other lengths now, or a cleaned-up disk."""
        for cell in cells:
            outcome = outcomes.get(cell.trunk)
            if outcome is None or cell.name in outcomes or self.checkpoint(cell.trunk, cell.step).exists():
                continue
            if not outcome.reason:
                raise UserError(
                    f"{self.folder / 'runs' / cell.trunk} is finished and has no checkpoint of step "
                    f"{cell.step}, where {cell.name} begins: delete that folder, and it is trained again "
                    "with all that are needed"
                )
            outcomes[cell.name] = Outcome(reason=f"its trunk {cell.trunk} failed: {outcome.reason}")

    def progress(self, cell: Cell) -> tuple[float, float | None]:
        """(share of the run that is done, its last training loss), from its log."""
        try:
            rows = [row for row in read_log(self.of(cell)) if "loss" in row]
        except OSError:
            rows = []
        if not rows:
            return 0.0, None
        done = (rows[-1]["step"] - cell.step) / (cell.plan.steps - cell.step)
        return min(1.0, max(0.0, done)), rows[-1]["loss"]


class Queue:
    """What is still to be trained, what is in training, and what has become of the rest."""

    def __init__(self, store: RunStore, retry_failed: bool = False):
        self.store, self.retry = store, retry_failed
        self.cells: list[Cell] = []
        self.outcomes: dict[str, Outcome] = {}
        self.running: dict[str, float] = {}  # since when
        self.busy: dict[str, float] = {}  # another process has it: not before
        self.deaths: Counter[str] = Counter()  # of workers, by the run that they had

    def add(self, cells: list[Cell]) -> None:
        """More runs; those that have an end already keep it."""
        self.cells += cells
        for cell in cells:
            if self.retry:
                self.store.clear_failure(cell)
            if outcome := self.store.look(cell):
                self.outcomes[cell.name] = outcome
        self.store.fail_cooldowns(self.cells, self.outcomes)

    @property
    def done(self) -> bool:
        return not any(map(self.is_open, self.cells))

    def is_open(self, cell: Cell) -> bool:
        """Is there still something to do? A trunk is needed only while a cooldown from it is missing."""
        if cell.name in self.outcomes:
            return False
        missing = (c for c in self.cells if c.trunk == cell.name and c.name not in self.outcomes)
        return not cell.is_trunk or any(not self.store.checkpoint(cell.name, c.step).exists() for c in missing)

    def take(self, seconds: Callable[[Cell], float]) -> Cell | None:
        """The longest run, by `seconds`, that can begin now; it counts as running from here on. None: there is none."""
        for cell in sorted(filter(self._ready, self.cells), key=seconds, reverse=True):
            if outcome := self.store.look(cell):  # another sweep on this folder was faster
                self._end(cell, outcome)
            else:
                self.running[cell.name] = time.monotonic()
                return cell
        return None

    def _ready(self, cell: Cell) -> bool:
        if cell.name in self.running or self.busy.get(cell.name, 0) > time.monotonic() or not self.is_open(cell):
            return False
        return not cell.trunk or self.store.checkpoint(cell.trunk, cell.step).exists()

    def put(self, reply: Reply) -> None:
        """Take note of how a worker left a run. Raises UserError if the disk has another text's, or takes no note."""
        cell = next(cell for cell in self.cells if cell.name == reply.run)
        del self.running[cell.name]
        match reply.status:
            case "finished":
                if outcome := self.store.look(cell):
                    self._end(cell, outcome)
            case "failed":
                self._end(cell, self.store.failed(cell, reply.reason))
            case "busy":
                self.busy[cell.name] = time.monotonic() + BUSY_SECONDS
            case "died":
                self.deaths[cell.name] += 1
                if self.deaths[cell.name] == DEATHS:
                    reason = f"its worker died {DEATHS} times ({reply.reason})"
                    self._end(cell, self.store.failed(cell, reason))

    def _end(self, cell: Cell, outcome: Outcome) -> None:
        self.outcomes[cell.name] = outcome
        if cell.is_trunk:
            self.store.fail_cooldowns(self.cells, self.outcomes)
