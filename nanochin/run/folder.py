"""A run's folder: name, configuration, log, summary, and the lock that keeps a second process out.

runs/<name>/config.json     resolved options, identity, versions, device, data fingerprints
            log.jsonl       one object per logged step or evaluation
            checkpoints/    see checkpoint.py
            summary.json    written last: a run is finished if and only if it exists
"""

import dataclasses
import hashlib
import json
import os
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from nanochin.base.cli import UserError, value_type
from nanochin.base.console import three
from nanochin.base.files import NUMBER, has_type, read_json, write_file, write_json, writing
from nanochin.config import Config
from nanochin.runrow import read_summary

# What every reader of config.json relies on. Older records may lack all but the identity.
RECORD = {
    "identity": dict,
    "device": str | None,
    "threads": int | None,
    "processes": int | None,
    "versions": {"torch": str | None},
    "predicted": dict.fromkeys(("predicted_loss", "predicted_low", "predicted_high"), NUMBER | None),
}


PRIVATE = ".private"  # in `out`: only one process writes there, so no lock is needed (a network disk may not keep one)


class BusyError(UserError):
    """The run is being trained by another process."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The folder of a run. `loggers` are pairs (function that logs a row, function that closes the logger); `began` is
    its config.json, from before the first step."""

    folder: Path
    loggers: list = dataclasses.field(default_factory=list)
    began: dict = dataclasses.field(default_factory=dict)

    @property
    def summary(self) -> dict | None:
        path = self.folder / "summary.json"
        return read_summary(path).summary() if path.exists() else None

    def log(self, row: dict) -> None:
        """Append a row to log.jsonl and pass it to the loggers."""
        with writing(self.folder / "log.jsonl"), open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        for log, _ in self.loggers:
            log(row)

    def cut_log(self, step: int, note: Callable[[str], object] | None = None) -> None:
        """Remove the rows that a run resumed from `step` logs again, later steps and the evaluation after `step`, and
        damaged lines, with a `note`."""
        path = self.folder / "log.jsonl"
        if path.exists():
            kept = [row for row in read_log(self.folder, note) if row["step"] < step + ("val_loss" not in row)]
            write_file(path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def finish(self, summary: dict) -> None:
        write_json(self.folder / "summary.json", summary)


@contextmanager
def open_run(out: str, name: str, record: dict) -> Iterator[Run]:
    """Create or reopen the folder of the run that `record` describes, locked inside the block unless `out` is private.

    Raises UserError if another process has the lock, or if the folder belongs to a run with other options or to one
    whose config.json is damaged or lost.
    """
    folder = Path(out) / name
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            private = (folder.parent / PRIVATE).exists()
            lock = nullcontext() if private else FileLock(folder / ".lock").acquire(timeout=0)
        except Timeout:
            raise BusyError(f"{folder}: another process is training this run; wait for it or choose `name`") from None
    with lock:
        if not any((folder / name).exists() for name in ("config.json", "log.jsonl", "checkpoints", "summary.json")):
            write_json(folder / "config.json", record)
        began = read_record(folder)
        theirs, ours = began["identity"], record["identity"]
        if key := first_difference(theirs, ours):
            raise UserError(
                f"{folder} holds a run with {key} = {theirs.get(key)}, this one has {ours.get(key)}: "
                "choose another `name`, or delete that folder"
            )
        run = Run(folder, began=began)
        try:
            yield run
        finally:
            for _, close in run.loggers:
                close()


def read_record(folder: Path, form: dict | None = None) -> dict:
    """config.json of a run; `form` as in read_json, in addition to RECORD. Raises UserError if it is damaged."""
    remedy = "restore it, or delete that folder to train the run again"
    return read_json(folder / "config.json", RECORD | (form or {}), remedy)


def read_options(folder: Path, names: Iterable[str]) -> dict:
    """The options `names` of a run, for Config; without those that are None or later than the run."""
    hints = typing.get_type_hints(Config)
    kinds = {name: value_type(hints[name]) for name in names}
    form = {name: {float: NUMBER}.get(kind, list if typing.get_origin(kind) else kind) for name, kind in kinds.items()}
    found = read_record(folder, {"options": {name: kind | None for name, kind in form.items()}})["options"]
    found = {name: found[name] for name in kinds if found.get(name) is not None}
    return {name: tuple(map(str, value)) if isinstance(value, list) else value for name, value in found.items()}


def moved(began: dict, now: dict) -> str:
    """What a run began with and now has not, of the things that can change its bits: "threads 2, torch 2.9", or ""."""
    facts = ("device", "processes", "threads", "torch")
    before, after = (
        {**{key: record.get(key) for key in facts}, **(record.get("versions") or {})} for record in (began, now)
    )
    return ", ".join(f"{key} {before[key]}" for key in facts if before.get(key) not in (None, after.get(key)))


def check_name(name: str) -> None:
    """Raises UserError for a `name` that is not the name of a folder."""
    if name in ("", ".", "..") or set("/\\") & set(name) or not name.isprintable():
        raise UserError(f"`name` {name!r}: must name a folder, without slashes and control characters")


def find_run(run: str, out: str = "runs") -> Path:
    """The folder of a run given by path or by name. Raises UserError if there is none."""
    for folder in (Path(run), Path(out) / run):
        if os.path.exists(folder / "config.json"):  # unlike Path.exists, False for a name that is too long
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


def read_log(folder: Path, note: Callable[[str], object] | None = None) -> list[dict]:
    """The rows of log.jsonl. Damaged lines are left out, with one `note` (default: on stderr) of how many: lines that
    are not JSON or not UTF-8, such as the last one of a killed run, and rows of another form.

    Raises UserError if the file cannot be read."""
    path = folder / "log.jsonl"
    try:
        lines = [line for line in path.read_bytes().split(b"\n") if line]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it or delete it") from None
    rows = [row for row in map(_row, lines) if row]
    if damaged := len(lines) - len(rows):
        note = note or (lambda text: print(text, file=sys.stderr))
        note(f"note: {path}: left out {damaged} damaged line{'s' * (damaged > 1)} of {len(lines)}")
    return rows


def _row(line: bytes) -> dict | None:
    """The row in a line of the log: a step and numbers, of which MFU and bits per byte may be null (unknown)."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not has_type(row.get("step"), int):
        return None
    unknown = ("mfu", "val_bpb")
    return row if all(has_type(v, NUMBER | None if key in unknown else NUMBER) for key, v in row.items()) else None
