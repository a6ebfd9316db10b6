"""Attempts: how processes on several machines train the runs of one sweep without a lock, which a network file system
may not keep.

    attempts/<run>/<n>/<run>/    the n-th attempt: a run's folder, written by one process alone
    runs/<run>/                  the attempt that ended first, with summary.json or failed.json

A new attempt starts from a copy of the newest valid checkpoint. It is published by one rename, which fails if another
was published before. So a process that was given up, and that wakes up later, changes nothing.
"""

import dataclasses
import itertools
import os
import shutil
import time
from contextlib import nullcontext, suppress
from pathlib import Path

from nanochin.base.cli import RunError, UserError
from nanochin.base.files import fsync, write_json, writing
from nanochin.run.folder import PRIVATE, lock_run
from nanochin.sweep.cells import Cell
from nanochin.sweep.pool import Train, attempt
from nanochin.sweep.store import RunStore, has_ended

COPIES = 5  # tries to copy an attempt whose process may still write
STOP = "stop.json"  # in an attempt's folder: the error that must stop the sweep


def train_runs(train: Train, store: RunStore, cells: list[Cell]) -> None:
    """Train the runs without an outcome one after the other, and publish them. Raises UserError for what must stop the
    sweep, and RunError if another process has started a later attempt of a run that failed here."""
    for cell in cells:
        if store.outcome(cell):
            continue
        out = begin(store, cell)
        print(f"{cell.name}: attempt {out.name}", flush=True)
        reply = attempt(train, dataclasses.replace(cell.config, out=str(out), threads=1))
        if store.outcome(cell):  # of another attempt, which has removed this one's folder
            continue
        if isinstance(reply, UserError):
            with suppress(UserError, OSError):
                write_json(out / STOP, {"reason": str(reply)})
            raise reply
        if reply.status == "failed":
            if store.attempts(cell.name)[-1] != out:
                raise RunError(f"{out}: {reply.reason}; a later attempt trains this run")
            with writing(out):
                (out / cell.name).mkdir(exist_ok=True)
            write_json(out / cell.name / "failed.json", {"reason": reply.reason})
        publish(store, cell.name, out)


def begin(store: RunStore, cell: Cell) -> Path:
    """The folder (`out`) of a new attempt, with a copy of the newest valid checkpoint of the earlier ones."""
    earlier = [out / cell.name for out in store.attempts(cell.name)]
    out = _new(store, cell.name)
    with writing(out):
        (out / PRIVATE).touch()
        if cell.trunk:  # where train.py looks for it; relative, since machines may mount the folder elsewhere
            (out / cell.trunk).symlink_to(Path("../../..", "runs", cell.trunk))
    for _ in range(COPIES):
        newest = max(earlier, key=newest_step, default=None)
        if newest is None or newest_step(newest) < 0:
            break
        try:  # the log after the checkpoints, so that it has all their steps
            shutil.copytree(newest / "checkpoints", out / cell.name / "checkpoints", ignore=_unfinished)
            shutil.copytree(newest, out / cell.name, ignore=_all_but_records, dirs_exist_ok=True)
            break
        except OSError:  # its process may be alive, and has deleted an older checkpoint
            shutil.rmtree(out / cell.name, ignore_errors=True)
            time.sleep(1)
    return out


def newest_step(run: Path) -> int:
    """The step of the newest valid checkpoint in a run's folder, -1 if there is none."""
    from nanochin.run import checkpoint  # loads torch

    for step in reversed(checkpoint.steps(run)):
        with suppress(UserError):
            return checkpoint.verify(run / "checkpoints" / f"step-{step}")["step"]
    return -1


def publish(store: RunStore, run: str, out: Path) -> bool:
    """Move an attempt that has ended to where the sweep reads it, and delete the others -> False if one of them was
    first. Raises DiskError if neither is possible."""
    final = store.run_folder(run)
    with writing(final):
        try:
            os.rename(out / run, final)  # fails on a folder that is not empty
        except OSError:
            if not has_ended(final):
                raise
            return False
        fsync(final.parent)
    shutil.rmtree(out.parent, ignore_errors=True)
    return True


def adopt(store: RunStore, run: str) -> None:
    """Make an attempt of an unfinished run in runs/: one of the local launcher, or a failed one to be tried again.
    Raises BusyError if a process on this machine trains it."""
    folder = store.run_folder(run)
    if folder.exists() and not has_ended(folder):
        lock = lock_run(folder) if (folder / ".lock").exists() else nullcontext()
        with lock, writing(folder):
            os.rename(folder, _new(store, run) / run)


def _new(store: RunStore, run: str) -> Path:
    """A folder that no other process has."""
    root = store.folder / "attempts" / run
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1 + max((int(out.name) for out in store.attempts(run)), default=0)):
            with suppress(FileExistsError):
                (root / str(number)).mkdir()
                return root / str(number)


def _unfinished(_: str, names: list[str]) -> list[str]:
    return [name for name in names if name.endswith((".tmp", ".broken"))]


def _all_but_records(_: str, names: list[str]) -> list[str]:
    return ["checkpoints", ".lock", *_unfinished(_, names)]
