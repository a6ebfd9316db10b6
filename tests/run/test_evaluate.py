"""The `evaluate` command reads text as training does, and says what it left out. Its numbers: tests/test_train.py."""

import json
import re

import pytest
from conftest import words
from sweep_files import toml

import train
from nanochin.__main__ import run
from nanochin.base.cli import UserError


@pytest.fixture
def said(tiny, capsys):
    """`said(path, "--skip-bad", ...)`: what `evaluate` prints about a run on `path`, or its error."""
    config = tiny(name="run", tokens=1280.0)
    train.train(config, quiet=True)

    def command(*argv) -> str:
        try:
            run("evaluate", "run", f"--out={config.out}", "--data", *map(str, argv))
        except UserError as error:
            return f"error: {error}"
        return capsys.readouterr().out

    return command


def test_options_of_reading(said, tmp_path):
    """skip_bad, text_column, encoding and document_separator give the bytes and documents of the text they select."""
    texts = [words(2000, seed) for seed in range(3)]
    lines, prose, latin = (tmp_path / name for name in ("a.jsonl", "a.txt", "latin.txt"))
    lines.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts) + '{"body": null}')
    prose.write_text("<|endoftext|>".join(texts))
    latin.write_bytes("caf\xe9 ".encode("latin-1") * 100)
    assert "line 1" in said(lines) and "line 4: " in said(lines, "--text-column=body")
    both = said(lines, "--text-column=body", "--skip-bad")
    assert "note: 1 " in both and "a.jsonl" in both
    split = said(prose, "--document-separator=<|endoftext|>")
    assert re.search(r"loss.*", both)[0] == re.search(r"loss.*", split)[0]
    assert "note: a.txt: <|endoftext|> occurs 2 times" not in said(prose)
    assert "byte 3 is not utf-8" in said(latin) and "600 bytes" in said(latin, "--encoding=latin-1")


def test_train_sweep_and_evaluate_say_the_same(said, tiny, tmp_path, capsys, command):
    """The same notes, with the file, before the result."""
    path = tmp_path / "a.txt"
    path.write_bytes(words(100_000).encode() + b"\0\xff\xff")
    notes = [line for line in said(path).splitlines() if line.startswith("note: ")]
    assert len(notes) == 2 and all("a.txt" in note for note in notes)
    config = tiny(data=(str(path),), tokens=1280.0)
    train.train(config)
    table = {"kind": "grid", "data": [str(path)], "seq_len": 32, "budgets": [4e8], "models": ["16x1"]}
    (tmp_path / "some.toml").write_text(toml(table | {"cache": config.cache, "val_bytes": 4096}))
    plan = command("sweep.py", tmp_path / "some.toml", "--dry-run")
    for out in (capsys.readouterr().out, plan.stdout):
        assert set(notes) <= set(out.splitlines())
