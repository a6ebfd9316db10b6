"""Where else the rows of log.jsonl go: wandb or tensorboard, optional libraries, imported only when asked for."""

from collections.abc import Callable
from pathlib import Path

from nanochin.config import need


def check(names: tuple[str, ...]) -> None:
    """Raises UserError for a logger whose library is not installed."""
    for name in names:
        need(name, f"--loggers {name}")


def open_logger(name: str, folder: Path, options: dict, step: int) -> tuple[Callable[[dict], None], Callable[[], None]]:
    """(function that takes a row, function that ends it) for the run in `folder`, which goes on from `step`."""
    if name == "wandb":
        import wandb

        run = wandb.init(project="nanochin", id=folder.name, name=folder.name, resume="allow", dir=folder,
                         config=options)  # fmt: skip
        return lambda row: run.log(row, step=row["step"]), run.finish

    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)  # what a resumed run will log again

    def log(row: dict) -> None:
        for key, value in row.items():
            if key != "step" and value is not None:
                writer.add_scalar(key, value, row["step"])
        writer.flush()

    return log, writer.close
