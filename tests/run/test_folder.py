import dataclasses
import json
import re
import shutil

import pytest
from conftest import ROOT, arguments

import train
from nanochin.base.cli import UserError, opt
from nanochin.base.console import Progress
from nanochin.config import Config
from nanochin.run.folder import (
    BusyError,
    Run,
    check_name,
    find_run,
    first_difference,
    moved,
    open_run,
    read_log,
    read_record,
    run_identity,
    run_name,
)
from nanochin.run.record import describe

RECORD = {"identity": {"lr": 0.1, "model": "16x1", "seed": 0}, "options": {}}


def identity_of(config: Config) -> tuple[str, dict]:
    """(name, identity) of the run of `config`."""
    setup = train.resolve(config, Progress(quiet=True))
    identity = describe(setup)["identity"]
    return run_name(setup.corpus.name, identity), identity


# ---------------------------------------------------------------------------------------------------------------------
# Identity


@pytest.mark.parametrize("tokens, words", [(12_800, "0.0128M"), (999.6e6, "1000M"), (5e9, "5000M")])
def test_run_names_have_no_exponents(tokens, words):
    """Tokens are in millions with three significant digits, never with an exponent."""
    assert re.fullmatch(rf"text-64x2-{words}-[0-9a-f]{{8}}", run_name("text", {"model": "64x2", "tokens": tokens}))


