"""Training from GPT-2 weights, here of a small `transformers` model with random weights."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from nanochin.base.cli import UserError
from nanochin.config import Config, make_shape
from nanochin.interop.initial import find_initial, initial_options
from nanochin.model import GPT
from nanochin.run.folder import read_log

transformers = pytest.importorskip("transformers", reason="pip install transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
V, T = 256, 48


def theirs(**options):
    """A GPT-2 with nontrivial norms and biases."""
    usual = {"vocab_size": V, "n_positions": T, "n_embd": 32, "n_layer": 3, "n_head": 4}
    usual |= {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**usual | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    theirs().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def options_of(path, **options) -> Config:
    """The options of a run that starts from `path`."""
    config = Config(init_from=str(path), **{"tokens": 1e6, "lr": 3e-5} | options)
    return initial_options(config, find_initial(config))


def ours(path, **options) -> GPT:
    """Our model with the shape and weights found at `path`."""
    config = options_of(path, **options)
    width, layers = map(int, config.model.split("x"))
    names = ("vocab_size", "seq_len", "head_size", "ffn", "norm", "positions", "activation", "bias", "tied", "qk_norm")
    model = GPT(make_shape(width, layers, **{name: getattr(config, name) for name in names}), seed=5)
    find_initial(config).load(model)
    return model


def agree(model: GPT, hf) -> bool:
    tokens = torch.randint(V, (2, model.shape.seq_len), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return (model(tokens) - hf(tokens).logits).abs().max() < 1e-4 < model(tokens).std()


def test_logits_equal_transformers(tmp_path):
    """To 1e-4, for all options of GPT-2."""
    activations = [{"activation_function": name} for name in ("gelu_new", "gelu", "gelu_pytorch_tanh")]
    shapes = [{"n_inner": 50, "n_head": 16}, {"tie_word_embeddings": False}, {"n_layer": 1, "n_head": 1}]
    for i, options in enumerate(activations + shapes):
        hf = theirs(**options)
        hf.save_pretrained(tmp_path / f"{i}")
        model = ours(tmp_path / f"{i}")
        assert agree(model, hf) and model.shape.tied == hf.config.tie_word_embeddings, options


def test_checkpoint_formats(tmp_path):
    """Several files, half precision, causal masks and no prefix as in older versions, no config.json."""
    hf = theirs(n_embd=128, n_head=2)
    hf.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3 and agree(ours(tmp_path / "many"), hf)

    hf.save_pretrained(tmp_path / "one")
    weights = load_file(tmp_path / "one/model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    old |= {f"h.{i}.attn.{kind}": torch.ones(1, 1, T, T) for i in range(3) for kind in ("bias", "masked_bias")}
    (tmp_path / "bare").mkdir()
    save_file(old, tmp_path / "bare/weights.safetensors")
    assert agree(ours(tmp_path / "bare/weights.safetensors"), hf)
    assert ours(tmp_path / "bare/weights.safetensors", head_size=32).shape.heads == 4

    hf = hf.to(torch.bfloat16)
    hf.save_pretrained(tmp_path / "half")
    assert agree(ours(tmp_path / "half"), hf.float())


def test_a_shorter_context_takes_the_first_positions(folder):
    """`seq_len` 20 of 48: the same logits for 20 tokens. The tokenizer follows from the vocabulary."""
    model = ours(folder, seq_len=20)
    assert model.shape.seq_len == 20 and agree(model, theirs())
    assert options_of(folder).tokenizer == "ids-256"


def test_training_starts_from_the_weights(tiny, folder):
    """The first loss is that of the `transformers` model; resuming works, and other weights are another run."""
    options = {"model": None, "seq_len": None, "tokenizer": "bytes", "batch_tokens": 96, "tokens": 960.0}
    config = tiny(**options, log_every=1, init_from=str(folder), name="run")
    job = train.resolve(config, train.Progress(quiet=True))
    batch = torch.from_numpy(job.windows.batch(0, 2))
    expected = theirs()(batch[:, :-1]).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(expected, batch[:, 1:].flatten()).item()
    summary = train.train(config, quiet=True)
    rows = read_log(Path(config.out) / "run")
    assert rows[0]["loss"] == pytest.approx(expected, abs=1e-4) and (summary["width"], summary["layers"]) == (32, 3)
    assert rows[9]["loss"] < rows[0]["loss"] and train.train(config, quiet=True) == summary

    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="holds a run with init_sha"):
        train.train(config, quiet=True)


@pytest.mark.parametrize(
    ("options", "stated", "message"),
    [
        ({"model": "64x3"}, {}, "`model` 64x3: .* 32x3"),
        ({"activation": "swiglu"}, {}, "`activation` swiglu: .* gelu_tanh"),
        ({"seq_len": 49}, {}, "`seq_len` 49: .* 48"),
        ({"tokenizer": "bpe"}, {}, "`tokenizer` bpe: "),
        ({"lr": None, "budget": 1e15}, {}, "needs `tokens` and `lr`"),
        ({}, {"model_type": "bert"}, "model_type bert"),
        ({}, {"n_head": 3}, "n_head 3 "),
        ({}, {"n_head": None}, "n_head None "),
        ({}, {"activation_function": "tanh"}, "activation_function tanh"),
        ({}, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ],
)
def test_contradictory_options(folder, options, stated, message):
    """An option that contradicts the shape, or a GPT-2 with features that our model lacks: one line."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | stated))
    with pytest.raises(UserError, match=message) as error:
        ours(folder, **options)
    assert "\n" not in str(error.value)


def test_invalid_weights(folder, tmp_path):
    """Missing, extra, misshapen or foreign tensors, corrupted files, and pickles, which are never loaded."""
    weights, file = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    missing = "transformer.h.1.attn.c_attn.bias"
    for tensors, named in [
        (weights | {"transformer.extra.weight": torch.ones(2)}, r"unexpected tensor transformer\.extra\.weight"),
        ({name: t for name, t in weights.items() if name != missing}, f"tensor {missing} is missing"),
        (weights | {"transformer.h.1.ln_1.weight": torch.ones(7)}, r"ln_1\.weight is \[7\], expected \[32\]"),
        ({"model.embed_tokens.weight": torch.ones(3, 3)}, "not GPT-2 weights"),
    ]:
        save_file({name: t.clone() for name, t in tensors.items()}, file)
        with pytest.raises(UserError, match=named):
            ours(folder)
    file.write_bytes(b"no tensors at all")
    with pytest.raises(UserError, match=r"model\.safetensors: corrupted"):
        ours(folder)
    file.unlink()
    pickled = folder / "pytorch_model.bin"
    pickled.write_bytes(pickle.dumps({}))
    for path in (tmp_path / "nowhere", folder, pickled):
        with pytest.raises(UserError, match=f"`init_from` {path}: ") as error:
            ours(path)
        assert ("pickle" in str(error.value)) == (path.name != "nowhere")
