"""Items that any model can be asked, their scores against float64 by hand, and what `evaluate --tasks` reports."""

import json
import re
from collections import Counter
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import pseudo_english, words

import train
from nanochin.__main__ import run
from nanochin.base.cli import UserError
from nanochin.config import make_shape
from nanochin.data.tokenizer import Tokenizer, train_bpe
from nanochin.model import GPT
from nanochin.options import EvaluateOptions
from nanochin.run.checkpoint import load_run
from nanochin.run.folder import find_run
from nanochin.run.tasks import (
    TASKS,
    WORD,
    Item,
    better,
    documents_of,
    log_probabilities,
    margins_of,
    sha_of,
    summarise,
    wilson,
)

DOCUMENTS = [pseudo_english(60_000), "é🙂 " + pseudo_english(60_000, seed=1), words(3000), "short"]
BYTES = Tokenizer("bytes")
CHANCE = {"cloze": 1 / 2, "last-word": 1 / 5}


def made(task: str, count: int = 300, passage: int = 128, seed: int = 0):
    return TASKS[task](DOCUMENTS, count, passage, seed)


def gpt(seed: int = 0, seq_len: int = 128, vocab_size: int = 256) -> GPT:
    return GPT(make_shape(16, 1, vocab_size=vocab_size, seq_len=seq_len), seed=seed)


class Copier(torch.nn.Module):
    """Expects what followed the same byte earlier in the sequence."""

    def __init__(self):
        super().__init__()
        self.shape = SimpleNamespace(seq_len=128, vocab_size=256)
        self.weight = torch.nn.Parameter(torch.zeros(1))  # says where it is

    def forward(self, x):
        same = (x[:, :, None] == x[:, None, :-1]).float().tril(-1)  # (B, T, T-1)
        return 3 * (same @ torch.nn.functional.one_hot(x[:, 1:], 256).float())  # (B, T, V)


@pytest.mark.parametrize("task", TASKS)
def test_items(task):
    """The truth follows its context in the text, and no other candidate does; all have one length and fit a passage.
    Another seed gives other items; the same seed the same ones, and fewer of them first."""
    items = made(task)
    for item in items:
        assert len({len(candidate) for candidate in item.candidates}) == 1
        assert len(set(item.candidates)) == len(item.candidates) == round(1 / CHANCE[task])
        assert len(item.context + item.candidates[0]) <= 128
        passages = [(item.context + candidate).decode() for candidate in item.candidates]
        found = [any(passage in text for text in DOCUMENTS) for passage in passages]
        assert found == [True] + [False] * (len(found) - 1)
    assert len(items) == 300 and items == made(task) and items[:50] == made(task, 50)
    assert items != made(task, seed=1)


def test_cloze_lengths():
    """Continuations begin at a word, have 8, 16, 32 and 64 bytes in turn, and are both of one document."""
    items = made("cloze")
    assert [len(item.candidates[0]) for item in items[:5]] == [8, 16, 32, 64, 8]
    for item in items:
        assert all(re.match(rb" \S", candidate) for candidate in item.candidates)
        texts = [text for text in DOCUMENTS if (item.context + item.candidates[0]).decode() in text]
        assert any(item.candidates[1].decode() in text for text in texts)


def test_last_words():
    """Only the true word is in the passage; all occur twice in the text and agree in length and capitals."""
    times = Counter(word for text in DOCUMENTS for word in WORD.findall(text))
    for item in made("last-word"):
        found = [candidate[1:-1].decode() for candidate in item.candidates]
        assert [word in WORD.findall(item.context.decode()) for word in found] == [True] + [False] * 4
        assert min(times[word] for word in found) >= 2
        assert len({word[0].isupper() for word in found}) == len({candidate[-1] for candidate in item.candidates}) == 1


def test_tokenizers_see_the_same_items():
    """Documents come back from the tokens of any tokenizer, and so do the items."""
    bpe = train_bpe(DOCUMENTS, 400)
    for tokenizer in (BYTES, bpe):
        eot = np.array([tokenizer.eot])
        tokens = np.concatenate([eot, *(p for text in DOCUMENTS for p in (tokenizer.encode(text.encode()), eot))])
        assert documents_of(tokens, tokenizer) == DOCUMENTS
    with pytest.raises(UserError, match="ids-9"):
        documents_of(np.array([1, 2]), Tokenizer("ids-9"))


@pytest.mark.parametrize("task", TASKS)
def test_random_weights_score_chance(task, one_thread):
    """Within the 99.9% interval of a binomial distribution."""
    items = made(task)
    p = CHANCE[task]
    right = summarise(margins_of(log_probabilities(gpt(), BYTES, items)))["accuracy"]
    assert abs(right - p) < 3.29 * (p * (1 - p) / len(items)) ** 0.5


def test_a_model_that_copies_finds_last_words(one_thread):
    """Words that were in the passage are far above chance for a model that repeats what it has seen."""
    low, _ = summarise(margins_of(log_probabilities(Copier(), BYTES, made("last-word", 100))))["accuracy_ci"]
    assert low > 0.5


@pytest.mark.parametrize("seq_len", [64, 128])
@pytest.mark.parametrize("vocab_size", [256, 400])
def test_log_probability_by_hand(seq_len, vocab_size, monkeypatch, one_thread):
    """Sum of log-softmax in float64 of each candidate alone, for any batch; context beyond seq_len is cut."""
    tokenizer = BYTES if vocab_size == 256 else train_bpe(DOCUMENTS, vocab_size)
    model, items = gpt(3, seq_len, vocab_size), made("cloze", 8) + made("cloze", 3, passage=200)
    expected = []
    for item in items:
        for candidate in item.candidates:
            ids = [*tokenizer.encode(item.context).tolist(), *tokenizer.encode(candidate).tolist()]
            size = len(tokenizer.encode(candidate))
            ids = torch.tensor(ids[-seq_len - 1 :])
            with torch.no_grad():
                nats = model(ids[None, :-1])[0].double().log_softmax(-1)[-size:]
            expected.append(nats[torch.arange(size), ids[-size:]].sum().item())
    for at_once in (1, 1 << 17, 1 << 24):
        monkeypatch.setattr("nanochin.run.tasks.LOGITS_AT_ONCE", at_once)
        assert log_probabilities(model, tokenizer, items).ravel().tolist() == pytest.approx(expected, rel=1e-5)


