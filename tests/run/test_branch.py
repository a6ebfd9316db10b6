"""Branches: options from the trunk, one identity for one trunk, and trunks made longer."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from nanochin.base.cli import UserError
from nanochin.base.files import read_json
from nanochin.config import Config
from nanochin.run import checkpoint
from nanochin.run.branch import branch_name
from nanochin.run.evaluate import held_out

pytestmark = pytest.mark.usefixtures("one_thread")
PLANNED = ("lr", "batch_tokens", "warmup_tokens", "beta2")  # by rules, if not given


def run(config: Config) -> tuple[dict, Path]:
    summary = train.train(config, quiet=True)
    return summary, Path(config.out) / summary["name"]


def same_bits(a: Path, b: Path) -> bool:
    """Whether the newest checkpoints of two runs have the same weights and moments."""
    for name in checkpoint.DIGESTS:
        one, other = (load_file(checkpoint.newest(folder) / name) for folder in (a, b))
        if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
            return False
    return True


@pytest.fixture
def trunk(tiny) -> tuple[Config, Path]:
    """A finished constant-rate run whose options are not the defaults."""
    config = tiny(name="trunk", schedule="constant", seed=3, weight_decay=0.2, qk_norm=True, save_steps=(40,))
    return config, run(config)[1]


def short(trunk: Config, **options) -> Config:
    """A command that gives only where things are and `options`."""
    places = {name: getattr(trunk, name) for name in ("out", "cache", "device", "threads", "save_every")}
    return Config(**places | {"sample_tokens": 0} | options)


def from_scratch(trunk: tuple[Config, Path], config: Config) -> Config:
    """`config` without its trunk, with the trunk's options given one by one."""
    options = read_json(trunk[1] / "config.json")["options"]
    names = ("data", "val_bytes", "model", "seq_len", "seed", "weight_decay", "qk_norm", *PLANNED)
    given = {name: options[name] for name in names} | {"tokens": config.tokens, "schedule": config.schedule}
    return short(trunk[0], **given | {"data": tuple(given["data"])})


@pytest.mark.parametrize(("step", "schedule", "times"), [(40, "wsd", 1.0), (40, "wsd", 2.0), ("last", "constant", 2.0)])
def test_what_is_not_given_is_taken_from_the_trunk(trunk, step, schedule, times):
    """A cooldown of any length, and a finished run made longer, with its own warm-up: the bits of one run."""
    step = checkpoint.steps(trunk[1])[-1] if step == "last" else step
    config = short(trunk[0], branch_from=f"trunk@{step}", tokens=times * trunk[0].tokens, schedule=schedule)
    summary, folder = run(config)
    scratch, other = run(from_scratch(trunk, config))
    assert same_bits(folder, other) and summary["loss"] == scratch["loss"] and summary["trunk"] == "trunk"
    assert read_json(folder / "config.json")["options"]["warmup_tokens"] > 0


def test_one_trunk_has_one_identity(trunk, monkeypatch):
    """By name, by relative and absolute path: the same run, named as in a sweep."""
    monkeypatch.chdir(trunk[1].parent.parent)
    spelled = ["trunk", "runs/trunk", "./runs/trunk/", str(trunk[1])]
    configs = [short(trunk[0], branch_from=f"{name}@40", schedule="wsd", tokens=12_800.0) for name in spelled]
    first, *others = (run(config) for config in configs)
    assert all(other == first for other in others) and {branch_name(c.branch_from) for c in configs} == {"trunk@40"}
    assert read_json(first[1] / "config.json")["identity"]["branch_from"] == "trunk@40"


def test_a_branch_that_has_begun_needs_no_trunk(trunk):
    """It is reported with its trunk deleted, if its options are given; a new branch is refused."""
    config = from_scratch(trunk, short(trunk[0], tokens=12_800.0, schedule="wsd"))
    config = Config(**vars(config) | {"branch_from": "trunk@40"})
    finished = run(config)
    shutil.rmtree(trunk[1])
    assert run(config) == finished
    with pytest.raises(UserError, match="trunk: no run folder"):
        run(Config(**vars(config) | {"tokens": 25_600.0}))


def test_epochs_need_the_same_length(tiny):
    """With `epochs` the part of the text that is trained on depends on `tokens`, so another length is refused."""
    usual = {"schedule": "constant", "epochs": 2.0, "save_steps": (40,)}
    run(tiny(name="trunk", **usual))
    with pytest.raises(UserError, match="`epochs`"):
        run(tiny(branch_from="trunk@40", **usual | {"tokens": 25_600.0}))
    run(tiny(branch_from="trunk@40", **usual | {"schedule": "wsd", "cooldown": 0.5}))


def test_the_tokenizer_of_the_trunk(tiny, tmp_path, trunk):
    """A trunk that started from another run has the BPE of that run, which its branch and its evaluation use too."""
    other = tmp_path / "other.txt"
    other.write_text("a rather different text, in other words. " * 3000)
    run(tiny(name="base", tokenizer="bpe", vocab_size=300))
    again = tiny(name="again", init_from="base", data=(str(other),), schedule="constant", save_steps=(40,))
    _, folder = run(again)
    config = short(again, branch_from="again@40", tokens=again.tokens * 2, schedule="constant")
    ranks = [(path / "tokenizer.tiktoken").read_bytes() for path in (Path(again.out) / "base", folder, run(config)[1])]
    assert ranks[0] == ranks[1] == ranks[2]
    tokenizer = held_out(folder, ()).tokenizer
    assert tokenizer.rank_lines() == ranks[0]
