"""A run as a folder that `transformers` loads: python -m nanochin export RUN OUT

Written are config.json, generation_config.json, model.safetensors (float32) and, where the tokenizer is known,
tokenizer.json and tokenizer_config.json; none of it needs `transformers` to be installed here. The architecture is
the one that expresses the run exactly:

    LayerNorm, learned positions     GPT-2       any activation but swiglu
    LayerNorm, rotary positions      GPT-NeoX    any activation but swiglu
    RMSNorm, rotary positions        Llama       any activation

Biases that a run does without are written as zeros where the architecture has them. Llama's feed-forward is gated,
activation(gate) * up; one without a gate is the case up = 1: a matrix of zeros and a bias of ones.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanochin.checkpoint import load_run
from nanochin.config import Shape, UserError, opt, parse, run_renamed
from nanochin.files import writing
from nanochin.gpt2 import gpt2_name
from nanochin.model import GPT, ROTARY_THETA
from nanochin.runs import find_run
from nanochin.tokenizer import END_OF_TEXT, Tokenizer

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu2": "relu2", "swiglu": "silu"}
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class ExportOptions:
    run: str = opt(None, "the run: its folder, or its name under --out", positional=True)
    folder: str = opt(None, "folder to write, new or empty", positional=True)
    out: str = opt("runs", "folder of all runs")


def export(model: GPT, tokenizer: Tokenizer, folder: str | Path) -> str:
    """Write `model` and `tokenizer` into `folder`; returns the architecture's name.

    Raises UserError for options that no architecture expresses and for a folder that holds something.
    """
    folder = Path(folder).resolve()
    convert = architecture(model.shape)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder; name a new one")
    ours = {name: p.detach() for name, p in model.named_parameters()}
    tensors, config = convert(ours, model.shape)
    end = None if tokenizer.numbers else tokenizer.eot
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    config |= ends | {"vocab_size": model.shape.vocab_size, "tie_word_embeddings": model.shape.tied, "dtype": "float32"}
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with writing(folder), tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as around:
        aside = Path(around, "export")
        aside.mkdir()
        save_file(
            {name: t.contiguous().clone() for name, t in tensors.items()},
            aside / "model.safetensors",
            metadata={"format": "pt"},
        )
        files = {"config.json": config, "generation_config.json": ends}
        if not tokenizer.numbers:
            files |= tokenizer_files(tokenizer, model.shape.seq_len)
        for name, content in files.items():
            (aside / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        os.replace(aside, folder)
    return config["architectures"][0]


def architecture(shape: Shape):
    """The function that converts a model of this shape. Raises UserError naming the options that none expresses."""
    if shape.qk_norm:
        refused = "`qk_norm`"
    elif shape.norm == "rmsnorm" and shape.positions == "learned":
        refused = "`norm` rmsnorm with `positions` learned"
    elif shape.norm == "layernorm" and shape.activation == "swiglu":
        refused = "`norm` layernorm with `activation` swiglu"
    else:
        return to_llama if shape.norm == "rmsnorm" else to_gpt2 if shape.positions == "learned" else to_neox
    raise UserError(f"this run cannot be exported: neither Llama nor GPT-2 nor GPT-NeoX has {refused}")


# ---------------------------------------------------------------------------------------------------------------------
# The architectures: (their tensors, their configuration)


def to_gpt2(ours: Weights, shape: Shape) -> tuple[Weights, dict]:
    tensors = {}
    for name, tensor in with_biases(ours).items():
        theirs, transposed = gpt2_name(name, shape.layers)
        tensors[theirs] = tensor.T if transposed else tensor
    return tensors, {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": shape.width,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_inner": shape.ffn,
        "n_positions": shape.seq_len,
        "activation_function": ACTIVATIONS[shape.activation],
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def to_neox(ours: Weights, shape: Shape) -> tuple[Weights, dict]:
    """Its queries, keys and values are packed head by head, (H, 3, D); ours are (3, H, D)."""
    full, tensors = with_biases(ours), {}
    for name, theirs in (("embed", "gpt_neox.embed_in"), ("head", "embed_out")):
        if f"{name}.weight" in full:
            tensors[f"{theirs}.weight"] = full[f"{name}.weight"]
    for i, first, second in norms(shape):
        block, prefix = f"blocks.{i}", f"gpt_neox.layers.{i}"
        for kind in ("weight", "bias"):
            qkv = full[f"{block}.attention.qkv.{kind}"].unflatten(0, (3, shape.heads, shape.head_size))
            tensors |= {
                f"{prefix}.attention.query_key_value.{kind}": qkv.transpose(0, 1).flatten(0, 2),
                f"{prefix}.attention.dense.{kind}": full[f"{block}.attention.out.{kind}"],
                f"{prefix}.mlp.dense_h_to_4h.{kind}": full[f"{block}.feed_forward.up.{kind}"],
                f"{prefix}.mlp.dense_4h_to_h.{kind}": full[f"{block}.feed_forward.down.{kind}"],
                f"{prefix}.input_layernorm.{kind}": full[f"{first}.{kind}"],
                f"{prefix}.post_attention_layernorm.{kind}": full[f"{second}.{kind}"],
            }
    for kind in ("weight", "bias"):
        tensors[f"gpt_neox.final_layer_norm.{kind}"] = full[f"blocks.{shape.layers - 1}.norm2.{kind}"]
    return tensors, {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        **sizes(shape),
        "layer_norm_eps": 1e-5,
        "attention_bias": True,
        "use_parallel_residual": False,
        "rotary_pct": 1.0,
        "rotary_emb_base": ROTARY_THETA,
        "rope_parameters": rope() | {"partial_rotary_factor": 1.0},
    }


def to_llama(ours: Weights, shape: Shape) -> tuple[Weights, dict]:
    gated = shape.activation == "swiglu"
    tensors = {"model.embed_tokens.weight": ours["embed.weight"]}
    if not shape.tied:
        tensors["lm_head.weight"] = ours["head.weight"]
    for i, first, second in norms(shape):
        block, prefix = f"blocks.{i}", f"model.layers.{i}"
        tensors[f"{prefix}.input_layernorm.weight"] = ours[f"{first}.weight"]
        tensors[f"{prefix}.post_attention_layernorm.weight"] = ours[f"{second}.weight"]
        for kind in ("weight", "bias") if shape.bias else ("weight",):
            q, k, v = ours[f"{block}.attention.qkv.{kind}"].chunk(3)
            up = ours[f"{block}.feed_forward.up.{kind}"]
            gate, up = up.chunk(2) if gated else (up, torch.full_like(up, float(kind == "bias")))
            tensors |= {
                f"{prefix}.self_attn.q_proj.{kind}": q,
                f"{prefix}.self_attn.k_proj.{kind}": k,
                f"{prefix}.self_attn.v_proj.{kind}": v,
                f"{prefix}.self_attn.o_proj.{kind}": ours[f"{block}.attention.out.{kind}"],
                f"{prefix}.mlp.gate_proj.{kind}": gate,
                f"{prefix}.mlp.up_proj.{kind}": up,
                f"{prefix}.mlp.down_proj.{kind}": ours[f"{block}.feed_forward.down.{kind}"],
            }
        if not gated and not shape.bias:
            tensors |= {
                f"{prefix}.mlp.gate_proj.bias": torch.zeros(shape.ffn),
                f"{prefix}.mlp.up_proj.bias": torch.ones(shape.ffn),
                f"{prefix}.mlp.down_proj.bias": torch.zeros(shape.width),
            }
    tensors["model.norm.weight"] = ours[f"blocks.{shape.layers - 1}.norm2.weight"]
    return tensors, {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes(shape),
        "num_key_value_heads": shape.heads,
        "head_dim": shape.head_size,
        "rms_norm_eps": 1e-6,
        "attention_bias": shape.bias,
        "mlp_bias": shape.bias or not gated,
        "rope_theta": ROTARY_THETA,
        "rope_parameters": rope(),
    }


def sizes(shape: Shape) -> dict:
    """What NeoX and Llama call by the same names."""
    return {
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "hidden_act": ACTIVATIONS[shape.activation],
        "max_position_embeddings": shape.seq_len,
    }


def rope() -> dict:
    """As `transformers` 5 has it; older versions read rope_theta or rotary_emb_base."""
    return {"rope_type": "default", "rope_theta": ROTARY_THETA}


def norms(shape: Shape) -> list[tuple[int, str, str]]:
    """(i, the norm before its attention, the norm before its feed-forward) of every block, by our names."""
    return [(i, f"blocks.{i - 1}.norm2" if i else "norm", f"blocks.{i}.norm1") for i in range(shape.layers)]


def with_biases(ours: Weights) -> Weights:
    """`ours` with zeros for the biases that the run does without."""
    full = dict(ours)
    for name, tensor in ours.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module not in ("embed", "positions", "head"):
            full.setdefault(f"{module}.bias", torch.zeros(len(tensor)))
    return full


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


def tokenizer_files(tokenizer: Tokenizer, seq_len: int) -> dict[str, dict]:
    """tokenizer.json, as the `tokenizers` library reads it, and what `transformers` wants to know beside it.

    One thing differs: as everywhere in `transformers`, the string <|endoftext|> in a text is read as end-of-text.
    """
    letter = byte_letters()
    if tokenizer.encoding is None:  # bytes: id 0, which text never contains, is end-of-text
        vocab = {letter[byte]: byte for byte in range(256) if byte != tokenizer.eot} | {END_OF_TEXT: tokenizer.eot}
        merges, split = [], []
    else:
        ranks = tokenizer.encoding._mergeable_ranks
        spell = {token: "".join(letter[byte] for byte in token) for token in ranks}
        vocab = {spell[token]: rank for token, rank in ranks.items()} | {END_OF_TEXT: tokenizer.eot}
        merges = [[spell[left], spell[right]] for left, right in all_merges(ranks)]
        pattern = {"Regex": oniguruma(tokenizer.encoding._pat_str)}
        split = [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {
        "id": tokenizer.eot,
        "content": END_OF_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "vocab": vocab,
        "merges": merges,
    }
    return {
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, byte_level]}, "post_processor": None,
            "decoder": byte_level, "model": model,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": seq_len, "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, "clean_up_tokenization_spaces": False,
        },
    }  # fmt: skip


def byte_letters() -> list[str]:
    """The visible letter that stands for each byte in a byte-level vocabulary (GPT-2): itself where it is visible in
    Latin-1, else the next one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(0x100 + hidden.index(byte)) for byte in range(256)]


def all_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, in the order of what it makes. tiktoken needs no such list: it joins
    neighbours whenever both together are a token, the lowest rank first, and this says the same."""
    pairs = []
    for token in sorted(ranks, key=ranks.get):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        cuts = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        pairs += sorted(cuts, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
    return pairs


def oniguruma(pattern: str) -> str:
    """tiktoken's pattern for the regular expressions of `tokenizers`, where {1,3}+ is no possessive quantifier and $
    the end of a line."""
    return pattern.replace("{1,3}+", "{1,3}").replace("{1,2}+", "{1,2}").replace("$", r"\z")


def main(argv: list[str] | None = None) -> None:
    options = parse(ExportOptions, argv, prog="python -m nanochin export", description=__doc__)
    model, tokenizer, _ = load_run(find_run(options.run, options.out))
    name = export(model, tokenizer, options.folder)
    print(f'{options.folder}: {name}; AutoModelForCausalLM.from_pretrained("{options.folder}") loads it')
    if tokenizer.numbers:
        print(f"note: no tokenizer in it: this run was trained on token files without one ({tokenizer.name})")


if __name__ == "__main__":
    run_renamed(main, "export")
