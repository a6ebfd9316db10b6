"""Cooldowns: a run that starts from a checkpoint of another run."""

import dataclasses
from pathlib import Path

from nanochin.base.cli import UserError
from nanochin.base.files import NUMBER
from nanochin.config import Config
from nanochin.run import checkpoint
from nanochin.run.folder import find_run, first_difference, read_record
from nanochin.run.optim import learning_rate


def find_branch(config: Config, record: dict) -> Path:
    """The checkpoint that `branch_from` (RUN@STEP) names: weights, moments and data position of another run.

    Raises UserError unless training from scratch would give the same result: only length and schedule may differ from
    that run, and the schedule only after STEP (a cooldown).
    """
    what = f"`branch_from` {config.branch_from}"
    trunk, _, step = config.branch_from.rpartition("@")
    if not trunk:
        raise UserError(f"{what}: expected RUN@STEP")
    folder = find_run(trunk, config.out)
    schedule = {"schedule": str, **dict.fromkeys(("tokens", "cycle", "final_lr", "cooldown"), NUMBER)}
    theirs = read_record(folder, {"options": schedule})
    free = {"tokens", "schedule", "cycle", "final_lr", "cooldown", "branch_from", "init_sha"}
    before, ours = ({k: v for k, v in each["identity"].items() if k not in free} for each in (theirs, record))
    if key := first_difference(before, ours):
        raise UserError(f"{what}: that run has {key} = {before.get(key)}, this one {ours.get(key)}")
    saved = [str(number) for number in checkpoint.steps(folder)]
    if step not in saved:
        raise UserError(f"{what}: no such checkpoint; there are steps {', '.join(saved) or 'none'} (`save_steps`)")
    seen = int(step) * config.batch_tokens
    if seen >= config.tokens:
        raise UserError(f"{what}: it has seen {seen} tokens already, `tokens` {config.tokens:g} must be more")
    trunk_config = dataclasses.replace(config, **{k: v for k, v in theirs["options"].items() if k in free})
    for i in range(int(step)):
        if learning_rate(trunk_config, i) != learning_rate(config, i):
            raise UserError(
                f"{what}: from step {i} on, its learning rate differs from this run's; branch at step {i} or before, "
                "or from a run with `schedule` constant"
            )
    return folder / "checkpoints" / f"step-{step}"
