"""A run's folder: name, configuration, log, summary, and the lock that keeps a second process out.

runs/<name>/config.json     resolved options, identity, versions, device, data fingerprints
            log.jsonl       one object per logged step or evaluation
            checkpoints/    see checkpoint.py
            summary.json    written last: a run is finished if and only if it exists
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from nanochin.base.cli import UserError
from nanochin.base.console import three
from nanochin.base.files import DiskError, read_json, write_file, write_json, writing
from nanochin.config import Config


class BusyError(UserError):
    """The run is being trained by another process."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The folder of a run. `loggers` are pairs (function that logs a row, function that closes the logger)."""

    folder: Path
    loggers: list = dataclasses.field(default_factory=list)

    @property
    def summary(self) -> dict | None:
        path = self.folder / "summary.json"
        return read_json(path) if path.exists() else None

    def log(self, row: dict) -> None:
        """Append a row to log.jsonl and pass it to the loggers."""
        with writing(self.folder / "log.jsonl"), open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        for log, _ in self.loggers:
            log(row)

    def cut_log(self, step: int) -> None:
        """Remove the rows that a run resumed from `step` logs again: later steps, the evaluation after `step`, and a
        line truncated by a kill."""
        path = self.folder / "log.jsonl"
        if path.exists():
            kept = [row for row in read_log(self.folder) if row["step"] < step + ("val_loss" not in row)]
            write_file(path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def finish(self, summary: dict) -> None:
        write_json(self.folder / "summary.json", summary)


@contextmanager
def open_run(out: str, name: str, record: dict) -> Iterator[Run]:
    """Create or reopen the folder of the run that `record` describes, locked inside the block.

    Raises UserError if another process has the lock, or if the folder belongs to a run with other options.
    """
    folder = Path(out) / name
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise BusyError(f"{folder}: another process is training this run; wait for it or choose `name`") from None
    except OSError as error:
        raise DiskError(f"{folder}: cannot write: {error.strerror}") from None
    with lock:
        if not (folder / "config.json").exists():
            write_json(folder / "config.json", record)
        theirs, ours = read_json(folder / "config.json")["identity"], record["identity"]
        if key := first_difference(theirs, ours):
            raise UserError(
                f"{folder} holds a run with {key} = {theirs.get(key)}, this one has {ours.get(key)}: "
                "choose another `name`, or delete that folder"
            )
        run = Run(folder)
        try:
            yield run
        finally:
            for _, close in run.loggers:
                close()


def find_run(run: str, out: str = "runs") -> Path:
    """The folder of a run given by path or by name. Raises UserError if there is none."""
    for folder in (Path(run), Path(out) / run):
        if (folder / "config.json").exists():
            return folder
    raise UserError(f"{run}: no run folder (no config.json there, nor in {Path(out) / run})")


def run_identity(config: Config, **facts) -> dict:
    """What defines the result of a run: the resolved options that can change it, and facts about the data. Options
    added after version 0.1 are left out at their default, so that older runs keep their names."""
    options = {f: getattr(config, f.name) for f in dataclasses.fields(config) if f.metadata["result"]}
    kept = {f.name: value for f, value in options.items() if not (f.metadata["later"] and value == f.default)}
    return json.loads(json.dumps(kept | facts))


def first_difference(theirs: dict, ours: dict) -> str | None:
    """The alphabetically first key in which two identities differ, or None. An absent key means its default."""
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    theirs, ours = ({**defaults, **identity} for identity in (theirs, ours))
    return min((key for key in theirs | ours if theirs.get(key) != ours.get(key)), default=None)


def run_name(corpus: str, identity: dict) -> str:
    """A readable stem and a hash of the identity: 'python-96x4-7.5M-0b1c2d3e'."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{corpus}-{identity['model']}-{three(identity['tokens'] / 1e6)}M-{digest[:8]}"


def read_log(folder: Path) -> list[dict]:
    """The rows of log.jsonl, without a last line truncated by a kill. Raises UserError for a damaged file."""
    path, rows = folder / "log.jsonl", []
    for i, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows.append(json.loads(line.decode()))
        except (json.JSONDecodeError, RecursionError):
            break
        except ValueError as error:  # not UTF-8, or an integer of thousands of digits
            raise UserError(f"{path}: line {i}: {error}; restore the file or delete it") from None
        if not isinstance(rows[-1], dict):
            raise UserError(f"{path}: line {i}: {line[:40].decode()!r} is not an object; restore the file or delete it")
    return rows
