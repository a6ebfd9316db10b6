"""Export a run as a folder that `transformers` loads: python -m nanochin export RUN OUT

Writes config.json, generation_config.json, model.safetensors (float32) and, if the tokenizer is known, tokenizer.json
and tokenizer_config.json, without needing `transformers`. The architecture is the one that matches the run exactly:

    LayerNorm, learned positions     GPT-2       any activation but swiglu
    LayerNorm, rotary positions      GPT-NeoX    any activation but swiglu
    RMSNorm, rotary positions        Llama       any activation

Biases that only the architecture has are zeros. Llama's feed-forward is gated, activation(gate) * up; an ungated one is
written with up = 1: a matrix of zeros and a bias of ones.
"""

import json
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from nanochin.base.cli import UserError
from nanochin.base.files import writing
from nanochin.config import Shape
from nanochin.data.tokenizer import END_OF_TEXT, Tokenizer, bpe_of
from nanochin.interop.gpt2 import transpose_matrix
from nanochin.interop.names import GPT2, LLAMA, NEOX, rename
from nanochin.model import GPT, ROTARY_THETA
from nanochin.options import ExportOptions
from nanochin.run.checkpoint import load_run, save_tensors
from nanochin.run.folder import find_run

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu2": "relu2", "swiglu": "silu"}
ROPE = {"rope_type": "default", "rope_theta": ROTARY_THETA}  # `transformers` 5; rope_theta, rotary_emb_base before it
Weights = dict[str, Tensor]
BYTES = Tokenizer("bytes")


def export(model: GPT, tokenizer: Tokenizer, folder: str | Path) -> str:
    """Write `model` and `tokenizer` into `folder`; returns the architecture's name. Raises UserError if no architecture
    supports the run's options, or if the folder is not empty."""
    folder = Path(folder).resolve()
    convert = architecture(model.shape)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder; choose a new one")
    tensors, config = convert({name: p.detach() for name, p in model.named_parameters()}, model.shape)
    end = None if tokenizer.numbers else tokenizer.eot
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    config |= ends | {"vocab_size": model.shape.vocab_size, "tie_word_embeddings": model.shape.tied, "dtype": "float32"}
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with writing(folder), tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as parent:
        temp = Path(parent, "export")
        temp.mkdir()
        copies = {name: t.contiguous().clone() for name, t in tensors.items()}
        save_tensors(copies, temp / "model.safetensors", metadata={"format": "pt"})
        files = {"config.json": config, "generation_config.json": ends}
        if not tokenizer.numbers:
            files |= tokenizer_files(tokenizer, model.shape.seq_len)
        for name, content in files.items():
            (temp / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        os.replace(temp, folder)
    return config["architectures"][0]


def architecture(shape: Shape):
    """The function that converts a model of this shape. Raises UserError naming options that no architecture has."""
    if shape.qk_norm:
        unsupported = "`qk_norm`"
    elif shape.norm == "rmsnorm" and shape.positions == "learned":
        unsupported = "`norm` rmsnorm with `positions` learned"
    elif shape.norm == "layernorm" and shape.activation == "swiglu":
        unsupported = "`norm` layernorm with `activation` swiglu"
    else:
        return to_llama if shape.norm == "rmsnorm" else to_gpt2 if shape.positions == "learned" else to_neox
    raise UserError(f"this run cannot be exported: Llama, GPT-2 and GPT-NeoX do not support {unsupported}")


# ---------------------------------------------------------------------------------------------------------------------
# Architectures: (tensors, config.json)


def to_gpt2(ours: Weights, shape: Shape) -> tuple[Weights, dict]:
    renamed = {rename(name, shape.layers, GPT2): tensor for name, tensor in with_biases(ours).items()}
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": shape.width,
              "n_layer": shape.layers, "n_head": shape.heads, "n_inner": shape.ffn, "n_positions": shape.seq_len,
              "activation_function": ACTIVATIONS[shape.activation], "layer_norm_epsilon": 1e-5,
              **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)}  # fmt: skip
    return {name: transpose_matrix(name, tensor) for name, tensor in renamed.items()}, config


