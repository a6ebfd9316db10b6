"""What has become of each run of a sweep, and which run is next. Both are read from the folders of the runs.

    runs/<run>/summary.json     finished (or a row of the same run in results/<sweep>/runs.csv)
               failed.json      failed, and why
               config.json      started; another process holds its lock, or a worker resumes it

A sweep that is killed loses only the steps since the last checkpoints. Two sweeps on one folder share its runs: the
lock of a run keeps the second out, and the summary tells it the result.
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
from nanochin.run.folder import PRIVATE, first_difference, read_log, read_record
from nanochin.runrow import RunRow, read_csv, read_summary
from nanochin.sweep.cells import Cell
from nanochin.sweep.pool import Reply

DEATHS = 3  # of workers on one run, after which it counts as failed
BUSY_SECONDS = 2.0  # before a run that another process trains is looked at again


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: its row of runs.csv if it finished, the reason if it failed."""

    row: RunRow | None = None
    reason: str = ""

    @property
    def loss(self) -> float | None:
        return self.row.loss if self.row else None


class RunStore:
    """The outcomes and curves of runs, as the disk has them."""

    def __init__(self, folder: Path, results: Path, fingerprints: dict):
        """folder: of the sweep. results: folder of kept rows, may be absent. fingerprints: data_sha and val_sha, None
        if unknown: any text is theirs then."""
        self.folder, self.results, self.fingerprints = folder, results, fingerprints
        self.kept = read_csv(results / "runs.csv")

    def run_folder(self, run: str) -> Path:
        return self.folder / "runs" / run

    def attempts(self, run: str) -> list[Path]:
        """The attempts of a run, in their order: one, or for a moment none; see attempts.py."""
        found = (self.folder / "attempts" / run).glob(f"[1-9]*/{PRIVATE}")
        return sorted((path.parent for path in found), key=lambda out: int(out.name))

    def saved_step(self, run: str) -> int:
        """The last checkpoint of a run's last attempt, 0 without one."""
        found = [path.name[5:] for out in self.attempts(run)[-1:] for path in (out / run).glob("checkpoints/step-*")]
        return max((int(step) for step in found if step.isdigit()), default=0)

    def checkpoint(self, run: str, step: int) -> Path:
        return self.run_folder(run) / "checkpoints" / f"step-{step}"

    def outcome(self, cell: Cell) -> Outcome | None:
        """The outcome of a run, None if it has none yet. Raises UserError if the folder or the kept row is of a run
        with other options or, for the folder, another text."""
        folder = self.run_folder(cell.name)
        if (folder / "config.json").exists():
            self._check_same(cell, folder)
            if (folder / "summary.json").exists():  # only the sweep knows the rest of the row
                ours = {"kind": cell.kind, "budget": cell.budget, "trunk": cell.trunk, "flops_spent": cell.spent}
                ours["cell"] = cell.digest(**self.fingerprints)
                return Outcome(dataclasses.replace(read_summary(folder / "summary.json"), **ours))
        elif (row := self.kept.get(cell.name)) and (outcome := self._kept_outcome(cell, row)):
            return outcome
        if (folder / "failed.json").exists():
            return Outcome(reason=read_json(folder / "failed.json", {"reason": str})["reason"])
        return None

    def _check_same(self, cell: Cell, folder: Path) -> None:
        theirs, shape = read_record(folder)["identity"], cell.plan.shape
        ours = {f.name: getattr(cell.config, f.name) for f in dataclasses.fields(Config) if f.metadata["result"]}
        ours |= {"vocab_size": shape.vocab_size, "head_size": shape.head_size, "ffn": shape.ffn, **self.fingerprints}
        ours = {key: value for key, value in json.loads(json.dumps(ours)).items() if value not in (None, "auto")}
        if key := first_difference({key: value for key, value in theirs.items() if key in ours}, ours):
            raise UserError(
                f"{folder} holds a run with {key} = {theirs.get(key)}, the sweep now asks for {ours[key]}: "
                "give the sweep file another name, or delete that folder"
            )

    def _kept_outcome(self, cell: Cell, row: RunRow) -> Outcome | None:
        path, text = self.results / "runs.csv", {key: getattr(row, key) for key in self.fingerprints}
        known, same = None not in self.fingerprints.values(), row.cell == cell.digest(**text)
        if row.status != "finished" or (text != self.fingerprints if known else not same):
            return None  # ignored: the text `python` differs between versions of Python
        if not same:
            raise UserError(
                f"{path}: {cell.name} was run with other options than the sweep file now has: "
                "give the file another name, or `results` none"
            )
        if row.loss is None:
            raise UserError(f"{path}: {cell.name} is finished and has no loss: correct the row or remove it")
        return Outcome(row)

    def fail(self, cell: Cell, reason: str) -> Outcome:
        """Record a failure."""
        folder = self.run_folder(cell.name)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "failed.json", {"reason": reason})
        return Outcome(reason=reason)

    def curves(self, rows: list[RunRow]) -> Curves:
        """Training curves of the finished runs in `rows`, then of their trunks: from the log of a run that was
        trained here, else as kept with the rows (older results have logs)."""
        finished = [row for row in rows if row.status == "finished"]
        runs = dict.fromkeys([*(row.run for row in finished), *(row.trunk for row in finished if row.trunk)])

        def logged(folder: Path) -> Curves:
            folders = {run: folder / "runs" / run for run in runs}
            return {run: log_points(path) for run, path in folders.items() if (path / "log.jsonl").exists()}

        curves, kept = logged(self.folder), self.results / CURVES
        if len(curves) < len(runs):
            curves = (read_csv_gz(kept) if kept.exists() else logged(self.results)) | curves
        return {run: curves.get(run, []) for run in runs}

    def progress(self, cell: Cell) -> tuple[float, float | None]:
        """(share of the run that is done, last training loss), from its log or that of its last attempt."""
        folder = self.run_folder(cell.name)
        if not folder.exists() and (attempts := self.attempts(cell.name)):
            folder = attempts[-1] / cell.name
        try:
            rows = [row for row in read_log(folder, note=lambda _: None) if "loss" in row]
        except UserError:  # no log yet
            rows = []
        if not rows:
            return 0.0, None
        done = (rows[-1]["step"] - cell.step) / (cell.plan.steps - cell.step)
        return min(1.0, max(0.0, done)), rows[-1]["loss"]