def test_identity_does_not_depend_on_paths(tiny, text, tmp_path):
    """The same text in another place, another cache and another output folder give the same run name."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(text, elsewhere)
    moved = tiny(data=(str(elsewhere / text.name),), cache=str(tmp_path / "cache"), out=str(tmp_path / "other"))
    name, identity = identity_of(tiny())
    assert identity_of(moved) == (name, identity)
    assert re.fullmatch(r"made-up-16x1-0\.0128M-[0-9a-f]{8}", name)
    assert str(text.parent) not in json.dumps(identity)


OTHER = {  # every option, with a value that differs from a tiny run
    "budget": 6.7e8, "model": "24x2", "tokens": 25_600.0, "flops": "6nd", "law_approach": 1, "tokenizer": "bpe",
    "vocab_size": 300, "seq_len": 64, "head_size": 4, "ffn": 32, "norm": "layernorm", "positions": "learned",
    "activation": "swiglu", "bias": True, "tied": False, "qk_norm": True, "optimizer": "adam", "lr": 0.02,
    "batch_tokens": 256, "warmup_tokens": 256.0, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.2, "clip": 0.5,
    "z_loss": 1e-4, "epochs": 4.0, "weight_dtype": "bfloat16",
    "schedule": "wsd", "cycle": 1.5, "final_lr": 0.2, "cooldown": 0.5, "seed": 1, "dtype": "bfloat16",
    "step": "eager", "micro_batch": 1, "threads": 2, "name": "x", "branch_from": "a@1", "log_every": 7,
    "eval_every": 9, "eval_bytes": 1024, "save_every": 5.0, "save_steps": (3,), "keep": 3, "sample_tokens": 5,
    "skip_bad": True, "text_column": "content", "encoding": "latin-1", "document_separator": ". ",
    "kernels": "fallback",
}  # fmt: skip
# Tested above or with their modules, or not available here.
NOT_HERE = {"data", "val", "cache", "out", "law", "device", "val_bytes", "max_tokens", "init_from", "loggers"}


@pytest.mark.parametrize("option", [f.name for f in dataclasses.fields(Config) if f.name not in NOT_HERE])
def test_identity_has_exactly_the_options_that_change_the_result(tiny, option):
    """Changing an option changes the run if and only if the option can change the result."""
    changes_result = {f.name: f.metadata["result"] for f in dataclasses.fields(Config)}
    usual = {"vocab_size": 290}  # valid for both bytes and our BPE
    same = identity_of(tiny(**usual)) == identity_of(tiny(**usual | {option: OTHER[option]}))
    assert same is not changes_result[option]


def test_records_of_version_0_1():
    """The identity and name of an existing run are unchanged, and an option added later does not rename it."""

    @dataclasses.dataclass(frozen=True)
    class Later(Config):
        dropout: float = opt(0.0, "an option that came later", later=True)

    kept = json.loads((ROOT / "results/books-3e13/config.json").read_text())["identity"]
    assert run_name("gutenberg-train", kept) == "gutenberg-train-96x2-17M-6352345a"
    facts = {key: kept[key] for key in ("device", "data_sha", "val_sha")}
    options = {key: value for key, value in kept.items() if key not in facts}
    assert run_identity(Config(**options), **facts) == kept == run_identity(Later(**options), **facts)
    other = run_identity(Later(**options, dropout=0.1), **facts)
    assert other == kept | {"dropout": 0.1} and first_difference(kept, other) == "dropout"


def test_an_absent_key_means_its_default():
    """Identities with and without a key are equal if its value is the default, whichever lacks it."""
    ours = {"model": "16x1", "clip": 1.0}
    assert first_difference({"model": "16x1"}, ours) is None is first_difference(ours, {"model": "16x1"})
    assert first_difference({"model": "16x1", "clip": 0.5}, {"model": "16x1"}) == "clip"


def test_different_text_is_a_different_run(tiny, text, tmp_path):
    """One more byte, or other validation text, gives another run although all options are equal."""
    longer, val = tmp_path / "made-up.txt", tmp_path / "other.txt"
    longer.write_text(text.read_text() + "x")
    val.write_text("another text to validate on " * 100)
    changes = ({}, {"data": (str(longer),)}, {"val": (str(val),)}, {"val_bytes": 2048})
    assert len({identity_of(tiny(**change))[0] for change in changes}) == 4


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def test_folder_is_locked_while_open(tmp_path):
    """Another process cannot open a run inside the block; afterwards, even after an error, it is unlocked."""
    with pytest.raises(ZeroDivisionError), open_run(tmp_path, "a", RECORD) as run:
        assert read_record(run.folder) == RECORD == run.began
        with pytest.raises(BusyError), open_run(tmp_path, "a", RECORD):
            pass
        with open_run(tmp_path, "b", RECORD):  # other runs are not locked
            raise ZeroDivisionError
    with open_run(tmp_path, "a", RECORD) as run:
        assert run.summary is None


def test_folder_of_a_different_run_is_rejected(tmp_path):
    """A name used by a run with other options is refused, and its folder unchanged; the device may differ."""
    with open_run(tmp_path, "a", RECORD):
        pass
    other = {"identity": RECORD["identity"] | {"seed": 5, "model": "24x1"}}
    with pytest.raises(UserError, match="model = 16x1, this one has 24x1"), open_run(tmp_path, "a", other):
        pass
    assert read_record(tmp_path / "a") == RECORD
    with open_run(tmp_path, "a", RECORD | {"device": "another"}) as run:
        assert run.folder == tmp_path / "a"


def test_find_run(tmp_path):
    """Finds a run by its folder or by its name under `out`; otherwise raises UserError with the name."""
    with open_run(tmp_path, "a", RECORD) as run:
        pass
    assert find_run("a", tmp_path) == run.folder == find_run(str(tmp_path / "a"), "nowhere")
    with pytest.raises(UserError, match="b: no run folder"):
        find_run("b", tmp_path)


ROWS = [{"step": 10, "loss": 0.1 + 0.2}, {"step": 10, "val_loss": 3.0}, {"step": 20, "loss": 1e-17},
        {"step": 20, "val_loss": 2.5}, {"step": 30, "loss": 2.0}]  # fmt: skip


@pytest.mark.parametrize("end", ["", '{"step": 40, "lo', '{"step": 40, "loss": 1.5}', "\n"])
def test_log_is_cut_to_the_checkpoint(tmp_path, end):
    """Resuming from step 20 removes the rows that are logged again: later steps, an incomplete line, and the
    evaluation at step 20, which follows its checkpoint. The rest is bit-identical. Without a log nothing happens."""
    run = Run(tmp_path)
    run.cut_log(0)
    assert not (tmp_path / "log.jsonl").exists()
    for row in ROWS:
        run.log(row)
    kept = "".join((tmp_path / "log.jsonl").read_text().splitlines(keepends=True)[:3])
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(end)
    run.cut_log(20)
    assert (tmp_path / "log.jsonl").read_text() == kept
    assert read_log(tmp_path) == ROWS[:3]


GOOD = {"step": 3, "tokens": 9, "loss": 2.5, "mfu": None}
BAD = [b"{", b"\xff\xfe", b"[1]", b"7", b"null", b"[" * 10_000, b'{"loss": 2.5}', b'{"step": 3.5}', b'{"step": true}',
       b'{"step": 1, "loss": "2"}', b'{"step": 1, "loss": null}', b'{"step": 1, "loss": NaN}',
       b'{"step": 1, "tokens": 1' + b"0" * 400 + b"}"]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_damaged_lines_of_a_log(tmp_path, bad):
    """A line that is no row is left out wherever it stands; one note counts them. A folder is no log."""
    path, notes = tmp_path / "log.jsonl", []
    good = json.dumps(GOOD).encode()
    for lines in ([bad, good, good], [good, bad, bad, good], [good, good, bad]):
        path.write_bytes(b"\n".join(lines) + b"\n")
        assert read_log(tmp_path, notes.append) == [GOOD, GOOD]
        assert f"{path}: left out {len(lines) - 2} damaged line" in notes.pop() and not notes
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="log.jsonl: cannot be read"):
        read_log(tmp_path)


@pytest.mark.parametrize("left", ["log.jsonl", "summary.json", "checkpoints"])
def test_lost_config(tmp_path, left):
    """A folder with results whose config.json was lost is refused: it could be that of a run with other options."""
    with open_run(tmp_path, "a", RECORD) as run:
        pass
    (run.folder / "config.json").unlink()
    (run.folder / left).touch()
    with pytest.raises(UserError, match=f"{run.folder}/config.json: cannot be read"), open_run(tmp_path, "a", RECORD):
        pass


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "/a", "a\n", "\x1b[31m", "a\0"])
def test_names_that_are_no_folders(tiny, refusal, name):
    """--name is refused in one line, without a folder."""
    with pytest.raises(UserError, match="^`name` "):
        check_name(name)
    if "\0" not in name:
        assert "--name" in refusal(*arguments(tiny(name=name)), *([] if name else ["--name="]))
    check_name("a b-1.5@\u00e9...")


def test_moved_to_another_machine(tiny, capsys):
    """A note names what a run began with and now has not; without a difference there is none."""
    now = {"device": "cpu", "threads": 2, "versions": {"torch": "2.9"}}
    assert moved(now, now) == moved({}, now) == ""
    assert moved(now, {"device": "gpu", "threads": 1, "versions": {}}) == "device cpu, threads 2, torch 2.9"
    with open_run(tiny().out, "run", describe(train.resolve(tiny(threads=1), Progress(quiet=True)))):
        pass
    train.train(tiny(name="run", threads=2))
    assert "note: this run began with threads 1;" in capsys.readouterr().out
