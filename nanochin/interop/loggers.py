"""Loggers that also receive the rows of log.jsonl: wandb and tensorboard, optional and imported only on request."""

from collections.abc import Callable
from pathlib import Path

from nanochin.base.cli import RunError, need


def check(names: tuple[str, ...]) -> None:
    """Raises UserError for a logger whose library is not installed."""
    for name in names:
        need(name, f"`loggers` {name}")


def open_logger(name: str, folder: Path, options: dict, step: int) -> tuple[Callable[[dict], None], Callable[[], None]]:
    """(function that logs a row, function that closes the logger) for the run in `folder`, which starts from `step`.
    Raises RunError if wandb fails (no account, no network)."""
    if name == "wandb":
        import wandb

        place = {"project": "nanochin", "id": folder.name, "name": folder.name, "dir": folder}
        try:
            run = wandb.init(**place, resume="allow", config=options)
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise RunError(f"`loggers` wandb: {reason}; WANDB_MODE=offline needs no account") from None
        return lambda row: run.log(row, step=row["step"]), run.finish

    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)  # rows that a resumed run logs again

    def log(row: dict) -> None:
        for key, value in row.items():
            if key != "step" and value is not None:
                writer.add_scalar(key, value, row["step"])
        writer.flush()

    return log, writer.close
