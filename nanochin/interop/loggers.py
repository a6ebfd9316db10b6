"""Loggers that also receive the rows of log.jsonl, or the figures of a sweep: wandb and tensorboard, optional and
imported only on request.

A run never ends because of a logger: the first exception of one is printed, and the run goes on without it.
"""

import secrets
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from nanochin.base.cli import UserError, brief
from nanochin.base.files import NUMBER, has_type, read_json, write_file
from nanochin.run.folder import read_log

Logger = tuple[Callable[[dict], None], Callable[[], None]]  # logs a row, closes the logger


def check(names: tuple[str, ...]) -> None:
    """Raises UserError for a logger whose library is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"`loggers` {name} needs an optional library: pip install {name}")


def open_logger(name: str, folder: Path, options: dict, step: int) -> Logger:
    """A logger of the run in `folder`, which starts from `step`. A resumed run goes on in its own record there."""
    guarded = _guard(name)
    log, close = guarded(OPEN[name])(folder, options, step) or (None, None)
    return guarded(log), guarded(close)


def send_sweep(name: str, folder: Path) -> None:
    """Send the figures (PNG) of a fitted sweep and the constants of its law, in place of those sent before."""
    law = read_json(folder / "laws.json", {"law": dict})["law"]
    constants = {f"law/{key}": value for key, value in law.items() if has_type(value, NUMBER)}
    _guard(name)(SEND[name])(folder, constants, sorted(folder.glob("*.png")))


def _guard(name: str) -> Callable:
    """guarded(function): the same, but after the first exception of any of them, which is printed, they do nothing."""
    failed = []

    def guarded(function: Callable) -> Callable:
        def call(*args):
            try:
                return None if failed else function(*args)
            except Exception as error:  # no account, no network, an incomplete installation
                failed.append(error)
                print(f"note: {name} failed and is left out: {brief(error)}", file=sys.stderr)

        return call

    return guarded


def _wandb_run(folder: Path, options: dict):
    """The wandb run of this folder, whose id is in wandb-id.txt; earlier versions used the folder's name."""
    import wandb

    file = folder / "wandb-id.txt"
    if not file.exists():
        write_file(file, (folder.name if (folder / "wandb").exists() else secrets.token_hex(4)).encode())
    place = {"project": "nanochin", "id": file.read_text(), "name": folder.name, "dir": folder}
    return wandb.init(**place, resume="allow", config=options)


def _open_wandb(folder: Path, options: dict, step: int) -> Logger:
    run = _wandb_run(folder, options)
    return lambda row: run.log(row, step=row["step"]), run.finish


def _send_wandb(folder: Path, constants: dict, figures: list[Path]) -> None:
    run = _wandb_run(folder, {})
    import wandb

    run.summary.update(constants)
    run.log({path.stem: wandb.Image(str(path)) for path in figures})
    run.finish()


def _open_tensorboard(folder: Path, options: dict, step: int) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", purge_step=step)  # hides what was logged from this step on

    def log(row: dict) -> None:
        for key, value in row.items():
            if key != "step" and value is not None:
                writer.add_scalar(key, value, row["step"])
        writer.flush()

    for row in read_log(folder) if step and (folder / "log.jsonl").exists() else ():
        if row["step"] == step:  # is not trained again
            log(row)
    return log, writer.close


def _send_tensorboard(folder: Path, constants: dict, figures: list[Path]) -> None:
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder / "tensorboard", purge_step=0) as writer:
        for key, value in constants.items():
            writer.add_scalar(key, value, 0)
        for path in figures:
            writer.add_image(path.stem, imread(path), 0, dataformats="HWC")


OPEN = {"wandb": _open_wandb, "tensorboard": _open_tensorboard}
SEND = {"wandb": _send_wandb, "tensorboard": _send_tensorboard}
