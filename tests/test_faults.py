"""Faults: a process killed or signalled at a chosen point, a full disk, damaged files, divergence.

A child process runs train.py's `main` with one function patched to stop at a chosen call. The test checks what is on
disk at that point and kills the child there. Children are forked from a server that has imported torch once
(multiprocessing's "forkserver"): one second each instead of four.
"""

import itertools
import multiprocessing
import os
import random
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
from torn import stop_at_file_operation

import nanochin.run.evaluate
import train
from nanochin.base.cli import run_command
from nanochin.base.files import read_json
from nanochin.config import Config
from nanochin.data import cache
from nanochin.data.cache import UNFINISHED
from nanochin.data.tokenizer import Tokenizer
from nanochin.run import checkpoint
from nanochin.run.folder import Run, read_log

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "pytest"])
TIMEOUT = 120  # seconds to wait for a child


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
    """Stop when half of the nth tensor file is on disk (a checkpoint has two)."""
    original, calls = checkpoint.save_file, itertools.count(1)

    def stopping(tensors, path, metadata):
        original(tensors, path, metadata)
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
    "training step": lambda nth, stop: stop_before(torch.nn.utils, "clip_grad_norm_", nth, stop),
    "evaluation": lambda nth, stop: stop_before(nanochin.run.evaluate, "eval_windows", nth, stop),
    "checkpoint write": stop_in_write,
    "checkpoint rename": lambda nth, stop: stop_before(checkpoint.os, "rename", nth, stop),
    "pruning": lambda nth, stop: stop_before(checkpoint, "prune", nth, stop),
    "summary": lambda nth, stop: stop_before(Run, "finish", nth, stop),
    "tokenising": stop_in_tokenising,
    "tokenizer": lambda nth, stop: stop_before(Tokenizer, "save", nth, stop),
}


def wait_for(path: Path, process) -> None:
    """Wait until the file exists, or the process has ended."""
    deadline = time.monotonic() + TIMEOUT
    while not path.exists() and process.is_alive():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.005)


