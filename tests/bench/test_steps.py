"""Training steps that are timed, on tiny shapes with a stand-in for nanoGPT."""

import math

import pytest
import torch

from bench import gpu_jobs
from bench.gpu_jobs import training_step
from bench.kernels import Bench
from bench.steps import NanoGPT, our_step
from bench.train_throughput import Options, measure
from nanochin.base.cli import UserError
from nanochin.config import make_shape

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SHAPE = make_shape(16, 1, vocab_size=64, seq_len=16)

# What the bench uses of a nanoGPT checkout's model.py.
NANOGPT = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: few")
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
    def configure_optimizers(self, weight_decay, lr, betas, device_type):
        return torch.optim.SGD(self.parameters(), lr)
    def forward(self, x, y):
        logits = self.embed(x) @ self.embed.weight.T
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("nanoGPT")
    (folder / "model.py").write_text(NANOGPT)
    return str(folder)


@pytest.fixture
def step(checkout, monkeypatch):
    """A NanoGPT of 8 sequences at once."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    torch.manual_seed(0)
    return NanoGPT(checkout, SHAPE, 8, CPU, torch.float32)


@pytest.fixture
def batch():
    return torch.randint(64, (8, 17), generator=torch.Generator().manual_seed(0))


def test_cuts_do_not_change_the_gradient(step, batch):
    """That of the mean loss over all sequences, also where they come out uneven; a step then descends."""
    whole = []
    for micro_batch in (8, 3):
        step.set_micro_batch(micro_batch)
        step.gradient(batch)
        whole.append(step.model.embed.weight.grad.clone())
    torch.testing.assert_close(*whole)
    step.set_micro_batch(8)
    first, second = step(batch, 0.1), step(batch, 0.1)
    assert second[0] < first[0] and first[1] > 0
    assert step.model.embed.weight.grad is None


@pytest.mark.parametrize("fits, expected", [(8, 8), (3, 2), (1, 1)])
def test_the_micro_batch_is_halved_until_it_fits(step, batch, monkeypatch, fits, expected):
    """Out of memory, by torch or by CUDA, tries half; another error is raised, and so is memory for not even one."""

    def gradient(piece):
        if len(piece) > fits:
            raise torch.OutOfMemoryError() if len(piece) > 4 else RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(step, "gradient", gradient)
    step.compile(batch)
    assert step.micro_batch == expected
    fits = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        step.compile(batch)


def test_every_kind_is_measured(checkout, monkeypatch):
    """Our three kinds have equal losses, eager also memory by micro-batch and time by operation; nanoGPT runs with both
    kernels for attention."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    bench = Bench(CPU, torch.float32, dry=True)
    ours = {kind: list(training_step(bench, "10M", kind, None))[-1] for kind in ("graph", "eager", "compile")}
    for row in ours.values():
        assert row["losses"] == pytest.approx(ours["eager"]["losses"]) and row["losses"][-1] < row["losses"][0]
        assert row["tokens_per_s"] > 0 and row["micro_batch"] == 2
    assert set(ours["eager"]["peak_bytes_at"]) == {1, 2} and ours["eager"]["split_ms"]["aten::mm"] > 0
    for kernel in ("flash", "cudnn"):
        (theirs,) = training_step(bench, "10M", f"nanoGPT {kernel}", checkout)
        assert theirs["tokens_per_s"] > 0 and math.isfinite(theirs["losses"][0])


def test_a_step_that_falls_back_is_an_error(monkeypatch):
    """A graph that cannot be captured would be measured as eager."""
    monkeypatch.setattr(gpu_jobs, "our_step", lambda kind, *args, **_: our_step("eager", *args))
    with pytest.raises(RuntimeError, match="fell back"):
        list(training_step(Bench(CPU, torch.float32, dry=True), "10M", "graph", None))


def test_throughput():
    """Each variant is timed in processes of its own, whose failure is an error."""
    (row,) = measure("t96", Options(rounds=1, steps=1, processes=(2,)))
    assert row[0].startswith("t96 nanochin eager, 2 processes") and float(row[1]) > 0
    with pytest.raises(UserError, match="ended early"):
        measure("t96", Options(nanogpt="/nowhere", processes=()))
