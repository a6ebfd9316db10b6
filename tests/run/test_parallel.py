"""Several processes train one run: real groups over gloo, in processes forked from a server that has imported torch."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, arguments, tiny_config
from safetensors.torch import load_file

import train
from nanochin.base.cli import RunError, UserError, run_command
from nanochin.base.files import read_json
from nanochin.config import make_shape
from nanochin.data.windows import Windows
from nanochin.model import GPT
from nanochin.run import checkpoint, parallel
from nanochin.run.evaluate import evaluate
from nanochin.run.folder import read_log
from nanochin.run.optim import Adam
from nanochin.run.step import TrainingStep

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "pytest"])


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def child(rank: int, environment: dict, folder: Path, function: Callable, args: tuple) -> None:
    """Run `function(*args)` as one rank; its output, and its result as JSON, are files in `folder`."""
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    output = os.open(folder / f"output-{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    (folder / f"result-{rank}").write_text(json.dumps(function(*args)))


def together(size: int, folder: Path, function: Callable, *args) -> tuple[list[int], list[str]]:
    """Run `function(*args)` in a group of processes -> (exit codes, outputs)."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    where |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    processes = [SERVER.Process(target=child, args=(r, where, folder, function, args)) for r in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    return [process.exitcode for process in processes], [(folder / f"output-{r}").read_text() for r in range(size)]


def command(argv: list[str], fault: tuple[int, int, str] | None) -> None:
    """train.py with `argv`; `fault` (rank, step, what) happens on that rank in that step."""
    train.peak_of = lambda *_: (1e11, "as the test says")
    if fault and fault[0] == int(os.environ["RANK"]):
        calls, original = itertools.count(1), train.train_step

        def faulty(*args):
            if next(calls) == fault[1]:
                if fault[2] == "error":
                    raise RunError("a made-up error")
                os.kill(os.getpid(), fault[2])
            return original(*args)

        train.train_step = faulty
    sys.argv = ["train.py", *argv]
    run_command(train.main, "train.py")


def train_together(size: int, config, fault=None) -> tuple[list[int], list[str]]:
    return together(size, Path(config.out) / f"by-{size}", command, arguments(config), fault)


STEPS = 50
USUAL = {"name": "run", "tokens": STEPS * 192.0, "batch_tokens": 192, "log_every": 1, "save_steps": (20,)}


@pytest.fixture(scope="module")
def usual(text, cache, tmp_path_factory):
    """`usual()`: 50 steps of 6 sequences, in a new folder: among 4 ranks they do not divide."""
    return lambda **more: tiny_config(text, cache, tmp_path_factory.mktemp("runs"), **USUAL | more)