def test_candidate_longer_than_the_context():
    """Refused, with both lengths."""
    with pytest.raises(UserError, match="32 tokens.*64"):
        log_probabilities(gpt(seq_len=32), BYTES, made("cloze", 4))


def test_statistics_by_hand():
    """Wilson's interval as published calculators give it; a tie is not right; pairs are counted where they differ."""
    assert wilson(8, 10) == pytest.approx((0.490, 0.943), abs=5e-4)
    assert wilson(0, 0) == (0, 1) and wilson(0, 9)[0] == 0 and wilson(9, 9)[1] == 1
    assert margins_of(np.array([[-1.0, -3, -2], [-5, -5, -9]])).tolist() == [1, 0]
    found = summarise(np.array([1.0, 0.0, -2.0, 3.0]))
    assert (found["items"], found["accuracy"], found["margin"]) == (4, 0.5, 0.5)
    half = 1.96 * (13 / 3) ** 0.5 / 2  # deviations 0.5, -0.5, -2.5, 2.5: squares add up to 13
    assert found["margin_ci"] == pytest.approx((0.5 - half, 0.5 + half))
    assert better([1, 2, 3, 3], [0, 3, 3, 1]) == (2, 3)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def runs(tiny):
    """The configurations of two runs that differ in their tokenizers, and a context long enough."""
    configs = [
        tiny(name="a", tokens=1280.0, seq_len=128, val_bytes=16384),
        tiny(name="b", tokens=1280.0, seq_len=128, val_bytes=16384, tokenizer="bpe", vocab_size=300),
    ]
    for config in configs:
        train.train(config, quiet=True)
    return configs


def test_command(runs, tmp_path, capsys):
    """One record per run and task, with each item's margin, on the held-out text and on a file; the table and the pairs
    agree with them. Without tasks a line for each run."""
    out, path = f"--out={runs[0].out}", tmp_path / "results.json"
    argv = ["a", "b", out, "--tasks", "cloze", "last-word", "--items=20", f"--json={path}"]
    for where in (["--held-out"], ["--data", runs[0].data[0]]):
        capsys.readouterr()
        run("evaluate", *argv, *where)
        printed, records = capsys.readouterr().out, json.loads(path.read_text())
        assert [(r["run"], r["task"]) for r in records] == [(run, task) for run in "ab" for task in TASKS]
        for record in records:
            assert record["items"] == len(record["margins"]) == 20
            assert record["correct"] == [int(margin > 0) for margin in record["margins"]]
            assert f"{record['accuracy']:.3f}" in printed and record["tokens"] == 1280
        k, n = better(records[0]["margins"], records[2]["margins"])
        assert f"{k} of {n}" in printed
        if where == ["--held-out"]:
            for name, record in zip("ab", (records[0], records[2]), strict=True):
                folder = find_run(name, runs[0].out)
                summary = json.loads((folder / "summary.json").read_text())
                assert record["loss"] == pytest.approx(summary["loss"], rel=1e-6)
                assert record["data_sha"] == summary["val_sha"]
                assert record["params"] == sum(p.numel() for p in load_run(folder)[0].parameters())
    assert records[0]["data_sha"] == sha_of([pseudo_english(200_000)])

    run("evaluate", "a", "b", out, "--held-out", f"--json={path}")
    assert re.findall(r"^(\w): loss \d", capsys.readouterr().out, re.MULTILINE) == ["a", "b"]
    assert [(r["run"], "task" in r) for r in json.loads(path.read_text())] == [("a", False), ("b", False)]


def test_normalised_scores(runs, tmp_path):
    """What the context adds: log-probability after it less that after a line break."""
    path = tmp_path / "results.json"
    argv = ["a", f"--out={runs[0].out}", "--tasks=cloze", "--items=20", f"--json={path}", "--normalise"]
    run("evaluate", *argv, "--data", runs[0].data[0])
    model, tokenizer, _ = load_run(find_run("a", runs[0].out))
    items = TASKS["cloze"]([pseudo_english(200_000)], 20, 128, 0)
    alone = [Item(b"\n", item.candidates) for item in items]
    added = log_probabilities(model, tokenizer, items) - log_probabilities(model, tokenizer, alone)
    assert json.loads(path.read_text())[0]["margins"] == pytest.approx(margins_of(added), abs=2e-5)


def test_choices():
    """The options, which do not import this module, offer its tasks."""
    assert {f.name: f.metadata["choices"] for f in fields(EvaluateOptions)}["tasks"] == tuple(TASKS)


def test_refusals(runs, tmp_path):
    """A text without two items, a run whose data changed, and no text at all: one line each."""
    short = tmp_path / "short.txt"
    short.write_text(pseudo_english(200))
    usual = ["a", f"--out={runs[0].out}"]
    for argv, said in {
        ("--tasks=cloze", "--data", short): "cloze: fewer than two",
        ("--tasks=last-word", "--data", short): "last-word: fewer than two",
        ("--held-out", "--data", short): "its data_sha is",
        ("--tasks=cloze",): "`data`: missing",
    }.items():
        with pytest.raises(UserError, match=said):
            run("evaluate", *usual, *map(str, argv))
