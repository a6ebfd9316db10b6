"""Start a run from GPT-2 weights in `transformers` format: its names for our tensors, its options for ours.

GPT-2 stores linear layers transposed (in x out, "Conv1D") and packs queries, keys and values as our model does. Only
safetensors are read: pytorch_model.bin is a pickle, which can run code.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanochin.base.cli import UserError
from nanochin.base.files import sha256_of
from nanochin.config import Config
from nanochin.interop.names import GPT2, rename
from nanochin.model import GPT

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"}
GPT2_VOCAB = 50257


def transpose_matrix(name: str, tensor: Tensor) -> Tensor:
    """GPT-2 stores the matrices of its blocks transposed."""
    return tensor.T if name.startswith(GPT2["blocks"]) and tensor.ndim == 2 else tensor


def initial_options(config: Config) -> Config:
    """`config` with the shape of the weights in `init_from`. Raises UserError if they are not GPT-2's, if an option
    contradicts their shape, or without length or learning rate: the rules that derive them are for new models."""
    what, sizes = f"`init_from` {config.init_from}", {name: t.get_shape() for name, t in _tensors(config.init_from)}
    try:
        (V, C), (T, _) = sizes["transformer.wte.weight"], sizes["transformer.wpe.weight"]
        F = sizes["transformer.h.0.mlp.c_fc.weight"][1]
    except (KeyError, ValueError, IndexError):
        raise UserError(f"{what}: not GPT-2 weights (no wte, wpe or h.0.mlp.c_fc)") from None
    layers = sum(name.endswith("ln_1.weight") for name in sizes)
    stated = _read_config(config.init_from, C)
    theirs = {"norm": "layernorm", "positions": "learned", "bias": True, "qk_norm": False, "activation": "gelu_tanh"}
    theirs |= {"model": f"{C}x{layers}", "head_size": config.head_size or 64, "ffn": F, "vocab_size": V}
    theirs |= {"tied": "lm_head.weight" not in sizes} | stated
    for f in dataclasses.fields(Config):
        given = getattr(config, f.name)
        if f.name in theirs and given not in (f.default, theirs[f.name]):
            raise UserError(f"`{f.name}` {given}: {what} has {theirs[f.name]}; leave the option out")
    if (config.seq_len or T) > T:
        raise UserError(f"`seq_len` {config.seq_len}: {what} has {T} learned positions; use that or less")
    if config.tokenizer == "bpe":
        raise UserError(f"`tokenizer` bpe: a newly trained vocabulary does not match {what}")
    if config.lr is None or not (config.tokens or config.budget):
        raise UserError(f"{what}: needs `tokens` and `lr` (3e-5 is usual for GPT-2)")
    tokenizer = config.tokenizer or ("gpt2" if V == GPT2_VOCAB else f"ids-{V}")
    return dataclasses.replace(config, **theirs, seq_len=config.seq_len or T, tokenizer=tokenizer)


@torch.no_grad()
def load_initial(path: str, model: GPT) -> None:
    """Load the weights into `model`. Raises UserError for a missing, unexpected or misshapen tensor."""
    ours = {rename(name, model.shape.layers, GPT2): parameter for name, parameter in model.named_parameters()}
    for name, theirs in _tensors(path):
        if name == "lm_head.weight" and model.shape.tied:
            continue
        if name not in ours:
            raise UserError(f"`init_from` {path}: unexpected tensor {name}")
        parameter, tensor = ours.pop(name), transpose_matrix(name, theirs[:].float())
        if name == "transformer.wpe.weight":
            tensor = tensor[: len(parameter)]  # `seq_len` may be shorter
        if tensor.shape != parameter.shape:
            found, expected = list(tensor.shape), list(parameter.shape)
            raise UserError(f"`init_from` {path}: tensor {name} is {found}, expected {expected}")
        parameter.copy_(tensor)
    if ours:
        raise UserError(f"`init_from` {path}: tensor {next(iter(ours))} is missing")


def initial_sha(path: str) -> str:
    """SHA-256 of the weight files: part of the identity of a run that starts from them."""
    sha = hashlib.sha256()
    for file in _files(path):
        sha.update(bytes.fromhex(sha256_of(file)))
    return sha.hexdigest()


def _read_config(path: str, width: int) -> dict:
    """Our options from config.json; {} without one. Raises UserError for what our model does not support."""
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path).with_name("config.json")
    if not file.exists():
        return {}
    try:
        stated = json.loads(file.read_text())
        heads, activation = stated.get("n_head", 12), stated.get("activation_function", "gelu_new")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: not a model configuration ({error})") from None
    if stated.get("model_type") != "gpt2":
        raise UserError(f"{file}: model_type {stated.get('model_type')}, only gpt2 can be imported")
    ours = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True}
    ours |= {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for key, value in ours.items():
        if stated.get(key, value) != value:
            raise UserError(f"{file}: {key} {stated[key]}, our model has {value}")
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(f"{file}: n_head {heads!r} does not divide the width {width}")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UserError(f"{file}: activation_function {activation}, our model has {' '.join(ACTIVATIONS)}")
    return {
        "head_size": width // heads,
        "activation": ACTIVATIONS[activation],
        "tied": stated.get("tie_word_embeddings", True),
    }


def _files(path: str) -> list[Path]:
    """The .safetensors files of a checkpoint folder, or the given file."""
    if Path(path).is_file():
        if Path(path).suffix != ".safetensors":
            raise UserError(f"`init_from` {path}: not .safetensors; pickles can run code, so they are not read")
        return [Path(path)]
    files = sorted(Path(path).glob("model*.safetensors"))
    if not files:
        reason = "no model.safetensors in this folder" if Path(path).exists() else "no such file or folder"
        if list(Path(path).glob("pytorch_model*.bin")):
            reason += " (pytorch_model.bin is a pickle, which can run code; save it again as safetensors)"
        raise UserError(f"`init_from` {path}: {reason}")
    return files


def _tensors(path: str) -> Iterator[tuple[str, object]]:
    """(name in GPT2LMHeadModel, lazy safetensors slice) of every parameter."""
    for file in _files(path):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    if name.endswith((".attn.bias", ".attn.masked_bias")):
                        continue  # the causal mask, which older versions saved
                    full = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
                    yield full, tensors.get_slice(name)
        except SafetensorError as error:
            raise UserError(f"{file}: corrupted ({error})") from None
