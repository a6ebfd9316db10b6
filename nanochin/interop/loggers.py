"""Loggers that also receive the rows of log.jsonl: wandb and tensorboard, optional and imported only on request.

A run never ends because of a logger: the first exception of one is printed, and the run goes on without it.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from nanochin.base.cli import UserError, brief

Logger = tuple[Callable[[dict], None], Callable[[], None]]  # logs a row, closes the logger


def check(names: tuple[str, ...]) -> None:
    """Raises UserError for a logger whose library is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"`loggers` {name} needs an optional library: pip install {name}")


def open_logger(name: str, folder: Path, options: dict, step: int) -> Logger:
    """A logger of the run in `folder`, which starts from `step`."""
    failed = []

    def guarded(function: Callable) -> Callable:
        def call(*args):
            try:
                return None if failed else function(*args)
            except Exception as error:  # no account, no network, an incomplete installation
                failed.append(error)
                print(f"note: {name} failed, the run goes on without it: {brief(error)}", file=sys.stderr)

        return call

    log, close = guarded(OPEN[name])(folder, options, step) or (None, None)
    return guarded(log), guarded(close)


def _open_wandb(folder: Path, options: dict, step: int) -> Logger:
    import wandb

    place = {"project": "nanochin", "id": folder.name, "name": folder.name, "dir": folder}
    run = wandb.init(**place, resume="allow", config=options)
    return lambda row: run.log(row, step=row["step"]), run.finish


def _open_tensorboard(folder: Path, options: dict, step: int) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)  # rows that a resumed run logs again

    def log(row: dict) -> None:
        for key, value in row.items():
            if key != "step" and value is not None:
                writer.add_scalar(key, value, row["step"])
        writer.flush()

    return log, writer.close


OPEN = {"wandb": _open_wandb, "tensorboard": _open_tensorboard}