def to_neox(ours: Weights, shape: Shape) -> tuple[Weights, dict]:
    """NeoX packs queries, keys and values per head, (H, 3, D); we pack them as (3, H, D)."""
    tensors = {}
    for name, tensor in with_biases(ours).items():
        if ".qkv." in name:
            tensor = tensor.unflatten(0, (3, shape.heads, shape.head_size)).transpose(0, 1).flatten(0, 2)
        tensors[rename(name, shape.layers, NEOX)] = tensor
    return tensors, {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", **sizes(shape),
        "layer_norm_eps": 1e-5, "attention_bias": True, "use_parallel_residual": False, "rotary_pct": 1.0,
        "rotary_emb_base": ROTARY_THETA, "rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}  # fmt: skip


def to_llama(ours: Weights, shape: Shape) -> tuple[Weights, dict]:
    gated, tensors = shape.activation == "swiglu", {}
    for name, tensor in (ours if gated else with_biases(ours, "feed_forward")).items():
        theirs = rename(name, shape.layers, LLAMA)
        if ".qkv." in name:
            tensors |= {theirs.format(part): t for part, t in zip("qkv", tensor.chunk(3), strict=True)}
        elif ".up." in name:
            one = torch.full_like(tensor, float(name.endswith("bias")))  # the projection that is 1 for every input
            gate, up = tensor.chunk(2) if gated else (tensor, one)
            tensors |= {theirs.format("gate"): gate, theirs.format("up"): up}
        else:
            tensors[theirs] = tensor
    return tensors, {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes(shape),
        "num_key_value_heads": shape.heads, "head_dim": shape.head_size, "rms_norm_eps": 1e-6,
        "attention_bias": shape.bias, "mlp_bias": shape.bias or not gated, "rope_theta": ROTARY_THETA,
        "rope_parameters": ROPE}  # fmt: skip


def sizes(shape: Shape) -> dict:
    """Config entries with the same name in NeoX and Llama."""
    return {"hidden_size": shape.width, "intermediate_size": shape.ffn, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "hidden_act": ACTIVATIONS[shape.activation],
        "max_position_embeddings": shape.seq_len}  # fmt: skip


def with_biases(ours: Weights, within: str = "") -> Weights:
    """`ours` with zeros for missing biases, of the modules with `within` in their name."""
    full = dict(ours)
    for name, tensor in ours.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module not in ("embed", "positions", "head") and within in module:
            full.setdefault(f"{module}.bias", torch.zeros(len(tensor)))
    return full


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


def tokenizer_files(tokenizer: Tokenizer, seq_len: int) -> dict[str, dict]:
    """tokenizer.json for the `tokenizers` library, and tokenizer_config.json for `transformers`. Unlike with our
    tokenizer, <|endoftext|> in a text becomes end-of-text, as everywhere in `transformers`."""
    letter = _byte_letters()
    if tokenizer.encoding is None:  # bytes: id 0, which text never contains, is end-of-text
        vocab = {letter[byte]: byte for byte in range(256) if byte != tokenizer.eot} | {END_OF_TEXT: tokenizer.eot}
        merges, split = [], []
    else:
        ranks = tokenizer.encoding._mergeable_ranks
        spell = {token: "".join(letter[byte] for byte in token) for token in ranks}
        vocab = {spell[token]: rank for token, rank in ranks.items()} | {END_OF_TEXT: tokenizer.eot}
        merges = [[spell[left], spell[right]] for left, right in _all_merges(ranks)]
        pattern = {"Regex": _oniguruma(tokenizer.encoding._pat_str)}
        split = [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {"id": tokenizer.eot, "content": END_OF_TEXT}
    special |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    unused = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    model = {"type": "BPE"} | dict.fromkeys(unused) | {"fuse_unk": False, "byte_fallback": False}
    return {
        "tokenizer.json": {
            "version": "1.0",
            **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
            "added_tokens": [special],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, byte_level]},
            "decoder": byte_level,
            "model": model | {"ignore_merges": True, "vocab": vocab, "merges": merges},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": seq_len,
            **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
            "clean_up_tokenization_spaces": False,
        },
    }


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of an export, if it is `bytes` or our BPE; else None."""
    byte = {letter: i for i, letter in enumerate(_byte_letters())}
    try:
        stated = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        ids = {word: i for word, i in stated["model"]["vocab"].items() if word != END_OF_TEXT}
        found = bpe_of({bytes(byte[c] for c in word): i for word, i in ids.items()}) if len(ids) > 255 else BYTES
        return found if tokenizer_files(found, 0)["tokenizer.json"] == stated else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _byte_letters() -> list[str]:
    """GPT-2's character for each byte: the byte itself if printable in Latin-1, else the next one from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(0x100 + hidden.index(byte)) for byte in range(256)]


def _all_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that forms a token, by the rank of the result: tiktoken merges any neighbours that form a
    token, lowest rank first."""
    pairs = []
    for token in sorted(ranks, key=ranks.get):
        places = (i for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks)
        cuts = [(token[:i], token[i:]) for i in places]
        pairs += sorted(cuts, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
    return pairs


def _oniguruma(pattern: str) -> str:
    """tiktoken's pattern for `tokenizers`, whose {1,3}+ is not possessive and whose $ is the end of a line."""
    return pattern.replace("{1,3}+", "{1,3}").replace("{1,2}+", "{1,2}").replace("$", r"\z")


def main(options: ExportOptions) -> None:
    model, tokenizer, _ = load_run(find_run(options.run, options.out))
    name = export(model, tokenizer, options.folder)
    print(f'{options.folder}: {name}; AutoModelForCausalLM.from_pretrained("{options.folder}") loads it')
    if tokenizer.numbers:
        print(f"note: exported without a tokenizer: the run's token files name none ({tokenizer.name})")