def has_ended(folder: Path) -> bool:
    """Whether the folder is of a run that finished or failed."""
    return any((folder / name).exists() for name in ("summary.json", "failed.json"))


class Queue:
    """The runs of a sweep: to be trained, in training, and those that have an outcome."""

    def __init__(self, store: RunStore, cells: list[Cell], retry_failed: bool = False):
        """Raises UserError as `add` does."""
        self.store, self.retry = store, retry_failed
        self.cells: list[Cell] = []
        self.outcomes: dict[str, Outcome] = {}
        self.running: dict[str, float] = {}  # time of the start
        self.busy: dict[str, float] = {}  # in another process: time of the next look
        self.deaths: Counter[str] = Counter()  # of workers, by run
        self.add(cells)

    def add(self, cells: list[Cell]) -> None:
        """Add runs, with the outcomes that the disk has. Raises UserError as `RunStore.outcome` does."""
        self.cells += cells
        for cell in cells:
            if self.retry:
                failed = self.store.run_folder(cell.name) / "failed.json"
                with writing(failed):
                    failed.unlink(missing_ok=True)
            if outcome := self.store.outcome(cell):
                self.outcomes[cell.name] = outcome
        self._fail_cooldowns()

    @property
    def losses(self) -> dict[str, float | None]:
        """By run; None for a failed run."""
        return {name: outcome.loss for name, outcome in self.outcomes.items()}

    @property
    def done(self) -> bool:
        return not any(map(self.is_open, self.cells))

    def is_open(self, cell: Cell) -> bool:
        """Whether a run must still be trained. A trunk is needed only while a cooldown lacks its checkpoint."""
        if cell.name in self.outcomes:
            return False
        missing = (c for c in self.cells if c.trunk == cell.name and c.name not in self.outcomes)
        return not cell.is_trunk or any(not self.store.checkpoint(cell.name, c.step).exists() for c in missing)

    def take(self, seconds: Callable[[Cell], float]) -> Cell | None:
        """The longest run, by `seconds`, that can start now; it counts as running from here on."""
        for cell in sorted(filter(self._ready, self.cells), key=seconds, reverse=True):
            if outcome := self.store.outcome(cell):  # trained by another sweep on this folder
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
        """Record how a worker left a run. Raises UserError if the run is of another text, or the disk is full."""
        cell = next(cell for cell in self.cells if cell.name == reply.run)
        del self.running[cell.name]
        match reply.status:
            case "finished":
                if outcome := self.store.outcome(cell):
                    self._end(cell, outcome)
            case "failed":
                self._end(cell, self.store.fail(cell, reply.reason))
            case "busy":
                self.busy[cell.name] = time.monotonic() + BUSY_SECONDS
            case "died":
                self.deaths[cell.name] += 1
                if self.deaths[cell.name] == DEATHS:
                    reason = f"its worker died {DEATHS} times ({reply.reason})"
                    self._end(cell, self.store.fail(cell, reason))

    def _end(self, cell: Cell, outcome: Outcome) -> None:
        self.outcomes[cell.name] = outcome
        if cell.is_trunk:
            self._fail_cooldowns()

    def _fail_cooldowns(self) -> None:
        """Cooldowns fail with their trunk if it did not reach their checkpoint. Raises UserError if the trunk finished
        and the checkpoint is missing: the sweep file asks for other lengths now, or the checkpoint was deleted."""
        for cell in self.cells:
            trunk = self.outcomes.get(cell.trunk)
            if trunk is None or cell.name in self.outcomes or self.store.checkpoint(cell.trunk, cell.step).exists():
                continue
            if not trunk.reason:
                raise UserError(
                    f"{self.store.run_folder(cell.trunk)} is finished and has no checkpoint of step {cell.step}, "
                    f"from which {cell.name} starts: delete that folder to train it again"
                )
            self.outcomes[cell.name] = Outcome(reason=f"its trunk {cell.trunk} failed: {trunk.reason}")
