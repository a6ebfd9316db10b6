"""A run exported for `transformers`: the same logits, greedy text and tokens; lm-eval's perplexity."""

import functools
import itertools
import json
import os
from pathlib import Path

import pytest
import tiktoken
import tiktoken_ext.openai_public
import torch
from conftest import ROOT, pseudo_english

import train
from nanochin.base.cli import UserError
from nanochin.config import make_shape
from nanochin.data.tokenizer import END_OF_TEXT, Tokenizer, train_bpe
from nanochin.interop import export
from nanochin.interop.export import tokenizer_files
from nanochin.model import GPT
from nanochin.run import checkpoint
from nanochin.run.evaluate import evaluate
from nanochin.run.sample import generate

pytestmark = pytest.mark.usefixtures("one_thread")
V, T = 61, 24
IDS = Tokenizer.load(f"ids-{V}")
ARCHITECTURES = {"Llama": ("rmsnorm", "rotary"), "GPTNeoX": ("layernorm", "rotary"), "GPT2": ("layernorm", "learned")}
ACTIVATIONS = ("gelu", "gelu_tanh", "relu2", "swiglu")
EXPORTED = [(a, b) for a, b in itertools.product(ARCHITECTURES, ACTIVATIONS) if a == "Llama" or b != "swiglu"]
ODD = (
    "naïve ß Ω 中文字 🙂👨\u200d👩\u200d👧 עברית e\u0301 \u00a0\u2003\u3000x\r\n\n\t\tif  a:\r 1234567 don't 'tis I'LL "
    "\U0010ffff\x01\x85a\u2028b  \n  \n x   \u1680y  $\n\nhttp://a.b/c//d ...\n  "
)


def make(seed=1, **options) -> GPT:
    """A model whose norms and biases are not the initial ones and zeros."""
    model = GPT(make_shape(24, 3, **{"vocab_size": V, "seq_len": T, "head_size": 8} | options), seed=seed).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def load(folder: Path):
    """The model loaded by `transformers`, checking that every tensor was used."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def agree(model: GPT, theirs) -> bool:
    """Whether the logits differ by less than 1e-4 on the whole context."""
    tokens = torch.randint(V, (3, model.shape.seq_len), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model(tokens)
        return (theirs(tokens).logits - logits).abs().max() < 1e-4 and logits.std() > 0.5


def greedy(model, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """Greedy continuation by `generate` of transformers, with its KV cache."""
    return model.generate(prompt[None], max_new_tokens=tokens, do_sample=False, eos_token_id=None)[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("architecture", "activation"), EXPORTED)
def test_logits_and_greedy_text_are_equal(tmp_path, architecture, activation, bias, tied):
    """For every exportable combination of options: logits to 1e-4 on the whole context, and the same greedy tokens."""
    norm, positions = ARCHITECTURES[architecture]
    model = make(norm=norm, positions=positions, activation=activation, bias=bias, tied=tied)
    name = export.export(model, IDS, tmp_path / "out")
    theirs = load(tmp_path / "out")
    assert name.startswith(architecture) and name == type(theirs).__name__
    assert agree(model, theirs)
    prompt = torch.randint(V, (4,), generator=torch.Generator().manual_seed(2))
    assert greedy(theirs, prompt, T - 4).tolist() == generate(model, prompt, T - 4, temperature=0).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"head_size": 2, "ffn": 10, "vocab_size": 257},
        {"norm": "layernorm", "positions": "learned", "head_size": 24, "ffn": 7, "seq_len": 5},
        {"activation": "swiglu", "seq_len": 300},
    ],
)
def test_odd_shapes(tmp_path, options):
    """One head, head size 2, odd feed-forward widths, other vocabularies and lengths."""
    model = make(**options)
    export.export(model, Tokenizer.load(f"ids-{model.shape.vocab_size}"), tmp_path / "out")
    assert agree(model, load(tmp_path / "out"))


def test_options_that_no_architecture_has_are_named(tmp_path):
    """One line that names them, and no folder."""
    for options, named in [
        ({"qk_norm": True}, "`qk_norm`"),
        ({"norm": "rmsnorm", "positions": "learned"}, "`norm` rmsnorm with `positions` learned"),
        ({"norm": "layernorm", "activation": "swiglu"}, "`norm` layernorm with `activation` swiglu"),
    ]:
        with pytest.raises(UserError, match=named):
            export.export(make(**options), IDS, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_existing_folders(tmp_path):
    """A new or empty folder is filled; a folder with a file, or a file of that name, is rejected and unchanged."""
    file = tmp_path / "full/thesis.txt"
    for folder in ("full", "empty", "new.tmp"):
        (tmp_path / folder).mkdir()
    file.write_text("keep me")
    for folder in (file.parent, file):
        with pytest.raises(UserError, match=f"{folder}: exists"):
            export.export(make(), IDS, folder)
    for name in ("empty", "new"):
        export.export(make(), IDS, tmp_path / name)
        written = {path.name for path in (tmp_path / name).iterdir()}
        assert written == {"config.json", "generation_config.json", "model.safetensors"}
    assert [file.read_text(), *file.parent.iterdir()] == ["keep me", file]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "new", "new.tmp"]


def reload(tokenizer: Tokenizer, folder: Path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    folder.mkdir()
    for file, content in tokenizer_files(tokenizer, 10**9).items():
        (folder / file).write_text(json.dumps(content))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return transformers.AutoTokenizer.from_pretrained(folder)


def same(ours: Tokenizer, theirs, text: str) -> bool:
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    return ids == ours.encode(text.encode()).tolist() and theirs.decode(ids) == text


@functools.cache
def long_text() -> str:
    """400 KB of text: made-up English, all kinds of symbols, and this repository's code."""
    code = "".join(path.read_text() for path in sorted(ROOT.glob("*/*.py"))).replace(END_OF_TEXT, "")
    return pseudo_english(200_000, seed=3) + ODD * 50 + code[:200_000]


