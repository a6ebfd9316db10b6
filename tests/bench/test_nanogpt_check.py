"""train.py beside another implementation, which here is a stand-in with the names of nanoGPT's parameters."""

import pytest
import torch

from bench import nanogpt_check
from bench.nanogpt_check import copy_weights, schedule
from bench.steps import NanoGPT
from nanochin.base.cli import run_command
from nanochin.config import make_shape
from nanochin.model import GPT

pytestmark = pytest.mark.usefixtures("one_thread")

# GPT-2 of torch's modules: attention by its matrix of scores, the loss by gathered log-probabilities.
NANOGPT = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.n_head
        self.c_attn, self.c_proj = nn.Linear(c.n_embd, 3 * c.n_embd), nn.Linear(c.n_embd, c.n_embd)

    def forward(self, x):
        q, k, v = self.c_attn(x).unflatten(2, (3, self.heads, -1)).unbind(2)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        return self.c_proj(torch.einsum("bhij,bjhd->bihd", scores.masked_fill(future, -1e9).softmax(-1), v).flatten(2))

class MLP(nn.Sequential):
    def __init__(self, c):
        super().__init__()
        F = 4 * c.n_embd
        self.c_fc, self.gelu, self.c_proj = nn.Linear(c.n_embd, F), nn.GELU(), nn.Linear(F, c.n_embd)

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = nn.LayerNorm(c.n_embd), Attention(c), nn.LayerNorm(c.n_embd), MLP(c)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.wte, self.transformer.wpe = (nn.Embedding(n, c.n_embd) for n in (c.vocab_size, c.block_size))
        self.transformer.h = nn.Sequential(*(Block(c) for _ in range(c.n_layer)))
        self.transformer.ln_f, self.lm_head = nn.LayerNorm(c.n_embd), nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, x, y):
        t = self.transformer
        logits = self.lm_head(t.ln_f(t.h(t.wte(x) + t.wpe.weight[: x.shape[1]])))
        return logits, -logits.log_softmax(-1).gather(2, y.clamp(min=0)[..., None]).mean()

    def configure_optimizers(self, decay, lr, betas, device):
        groups = [{"params": [p for p in self.parameters() if p.ndim == 2], "weight_decay": decay}]
        groups += [{"params": [p for p in self.parameters() if p.ndim == 1], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=betas)
"""
BROKEN = {
    "scale of attention": ("** 0.5", "** 0.6"),
    "causal mask": ("triu(1)", "triu(2)"),
    "weight decay": ("decay}", "5.0}"),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Our finished run is compared again, so that only the stand-in trains anew."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def check(text, cache, out, tmp_path, monkeypatch, capsys):
    """`check(code of model.py)`: the command on a run of a second -> (exit code, its output)."""
    monkeypatch.setattr("train.peak_of", lambda *_: (1e11, "as the test says"))

    def run(code: str = NANOGPT, *more: str) -> tuple[int, str]:
        (tmp_path / "model.py").write_text(code)
        where = [f"--nanogpt={tmp_path}", f"--data={text}", f"--cache={cache}", f"--out={out}", "--threads=1"]
        tiny = ["--val-bytes=4096", "--model=16x1", "--seq-len=32", "--budget=2e8", "--lr=0.02"]
        monkeypatch.setattr("sys.argv", ["nanogpt_check", *where, *tiny, *more])
        with pytest.raises(SystemExit) as end:
            run_command(nanogpt_check.main, "nanogpt_check")
        return end.value.code, "".join(capsys.readouterr())

    return run


def test_same_weights_same_logits(tmp_path):
    """With all parameters random, norms and biases included, each has its place in nanoGPT's model."""
    (tmp_path / "model.py").write_text(NANOGPT)
    shape = make_shape(16, 3, vocab_size=50, seq_len=8, norm="layernorm", positions="learned", bias=True)
    ours, theirs = GPT(shape), NanoGPT(str(tmp_path), shape, 1, torch.device("cpu"), torch.float32).model
    generator = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():
        parameter.data.normal_(generator=generator)
    copy_weights(ours, theirs)
    tokens = torch.randint(50, (4, 8), generator=generator)
    torch.testing.assert_close(ours(tokens), theirs(tokens, tokens)[0], rtol=1e-4, atol=1e-4)


def test_the_same_program_passes(check, tmp_path):
    """The same losses on the way and at the end, in a table that is also saved."""
    code, printed = check(NANOGPT, f"--save={tmp_path / 'table.md'}")
    table = printed.strip()
    assert code == 0 and table in (tmp_path / "table.md").read_text()
    step, _, _, difference, *_ = table.splitlines()[2].split()
    assert step == "1" and float(difference) < 1e-5
    assert float(table.split("difference ")[-1].split()[0]) < 1e-3


@pytest.mark.parametrize("part", BROKEN)
def test_another_program_fails(check, part):
    """Exit code 1 if the two differ in this."""
    assert check(NANOGPT.replace(*BROKEN[part]))[0] == 1


def test_another_schedule_fails(check, monkeypatch):
    """Exit code 1 if one of them has a constant learning rate."""
    monkeypatch.setattr(nanogpt_check, "schedule", lambda *_: 1.0)
    assert check()[0] == 1


def test_schedule():
    """Three steps of warm-up, then half a cosine from 1 to 0.1, which the step after the last would have."""
    assert [schedule(i, 13, 3.0) for i in (0, 1, 2, 3, 8, 13)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.55, 0.1])


@pytest.mark.parametrize("code", ["import no_such_module", "(", "x = 1", NANOGPT.replace("ln_f", "norm")])
def test_not_nanogpt(check, code):
    """Another model.py is refused in one line."""
    assert_refused(check(code), "--nanogpt")


def test_refused(check, out, tmp_path):
    """A folder without model.py, and a log with a step missing."""
    assert_refused(check(NANOGPT, f"--nanogpt={tmp_path / 'nowhere'}"), "--nanogpt")
    check()
    (log,) = out.glob("*/log.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[1:]))
    refused = check()
    log.write_text("".join(lines))
    assert_refused(refused, "--out")


def assert_refused(found: tuple[int, str], option: str) -> None:
    code, printed = found
    assert code == 2 and printed.count("\n") == 1 and option in printed, printed
