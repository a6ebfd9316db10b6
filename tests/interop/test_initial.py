"""Runs that start from a run, a checkpoint or an export. GPT-2 is in test_gpt2.py."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from nanochin.base.cli import UserError
from nanochin.base.console import Progress
from nanochin.config import Config, make_shape, parse_model, shape_maker
from nanochin.data.tokenizer import Tokenizer, train_bpe
from nanochin.interop.export import export
from nanochin.interop.initial import find_initial, initial_options
from nanochin.model import GPT
from nanochin.run import checkpoint
from nanochin.run.folder import read_log
from nanochin.run.record import describe

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = Tokenizer.load("ids-61")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu2", "swiglu")
READ_BACK = [("rmsnorm", activation) for activation in ACTIVATIONS] + [("layernorm", a) for a in ACTIVATIONS[:3]]


def make(**options) -> GPT:
    """A model whose norms and biases are not the initial ones and zeros."""
    model = GPT(make_shape(24, 2, **{"vocab_size": 61, "seq_len": 16, "head_size": 8} | options), seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7)))
    return model


def started(path, **options) -> tuple[Config, GPT]:
    """(the options of a run that starts from `path`, its model)."""
    config = Config(init_from=str(path), **options)
    initial = find_initial(config)
    config = initial_options(config, initial)
    model = GPT(shape_maker(config, config.vocab_size, config.seq_len)(*parse_model(config.model)))
    initial.load(model)
    return config, model


def equal(a: GPT, b: GPT) -> bool:
    return a.shape == b.shape and all(map(torch.equal, a.parameters(), b.parameters()))


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def base(tiny) -> Path:
    """A finished run with a BPE of its own."""
    config = tiny(name="base", tokenizer="bpe", vocab_size=300, head_size=4, activation="swiglu", save_steps=(50,))
    train.train(config, quiet=True)
    return Path(config.out) / "base"


def fine_tune(base: Path, tiny, tmp_path, **options) -> Config:
    """A run on another text that starts from `base`; it gives no shape."""
    (tmp_path / "other.txt").write_text("some words of another kind, " * 2000)
    usual = {"model": None, "seq_len": None, "lr": None, "tokens": 6400.0, "data": (str(tmp_path / "other.txt"),)}
    return tiny(**usual | {"init_from": "base", "log_every": 1, "seed": 5} | options)


def test_fine_tuning_starts_from_the_weights(base, tiny, tmp_path):
    """The first loss is that of the run's model, the text is in the run's tokens, the schedule and moments are new."""
    config = fine_tune(base, tiny, tmp_path)
    setup = train.resolve(config, Progress(quiet=True))
    model, tokenizer, _ = checkpoint.load_run(base)
    assert setup.corpus.tokenizer.rank_lines() == tokenizer.rank_lines() and setup.plan.shape == model.shape
    batch = torch.from_numpy(setup.windows.batch(0, 4))
    expected = model(batch[:, :-1], batch[:, 1:]).item()
    summary = train.train(config, quiet=True)
    rows = read_log(Path(config.out) / summary["name"])
    assert rows[0]["step"] == 1 and rows[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert rows[-1]["val_loss"] < 0.9 * rows[0]["loss"] and train.train(config, quiet=True) == summary


def test_identity_is_that_of_the_weights(base, tiny, tmp_path, monkeypatch):
    """A run, its folder, its newest checkpoint and a copy of it are the same start; another checkpoint is not, and one
    that is damaged is passed over."""

    def identity(init_from) -> dict:
        return describe(train.resolve(fine_tune(base, tiny, tmp_path, init_from=str(init_from)), Progress(quiet=True)))

    shutil.copytree(base, tmp_path / "copy")
    newest = checkpoint.newest(base)
    first, *others = (identity(path)["identity"] for path in ("base", base, newest, tmp_path / "copy"))
    assert all(other == first for other in others)
    older = identity(base / "checkpoints/step-50")["identity"]
    assert {key for key in first if first[key] != older[key]} == {"init_sha"}
    (newest / "model.safetensors").write_bytes(b"damaged")
    assert identity("base")["identity"] == older
    with pytest.raises(UserError, match="SHA-256 differs"):
        identity(newest)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model": "32x2"}, "`model` 32x2: .* 16x1"),
        ({"head_size": 8}, "`head_size` 8: .* 4"),
        ({"activation": "relu2"}, "`activation` relu2: .* swiglu"),
        ({"tied": False}, "`tied` False: .* True"),
        ({"tokenizer": "gpt2"}, "`tokenizer` gpt2: .* bpe"),
        ({"tokenizer": "bytes"}, "`tokenizer` bytes: .* bpe"),
        ({"vocab_size": 400}, "`vocab_size` 400: .* 300"),
        ({"init_from": "nowhere"}, "`init_from` nowhere: no such run"),
    ],
)
def test_options_that_contradict_the_run(base, tiny, tmp_path, options, named):
    """One line that names the option, and no folder."""
    with pytest.raises(UserError, match=named) as error:
        train.train(fine_tune(base, tiny, tmp_path, **options), quiet=True)
    assert "\n" not in str(error.value) and [path.name for path in base.parent.iterdir()] == ["base"]
    started(base, seq_len=100, model="16x1", tokenizer="bpe")  # rotary positions have any length


# ---------------------------------------------------------------------------------------------------------------------
# Exports


@pytest.mark.parametrize(("norm", "activation"), READ_BACK)
@pytest.mark.parametrize(("bias", "tied"), [*itertools.product([False, True], repeat=2)])
def test_exports_are_read_back(tmp_path, norm, activation, bias, tied):
    """Llama and GPT-NeoX: the same shape and the same weights to the bit."""
    model = make(norm=norm, activation=activation, bias=bias, tied=tied)
    export(model, IDS, tmp_path / "out")
    config, again = started(tmp_path / "out")
    assert equal(again, model) and config.tokenizer == "ids-61"


def test_an_export_as_gpt2(tmp_path):
    """It has biases; those that the run had not are zeros."""
    for bias in (True, False):
        model = make(norm="layernorm", positions="learned", bias=bias)
        export(model, IDS, tmp_path / f"{bias}")
        _, again = started(tmp_path / f"{bias}", tokens=1e6, lr=1e-4)
        ids = torch.arange(16)[None]
        assert again.shape.bias and torch.allclose(again(ids), model(ids), atol=1e-5)
        assert equal(again, model) is bias


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_the_tokenizer_of_an_export(tmp_path, name):
    """Bytes and our own BPE come with it, also if the vocabulary is padded."""
    tokenizer = Tokenizer("bytes") if name == "bytes" else train_bpe(["so many words, and more of them"], 270)
    export(make(vocab_size=288), tokenizer, tmp_path / "out")
    config, _ = started(tmp_path / "out")
    found = find_initial(config).tokenizer
    assert (config.tokenizer, config.vocab_size) == (name, 288)
    assert found.encode(b"many words").tolist() == tokenizer.encode(b"many words").tolist()
    with pytest.raises(UserError, match=f"`tokenizer` gpt2: .* has {name}"):
        started(tmp_path / "out", tokenizer="gpt2")


LAST = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("stated", "tensors", "named"),
    [
        ({"model_type": "mistral"}, {}, "model_type mistral"),
        ({"num_key_value_heads": 1}, {}, "num_key_value_heads 1, our model has 3"),
        ({"rms_norm_eps": 1e-5}, {}, "rms_norm_eps 1e-05"),
        ({"rope_theta": 5e5}, {}, "rope_theta 500000"),
        ({"rope_scaling": {"factor": 8}}, {}, "rope_scaling"),
        ({"hidden_act": "silu"}, {}, "mlp_bias True"),
        ({"hidden_act": "tanh"}, {}, "'tanh'"),
        ({"hidden_size": None}, {}, "not an export"),
        ({"hidden_size": 48}, {}, "size mismatch for embed.weight"),
        ({"num_hidden_layers": 3}, {}, "model.layers.2"),
        ({"num_hidden_layers": 1}, {}, "tensor model.layers.1"),
        ({}, {f"{LAST}.weight": torch.ones(96, 24)}, f"tensor {LAST}.weight"),  # gated, but not SwiGLU
        ({}, {f"{LAST}.bias": None}, f"tensor {LAST}.bias"),
        ({}, {"extra": torch.ones(2)}, "tensor extra"),
    ],
)
def test_models_that_are_not_exports(tmp_path, stated, tensors, named):
    """Another configuration or other tensors: one line with the first difference."""
    export(make(), IDS, tmp_path / "out")
    file, weights = tmp_path / "out/config.json", tmp_path / "out/model.safetensors"
    file.write_text(json.dumps(json.loads(file.read_text()) | stated))
    changed = {name: tensor for name, tensor in (load_file(weights) | tensors).items() if tensor is not None}
    save_file(changed, weights)
    with pytest.raises(UserError, match=named) as error:
        started(tmp_path / "out")
    assert "\n" not in str(error.value)
