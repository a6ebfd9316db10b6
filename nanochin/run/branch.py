"""Branches: a run that goes on from a checkpoint of another run, its trunk; a cooldown, or the trunk made longer."""

import dataclasses
import os
from pathlib import Path

from nanochin.base.cli import UserError, validate
from nanochin.base.files import NUMBER
from nanochin.config import Config
from nanochin.data.tokenizer import Tokenizer
from nanochin.run import checkpoint
from nanochin.run.folder import find_run, first_difference, read_options, read_record
from nanochin.run.optim import learning_rate

FREE = {"tokens", "schedule", "cycle", "final_lr", "cooldown", "branch_from"}  # options of a branch's own
TEXT = {"data", "val", "val_bytes", "max_tokens", "skip_bad"}  # options that the identity has as the text's SHA-256


def branch_name(branch_from: str) -> str:
    """RUN@STEP with the name of the run: the same for `trunk@400` and `runs/trunk@400`."""
    trunk, _, step = branch_from.rpartition("@")
    return f"{os.path.basename(os.path.abspath(trunk))}@{step}"


def trunk_options(config: Config) -> tuple[Config, Tokenizer | None]:
    """(`config` with the trunk's options where it has the default; the trunk's tokenizer if it was not trained on its
    text). Unchanged if the trunk cannot be read: `find_branch` says so, unless the branch has begun."""
    options = [f for f in dataclasses.fields(Config) if f.name in TEXT or (f.metadata["result"] and f.name not in FREE)]
    try:
        trunk = find_run(config.branch_from.rpartition("@")[0], config.out)
        theirs = read_options(trunk, [f.name for f in options])
        bpe = checkpoint.given_tokenizer(trunk)
    except UserError:
        return config, None
    ours = {f.name for f in options if getattr(config, f.name) != f.default}
    config = dataclasses.replace(config, **{name: value for name, value in theirs.items() if name not in ours})
    validate(config)
    return config, bpe


def find_branch(config: Config, record: dict) -> Path:
    """The checkpoint that `branch_from` (RUN@STEP) names: weights, moments and data position of another run.

    Raises UserError unless training from scratch would give the same result: only length and schedule may differ from
    that run, and the schedule only after STEP.
    """
    what = f"`branch_from` {config.branch_from}"
    trunk, _, step = config.branch_from.rpartition("@")
    if not trunk:
        raise UserError(f"{what}: expected RUN@STEP")
    folder = find_run(trunk, config.out)
    schedule = {"schedule": str, **dict.fromkeys(("tokens", "cycle", "final_lr", "cooldown"), NUMBER)}
    theirs = read_record(folder, {"options": schedule})
    free = FREE | {"init_sha"}
    before, ours = ({k: v for k, v in each["identity"].items() if k not in free} for each in (theirs, record))
    if key := first_difference(before, ours):
        raise UserError(f"{what}: that run has {key} = {before.get(key)}, this one {ours.get(key)}")
    saved = [str(number) for number in checkpoint.steps(folder)]
    if step not in saved:
        raise UserError(f"{what}: no such checkpoint; there are steps {', '.join(saved) or 'none'} (`save_steps`)")
    seen = int(step) * config.batch_tokens
    if seen >= config.tokens:
        raise UserError(f"{what}: it has seen {seen} tokens already, `tokens` {config.tokens:g} must be more")
    if config.epochs and theirs["options"]["tokens"] != config.tokens:
        raise UserError(
            f"{what}: with `epochs`, the text depends on `tokens`; that run has {theirs['options']['tokens']:g}"
        )
    trunk_config = dataclasses.replace(config, **{k: v for k, v in theirs["options"].items() if k in free})
    for i in range(int(step)):
        if learning_rate(trunk_config, i) != learning_rate(config, i):
            raise UserError(
                f"{what}: from step {i} on, its learning rate differs with `schedule` {config.schedule}; branch "
                f"at step {i} or before, or give `schedule` wsd or constant to go on from a constant rate"
            )
    return folder / "checkpoints" / f"step-{step}"