def losses(config) -> np.ndarray:
    """(steps, 2): loss and gradient norm of each step."""
    rows = [row for row in read_log(Path(config.out) / "run") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return np.array([[row["loss"], row["grad_norm"]] for row in rows])


def bits(config) -> tuple[dict, list]:
    """Weights, moments and logged numbers at the end of a run; without times."""
    last = checkpoint.newest(Path(config.out) / "run")
    files = [load_file(last / name) for name in checkpoint.DIGESTS]
    rows = [{k: v for k, v in row.items() if k not in ("tokens_per_s", "mfu")} for row in read_log(last.parents[1])]
    return {key: tensor.tolist() for file in files for key, tensor in file.items()}, rows


@pytest.fixture(scope="module")
def alone(usual):
    config = usual()
    train.train(config, quiet=True)
    return config


@pytest.fixture(scope="module")
def by_two(usual):
    config = usual()
    assert train_together(2, config)[0] == [0, 0]
    return config


# ---------------------------------------------------------------------------------------------------------------------
# The same run


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("sequences", [1, 2, 6, 7])
def test_every_window_once(monkeypatch, size, sequences):
    """The shares of all ranks are the windows of one process, in order: none twice, none missing."""
    windows = Windows(np.arange(1000, dtype=np.uint16), 8, seed=0)
    monkeypatch.setattr(parallel, "size", lambda: size)
    for step in (0, 25):  # the second spans two epochs
        parts = []
        for rank in range(size):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            ours = parallel.share(sequences)
            assert len(ours) in (sequences // size, -(-sequences // size))
            parts.append(windows.batch(step * sequences + ours.start, len(ours)))
        assert (np.concatenate(parts) == windows.batch(step * sequences, sequences)).all()


def assert_same(config, alone) -> None:
    """Losses and norms to 1e-6 at the first step and to 1e-5 at the last, the validation loss too."""
    got, want = losses(config), losses(alone)
    assert got[0] == pytest.approx(want[0], rel=1e-6)
    assert got[-1] == pytest.approx(want[-1], rel=1e-5)
    assert want[-1, 0] < want[0, 0] - 0.5
    loss = [read_json(Path(each.out) / "run" / "summary.json")["loss"] for each in (config, alone)]
    assert loss[0] == pytest.approx(loss[1], rel=1e-5)


def test_two_ranks(alone, by_two, usual):
    """Two ranks: the losses of one, and the same bits again. The number is a fact in config.json, not the identity."""
    assert_same(by_two, alone)
    again = usual()
    train_together(2, again)
    assert bits(again) == bits(by_two)
    one, two = (read_json(Path(each.out) / "run" / "config.json") for each in (alone, by_two))
    assert (one["processes"], two["processes"]) == (1, 2) and one["identity"] == two["identity"]


def test_four_ranks(alone, usual):
    """Four ranks, which share 6 sequences as 1, 2, 1, 2: the losses of one."""
    config = usual()
    assert train_together(4, config)[0] == [0, 0, 0, 0]
    assert_same(config, alone)


def copied(config, usual):
    new = usual()
    shutil.copytree(Path(config.out) / "run", Path(new.out) / "run")
    return new


def double() -> list[float]:
    """Losses of 50 steps of 2 sequences in float64, then the loss on other tokens."""
    model = GPT(make_shape(16, 1, vocab_size=31, seq_len=32), dtype=torch.float64).double()
    optimizer = Adam(model, "adamw", 0.01, (0.9, 0.95), 0.1, False)
    step = TrainingStep("eager", train.train_step, model, optimizer, 1, 1.0, 2)
    generator, ours = torch.Generator().manual_seed(0), parallel.share(2)
    batches = torch.randint(31, (STEPS, 2, 33), generator=generator)
    found = [step(batch[ours.start : ours.stop], 0.01).tolist() for batch in batches]
    tokens = torch.randint(31, (50_000,), generator=generator).numpy()
    return [*itertools.chain(*found), *evaluate(model, tokens, 1000)]


def double_in_group() -> list[float]:
    with parallel.started():
        return double()


@pytest.mark.parametrize("size", [2, 3])
def test_float64(tmp_path, size, one_thread):
    """In float64, losses and norms of all steps, and an evaluation, equal those of one process to 1e-9; also with more
    ranks than sequences. All ranks have the same."""
    codes, said = together(size, tmp_path, double_in_group)
    assert codes == [0] * size, said
    found = [json.loads((tmp_path / f"result-{rank}").read_text()) for rank in range(size)]
    assert all(other == found[0] for other in found)
    assert found[0] == pytest.approx(double(), rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Errors and signals


def lines(said: list[str]) -> list[str]:
    return [line for text in said for line in text.splitlines() if line.startswith("train.py: ")]


@pytest.fixture(scope="module")
def failed(usual):
    """The run of two ranks, of which the second meets an error in step 30."""
    config = usual()
    codes, said = train_together(2, config, (1, 30, "error"))
    assert codes == [1, 1] and lines(said) == ["train.py: rank 1: a made-up error"], said
    assert checkpoint.steps(Path(config.out) / "run") == [20, 29]
    return config


def test_error_on_one_rank(failed, by_two, usual):
    """An error on one rank is one line and ends all; rank 0 saves the last finished step. Resumed by two: the same
    bits."""
    config = copied(failed, usual)
    train_together(2, config)
    assert bits(config) == bits(by_two)


@pytest.mark.parametrize("size", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_resumed_by_others(failed, alone, usual, size, one_thread):
    """Begun by two ranks, resumed by one or four: the losses of one."""
    config = copied(failed, usual)
    if size == 1:
        train.train(config, quiet=True)
    else:
        assert train_together(size, config)[0] == [0] * size
    assert_same(config, alone)


def test_killed(usual):
    """kill -9 of rank 1: one line says so, and rank 0 saves the last finished step."""
    config = usual()
    codes, said = train_together(2, config, (1, 30, signal.SIGKILL))
    assert codes == [1, -signal.SIGKILL]
    (line,) = lines(said)
    assert "has ended" in line and "Traceback" not in said[0]
    assert checkpoint.steps(Path(config.out) / "run") == [20, 29]


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_signal(usual, rank):
    """SIGTERM of one rank stops all after the same step, saved once, with one line."""
    config = usual()
    codes, said = train_together(2, config, (rank, 30, signal.SIGTERM))
    (line,) = lines(said)
    assert codes == [143, 143] and line.startswith("train.py: stopped by SIGTERM: ") and "step 31 of 50" in line
    assert checkpoint.steps(Path(config.out) / "run") == [20, 31]


def test_before_training(by_two, usual):
    """A finished run is reported once, with exit code 0. A folder of another run, and a wrong option, are refused once,
    by rank 0 with exit code 2."""
    config = copied(by_two, usual)
    codes, said = train_together(2, config)
    assert codes == [0, 0] and "is finished: loss" in said[0] and said[1] == ""
    for more in ({"seed": 1}, {"batch_tokens": 100}):
        codes, said = train_together(2, usual(out=config.out, **more))
        assert codes[0] == 2 and codes[1] in (1, 2) and len(lines(said)) == 1 and lines(said[:1]), said


def test_environment(monkeypatch, refusal):
    """WORLD_SIZE without torchrun's other variables is refused."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert "torchrun" in refusal()


def attempts() -> dict:
    """Steps on two ranks, of which the second fails in several ways -> what each rank did, by scenario."""
    found = {}
    for name in ("eager", "compile", "graph", "graph, out of memory", "later"):
        calls, sizes, said = itertools.count(1), [], []

        def function(shards, optimizer, batch, micro_batch, clip, name=name, calls=calls, sizes=sizes):
            sizes.append(micro_batch)
            call = next(calls)
            if parallel.rank():
                if (name, call) in (("eager", 2), ("eager", 3), ("graph, out of memory", 4)):
                    raise torch.OutOfMemoryError("full")
                if (name, call) in (("compile", 2), ("graph", 4)):
                    raise RuntimeError("not possible here")
            pair = train.train_step(shards, optimizer, batch, micro_batch, clip)
            if (name, call) == ("later", 2) and parallel.rank():
                raise torch.OutOfMemoryError("full")
            return pair

        class Replay:
            """A mock CudaGraph: three calls, a capture that every rank confirms, then replays."""

            def __init__(self, function, reserve, stream, confirm):
                self.function, self.calls, self.confirm = function, 0, confirm

            def __call__(self):
                self.calls += 1
                pair = self.function()
                if self.calls == 4:
                    self.confirm()
                return pair

        model = GPT(make_shape(16, 1, vocab_size=31, seq_len=8))
        optimizer = Adam(model, "adamw", 0.01, (0.9, 0.95), 0.1, False)
        kind = name.split(",")[0].replace("later", "eager")
        step = TrainingStep(kind, function, model, optimizer, 4, 1.0, 8, said.append, Replay)
        batches = torch.randint(31, (6, 8, 9), generator=torch.Generator().manual_seed(0))
        half = parallel.share(8)
        try:
            pairs = [step(batch[half.start : half.stop], 0.01).tolist() for batch in batches]
        except UserError as error:
            return found | {name: type(error).__name__}
        found[name] = [step.kind, step.micro_batch, sizes[-1], len(said), pairs]
    return found


def attempts_in_group() -> dict:
    torch.compile = lambda model, **_: model  # loads no compiler
    with parallel.started():
        return attempts()


def test_failures_are_agreed(tmp_path):
    """Out-of-memory on one rank halves the micro-batch of both, and a kind that fails on one falls back on both; they
    keep the same weights. A failure after the gradients were averaged ends the run."""
    codes, said = together(2, tmp_path, attempts_in_group)
    assert codes == [0, 0], said
    mine, theirs = (json.loads((tmp_path / f"result-{rank}").read_text()) for rank in range(2))
    expected = {"eager": ["eager", 1, 1, 0], "compile": ["eager", 4, 4, 1], "graph": ["eager", 4, 4, 1],
                "graph, out of memory": ["graph", 2, 2, 0]}  # fmt: skip
    for name, outcome in expected.items():
        assert mine[name] == theirs[name] and mine[name][:4] == outcome, name
        assert list(itertools.chain(*mine[name][4])) == pytest.approx(
            list(itertools.chain(*mine["eager"][4])), rel=1e-4
        )
    assert theirs["later"] == "RunError" and mine["later"] == "LostRank"


@pytest.mark.slow
def test_torchrun(usual):
    """torchrun itself: SIGTERM saves once, and the same command with one more process ends the run."""
    config = usual(tokens=600 * 192.0, log_every=100)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    output = Path(config.out) / "output"
    with open(output, "w") as file:
        argv = [*torchrun, "--nproc-per-node=2", "train.py", *arguments(config)]
        process = subprocess.Popen(argv, cwd=ROOT, stdout=file, stderr=file)
        while not (Path(config.out) / "run" / "log.jsonl").exists():
            assert process.poll() is None, output.read_text()
            time.sleep(0.1)
        process.terminate()
        process.wait(60)
    (line,) = lines([output.read_text()])
    assert "stopped by SIGTERM" in line
    done = subprocess.run([*torchrun, "--nproc-per-node=3", "train.py", *arguments(config)], cwd=ROOT)
    assert done.returncode == 0 and (Path(config.out) / "run" / "summary.json").exists()
