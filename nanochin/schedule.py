"""Which run of a sweep is next, and what has become of each: all of it read from and kept in the folders of the runs.

    runs/<run>/summary.json     finished (or a row of the same run in results/<sweep>/runs.csv)
               failed.json      failed, and why
               config.json      begun; another process holds its lock, or a worker goes on with it

So a sweep that is killed at any moment loses nothing but the steps since the last checkpoints, and two sweeps on one
folder share its runs between them: the lock of a run keeps the second out, its summary tells it the result.
"""

import dataclasses
import json
import math
import threading
import time
from pathlib import Path
from typing import IO

from nanochin.config import Config, RunError, UserError
from nanochin.files import read_json, write_file, write_json, writing
from nanochin.grid import Cell
from nanochin.runs import read_log
from nanochin.workers import Worker, WorkerDied

DEATHS = 3  # of workers on one run, after which it counts as failed
BUSY_SECONDS = 2.0  # between two looks at a run that another process has


@dataclasses.dataclass(frozen=True)
class End:
    """How a run ended: its row of runs.csv (finished), or the reason why there is none (failed)."""

    row: dict | None = None
    reason: str = ""

    @property
    def loss(self) -> float | None:
        return float(self.row["loss"]) if self.row else None


class Book:
    """The ends of runs, as the disk has them."""

    def __init__(self, folder: Path, results: Path, digest):
        """folder: of the sweep. results: where rows that were kept may lie. digest: of a cell (`Cell.digest`)."""
        self.folder, self.results, self.digest = folder, results, digest
        self.kept = read_rows(results / "runs.csv")

    def of(self, cell: Cell) -> Path:
        return self.folder / "runs" / cell.name

    def look(self, cell: Cell, facts: dict) -> End | None:
        """The end of a run, None if it has none yet. Raises UserError if what lies there is another run; `facts` of the
        text (data_sha, val_sha) belong to the comparison."""
        folder = self.of(cell)
        if (folder / "config.json").exists():
            self._same(cell, folder, facts)
            if (folder / "summary.json").exists():
                return End(self.row(cell, read_json(folder / "summary.json")))
        elif (row := self.kept.get(cell.name)) and (end := self._from_results(cell, row, facts)):
            return end
        if (folder / "failed.json").exists():
            return End(reason=read_json(folder / "failed.json")["reason"])
        return None

    def _same(self, cell: Cell, folder: Path, facts: dict) -> None:
        theirs, shape = read_json(folder / "config.json").get("identity", {}), cell.plan.shape
        ours = {f.name: getattr(cell.config, f.name) for f in dataclasses.fields(Config) if f.metadata["result"]}
        ours |= {"vocab_size": shape.vocab_size, "head_size": shape.head_size, "ffn": shape.ffn, **facts}
        for key, value in json.loads(json.dumps(ours)).items():
            if theirs.get(key) != value and value not in (None, "auto"):
                raise UserError(
                    f"{folder} holds a run with {key} = {theirs.get(key)}, the sweep now asks for {value}: "
                    "give the sweep file another name, or delete that folder"
                )

    def _from_results(self, cell: Cell, row: dict, facts: dict) -> End | None:
        if row.get("status") != "finished" or any(row.get(key) != sha for key, sha in facts.items()):
            return None  # nothing, or of another text: that of `python` is another with every version of Python
        if row.get("cell") != self.digest(cell):
            raise UserError(
                f"{self.results / 'runs.csv'}: {cell.name} was run with other options than the sweep file "
                "now has: give the file another name, or pass --results none"
            )
        try:
            float(row["loss"])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.results / 'runs.csv'}: {cell.name} is finished with the loss {row.get('loss')!r}, "
                "no number: put it right, or take the row out"
            ) from None
        return End(row)

    def copy_log(self, cell: Cell) -> None:
        """The training curve that was kept with a row, beside those of the runs that were trained here."""
        log, ours = self.results / "runs" / cell.name / "log.jsonl", self.of(cell) / "log.jsonl"
        if log.exists() and not ours.exists():
            with writing(ours):
                ours.parent.mkdir(parents=True, exist_ok=True)
            write_file(ours, log.read_bytes())

    def row(self, cell: Cell, summary: dict) -> dict:
        """The row of runs.csv: the run's summary, with what only the sweep knows."""
        return summary | {
            "kind": cell.kind,
            "budget": cell.budget,
            "trunk": cell.trunk,
            "flops_spent": cell.spent,
            "cell": self.digest(cell),
        }

    def failed(self, cell: Cell, reason: str) -> End:
        with writing(self.of(cell)):
            self.of(cell).mkdir(parents=True, exist_ok=True)
        write_json(self.of(cell) / "failed.json", {"reason": reason})
        return End(reason=reason)

    def forgive(self, cell: Cell) -> None:
        (self.of(cell) / "failed.json").unlink(missing_ok=True)

    def checkpoint(self, run: str, step: int) -> Path:
        return self.folder / "runs" / run / "checkpoints" / f"step-{step}"

    def strand(self, cells: list[Cell], ends: dict[str, End]) -> None:
        """Give an end to cooldowns whose trunk failed before the checkpoint that they need. Raises UserError if it is
        finished and the checkpoint is not there: a sweep file that asks for other lengths now, or a cleaned-up disk."""
        for cell in cells:
            end = ends.get(cell.trunk)
            if end is None or cell.name in ends or self.checkpoint(cell.trunk, cell.step).exists():
                continue
            if not end.reason:
                raise UserError(
                    f"{self.folder / 'runs' / cell.trunk} is finished and has no checkpoint of step "
                    f"{cell.step}, where {cell.name} begins: delete that folder, and it is trained again "
                    "with all that are needed"
                )
            ends[cell.name] = End(reason=f"its trunk {cell.trunk} failed: {end.reason}")

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


