import errno
import itertools
import os
import shutil

import pytest
import torch

from nanochin.base.cli import RunError, UserError
from nanochin.config import make_shape
from nanochin.model import GPT
from nanochin.run import checkpoint
from nanochin.run.optim import Adam

pytestmark = pytest.mark.usefixtures("one_thread")

STATE = {"seconds": 1.5, "lap": 1.25, "recent": [[2.5, 0.1]], "micro_batch": 4}


def make(seed=0, kind="adamw", **options):
    """A small model after two optimizer steps, so that there are moments to save."""
    model = GPT(make_shape(16, 2, vocab_size=31, seq_len=8, **options), seed=seed)
    optimizer = Adam(model, kind, 0.01, (0.9, 0.99), 0.1)
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    model(torch.arange(16).view(2, 8), torch.arange(1, 17).view(2, 8)).backward()
    optimizer.step()
    optimizer.zero_grad()


def save(run, steps=(2,), **rest):
    model, optimizer = make(**rest)
    for number in steps:
        checkpoint.save(run, number, model, optimizer, STATE)
    return model, optimizer


def damage(path, how):
    """Truncate a file by two bytes, flip a bit in its middle, or delete it."""
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["adamw", "adam"])
@pytest.mark.parametrize("options", [{}, {"tied": False, "bias": True, "norm": "layernorm"}], ids=["tied", "untied"])
def test_round_trip(tmp_path, kind, options):
    """Weights, moments, random state and counters are restored bit-identical, and so is the next step."""
    model, optimizer = save(tmp_path, kind=kind, **options)
    random = torch.rand(3)  # drawn after the save
    other, other_optimizer = make(seed=1, kind=kind, **options)
    state = checkpoint.load(tmp_path / "checkpoints" / "step-2", other, other_optimizer)
    assert state == {"step": 2, **STATE}
    assert torch.equal(torch.rand(3), random)
    for after_next_step in (False, True):
        if after_next_step:
            step(model, optimizer)
            step(other, other_optimizer)
        for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b), name
            ours, theirs = optimizer.state[a], other_optimizer.state[b]
            assert ours.keys() == theirs.keys() >= {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_files_of_a_checkpoint(tmp_path):
    """Three files and no leftovers; a tied matrix is written once."""
    model, _ = save(tmp_path)
    folder = tmp_path / "checkpoints" / "step-2"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    numbers = sum(p.numel() for p in model.parameters())
    assert 4 * numbers < (folder / "model.safetensors").stat().st_size < 4 * numbers + 4096


@pytest.mark.parametrize("how", ["truncated", "changed", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_damage_is_named(tmp_path, name, how):
    """A changed bit, or a truncated or missing file, raises UserError, which names the file."""
    model, optimizer = save(tmp_path)
    path = tmp_path / "checkpoints" / "step-2" / name
    damage(path, how)
    with pytest.raises(UserError) as error:
        checkpoint.load(path.parent, model, optimizer)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_any_change_of_the_state_is_detected(tmp_path):
    """A changed digit anywhere in state.json is detected."""
    save(tmp_path)
    path = tmp_path / "checkpoints" / "step-2" / "state.json"
    content = path.read_text()
    digits = [i for i, character in enumerate(content) if character.isdigit()]
    for i in digits[:: len(digits) // 20]:
        path.write_text(content[:i] + ("8" if content[i] == "9" else "9") + content[i + 1 :])
        with pytest.raises(UserError, match="corrupted"):
            checkpoint.verify(path.parent)


def test_newest_valid_skips_broken_checkpoints(tmp_path):
    """A run resumes from the newest valid checkpoint. Newer broken ones give a warning and are renamed, so that they
    are neither found again nor kept instead of a good one. Without a valid one the result is None."""
    assert checkpoint.newest(tmp_path) is None and checkpoint.newest_valid(tmp_path, print) is None
    save(tmp_path, steps=(5, 9, 10))
    folder = tmp_path / "checkpoints"
    damage(folder / "step-10" / "model.safetensors", "truncated")
    damage(folder / "step-9" / "state.json", "missing")
    warnings = []
    assert checkpoint.newest_valid(tmp_path, warnings.append) == folder / "step-5"
    assert [f"step-{n}" in line for n, line in zip((10, 9), warnings, strict=True)] == [True, True]
    assert {p.name for p in folder.iterdir()} == {"step-5", "step-9.broken", "step-10.broken"}
    save(tmp_path, steps=(9,))
    checkpoint.prune(tmp_path, keep=1)
    assert checkpoint.newest_valid(tmp_path, warnings.append) == folder / "step-9" and len(warnings) == 2
    damage(folder / "step-9" / "optimizer.safetensors", "changed")
    assert checkpoint.newest_valid(tmp_path, warnings.append) is None


def test_unfinished_checkpoints_are_ignored(tmp_path):
    """A step-N.tmp left by a kill is not a checkpoint, even if complete; the next save deletes it."""
    model, optimizer = save(tmp_path, steps=(3,))
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-3", folder / "step-7.tmp")
    assert checkpoint.newest(tmp_path) == checkpoint.newest_valid(tmp_path, print) == folder / "step-3"
    (folder / "step-7.tmp" / "stray").touch()
    checkpoint.save(tmp_path, 7, model, optimizer, STATE)
    assert checkpoint.steps(tmp_path) == [3, 7] and not (folder / "step-7" / "stray").exists()
    checkpoint.verify(folder / "step-7")


def test_prune(tmp_path):
    """Keeps the newest `keep` by number and the steps in `always`; deletes leftovers, but not folders with similar
    names."""
    save(tmp_path, steps=(2, 5, 9, 10, 100))
    (tmp_path / "checkpoints" / "step-101.tmp").mkdir()
    others = [tmp_path / "checkpoints" / name for name in ("step-notes.tmp", "step-1.backup.tmp", "step-1-backup")]
    for other in others:
        other.mkdir()
    checkpoint.prune(tmp_path, keep=2, always=(5, 77))
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()} - {path.name for path in others}
    assert left == {"step-10", "step-100", "step-5"} and all(other.is_dir() for other in others)
    checkpoint.prune(tmp_path, keep=1)
    assert checkpoint.steps(tmp_path) == [100]


def test_order_of_a_save(tmp_path, monkeypatch):
    """All files are flushed to disk before the rename, the folder's names after it: a power loss leaves a whole
    checkpoint or none."""
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "rename", lambda *paths: (events.append("rename"), rename(*paths)))
    save(tmp_path)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    folder = tmp_path / "checkpoints"
    assert {path.stat().st_ino for path in (folder / "step-2").iterdir()} <= set(before)
    assert after == [folder.stat().st_ino]


@pytest.mark.parametrize("call, nth", [("rename", 1), ("fsync", 1), ("fsync", 2), ("fsync", 3), ("fsync", 4)])
def test_failed_save_keeps_the_last_checkpoint(tmp_path, monkeypatch, call, nth):
    """If writing fails at any point, the partial checkpoint is deleted and the error names the last good one."""
    model, optimizer = save(tmp_path, steps=(1,))
    original, calls = getattr(os, call), itertools.count(1)

    def refuse(*args):
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(RunError) as error:
            checkpoint.save(tmp_path, 2, model, optimizer, STATE)
    folder = tmp_path / "checkpoints"
    last = folder / "step-1"
    message = str(error.value)
    assert message.startswith(f"{folder / 'step-2'}: cannot write: No space left") and message.endswith(str(last))
    assert error.value.code == 1
    assert [p.name for p in folder.iterdir()] == ["step-1"]
    checkpoint.save(tmp_path, 2, model, optimizer, STATE)
    assert checkpoint.steps(tmp_path) == [1, 2]