def run_child(argv: list[str], stop_at: tuple[str, int] | None, folder: Path, ignored: tuple = (), out=None) -> None:
    """In the child: train.py with `argv`, with standard output in the file `out`. At `stop_at` it creates the file
    `there` and waits for the file `go`. Only the signals in `ignored` are ignored, whatever this process ignores."""

    def stop():
        (folder / "there").touch()
        wait_for(folder / "go", multiprocessing.parent_process())

    with open(folder / "output", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if out:
        os.dup2(os.open(out, os.O_WRONLY), 1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    sys.argv = ["train.py", *argv]
    train.peak_of = lambda *_: (1e11, "as the test says")
    if stop_at and stop_at[0] == "file operation":
        stop_at_file_operation(stop_at[1], stop, folder.parent, folder)
    elif stop_at:
        STOPS[stop_at[0]](stop_at[1], stop)
    run_command(train.main, "train.py")


class Child:
    """A process that trains `config`; the constructor waits until it has stopped at `stop_at`, if given. `others`: see
    `run_child`."""

    def __init__(self, config: Config, stop_at: tuple[str, int] | None = None, wait: bool = True, **others):
        self.folder = Path(config.out).parent / f"child-{time.monotonic_ns()}"
        self.folder.mkdir(parents=True)
        args = arguments(config), stop_at, self.folder
        self.process = SERVER.Process(target=run_child, args=args, kwargs=others, daemon=True)
        self.process.start()
        if stop_at and wait:
            wait_for(self.folder / "there", self.process)
            assert self.process.is_alive(), self.said

    def end(self, number: int | None = None) -> int:
        """Send a signal, if given, and continue to the end -> exit code (minus the number of a signal that killed)."""
        if number:
            os.kill(self.process.pid, number)
        (self.folder / "go").touch()
        self.process.join(TIMEOUT)
        assert self.process.exitcode is not None, "does not end"
        return self.process.exitcode

    @property
    def said(self) -> str:
        return (self.folder / "output").read_text()


def assert_last_line(child: Child, start: str, end: str = "") -> None:
    line = child.said.splitlines()[-1]
    assert line.startswith(f"train.py: {start}") and line.endswith(end) and "Traceback" not in child.said, child.said


# ---------------------------------------------------------------------------------------------------------------------
# The outcome that every run must reach

USUAL = {"name": "run", "log_every": 7, "eval_every": 25, "save_steps": (20, 40, 60, 80)}  # of 100 steps


def outcome(out: Path) -> tuple:
    """All that must not depend on interruptions: weights, moments, random-number state, log, summary; without times."""
    folder = out / "run"
    assert not list(folder.rglob("*.tmp"))
    last = checkpoint.newest(folder)
    tensors = [load_file(last / name) for name in ("model.safetensors", "optimizer.safetensors")]
    bits = [{key: tensor.tolist() for key, tensor in named.items()} for named in tensors]
    rows = [*read_log(folder), read_json(folder / "summary.json")]
    timed = ("tokens_per_s", "mfu", "seconds")
    return last.name, bits, [{key: value for key, value in row.items() if key not in timed} for row in rows]


def finish(config: Config) -> tuple:
    """Run the same command to its end -> outcome."""
    child = Child(config)
    assert child.end() == 0, child.said
    return outcome(Path(config.out))


@pytest.fixture(scope="module")
def uninterrupted(text, cache, tmp_path_factory) -> tuple:
    """The outcome of the usual run without interruptions. It also tokenises the text."""
    return finish(tiny_config(text, cache, tmp_path_factory.mktemp("uninterrupted") / "runs", **USUAL))


@pytest.fixture
def usual(text, cache, tmp_path) -> Config:
    return tiny_config(text, cache, tmp_path / "runs", **USUAL)


# ---------------------------------------------------------------------------------------------------------------------
# kill -9, SIGTERM and SIGINT


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


TWO, END = ["step-20", "step-40"], ["step-100", "step-20", "step-40", "step-60", "step-80"]
PHASES = {  # where to stop, the checkpoints on disk there, files of the unfinished one, step and loss of the last row
    "training step": (("training step", 45), TWO, 0, (42, "loss")),
    "evaluation": (("evaluation", 3), TWO, 0, (49, "loss")),
    "checkpoint write": (("checkpoint write", 4), ["step-20", "step-40.tmp"], 2, (35, "loss")),
    "checkpoint rename": (("checkpoint rename", 2), ["step-20", "step-40.tmp"], 4, (35, "loss")),
    "pruning": (("pruning", 2), TWO, 0, (35, "loss")),
    "last evaluation": (("evaluation", 5), END, 0, (100, "loss")),
    "summary": (("summary", 1), END, 0, (100, "val_loss")),
}


@pytest.mark.parametrize("phase", PHASES)
def test_killed(uninterrupted, usual, phase):
    """kill -9 in each phase, then the same command: weights, moments, log and summary of an uninterrupted run."""
    stop_at, checkpoints, unfinished, (step, loss) = PHASES[phase]
    assert Child(usual, stop_at).end(signal.SIGKILL) == -signal.SIGKILL
    folder = Path(usual.out) / "run"
    assert files(folder / "checkpoints") == checkpoints and not (folder / "summary.json").exists()
    assert len(list(folder.glob("checkpoints/*.tmp/*"))) == unfinished
    last = read_log(folder)[-1]
    assert last["step"] == step and loss in last
    assert finish(usual) == uninterrupted


@pytest.mark.parametrize("nth", [1, 2])
def test_killed_while_tokenising(uninterrupted, usual, tmp_path, nth):
    """kill -9 between shards leaves a temporary folder, which the same command replaces with the same tokens."""
    cache = tmp_path / "cache"
    config = replace(usual, cache=str(cache))
    assert Child(config, ("tokenising", nth)).end(signal.SIGKILL) == -signal.SIGKILL
    (temp,) = (cache / UNFINISHED).iterdir()
    assert not (cache / temp.name).exists() and not Path(config.out).exists()
    assert finish(config) == uninterrupted
    assert (cache / temp.name).exists() and not list((cache / UNFINISHED).iterdir())


def test_frequent_checkpoints_change_nothing(uninterrupted, usual):
    """A run that saves after every step has the same outcome."""
    assert finish(replace(usual, save_every=1e-6, keep=1)) == uninterrupted


def operations(config: Config, stop_at: int) -> tuple[int, int]:
    """(exit code, file operations) of a run that is killed at the operation `stop_at`, 0: never."""
    child = Child(config, ("file operation", stop_at), wait=stop_at > 0)
    code = child.end(signal.SIGKILL if stop_at else None)
    return code, int((child.folder / "operations").read_text())


def killed_everywhere(reference: tuple, usual: Config, tmp_path: Path, kills: int) -> None:
    """Kill at file operations spread evenly over a run that also tokenises, each time from nothing; the same command
    then reaches the reference."""
    at = replace(usual, out=str(tmp_path / "0" / "runs"), cache=str(tmp_path / "0" / "cache"))
    code, every = operations(at, 0)
    assert code == 0 and every > 100
    for i in range(kills):
        number = 1 + (2 * i + 1) * every // (2 * kills)
        config = replace(at, out=str(tmp_path / f"{number}" / "runs"), cache=str(tmp_path / f"{number}" / "cache"))
        assert operations(config, number)[0] == -signal.SIGKILL
        assert finish(config) == reference, number
        shutil.rmtree(tmp_path / f"{number}")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
@pytest.mark.parametrize("kills", [9, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_at_file_operations(uninterrupted, usual, tmp_path, kills):
    killed_everywhere(uninterrupted, usual, tmp_path, kills)


@pytest.mark.slow
def test_killed_at_twenty_moments(uninterrupted, usual):
    """`python train.py` itself, killed at twenty random moments, has the same outcome."""
    draw, config = random.Random(0), replace(usual, save_every=1e-6)
    argv = [sys.executable, "train.py", *arguments(config)]
    log = Path(config.out) / "run" / "log.jsonl"
    for _ in range(20):
        process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = log.read_bytes() if log.exists() else b""
        while process.poll() is None and (log.read_bytes() if log.exists() else b"") == before:
            time.sleep(0.01)  # until it logs more than before
        time.sleep(draw.random() * 0.2)
        process.kill()
        process.wait()
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert outcome(Path(config.out)) == uninterrupted


SAVED = {  # where the signal comes, the last checkpoint then; None: outside the loop there is nothing to save
    ("training step", 45): 45,
    ("evaluation", 3): 51,
    ("checkpoint rename", 2): 40,
    ("tokenising", 1): None,
    ("evaluation", 5): None,
    ("summary", 1): None,
}


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("stop_at", SAVED)
def test_signal(uninterrupted, usual, tmp_path, stop_at, number, code):
    """The step ends and is saved; one line says so; the exit code is 128 + the signal. The same command resumes."""
    own_cache = {"cache": str(tmp_path / "cache")} if stop_at[0] == "tokenising" else {}
    config, saved = replace(usual, **own_cache), SAVED[stop_at]
    child = Child(config, stop_at)
    assert child.end(number) == code
    assert "Traceback" not in child.said and not list(tmp_path.glob(f"cache/{UNFINISHED}/*"))
    if saved:
        folder = Path(config.out) / "run"
        assert checkpoint.steps(folder)[-1] == saved
        assert_last_line(child, f"stopped by {number.name}: {folder} is saved at step {saved} of 100; ")
    assert finish(config) == uninterrupted


@pytest.mark.parametrize("ignored, code", [((), 129), ((signal.SIGHUP,), 0)])
def test_closed_terminal(uninterrupted, usual, ignored, code):
    """SIGHUP saves the run; where it is ignored, as under nohup, the run goes on."""
    child = Child(usual, ("training step", 45), ignored=ignored)
    assert child.end(signal.SIGHUP) == code
    if code:
        assert checkpoint.steps(Path(usual.out) / "run")[-1] == 45 and "stopped by SIGHUP" in child.said
    assert finish(usual) == uninterrupted


def test_background_job(uninterrupted, usual):
    """Where SIGINT is ignored from the start, as in a background job of a script, it stays so."""
    assert Child(usual, ("training step", 45), ignored=(signal.SIGINT,)).end(signal.SIGINT) == 0
    assert outcome(Path(usual.out)) == uninterrupted


@pytest.mark.parametrize("options", [{}, {"sample_tokens": 9}])
def test_full_standard_output(uninterrupted, usual, options):
    """A run whose standard output takes nothing is trained to its end; one line on standard error says so."""
    child = Child(replace(usual, **options), out="/dev/full")
    assert child.end() == 0
    assert_last_line(child, "standard output: No space left on device")
    assert child.said.count("\n") == 1 and outcome(Path(usual.out)) == uninterrupted


def test_second_process_on_a_run(uninterrupted, usual, refusal):
    """While a process trains a run, the same command is refused and does not disturb it."""
    child = Child(usual, ("training step", 45))
    assert f"{usual.out}/run: another process" in refusal(*arguments(usual))
    assert child.end() == 0, child.said
    assert outcome(Path(usual.out)) == uninterrupted


@pytest.mark.parametrize(
    "leave, options, failed",
    [(16384, {}, "checkpoints/step-60"), (0, {"log_every": 1, "save_steps": (20, 40)}, "log.jsonl")],
)
def test_full_disk(uninterrupted, usual, disk, leave, options, failed):
    """A disk that fills up during a checkpoint or a row of the log: one line, exit code 1, the last good checkpoint
    kept and named. With free space again, the same command has the same outcome."""
    config = replace(usual, out=str(disk.folder / "runs"), **options)
    child, folder = Child(config, ("training step", 45)), disk.folder / "runs" / "run"
    disk.fill(leave)
    assert child.end() == 1
    last = folder / "checkpoints" / "step-40"
    assert_last_line(child, f"{folder / failed}: cannot write: ", str(last) if "step" in failed else "")
    assert "No space left" in child.said and files(folder / "checkpoints") == TWO
    checkpoint.verify(last)
    disk.filler.unlink()
    *state, rows = finish(config)
    assert state == list(uninterrupted[:2]) and (options or rows == uninterrupted[2])


@pytest.mark.parametrize("tokenizer, stop, failed", [
    ("bytes", None, "text/train/text-00000"), ("bytes", ("tokenising", 1), "train-00000.bin"),
    ("bpe", ("tokenizer", 1), "tokenizer.tiktoken"),
])  # fmt: skip
def test_full_disk_while_tokenising(usual, disk, tmp_path, tokenizer, stop, failed):
    """One line with the file, exit code 1, nothing left in the cache but a lock; then the same command has its text."""
    vocab_size = 300 if tokenizer == "bpe" else None
    here = replace(usual, cache=str(disk.folder / "cache"), tokenizer=tokenizer, vocab_size=vocab_size)
    if stop:
        child = Child(here, stop)
        disk.fill()
    else:
        disk.fill(100_000)  # of 200,000
        child = Child(here)
    assert child.end() == 1
    line = child.said.splitlines()[-1]
    assert line.startswith(f"train.py: {here.cache}/") and f"/{failed}: cannot write: No space left" in line
    assert "Traceback" not in child.said and not Path(here.out).exists()
    cached = Path(here.cache)
    assert {path.suffix or path.name for path in cached.iterdir()} == {".lock", UNFINISHED}
    assert not list((cached / UNFINISHED).iterdir())
    disk.filler.unlink()
    assert finish(here) == finish(replace(here, cache=str(tmp_path / "cache"), out=str(tmp_path / "elsewhere")))


# ---------------------------------------------------------------------------------------------------------------------
# Damage and divergence, in this process


def patched_at(monkeypatch, nth: int, fault) -> None:
    """Patch train.train_step: its nth call is `fault()`."""
    calls, original = itertools.count(1), train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: fault() if next(calls) == nth else original(*args))


@pytest.fixture
def interrupted(uninterrupted, usual, tiny, monkeypatch) -> Config:
    """The usual run, stopped in step 45 by an unexpected error."""
    with monkeypatch.context() as patch:
        patched_at(patch, 45, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(usual, quiet=True)
    assert checkpoint.steps(Path(usual.out) / "run") == [20, 40]
    return usual


@pytest.mark.parametrize(
    "names",
    [["step-40/optimizer.safetensors"], ["step-40/state.json"], ["step-40/state.json", "step-20/model.safetensors"]],
)
def test_truncated_checkpoints(uninterrupted, interrupted, capsys, names, main):
    """Truncated checkpoints are named. The run resumes from the one before, or starts from the beginning."""
    folder = Path(interrupted.out) / "run" / "checkpoints"
    for name in names:
        os.truncate(folder / name, (folder / name).stat().st_size // 2)
    assert main(*arguments(interrupted)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(f"warning: {folder / name}: " in out for name in names)
    assert (f"resuming from {folder / 'step-20'}" in out) == (len(names) == 1)
    assert outcome(Path(interrupted.out)) == uninterrupted


def test_not_finite(uninterrupted, usual, monkeypatch, main, refusal):
    """An infinite loss stops the run and names the step; the last good checkpoint is kept."""
    with monkeypatch.context() as patch:
        patched_at(patch, 45, lambda: torch.tensor([float("inf"), 1.0]))
        line = refusal(*arguments(usual), code=1)
    folder = Path(usual.out) / "run"
    assert line.startswith("train.py: step 45: loss inf, gradient norm 1.0; ")
    assert line.endswith(f": {folder / 'checkpoints' / 'step-40'}\n") and files(folder / "checkpoints") == TWO
    assert max(row["step"] for row in read_log(folder)) == 42
    assert main(*arguments(usual)) == 0  # without the fault
    assert outcome(Path(usual.out)) == uninterrupted


def test_divergence(tiny, refusal):
    """A learning rate far too high: one line, only finite checkpoints, no summary."""
    config = tiny(lr=9e5, name="run", save_every=1e-6)
    assert "the run diverged, try a lower --lr" in refusal(*arguments(config), code=1)
    for file in Path(config.out).glob("run/checkpoints/*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    assert not (Path(config.out) / "run" / "summary.json").exists()


def test_divergence_at_the_last_step(tiny, monkeypatch, refusal):
    """A model broken by its last step gets no summary."""
    monkeypatch.setattr("nanochin.model.GPT.forward", lambda self, x, y: self.embed.weight.sum() * float("nan"))
    monkeypatch.setattr(train, "train_step", lambda *_: torch.zeros(2))
    config = tiny(name="run", tokens=128.0)
    assert "step 1: validation loss nan" in refusal(*arguments(config), code=1)
    assert not (Path(config.out) / "run" / "summary.json").exists()