def read_rows(path: Path) -> dict[str, dict]:
    """The rows of a runs.csv by run; none if there is no such file."""
    import csv

    if not path.exists():
        return {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return {row["run"]: row for row in csv.DictReader(file)}
    except KeyError:
        raise UserError(f"{path}: no column run; is it the table of a sweep?") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table of runs: {error}") from None


class Schedule:
    """Hands out runs to slots, longest first, each slot a thread with a worker of its own."""

    def __init__(self, book: Book, facts: dict, seconds, log: IO, retry_failed: bool = False):
        """facts: of the text. seconds(cell): how long a run takes, roughly. log: where the workers' own output goes."""
        self.book, self.facts, self.seconds, self.log, self.retry = book, facts, seconds, log, retry_failed
        self.cells: list[Cell] = []
        self.ends: dict[str, End] = {}
        self.running: dict[str, float] = {}  # since when
        self.busy: dict[str, float] = {}  # not before
        self.deaths: dict[str, int] = {}
        self.lonely: set[str] = set()  # lacked memory beside others: tried again by themselves, when these are through
        self.error: Exception | None = None
        self.closed = False
        self.changed = threading.Condition()
        self.workers: list[Worker] = []
        self.threads: list[threading.Thread] = []
        self.slots = 0  # that take runs
        self.most = math.inf  # slots from this number on end after the run that they have

    def add(self, cells: list[Cell]) -> None:
        """More runs; those that have an end already keep it."""
        with self.changed:
            self.cells += cells
            for cell in cells:
                if self.retry:
                    self.book.forgive(cell)
                if end := self.book.look(cell, self.facts):
                    self.ends[cell.name] = end
            self.book.strand(self.cells, self.ends)
            self.changed.notify_all()

    @property
    def done(self) -> bool:
        return all(not self.is_open(cell) for cell in self.cells)

    def is_open(self, cell: Cell) -> bool:
        """Is there still something to do? A trunk is needed only while a cooldown from it is missing."""
        if cell.name in self.ends:
            return False
        if cell.is_trunk:
            missing = [c for c in self.cells if c.trunk == cell.name and c.name not in self.ends]
            return any(not self.book.checkpoint(cell.name, c.step).exists() for c in missing)
        return True

    def _ready(self, cell: Cell) -> bool:
        if not self.is_open(cell) or cell.name in self.running or self.busy.get(cell.name, 0) > time.monotonic():
            return False
        if self.lonely & self.running.keys() or (cell.name in self.lonely and self.running):
            return False
        return not cell.trunk or self.book.checkpoint(cell.trunk, cell.step).exists()

    def take(self, number: int) -> Cell | None:
        """The longest run that can begin now; waits for one. None when there will be no more for this slot."""
        with self.changed:
            while not (self.closed or self.error or number >= self.most):
                ready = filter(self._ready, self.cells)
                for cell in sorted(ready, key=lambda c: (c.name in self.lonely, -self.seconds(c))):
                    if end := self.book.look(cell, self.facts):  # another sweep on this folder was faster
                        self._end(cell, end)
                        continue
                    self.running[cell.name] = time.monotonic()
                    return cell
                self.changed.wait(0.3)
            return None

    def _end(self, cell: Cell, end: End) -> None:
        self.ends[cell.name] = end
        if cell.is_trunk:
            self.book.strand(self.cells, self.ends)

    def put(self, cell: Cell, answer: dict) -> None:
        """Take note of how a worker left a run."""
        with self.changed:
            self.running.pop(cell.name, None)
            self.busy.pop(cell.name, None)
            try:
                match answer["end"]:
                    case "finished":
                        if end := self.book.look(cell, self.facts):  # which refuses one of a text that has changed
                            self._end(cell, end)
                    case "failed":
                        self._end(cell, self.book.failed(cell, answer["reason"]))
                    case "full":
                        self.lonely.add(cell.name)
                    case "busy":
                        self.busy[cell.name] = time.monotonic() + BUSY_SECONDS
                    case "stop":
                        self.error = self.error or (RunError if answer["code"] == 1 else UserError)(answer["reason"])
                    case "died" if not self.closed:  # by our own hand
                        self.deaths[cell.name] = self.deaths.get(cell.name, 0) + 1
                        if self.deaths[cell.name] == DEATHS:
                            reason = f"its worker died {DEATHS} times ({answer['how']})"
                            self._end(cell, self.book.failed(cell, reason))
            except UserError as error:  # also a disk that will not take failed.json
                self.error = self.error or error
            self.changed.notify_all()

    def open_slot(self, number: int, device: str, gpus: int, worker: Worker | None = None) -> None:
        """One more thread that takes runs, with the worker given or one of its own."""
        with self.changed:
            self.slots += 1
        self.threads.append(threading.Thread(target=self._slot, args=(number, device, gpus, worker), daemon=True))
        self.threads[-1].start()

    def _slot(self, number: int, device: str, gpus: int, worker: Worker | None) -> None:
        """Run after run, with a new worker wherever one died."""
        try:
            while cell := self.take(number):
                alone = len(self.running) == 1
                try:
                    worker = worker or self._start(number, device, gpus)
                    answer = worker.do(job(cell, self.book.folder))
                except WorkerDied as error:
                    worker, answer = None, {"end": "died", "how": str(error)}
                except UserError:  # no worker: there may be no room for it beside the others
                    if not self._leave():
                        raise
                    self.put(cell, {"end": "busy"})
                    return
                if answer["end"] == "full" and alone and len(self.running) == 1:
                    answer["end"] = "failed"
                self.put(cell, answer)
            self._leave()
            if worker:
                worker.close()
        except Exception as error:  # the sweep's own thread raises it; here nobody would see it
            with self.changed:
                self.error = self.error or error
                self.changed.notify_all()

    def _leave(self) -> bool:
        """One slot less; not if it is the last."""
        with self.changed:
            others = self.slots > 1
            self.slots -= others
            return others

    def _start(self, number: int, device: str, gpus: int) -> Worker:
        worker = Worker(number, self.log, device, gpus)
        with self.changed:
            self.workers.append(worker)
            if self.closed:
                worker.close()
        try:
            worker.greet()
        except WorkerDied as error:
            raise RunError(f"a worker ended before it began ({error}); see {self.log.name}") from None
        return worker

    def done_by_running(self) -> dict[str, float]:
        """FLOPs of each run in progress, by its log."""
        cells = [cell for cell in self.cells if cell.name in self.running]
        return {cell.name: cell.spent * self.book.progress(cell)[0] for cell in cells}

    def first_worker(self, device: str) -> Worker:
        """The worker that says what device there is."""
        return self._start(0, device, 0)

    def stop(self) -> None:
        """No more runs; those in progress are saved, and all workers end."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
            workers = list(self.workers)
        for worker in workers:
            worker.close()
        for worker in workers:
            worker.wait()
        for thread in self.threads:
            thread.join()


def job(cell: Cell, folder: Path) -> Config:
    """The options of the run in the sweep's folder."""
    return dataclasses.replace(cell.config, out=str(folder / "runs"), threads=1)
