"""Every user error is one line on stderr that names the problem, exit code 2, and no traceback."""

import io
import sys
from pathlib import Path

import pytest
from conftest import arguments, pseudo_english


@pytest.mark.parametrize(
    "options, said",
    [
        ({"data": ("{tmp}/empty.txt",)}, "empty.txt"),
        ({"data": ("{tmp}/page.txt",), "seq_len": 4096, "batch_tokens": None, "tokens": 1e6}, "--seq-len 4096: the "),
        ({"val": ("nowhere.txt",)}, "--val nowhere.txt"),
        ({"budget": 1.0, "tokens": None, "model": None, "batch_tokens": None}, "--budget 1: too small"),
        ({"tokens": 100.0}, "less than one step"),
        ({"batch_tokens": 100}, "--batch-tokens 100: must be a multiple of --seq-len 32"),
        ({"budget": 1e15}, "leave one of the three out"),
        ({"model": "15x2"}, "width 15"),
        ({"warmup_tokens": 12_800.0}, "--warmup-tokens"),
        ({"tokenizer": "gtp2"}, "--tokenizer gtp2: unknown"),
        ({"device": "cuda:99"}, "--device cuda:99: not available here"),
        ({"law": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_bad_input_is_one_line(tiny, tmp_path, options, said, refusal):
    """One line that names option and value, exit code 2, no run folder."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "page.txt").write_text(pseudo_english(4000))
    if "data" in options:
        options = options | {"data": tuple(name.format(tmp=tmp_path) for name in options["data"])}
    config = tiny(**options)
    assert said in refusal(*arguments(config))
    assert not Path(config.out).exists()


def test_a_model_that_does_not_fit(tiny, refusal):
    """One line before a folder exists; exit code 1, so that a sweep continues."""
    config = tiny(model="200000x100")
    assert "choose a smaller --model" in refusal(*arguments(config), code=1)
    assert not Path(config.out).exists()


def test_folder_of_another_run(tiny, main, refusal):
    """A run with the same name and other options: the error names the first different option."""
    assert main(*arguments(tiny(name="run"))) == 0
    folder = Path(tiny().out) / "run"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    line = refusal(*arguments(tiny(name="run", seed=1, lr=0.02)))
    assert f"{folder} holds a run with lr = 0.01, this one has 0.02: choose another --name" in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_output_that_is_not_utf8(tiny, monkeypatch, main):
    """Characters that stdout cannot encode are replaced."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr("nanochin.data.tokenizer.Tokenizer.decode", lambda *_: "caf\u00e9")
    assert main(*arguments(tiny(sample_tokens=1))) == 0
    sys.stdout.flush()
    assert b"caf?" in sys.stdout.buffer.getvalue()
