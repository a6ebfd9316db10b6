"""Every user error is one line on stderr that names the problem, exit code 2, and no traceback."""

import dataclasses
import io
import math
import sys
import typing
from pathlib import Path

import pytest
from conftest import arguments, pseudo_english
from hypothesis import strategies as st

import train
from nanochin.base.cli import UserError, validate, value_type
from nanochin.base.console import Progress
from nanochin.config import Config
from nanochin.run.optim import learning_rate
from nanochin.run.record import describe, summarise


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


HINTS = {name: value_type(hint) for name, hint in typing.get_type_hints(Config).items()}
NUMBERS = [f for f in dataclasses.fields(Config) if HINTS[f.name] in (int, float)]


def numbers(f: dataclasses.Field):
    """Values of an option within its bounds, many at the limits of its type."""
    low, high = f.metadata["low"] or f.metadata["above"] or 0, f.metadata["high"]
    if HINTS[f.name] is int:
        return st.one_of(
            st.integers(low, min(high or 300, 300)), st.integers(low, high or 10**308), st.just(high or 2**31)
        )
    extremes = st.sampled_from([1e-320, 1e-45, 1e38, 1e308, 0.5, 1.0]).map(lambda x: min(max(x, low), high or x))
    return st.one_of(extremes, st.floats(low, high, allow_nan=False, allow_infinity=False))


VALUES = st.sampled_from(NUMBERS).flatmap(lambda f: st.tuples(st.just(f.name), numbers(f)))


def test_any_numbers(tiny, for_all):
    """Any values within the bounds: one line, or a run whose rates are from 0 to 1 and whose records can be read."""
    corpus = train.prepare(tiny(), Progress(quiet=True))

    def check(values: list, schedule: str) -> str:
        config = tiny(**{"batch_tokens": None, "schedule": schedule} | dict(values) | {"threads": 1})
        try:
            validate(config)
            setup = train.resolve(config, Progress(quiet=True), corpus)
        except UserError as error:
            assert "\n" not in str(error)
            return "refused"
        steps = setup.plan.steps
        rates = [learning_rate(setup.config, step) for step in {0, 1, steps // 2, steps - 1} if step < steps]
        assert all(0 <= rate <= 1 for rate in rates) and max(rates) > 0
        record = describe(setup)
        summary = summarise(setup, record, "run", 2.0, None, 1.0).summary()
        assert all(math.isfinite(value) for value in summary.values() if isinstance(value, float)), summary
        return "a run"

    for_all(check, values=st.lists(VALUES, max_size=4), schedule=st.sampled_from(["cosine", "wsd", "linear"]))


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
