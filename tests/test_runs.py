import dataclasses
import json
import re
import shutil

import pytest
from conftest import ROOT

import train
from nanochin import runs
from nanochin.config import Config, RunError, UserError, opt
from nanochin.console import Progress
from nanochin.record import describe

RECORD = {"identity": {"lr": 0.1, "model": "16x1", "seed": 0}, "options": {}}


def identity_of(config: Config) -> tuple[str, dict]:
    """(name, identity) that train.py gives the run of `config`."""
    job = train.resolve(config, Progress(quiet=True))
    identity = describe(job)["identity"]
    return runs.run_name(job.corpus.name, identity), identity


# ---------------------------------------------------------------------------------------------------------------------
# Identity


@pytest.mark.parametrize("tokens, words", [(12_800, "0.0128M"), (4.84e6, "4.84M"), (999.6e6, "1000M"), (5e9, "5000M")])
def test_a_name_has_plain_numbers(tokens, words):
    """Tokens in millions to three figures, without an exponent however many they are."""
    assert re.fullmatch(rf"text-64x2-{words}-[0-9a-f]{{8}}", runs.run_name("text", {"model": "64x2", "tokens": tokens}))


def test_identity_does_not_depend_on_paths(tiny, text, tmp_path):
    """The same text elsewhere, another cache and another folder of runs: the same run, by the same name."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(text, elsewhere)
    moved = tiny(data=(str(elsewhere / text.name),), cache=str(tmp_path / "cache"), out=str(tmp_path / "other"))
    name, identity = identity_of(tiny())
    assert identity_of(moved) == (name, identity)
    assert re.fullmatch(r"made-up-16x1-0\.0128M-[0-9a-f]{8}", name)
    assert str(text.parent) not in json.dumps(identity)


OTHER = {  # for every option another value than a tiny run has
    "budget": 6.7e8, "model": "24x2", "tokens": 25_600.0, "flops": "6nd", "law_approach": 1, "tokenizer": "bpe",
    "vocab_size": 300, "seq_len": 64, "head_size": 4, "ffn": 32, "norm": "layernorm", "positions": "learned",
    "activation": "swiglu", "bias": True, "tied": False, "qk_norm": True, "optimizer": "adam", "lr": 0.02,
    "batch_tokens": 256, "warmup_tokens": 256.0, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.2, "clip": 0.5,
    "z_loss": 1e-4, "schedule": "wsd", "cycle": 1.5, "final_lr": 0.2, "cooldown": 0.5, "seed": 1, "dtype": "bfloat16",
    "step": "eager", "micro_batch": 1, "threads": 2, "name": "x", "branch_from": "a@1", "log_every": 7,
    "eval_every": 9, "save_every": 5.0, "save_steps": (3,), "keep": 3, "sample_tokens": 5,
    "skip_bad": True, "kernels": "fallback",
}  # fmt: skip
# Paths, tested above or in the tests of their modules; or not to be had here.
PLACES = {"data", "val", "cache", "out", "law", "device", "val_bytes", "max_tokens", "init_from", "loggers"}


@pytest.mark.parametrize("option", [f.name for f in dataclasses.fields(Config) if f.name not in PLACES])
def test_identity_has_what_changes_the_result(tiny, option):
    """Another value of an option is another run if, and only if, it is an option that can change the result."""
    changes_result = {f.name: f.metadata["result"] for f in dataclasses.fields(Config)}
    usual = {"vocab_size": 290}  # both bytes and our BPE can have that
    same = identity_of(tiny(**usual)) == identity_of(tiny(**usual | {option: OTHER[option]}))
    assert same is not changes_result[option]


def test_records_of_version_0_1():
    """The identity of a kept run, its name, and that a new option neither renames it nor makes it another run."""

    @dataclasses.dataclass(frozen=True)
    class Later(Config):
        dropout: float = opt(0.0, "an option that came later", later=True)

    kept = json.loads((ROOT / "results/books-3e13/config.json").read_text())["identity"]
    assert runs.run_name("gutenberg-train", kept) == "gutenberg-train-96x2-17M-6352345a"
    facts = {key: kept[key] for key in ("device", "data_sha", "val_sha")}
    options = {key: value for key, value in kept.items() if key not in facts}
    assert runs.identity(Config(**options), **facts) == kept == runs.identity(Later(**options), **facts)
    other = runs.identity(Later(**options, dropout=0.1), **facts)
    assert other == kept | {"dropout": 0.1} and runs.first_difference(kept, other) == "dropout"


def test_a_key_that_is_absent_has_its_default():
    """Identities with and without a key are equal if its value is the default, whoever lacks it."""
    ours = {"model": "16x1", "clip": 1.0}
    assert runs.first_difference({"model": "16x1"}, ours) is None is runs.first_difference(ours, {"model": "16x1"})
    assert runs.first_difference({"model": "16x1", "clip": 0.5}, {"model": "16x1"}) == "clip"


def test_other_text_is_another_run(tiny, text, tmp_path):
    """A byte more, or another choice of validation text, makes another run though all options are the same."""
    longer, val = tmp_path / "made-up.txt", tmp_path / "other.txt"
    longer.write_text(text.read_text() + "x")
    val.write_text("another text to validate on " * 100)
    names = [identity_of(config)[0] for config in (
        tiny(), tiny(data=(str(longer),)), tiny(val=(str(val),)), tiny(val_bytes=2048))]  # fmt: skip
    assert len(set(names)) == 4


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def test_folder_is_held_while_open(tmp_path):
    """Nobody else can open a run inside the block; afterwards, even after an error, it is free."""
    with runs.open_run(tmp_path, "a", RECORD) as run:
        assert json.loads((run.folder / "config.json").read_text()) == RECORD
        with (
            pytest.raises(UserError, match="another process is training this run"),
            runs.open_run(tmp_path, "a", RECORD),
        ):
            pass
        with runs.open_run(tmp_path, "b", RECORD):  # another run is no matter
            pass
    with pytest.raises(ZeroDivisionError), runs.open_run(tmp_path, "a", RECORD):
        raise ZeroDivisionError
    with runs.open_run(tmp_path, "a", RECORD) as run:
        assert run.summary is None


def test_folder_of_other_options_is_refused(tmp_path):
    """A name that belongs to a run of other options: the error names folder, option and both values."""
    with runs.open_run(tmp_path, "a", RECORD):
        pass
    other = {"identity": RECORD["identity"] | {"seed": 5, "model": "24x1"}}
    with pytest.raises(UserError) as error, runs.open_run(tmp_path, "a", other):
        pass
    start = f"{tmp_path / 'a'} holds a run with model = 16x1, this one has 24x1: "
    assert str(error.value).startswith(start) and error.value.code == 2
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == RECORD
    with runs.open_run(tmp_path, "a", RECORD | {"device": "another"}) as run:  # facts about the machine may differ
        assert run.folder == tmp_path / "a"


def test_damaged_record_is_named(tmp_path):
    """A config.json that is not JSON is one line that names it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text('{"identity": ')
    with pytest.raises(UserError, match="config.json: not readable as JSON"), runs.open_run(tmp_path, "a", RECORD):
        pass