@functools.cache
def bpe(vocab_size: int) -> Tokenizer:
    return train_bpe([long_text()], vocab_size)


@pytest.mark.parametrize("name", ["bytes", "bpe", "gpt2", "cl100k_base"])
def test_long_text_round_trips(tmp_path, request, name):
    """The exported tokenizer gives our ids, and decodes them to the text; <|endoftext|> in a text is a token."""
    if name in ("gpt2", "cl100k_base"):
        request.getfixturevalue("tiktoken_ranks")
    ours = bpe(1000) if name == "bpe" else Tokenizer.load(name)
    theirs = reload(ours, tmp_path / "tokenizer")
    assert same(ours, theirs, long_text()) and theirs.eos_token_id == ours.eot
    assert theirs.decode([ours.eot], skip_special_tokens=True) == ""
    assert theirs(f"a{END_OF_TEXT}b")["input_ids"] == [*ours.encode(b"a"), ours.eot, *ours.encode(b"b")]


@pytest.mark.parametrize("name", tiktoken.list_encoding_names())
def test_patterns_of_every_named_encoding(tmp_path, monkeypatch, name):
    """`tokenizers` splits odd text as tiktoken does, here with the ranks of our BPE."""
    ranks = bpe(800).encoding._mergeable_ranks
    for reader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(tiktoken_ext.openai_public, reader, lambda *_, **__: ranks)
    pattern = tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]
    special = {END_OF_TEXT: 799}
    ours = Tokenizer(name, tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))
    theirs = reload(ours, tmp_path / "tokenizer")
    for text in (ODD * 3, ODD[::-1] * 3, long_text()[190_000:290_000]):
        assert same(ours, theirs, text)


def test_a_run_is_exported_by_the_command(tiny, tmp_path, command):
    """Text in, text out: greedy text from the exported tokenizer and model equals that of the run."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    config = tiny(name="run", tokenizer="bpe", vocab_size=300, model="32x2", lr=0.02)
    train.train(config, quiet=True)
    run, out = Path(config.out) / "run", tmp_path / "exported"
    done = command("-m", "nanochin", "export", run, out)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"{out}: LlamaForCausalLM; ")
    assert {path.stat().st_mode for path in out.iterdir()} == {(run / "config.json").stat().st_mode}  # by umask
    model, tokenizer, _ = checkpoint.load_run(run)
    text = Path(config.data[0]).read_text()[:15]
    theirs, words = load(out), transformers.AutoTokenizer.from_pretrained(out)
    prompt = words(text, return_tensors="pt")["input_ids"][0]
    assert prompt.tolist() == tokenizer.encode(text.encode()).tolist()
    room = model.shape.seq_len - len(prompt)
    expected = generate(model, prompt, room, temperature=0)
    found = greedy(theirs, prompt, room)
    assert room > 8 and found.tolist() == expected.tolist() and words.decode(found) == tokenizer.decode(expected)
    assert words.model_max_length == theirs.config.max_position_embeddings == model.shape.seq_len


TASK = """
task: made_up
dataset_path: json
dataset_kwargs: {{data_files: {{test: {}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_lm_eval_runs_on_the_folder(tiny, tmp_path, tokenizer, command):
    """`lm_eval --model hf` measures our bits per byte to 1e-3 on a text of whole windows, with a local task."""
    for library in ("lm_eval", "accelerate"):
        pytest.importorskip(library, reason="pip install 'lm_eval[hf]'")
    config = tiny(name="run", tokenizer=tokenizer, vocab_size={"bpe": 300}.get(tokenizer), model="32x2", lr=0.02)
    train.train(config, quiet=True)
    model, words, _ = checkpoint.load_run(Path(config.out) / "run")
    export.export(model, words, tmp_path / "exported")

    # lm-eval uses non-overlapping windows as we do, except for an incomplete last one.
    ids = words.encode(Path(config.data[0]).read_bytes()[:40_000]).tolist()
    ids = ids[: len(ids) // config.seq_len * config.seq_len]
    text = words.decode(ids)
    assert words.encode(text.encode()).tolist() == ids
    _, expected = evaluate(model, torch.tensor([words.eot, *ids]).numpy(), len(text.encode()))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "task.yaml").write_text(TASK.format(tmp_path / "text.jsonl"))

    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    options = (
        f"--model hf --model_args pretrained={tmp_path / 'exported'},dtype=float32 --tasks {tmp_path / 'task.yaml'}"
    )
    options += f" --device cpu --batch_size 8 --output_path {tmp_path / 'results'}"
    done = command("-m", "lm_eval", *options.split(), env=environment)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").rglob("*.json")
    results = json.loads(path.read_text())["results"]["made_up"]
    assert results["bits_per_byte,none"] == pytest.approx(expected, abs=1e-3)
    assert results["byte_perplexity,none"] == pytest.approx(2**expected, abs=1e-3)
