import errno
import itertools
import os
import shutil
import stat

import pytest
import torch
from safetensors import SafetensorError

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
    optimizer = Adam(model, kind, 0.01, (0.9, 0.99), 0.1, False)
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


DAMAGE = {
    "truncated": lambda content: content[:-2],
    "changed": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "another step": lambda content: content.replace(b'"step": 2', b'"step": 3'),  # of state.json
}


def damage(path, how):
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(DAMAGE[how](path.read_bytes()))


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


FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "clock.json")
CASES = [*itertools.product(FILES, ("truncated", "changed", "missing")), ("state.json", "another step")]


@pytest.mark.parametrize("name, how", CASES)
def test_damage_is_named(tmp_path, name, how):
    """Raises UserError, which names the file."""
    model, optimizer = save(tmp_path)
    path = tmp_path / "checkpoints" / "step-2" / name
    damage(path, how)
    with pytest.raises(UserError) as error:
        checkpoint.load(path.parent, model, optimizer)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_resume_skips_broken_checkpoints(tmp_path):
    """A run resumes from the newest valid checkpoint. Newer broken ones give a warning and are renamed, so that they
    are neither found again nor kept instead of a good one. Without a valid one the state is empty."""
    model, optimizer = make()

    def resume() -> int | None:
        said.clear()
        return checkpoint.resume(tmp_path, model, optimizer, said.append).get("step")

    said: list[str] = []
    assert checkpoint.newest(tmp_path) is None is resume() and not said
    save(tmp_path, steps=(5, 9, 10))
    folder = tmp_path / "checkpoints"
    damage(folder / "step-10" / "model.safetensors", "truncated")
    damage(folder / "step-9" / "state.json", "missing")
    assert resume() == 5
    assert all(f"step-{step}" in line for step, line in zip((10, 9, 5), said, strict=True))
    assert {p.name for p in folder.iterdir()} == {"step-5", "step-9.broken", "step-10.broken"}
    save(tmp_path, steps=(9,))
    checkpoint.prune(tmp_path, keep=1)
    assert resume() == 9 and len(said) == 1
    damage(folder / "step-9" / "optimizer.safetensors", "changed")
    assert resume() is None and len(said) == 1


@pytest.mark.parametrize("options", [{"bias": True}, {"tied": False}, {"ffn": 32}])
def test_checkpoint_of_another_model(tmp_path, options):
    """A missing or unknown name or another shape: a line that names file and tensor; the model keeps its weights."""
    save(tmp_path, **options)
    model, optimizer = make(seed=1)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UserError, match=r"step-2/model.safetensors: '.*\.weight|bias' is ") as error:
        checkpoint.load(tmp_path / "checkpoints" / "step-2", model, optimizer)
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_similar_names_are_no_checkpoints(tmp_path):
    """Copies of a checkpoint under other names and files are left alone; one under the number of another step is not
    valid."""
    save(tmp_path)
    folder, model = tmp_path / "checkpoints", make(seed=1)[0]
    for name in ("step-2-copy", "step-2-old2", "step-02", "step-\u0663", "step-", "step-7.tmp.old"):
        shutil.copytree(folder / "step-2", folder / name)
    (folder / "step-8").touch()
    assert checkpoint.steps(tmp_path) == [2] and checkpoint.load_newest(tmp_path, model)[0]["step"] == 2
    shutil.copytree(folder / "step-2", folder / "step-9")
    state, errors = checkpoint.load_newest(tmp_path, model)
    assert state["step"] == 2 and list(errors) == [folder / "step-9"]


def test_modes_of_files(tmp_path):
    """All files have the permissions that umask leaves."""
    before = os.umask(0o027)
    try:
        save(tmp_path)
    finally:
        os.umask(before)
    files = list((tmp_path / "checkpoints" / "step-2").iterdir())
    assert len(files) == 4 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_unfinished_checkpoints_are_ignored(tmp_path):
    """A step-N.tmp left by a kill is not a checkpoint, even if complete; the next save deletes it."""
    model, optimizer = save(tmp_path, steps=(3,))
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-3", folder / "step-7.tmp")
    assert checkpoint.newest(tmp_path) == folder / "step-3"
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


FAILURES = [("save_file", 1), ("save_file", 2), *(("fsync", n) for n in range(1, 7)), ("rename", 1)]


@pytest.mark.parametrize("call, nth", FAILURES)
def test_failed_save_keeps_the_last_checkpoint(tmp_path, monkeypatch, call, nth):
    """If writing fails at any point, the partial checkpoint is deleted and the error names the last good one."""
    model, optimizer = save(tmp_path, steps=(1,))
    full = "No space left on device"
    owner, error = (checkpoint, SafetensorError(full)) if call == "save_file" else (os, OSError(errno.ENOSPC, full))
    original, calls, folder = getattr(owner, call), itertools.count(1), tmp_path / "checkpoints"

    def refuse(*args):
        if next(calls) == nth:
            raise error
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(RunError, match="cannot write: No space") as raised:
        patch.setattr(owner, call, refuse)
        checkpoint.save(tmp_path, 2, model, optimizer, STATE)
    message = str(raised.value)
    assert message.startswith(f"{folder / 'step-2'}: ") and message.endswith(str(folder / "step-1"))
    assert raised.value.code == 1
    assert [p.name for p in folder.iterdir()] == ["step-1"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # an error that is not the disk's
        patch.setattr(checkpoint, "to_json", lambda _: 1 / 0)
        checkpoint.save(tmp_path, 2, model, optimizer, STATE)
    assert [p.name for p in folder.iterdir()] == ["step-1"]
    checkpoint.save(tmp_path, 2, model, optimizer, STATE)
    assert checkpoint.steps(tmp_path) == [1, 2]
