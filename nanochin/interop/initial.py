"""The weights that a run starts from (`init_from`): a run, one of its checkpoints, an export of a run, or GPT-2.

The shape and the tokenizer come with the weights. Everything else is new: step 0, schedule, moments of the optimizer.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanochin.base.cli import UserError, brief
from nanochin.base.files import sha256_of
from nanochin.config import Config, Shape, make_shape
from nanochin.data.tokenizer import Tokenizer
from nanochin.interop import export, gpt2
from nanochin.interop.names import LLAMA, NEOX, rename
from nanochin.model import GPT
from nanochin.run.checkpoint import MODEL, load_run, newest_valid, read_tensors
from nanochin.run.folder import find_run

GPT2_VOCAB = 50257
LAYOUTS = {"llama": ("rmsnorm", LLAMA, export.to_llama), "gpt_neox": ("layernorm", NEOX, export.to_neox)}


@dataclass(frozen=True)
class Initial:
    """Weights to start from."""

    options: dict  # of the shape; seq_len is the longest context if positions are learned
    tokenizer: Tokenizer | None  # None: unknown
    files: list[Path]
    load: Callable[[GPT], None]  # raises UserError if the tensors are not those of the shape

    def sha(self) -> str:
        """SHA-256 of the weight files: part of the identity of a run that starts from them."""
        return hashlib.sha256(b"".join(bytes.fromhex(sha256_of(file)) for file in self.files)).hexdigest()


def find_initial(config: Config) -> Initial:
    """What `init_from` names. Raises UserError for weights that are missing, damaged or of another architecture, and
    for GPT-2 without length or learning rate: the rules that derive them are for new models."""
    path = config.init_from
    if checkpoint := _checkpoint(config):
        run = checkpoint.resolve().parents[1]
        model, tokenizer, _ = load_run(run, checkpoint)
        load = partial(_copy, lambda: load_run(run, checkpoint)[0])
        return Initial(_options(model.shape), tokenizer, [checkpoint / MODEL], load)
    file, stated = gpt2.read_config(path)
    tokenizer, files = export.read_tokenizer(file.parent), gpt2.weight_files(path)
    match stated.get("model_type", None if stated else "gpt2"):
        case "llama" | "gpt_neox":
            options = _options(_read_export(path).shape)
            return Initial(options, tokenizer, files, partial(_copy, partial(_read_export, path)))
        case "gpt2":
            options = gpt2.read_options(path, config.head_size)
            if config.lr is None or not (config.tokens or config.budget):
                raise UserError(f"`init_from` {path}: needs `tokens` and `lr` (3e-5 is usual for GPT-2)")
            return Initial(options, tokenizer, files, partial(gpt2.load, path))
        case other:
            raise UserError(f"{file}: model_type {other}, only gpt2 and exports of a run can be imported")


def initial_options(config: Config, initial: Initial) -> Config:
    """`config` with the shape and the tokenizer of the weights. Raises UserError if an option contradicts them; an
    option at its default counts as not given."""
    what, theirs = f"`init_from` {config.init_from}", dict(initial.options)
    T, V, known = theirs.pop("seq_len"), theirs["vocab_size"], initial.tokenizer
    if known and not known.numbers:
        theirs["tokenizer"] = known.name
    else:
        theirs["tokenizer"] = config.tokenizer or ("gpt2" if V == GPT2_VOCAB else f"ids-{V}")
    for f in fields(Config):
        given = getattr(config, f.name)
        if f.name in theirs and given not in (f.default, theirs[f.name]):
            raise UserError(f"`{f.name}` {given}: {what} has {theirs[f.name]}; leave the option out")
    if theirs["positions"] == "learned" and (config.seq_len or T) > T:
        raise UserError(f"`seq_len` {config.seq_len}: {what} has {T} learned positions; use that or less")
    if config.tokenizer == "bpe" and not known:
        raise UserError(f"`tokenizer` bpe: a newly trained vocabulary does not match {what}")
    return replace(config, **theirs, seq_len=config.seq_len or T)


def _checkpoint(config: Config) -> Path | None:
    """The checkpoint of ours that `init_from` names, of a run its newest valid one; None for other weights."""
    path = Path(config.init_from)
    if (path / "state.json").exists():
        return path
    with suppress(UserError):  # no config.json
        path = find_run(config.init_from, config.out)
    return newest_valid(path) if (path / "checkpoints").is_dir() else None


def _options(shape: Shape) -> dict:
    sizes = {f.name: getattr(shape, f.name) for f in fields(Shape) if f.name not in ("width", "layers")}
    return {"model": str(shape)} | sizes


@torch.no_grad()
def _copy(read: Callable[[], GPT], model: GPT) -> None:
    theirs = dict(read().named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_(theirs[name][: len(parameter)])  # `seq_len` may be shorter: fewer learned positions


# ---------------------------------------------------------------------------------------------------------------------
# Exports of a run


@torch.no_grad()
def _read_export(path: str) -> GPT:
    """The model that was exported to this folder as Llama or GPT-NeoX. Raises UserError for a model that is not an
    export of ours: one that, exported again, has another configuration or other tensors."""
    file, stated = gpt2.read_config(path)
    norm, names, convert = LAYOUTS[stated["model_type"]]
    theirs: dict[str, Tensor] = {}
    for part in gpt2.weight_files(path):
        theirs |= {name: tensor.float() for name, tensor in read_tensors(part).items()}
    try:
        shape = _exported_shape(stated, norm, theirs)
        with torch.device("meta"):
            model = GPT(shape)
        ours = {name: _exported(name, shape, names, theirs) for name, _ in model.named_parameters()}
        model.load_state_dict(ours | ({"head.weight": ours["embed.weight"]} if shape.tied else {}), assign=True)
        tensors, config = convert(ours, shape)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(f"`init_from` {path}: not an export of a run ({brief(error)})") from None
    for key, value in (config | {"rope_scaling": None}).items():
        if stated.get(key, value) != value:
            raise UserError(f"{file}: {key} {stated[key]}, our model has {value}")
    for name in sorted(tensors.keys() | theirs.keys()):
        if name not in tensors or name not in theirs or not torch.equal(tensors[name], theirs[name]):
            raise UserError(f"`init_from` {path}: tensor {name} is not that of an export of a run")
    return model


def _exported_shape(stated: dict, norm: str, theirs: dict[str, Tensor]) -> Shape:
    C, heads = stated["hidden_size"], stated["num_attention_heads"]
    llama = norm == "rmsnorm"
    biases = (name.endswith("bias") and bool(tensor.any()) for name, tensor in theirs.items())
    more = {"bias": stated["attention_bias"] if llama else any(biases), "tied": stated["tie_word_embeddings"]}
    activation = {theirs: ours for ours, theirs in export.ACTIVATIONS.items()}[stated["hidden_act"]]
    if activation == "swiglu" and not llama:
        raise ValueError("hidden_act silu without a gate")
    return make_shape(
        C, stated["num_hidden_layers"], vocab_size=stated["vocab_size"], seq_len=stated["max_position_embeddings"],
        head_size=C // heads, ffn=stated["intermediate_size"], norm=norm, activation=activation, **more,
    )  # fmt: skip


def _exported(name: str, shape: Shape, names: dict[str, str], theirs: dict[str, Tensor]) -> Tensor:
    """Our parameter `name` from the tensors of an export."""
    theirs_name = rename(name, shape.layers, names)
    if names is LLAMA and ".qkv." in name:
        return torch.cat([theirs[theirs_name.format(part)] for part in "qkv"])
    if names is LLAMA and ".up." in name:
        parts = ("gate", "up") if shape.activation == "swiglu" else ("gate",)  # else up is the constant 1
        return torch.cat([theirs[theirs_name.format(part)] for part in parts])
    if names is NEOX and ".qkv." in name:
        return theirs[theirs_name].unflatten(0, (shape.heads, 3, shape.head_size)).transpose(0, 1).flatten(0, 2)
    return theirs[theirs_name]