def test_place_that_cannot_be_a_folder(tmp_path):
    """A file where the folder of runs should be is one line that names it."""
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match=f"{tmp_path}/file/a: cannot write: "),
        runs.open_run(tmp_path / "file", "a", RECORD),
    ):
        pass


def test_find_run(tmp_path):
    """A run is found by its folder or by its name under `out`; anything else is an error that says where it looked."""
    with runs.open_run(tmp_path, "a", RECORD) as run:
        pass
    assert runs.find_run("a", tmp_path) == run.folder == runs.find_run(str(tmp_path / "a"), "nowhere")
    for name in ("b", str(tmp_path)):
        with pytest.raises(UserError, match=f"{name}: no run folder"):
            runs.find_run(name, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The log


ROWS = [{"step": 10, "loss": 0.1 + 0.2}, {"step": 10, "val_loss": 3.0}, {"step": 20, "loss": 1e-17},
        {"step": 20, "val_loss": 2.5}, {"step": 30, "loss": 2.0}]  # fmt: skip


@pytest.mark.parametrize("end", ["", '{"step": 40, "lo', '{"step": 40, "loss": 1.5}', "\n"])
def test_log_is_cut_to_the_checkpoint(tmp_path, end):
    """What a run that goes on from step 20 will log again is forgotten: later steps, half a line, and the evaluation
    of step 20, which follows its checkpoint. The rest stays to the bit."""
    run = runs.Run(tmp_path)
    for row in ROWS:
        run.log(row)
    kept = "".join((tmp_path / "log.jsonl").read_text().splitlines(keepends=True)[:3])
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(end)
    run.cut_log(20)
    assert (tmp_path / "log.jsonl").read_text() == kept
    assert runs.read_log(tmp_path) == ROWS[:3]


def test_no_log_yet(tmp_path):
    """A run that has logged nothing has nothing to cut."""
    runs.Run(tmp_path).cut_log(0)
    assert not (tmp_path / "log.jsonl").exists()
