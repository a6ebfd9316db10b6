"""What happens to real processes: killed at a chosen point, signalled, out of disk; and what bad input is told.

A child process runs train.py's `main` with one function patched to stop at a chosen call, so that the test knows
where the child is, looks at what it left on disk, and kills it there. Children are forked from a server that has
imported torch once (multiprocessing's "forkserver"), so that each costs a second and not four.
"""

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, arguments, tiny_config
from safetensors.torch import load_file

import nanochin.run.evaluate
import train
from nanochin.base.cli import run_command
from nanochin.config import Config
from nanochin.data import cache
from nanochin.run import checkpoint
from nanochin.run.folder import Run, read_log

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "pytest"])
PATIENCE = 120  # seconds until a child that does nothing is an error


# ---------------------------------------------------------------------------------------------------------------------
# The child


def stop_before(owner, name: str, nth: int, stop) -> None:
    """Patch a function so that its nth call first calls `stop`."""
    original, calls = getattr(owner, name), itertools.count(1)

    def stopping(*args, **kwargs):
        if next(calls) == nth:
            stop()
        return original(*args, **kwargs)

    setattr(owner, name, stopping)


def stop_in_write(nth: int, stop) -> None:
    """Stop when half of the nth tensor file is on disk; a checkpoint has two."""
    original, calls = checkpoint.save_file, itertools.count(1)

    def stopping(tensors, path):
        original(tensors, path)
        if next(calls) == nth:
            os.truncate(path, path.stat().st_size // 2)
            stop()

    checkpoint.save_file = stopping


def stop_in_tokenising(nth: int, stop) -> None:
    """Stop between the nth piece of tokens and the next."""
    original = cache.encode

    def stopping(*args):
        for number, tokens in enumerate(original(*args), start=1):
            yield tokens
            if number == nth:
                stop()

    cache.encode = stopping


STOPS = {
    "training step": lambda nth, stop: stop_before(torch.nn.utils, "clip_grad_norm_", nth, stop),  # gradient is there
    "evaluation": lambda nth, stop: stop_before(nanochin.run.evaluate, "eval_windows", nth, stop),
    "checkpoint write": stop_in_write,
    "checkpoint rename": lambda nth, stop: stop_before(checkpoint.os, "rename", nth, stop),
    "pruning": lambda nth, stop: stop_before(checkpoint, "prune", nth, stop),
    "summary": lambda nth, stop: stop_before(Run, "finish", nth, stop),
    "tokenising": stop_in_tokenising,
}


def run_child(argv: list[str], output: str, stop_at: tuple[str, int] | None, flags: Path, limit: int | None) -> None:
    """In the child: train.py with `argv`. At `stop_at` it says so by a file and waits for another one to go on, or
    limits the size of files to `limit`."""

    def stop():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return
        (flags / "there").touch()
        deadline = time.monotonic() + PATIENCE
        while not (flags / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.005)

    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train.py", *argv]
    train.peak_of = lambda *_: (1e11, "as the test says")
    if stop_at:
        STOPS[stop_at[0]](stop_at[1], stop)
    run_command(train.main, "train.py")


class Child:
    """A process that trains `config`."""

    def __init__(self, config: Config, stop_at: tuple[str, int] | None = None, limit: int | None = None):
        self.folder = Path(config.out).parent / f"child-{time.monotonic_ns()}"
        self.folder.mkdir(parents=True)
        self.output = self.folder / "output"
        args = (arguments(config), str(self.output), stop_at, self.folder, limit)
        self.process = SERVER.Process(target=run_child, args=args, daemon=True)
        self.process.start()

    def comes_there(self) -> bool:
        """Wait until it stops where it should, or ends without having come there."""
        deadline = time.monotonic() + PATIENCE
        while not (self.folder / "there").exists():
            if not self.process.is_alive():
                return False
            assert time.monotonic() < deadline, "neither comes there nor ends"
            time.sleep(0.005)
        return True

    def wait_until_there(self) -> "Child":
        assert self.comes_there(), self.said
        return self

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)
        (self.folder / "go").touch()

    def end(self) -> int:
        """Wait for the end -> exit code (minus the number of a signal that killed it)."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, "does not end"
        return self.process.exitcode

    @property
    def said(self) -> str:
        return self.output.read_text()


# ---------------------------------------------------------------------------------------------------------------------
# What a run must come to

USUAL = {"name": "run", "log_every": 7, "eval_every": 25, "save_steps": (20, 40, 60, 80)}  # of 100 steps


def outcome(out: Path) -> tuple:
    """All that must not depend on interruptions: weights, moments, log, summary; without times, and without torch's
    global generator, which a test in this process may have used."""
    folder = out / "run"
    assert not list(folder.rglob("*.tmp"))
    last = checkpoint.newest(folder)
    bits = {name: {key: tensor.tolist() for key, tensor in load_file(last / name).items() if key != "rng"}
            for name in ("model.safetensors", "optimizer.safetensors")}  # fmt: skip
    timed = ("tokens_per_s", "mfu", "seconds")
    rows = [{key: value for key, value in row.items() if key not in timed}
            for row in (*read_log(folder), json.loads((folder / "summary.json").read_text()))]  # fmt: skip
    return last.name, bits, rows


@pytest.fixture(scope="module")
def uninterrupted(text, cache, tmp_path_factory) -> tuple:
    """The outcome of the usual run, left in peace; with it the tokens come into the cache."""
    out = tmp_path_factory.mktemp("peace") / "runs"
    child = Child(tiny_config(text, cache, out, **USUAL))
    assert child.end() == 0, child.said
    return outcome(out)


@pytest.fixture
def usual(text, cache, tmp_path) -> Config:
    return tiny_config(text, cache, tmp_path / "runs", **USUAL)


def finish(config: Config) -> tuple:
    """The same command again, to its end -> outcome."""
    child = Child(config)
    assert child.end() == 0, child.said
    return outcome(Path(config.out))


# ---------------------------------------------------------------------------------------------------------------------
# kill -9


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_training_step(folder: Path) -> bool:
    rows = read_log(folder)
    return checkpoint.steps(folder) == [20, 40] and rows[-1]["step"] == 42 and not list(folder.rglob("*.tmp"))


def in_evaluation(folder: Path) -> bool:
    return [row["step"] for row in read_log(folder)][-3:] == [35, 42, 49] and checkpoint.steps(folder) == [20, 40]


def in_last_evaluation(folder: Path) -> bool:
    return read_log(folder)[-1].get("loss") is not None and checkpoint.steps(folder)[-1] == 100


def in_write(folder: Path) -> bool:
    half = folder / "checkpoints" / "step-40.tmp"
    whole = folder / "checkpoints" / "step-20"
    sizes = [(there / "optimizer.safetensors").stat().st_size for there in (half, whole)]
    unfinished = files(half) == ["model.safetensors", "optimizer.safetensors"] and sizes[0] == sizes[1] // 2
    return unfinished and checkpoint.steps(folder) == [20]


def in_rename(folder: Path) -> bool:
    complete = ["model.safetensors", "optimizer.safetensors", "state.json"]
    return files(folder / "checkpoints") == ["step-20", "step-40.tmp"] and files(
        folder / "checkpoints" / "step-40.tmp") == complete  # fmt: skip


def in_pruning(folder: Path) -> bool:
    return files(folder / "checkpoints") == ["step-20", "step-40"]


def in_summary(folder: Path) -> bool:
    return read_log(folder)[-1]["step"] == 100 and "val_loss" in read_log(folder)[-1]


PHASES = {  # where to stop, and what must lie on the disk there
    "training step": (("training step", 45), in_training_step),
    "evaluation": (("evaluation", 2), in_evaluation),
    "checkpoint write": (("checkpoint write", 4), in_write),
    "checkpoint rename": (("checkpoint rename", 2), in_rename),
    "pruning": (("pruning", 2), in_pruning),
    "last evaluation": (("evaluation", 4), in_last_evaluation),
    "summary": (("summary", 1), in_summary),
}


@pytest.mark.parametrize("phase", PHASES)
def test_killed(uninterrupted, usual, phase):
    """kill -9 in each phase, then the same command: weights, moments, log and summary of an uninterrupted run."""
    stop_at, evidence = PHASES[phase]
    child = Child(usual, stop_at).wait_until_there()
    folder = Path(usual.out) / "run"
    child.send(signal.SIGKILL)
    assert child.end() == -signal.SIGKILL
    assert evidence(folder) and not (folder / "summary.json").exists()
    assert finish(usual) == uninterrupted


@pytest.mark.parametrize("nth", [1, 2])
def test_killed_while_tokenising(uninterrupted, usual, tmp_path, nth):
    """kill -9 among the shards leaves a temporary folder that the same command replaces by the same tokens."""
    cache = tmp_path / "cache"
    config = replace(usual, cache=str(cache))
    child = Child(config, ("tokenising", nth)).wait_until_there()
    child.send(signal.SIGKILL)
    assert child.end() == -signal.SIGKILL
    folders = [path.name for path in cache.iterdir() if path.is_dir()]
    assert len(folders) == 1 and folders[0].endswith(".tmp") and not Path(config.out).exists()
    assert finish(config) == uninterrupted
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [folders[0].removesuffix(".tmp")]


def test_checkpoints_by_the_clock_change_nothing(uninterrupted, usual):
    """A run that saves as often as it can ends like one that saves only where it must."""
    assert finish(replace(usual, save_every=1e-6, keep=1)) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_again_and_again(uninterrupted, usual, seed):
    """One run killed on its way wherever chance has it, five times or until it is through, ends as if left in peace."""
    draw, kills = random.Random(seed), 0
    config = replace(usual, save_every=1e-6) if seed % 2 else usual
    often = {"training step": 40, "evaluation": 2, "checkpoint write": 6, "checkpoint rename": 3, "pruning": 3}
    for _ in range(5):
        phase = draw.choice(list(often))
        child = Child(config, (phase, draw.randint(1, often[phase])))
        if not child.comes_there():
            break
        child.send(signal.SIGKILL)
        assert child.end() == -signal.SIGKILL
        kills += 1
    assert kills >= 3
    assert finish(config) == uninterrupted


@pytest.mark.slow
def test_killed_at_twenty_moments(uninterrupted, usual):
    """`python train.py` itself, killed twenty times at moments drawn by chance, ends like a run left in peace."""
    draw, config = random.Random(0), replace(usual, save_every=1e-6)
    argv = [sys.executable, "train.py", *arguments(config)]
    log = Path(config.out) / "run" / "log.jsonl"
    for _ in range(20):
        process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = log.read_bytes() if log.exists() else b""
        while process.poll() is None and (log.read_bytes() if log.exists() else b"") == before:
            time.sleep(0.01)  # until it has come back to where the last one was killed
        time.sleep(draw.random() * 0.2)
        process.kill()
        process.wait()
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert outcome(Path(config.out)) == uninterrupted


# ---------------------------------------------------------------------------------------------------------------------
# SIGTERM and SIGINT


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("phase, saved", [("training step", 45), ("evaluation", 51), ("checkpoint rename", 40)])
def test_signalled(uninterrupted, usual, phase, saved, number, code):
    """In the loop a signal lets the step end, saves, says so in one line and exits with 128 + its number; the same
    command goes on to the same bits."""
    child = Child(usual, PHASES[phase][0]).wait_until_there()
    child.send(number)
    assert child.end() == code
    folder = Path(usual.out) / "run"
    assert checkpoint.steps(folder)[-1] == saved
    line = child.said.splitlines()[-1]
    assert line.startswith(f"train.py: stopped by {number.name}: {folder} is saved at step {saved} of 100; ")
    assert "Traceback" not in child.said
    assert finish(usual) == uninterrupted


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("phase, nth", [("tokenising", 1), ("evaluation", 4), ("summary", 1)])
def test_signalled_outside_the_loop(uninterrupted, usual, tmp_path, phase, nth, number, code):
    """While it tokenises or evaluates at the end there is nothing to save: the same exit code, and no traceback."""
    config = replace(usual, cache=str(tmp_path / "cache"))
    child = Child(config, (phase, nth)).wait_until_there()
    child.send(number)
    assert child.end() == code
    assert "Traceback" not in child.said and not list(tmp_path.glob("cache/*.tmp"))
    assert finish(config) == uninterrupted


def test_second_process_on_a_run(uninterrupted, usual, refusal):
    """While a process trains a run, the same command is refused in one line, and does not disturb it."""
    child = Child(usual, ("training step", 45)).wait_until_there()
    said = refusal(*arguments(usual))
    assert f"{usual.out}/run: another process is training this run" in said
    (child.folder / "go").touch()
    assert child.end() == 0, child.said
    assert outcome(Path(usual.out)) == uninterrupted


# ---------------------------------------------------------------------------------------------------------------------
# Full disks


@contextlib.contextmanager
def small_disk(folder: Path):
    """A file system of 1 MB at `folder`, where this user may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not (
        sys.platform == "linux" and shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0
    ):
        pytest.skip("mounting a small file system takes root and mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Fill the file system of `folder` up to `leave` bytes."""
    path = folder / "filler"
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(path, max(0, path.stat().st_size - leave))
    return path


@pytest.mark.parametrize(
    "leave, options, failed",
    [(16384, {}, "checkpoints/step-60"), (0, {"log_every": 1, "save_steps": (20, 40)}, "log.jsonl")],
)
def test_full_disk(uninterrupted, usual, tmp_path, leave, options, failed):
    """A disk that fills up during a checkpoint, or at a line of the log: one line, exit code 1, the last good
    checkpoint kept and named. With room again the same command finishes with the same bits."""
    with small_disk(tmp_path / "disk") as disk:
        config = replace(usual, out=str(disk / "runs"), **options)
        child = Child(config, ("training step", 45)).wait_until_there()
        filler = fill(disk, leave)
        (child.folder / "go").touch()
        assert child.end() == 1
        folder = disk / "runs" / "run"
        line = child.said.splitlines()[-1]
        assert line.startswith(f"train.py: {folder / failed}: cannot write: ") and "No space left" in line
        assert "Traceback" not in child.said
        if failed != "log.jsonl":
            assert line.endswith(f"; the last good checkpoint is {folder / 'checkpoints' / 'step-40'}")
        assert files(folder / "checkpoints") == ["step-20", "step-40"]
        checkpoint.verify(folder / "checkpoints" / "step-40")
        filler.unlink()
        *state, rows = finish(config)
        assert state == list(uninterrupted[:2]) and (options or rows == uninterrupted[2])


def test_file_too_large(uninterrupted, usual):
    """The same under a limit on the size of files, which needs no root."""
    child = Child(usual, ("training step", 45), limit=16384)
    assert child.end() == 1
    folder = Path(usual.out) / "run" / "checkpoints"
    line = child.said.splitlines()[-1]
    assert line.startswith(f"train.py: {folder / 'step-60'}: cannot write: ")
    assert os.strerror(errno.EFBIG) in line and line.endswith(f"; the last good checkpoint is {folder / 'step-40'}")
    assert "Traceback" not in child.said and files(folder) == ["step-20", "step-40"]
    assert finish(usual) == uninterrupted


# ---------------------------------------------------------------------------------------------------------------------
# Damage and divergence: in this process, which patches itself and calls `main`


@pytest.fixture
def interrupted(uninterrupted, usual, tiny, monkeypatch) -> Config:
    """The usual run, left at step 45 by an error that is not ours."""
    calls, original = itertools.count(1), train.train_step
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", lambda *args: 1 / 0 if next(calls) == 45 else original(*args))
        with pytest.raises(ZeroDivisionError):
            train.train(usual, quiet=True)
    assert checkpoint.steps(Path(usual.out) / "run") == [20, 40]
    return usual


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_truncated_checkpoint(uninterrupted, interrupted, capsys, name, main):
    """A checkpoint that lost its end is named, the run goes on from the one before, and ends as it should."""
    folder = Path(interrupted.out) / "run" / "checkpoints"
    os.truncate(folder / "step-40" / name, (folder / "step-40" / name).stat().st_size // 2)
    assert main(*arguments(interrupted)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"warning: {folder / 'step-40' / name}: " in out and f"resuming from {folder / 'step-20'}" in out
    shutil.rmtree(folder / "step-40.broken")
    assert outcome(Path(interrupted.out)) == uninterrupted


def test_no_checkpoint_left(uninterrupted, interrupted, capsys, main):
    """Where every checkpoint is broken the run says so of each and begins anew."""
    folder = Path(interrupted.out) / "run" / "checkpoints"
    for step in (20, 40):
        (folder / f"step-{step}" / "model.safetensors").unlink()
    assert main(*arguments(interrupted)) == 0
    assert capsys.readouterr().out.count("model.safetensors: missing; renamed to") == 2
    assert outcome(Path(interrupted.out)) == uninterrupted


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_damaged_shard(tiny, tmp_path, damage, refusal):
    """A token shard that lost its end or had a bit flipped is named, before anything is trained."""
    config = tiny(cache=str(tmp_path / "cache"))
    shard = train.resolve(config, train.Progress(quiet=True)).corpus.folder / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content if damage == "changed" else content[:-100])
    assert str(shard) in refusal(*arguments(config))
    assert not Path(config.out).exists()


@pytest.mark.parametrize("what", ["weight", "loss"])
def test_not_a_number(uninterrupted, usual, monkeypatch, what, main, refusal):
    """NaN in a weight or in a loss stops the run with the step it was seen at; the last good checkpoint is kept, and
    good."""
    calls, original = itertools.count(1), train.train_step

    def poisoned(shards, *args):
        out = original(shards, *args)
        if next(calls) == 45:
            if what == "loss":
                return torch.tensor([float("inf"), 1.0])
            with torch.no_grad():
                shards.models[0].blocks[0].attention.out.weight[0, 0] = float("nan")
        return out

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", poisoned)
        line = refusal(*arguments(usual), code=1)
    folder = Path(usual.out) / "run"
    last = folder / "checkpoints" / "step-40"
    step, loss = (46, "nan") if what == "weight" else (45, "inf")
    assert line.startswith(f"train.py: step {step}: loss {loss}, gradient norm ")
    assert line.endswith(f"Last good checkpoint: {last}\n") and files(folder / "checkpoints") == ["step-20", "step-40"]
    assert all(tensor.isfinite().all() for tensor in load_file(last / "model.safetensors").values())
    assert max(row["step"] for row in read_log(folder)) == 42
    assert main(*arguments(usual)) == 0  # it was cosmic radiation
    assert outcome(Path(usual.out)) == uninterrupted


def test_divergence(tiny, refusal):
    """A learning rate far too high really ends that way: one line, no checkpoint of it, no summary."""
    config = tiny(lr=9e5, name="run", save_every=1e-6)
    line = refusal(*arguments(config), code=1)
    assert "the run diverged, try a lower --lr" in line
    for step in checkpoint.steps(Path(config.out) / "run"):
        weights = load_file(Path(config.out) / "run" / "checkpoints" / f"step-{step}" / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())
    assert not (Path(config.out) / "run" / "summary.json").exists()


def test_divergence_at_the_last_step(tiny, monkeypatch, refusal):
    """A model that is broken by its very last step gets no summary."""
    monkeypatch.setattr("nanochin.model.GPT.forward", lambda self, x, y: self.embed.weight.sum() * float("nan"))
    monkeypatch.setattr(train, "train_step", lambda *_: torch.zeros(2))
    config = tiny(name="run", tokens=128.0)
    line = refusal(*arguments(config), code=1)
    assert "step 1: validation loss nan; the run diverged" in line
    assert not (Path(config.out) / "run" / "summary.json").exists()
