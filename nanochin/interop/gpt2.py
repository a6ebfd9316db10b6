"""Start a run from GPT-2 weights in `transformers` format: its names for our tensors, its options for ours.

GPT-2 stores linear layers transposed (in x out, "Conv1D") and packs queries, keys and values as our model does. Only
safetensors are read: pytorch_model.bin is a pickle, which can run code.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanochin.base.cli import UserError
from nanochin.base.files import read_json
from nanochin.interop.names import GPT2, rename
from nanochin.model import GPT

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"}


def transpose_matrix(name: str, tensor: Tensor) -> Tensor:
    """GPT-2 stores the matrices of its blocks transposed."""
    return tensor.T if name.startswith(GPT2["blocks"]) and tensor.ndim == 2 else tensor


def read_options(path: str, head_size: int | None) -> dict:
    """Our options for the shape of the weights, with the most positions as seq_len. Raises UserError if they are not
    GPT-2's."""
    sizes = {name: t.get_shape() for name, t in _tensors(path)}
    try:
        (V, C), (T, _) = sizes["transformer.wte.weight"], sizes["transformer.wpe.weight"]
        F = sizes["transformer.h.0.mlp.c_fc.weight"][1]
    except (KeyError, ValueError, IndexError):
        raise UserError(f"`init_from` {path}: not GPT-2 weights (no wte, wpe or h.0.mlp.c_fc)") from None
    layers = sum(name.endswith("ln_1.weight") for name in sizes)
    theirs = {"norm": "layernorm", "positions": "learned", "bias": True, "qk_norm": False, "activation": "gelu_tanh"}
    theirs |= {"model": f"{C}x{layers}", "head_size": head_size or 64, "ffn": F, "vocab_size": V, "seq_len": T}
    return theirs | {"tied": "lm_head.weight" not in sizes} | _stated(path, C)


@torch.no_grad()
def load(path: str, model: GPT) -> None:
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


def read_config(path: str) -> tuple[Path, dict]:
    """(config.json of the weights, its content), {} without one. Raises UserError if it is not an object."""
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path).with_name("config.json")
    return file, read_json(file) if file.exists() else {}


def _stated(path: str, width: int) -> dict:
    """Our options from config.json; {} without one. Raises UserError for what our model does not support."""
    file, stated = read_config(path)
    if not stated:
        return {}
    heads, activation = stated.get("n_head", 12), stated.get("activation_function", "gelu_new")
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


def weight_files(path: str) -> list[Path]:
    """The .safetensors files of a checkpoint folder, or the given file."""
    if Path(path).is_file():
        if Path(path).suffix != ".safetensors":
            raise UserError(f"`init_from` {path}: not .safetensors; pickles can run code, so they are not read")
        return [Path(path)]
    files = sorted(Path(path).glob("model*.safetensors"))
    if not files:
        reason = "no model.safetensors in this folder" if Path(path).exists() else "no such run, file or folder"
        if list(Path(path).glob("pytorch_model*.bin")):
            reason += " (pytorch_model.bin is a pickle, which can run code; save it again as safetensors)"
        raise UserError(f"`init_from` {path}: {reason}")
    return files


def _tensors(path: str) -> Iterator[tuple[str, object]]:
    """(name in GPT2LMHeadModel, lazy safetensors slice) of every parameter."""
    for file in weight_files(path):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    if name.endswith((".attn.bias", ".attn.masked_bias")):
                        continue  # the causal mask, which older versions saved
                    full = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
                    yield full, tensors.get_slice(name)
        except SafetensorError as error:
            raise UserError(f"{file}: corrupted ({error})") from None
