"""Where else the rows of log.jsonl go: wandb or tensorboard, optional libraries, imported only when asked for."""

from collections.abc import Callable
from pathlib import Path

from nanochin.config import RunError, need


def check(names: tuple[str, ...]) -> None:
    """Raises UserError for a logger whose library is not installed."""
    for name in names:
        need(name, f"`loggers` {name}")


def open_logger(name: str, folder: Path, options: dict, step: int) -> tuple[Callable[[dict], None], Callable[[], None]]:
    """(function that takes a row, function that ends it) for the run in `folder`, which goes on from `step`.

    Raises RunError where wandb refuses (no account, no network).
    """
    if name == "wandb":
        import wandb

        try:
            run = wandb.init(
                project="nanochin", id=folder.name, name=folder.name, resume="allow", dir=folder, config=options
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise RunError(f"`loggers` wandb: {reason}; WANDB_MODE=offline needs no account") from None
        return lambda row: run.log(row, step=row["step"]), run.finish

    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)  # what a resumed run will log again

    def log(row: dict) -> None:
        for key, value in row.items():
            if key != "step" and value is not None:
                writer.add_scalar(key, value, row["step"])
        writer.flush()

    return log, writer.close
