"""Attempts: how processes on several machines train the runs of a sweep without a lock, which a network disk may not
keep.

    attempts/<run>/<n>/<run>/    the n-th attempt: a run's folder, in which only one process writes
    runs/<run>/                  the run once it has ended, with summary.json or failed.json

Each step is one rename, of which only one can succeed. A process takes over a run, with its checkpoints, by renaming
the last attempt to the next number; it publishes the run by renaming its folder. A process that was given up and wakes
up later finds its folder gone: whatever it still writes is in no attempt, and it cannot publish.
"""

import dataclasses
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from nanochin.base.cli import RunError, UserError
from nanochin.base.files import fsync, write_json, writing
from nanochin.run.folder import PRIVATE
from nanochin.sweep.cells import Cell
from nanochin.sweep.pool import Train, attempt
from nanochin.sweep.store import RunStore, has_ended


def train_runs(train: Train, store: RunStore, cells: list[Cell]) -> None:
    """Train the runs without an outcome one after the other, and publish them. Raises UserError for what must stop the
    sweep, and RunError if another process has taken over a run."""
    for cell in cells:
        if store.outcome(cell):
            continue
        out = begin(store, cell)
        print(f"{cell.name}: attempt {out.name}", flush=True)
        reply = attempt(train, dataclasses.replace(cell.config, out=str(out), threads=1))
        if not (out / PRIVATE).exists():
            raise RunError(f"{out}: another process has taken over this run")
        if isinstance(reply, UserError):
            raise reply
        if reply.status == "failed":
            with writing(out):
                (out / cell.name).mkdir(exist_ok=True)
            write_json(out / cell.name / "failed.json", {"reason": reply.reason})
        publish(store, cell.name, out)


def begin(store: RunStore, cell: Cell) -> Path:
    """The folder (`out`) of a new attempt, with all that the last one has saved; without any, with an unfinished run
    that the local launcher has left."""
    root, run = store.folder / "attempts" / cell.name, store.run_folder(cell.name)
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        while True:
            last = store.attempts(cell.name)[-1:]
            out = root / str(1 + max((int(path.name) for path in root.glob("[1-9]*")), default=0))
            with suppress(FileNotFoundError, FileExistsError):  # another process was first
                if last:
                    os.rename(last[0], out)
                    return out
                out.mkdir()
                break
            time.sleep(1)
        if run.exists() and not has_ended(run):
            os.rename(run, out / cell.name)
        if cell.trunk:  # where train.py looks for it; relative, since machines may mount the folder elsewhere
            (out / cell.trunk).symlink_to(Path("../../..", "runs", cell.trunk))
        (out / PRIVATE).touch()
    return out


def publish(store: RunStore, run: str, out: Path) -> None:
    """Move an attempt that has ended to where the sweep reads it. Raises DiskError if another process was first."""
    final = store.run_folder(run)
    with writing(final):
        try:
            os.rename(out / run, final)  # fails on a folder that is not empty
        except OSError:
            if (out / run).exists() or not has_ended(final):  # else the answer of a network disk was lost
                raise
        fsync(final.parent)
    shutil.rmtree(out.parent, ignore_errors=True)
