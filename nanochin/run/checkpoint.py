"""Atomic checkpoints: a resumed run is bit-identical to an uninterrupted one.

    checkpoints/step-N/model.safetensors      float32 weights
                       optimizer.safetensors  Adam's moments by parameter name, random-number state
                       state.json             step, counters, SHA-256 of the other two and of itself
                       clock.json             seconds of training: all that differs between two equal runs

Written as step-N.tmp, fsynced, renamed; older checkpoints are deleted only after that. No pickle anywhere.
"""

import os
import re
import shutil
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanochin.base.cli import UserError
from nanochin.base.files import NUMBER, fsync, has_type, read_json, replacing, sha256_of, to_json, writing
from nanochin.config import Shape
from nanochin.data.tokenizer import Tokenizer
from nanochin.model import GPT
from nanochin.run.folder import first_difference, read_record
from nanochin.run.optim import Adam

MODEL, OPTIMIZER = DIGESTS = "model.safetensors", "optimizer.safetensors"
CLOCK = {"seconds": NUMBER, "lap": NUMBER}
STATE = {"step": int, "recent": list, "micro_batch": int, "sha256": dict.fromkeys(DIGESTS, str)}


def save(run: Path, step: int, model: nn.Module, optimizer: Adam, state: dict) -> None:
    """Write checkpoint `step` of the run; `state` has what STATE and CLOCK list. Raises RunError if it cannot be
    written."""
    final = run / "checkpoints" / f"step-{step}"
    temp = final.with_name(final.name + ".tmp")
    last = newest(run)
    remark = f"; the last good checkpoint is {last}" if last else "; there is no earlier checkpoint"
    with writing(final, remark):
        try:
            shutil.rmtree(temp, ignore_errors=True)
            temp.mkdir(parents=True)
            digests = {}
            for name, tensors in _tensors(model, optimizer).items():
                save_tensors(tensors, temp / name)
                fsync(temp / name)
                digests[name] = sha256_of(temp / name)
            counters = {key: value for key, value in state.items() if key not in CLOCK}
            records = {"clock.json": {key: state[key] for key in CLOCK}}
            records["state.json"] = {**counters, "step": step, "sha256": digests}
            for name, record in records.items():
                with replacing(temp / name) as file:
                    file.write(to_json(record))
            os.rename(temp, final)
            fsync(final.parent)
        finally:
            shutil.rmtree(temp, ignore_errors=True)  # after an error


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with the permissions of any new file; `save_file` alone makes it readable only for its owner.
    Raises OSError if it cannot be written."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:  # a full disk, for instance
        raise OSError(*error.args) from None
    path.chmod(mode)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All of a safetensors file. Raises UserError if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def load(folder: Path, model: nn.Module, optimizer: Adam | None = None) -> dict:
    """Load the model (and the optimizer) from a checkpoint folder and return its state.

    Raises UserError naming the file if one is missing, damaged or of another model, before anything is changed.
    """
    state, ours = verify(folder), _tensors(model, optimizer)
    saved = {name: _read(folder / name, tensors) for name, tensors in ours.items()}
    with torch.no_grad():
        for name, tensors in ours.items():
            for key, tensor in tensors.items():
                tensor.copy_(saved[name][key])
    if optimizer is not None:
        torch.set_rng_state(saved[OPTIMIZER]["rng"])
        device = next(model.parameters()).device
        if device.type == "cuda":
            torch.cuda.set_rng_state(saved[OPTIMIZER]["rng.cuda"], device)
    return state


def verify(folder: Path) -> dict:
    """The state of an intact checkpoint. Raises UserError naming the file that is missing or damaged."""
    state = read_json(folder / "state.json", STATE)
    clock = "state.json" if "seconds" in state else "clock.json"  # older checkpoints have only state.json
    state |= read_json(folder / clock, CLOCK)
    for pair in state["recent"]:  # loss and gradient norm
        if not isinstance(pair, list) or [has_type(number, NUMBER) for number in pair] != [True, True]:
            raise UserError(f"{folder / 'state.json'}: recent has {pair!r:.40}, not a pair of numbers")
    if folder.name != f"step-{state['step']}":
        raise UserError(f"{folder / 'state.json'}: of step {state['step']}, not of {folder.name}")
    digests = state.pop("sha256")
    for name in DIGESTS:
        path = folder / name
        try:
            found = sha256_of(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if found != digests[name]:
            raise UserError(f"{path}: truncated or corrupted (SHA-256 differs)")
    return state


def load_newest(run: Path, model: nn.Module, optimizer: Adam | None = None) -> tuple[dict, dict[Path, UserError]]:
    """Load the newest valid checkpoint of a run -> (its state, {} if there is none; what is wrong with newer ones)."""
    errors = {}
    for folder in reversed(_folders(run).values()):
        try:
            return load(folder, model, optimizer), errors
        except UserError as error:
            errors[folder] = error
    return {}, errors


def resume(run: Path, model: nn.Module, optimizer: Adam, say: Callable[[str], object]) -> dict:
    """`load_newest` -> the state. Newer checkpoints that are not valid are renamed step-N.broken, so that they are
    neither found again nor kept instead of a good one. `say` is called with a line for each, and for the good one."""
    state, errors = load_newest(run, model, optimizer)
    for folder, error in errors.items():
        broken = folder.with_name(folder.name + ".broken")
        say(f"warning: {error}; renamed to {broken.name}")
        with writing(folder):
            shutil.rmtree(broken, ignore_errors=True)
            os.rename(folder, broken)
    if state:
        say(f"resuming from {newest(run)}")
    return state


def load_run(folder: Path, checkpoint: Path | None = None) -> tuple[GPT, Tokenizer, dict]:
    """(model in float32 on the CPU, tokenizer, config.json) of a run, from this checkpoint or its newest valid one; for
    newer ones that are not valid, a note on stderr.

    Raises UserError if the run has no valid checkpoint, or its config.json is damaged.
    """
    record = read_record(
        folder, {"shape": typing.get_type_hints(Shape), "corpus": {"tokenizer": str, "tokenizer_sha": str | None}}
    )
    # Shapes that differ in the head size only have the same weights, which would not show the damage.
    sizes = dict(record["shape"])
    sizes["model"] = f"{sizes.pop('width')}x{sizes.pop('layers')}"
    if key := first_difference({key: v for key, v in record["identity"].items() if key in sizes}, sizes):
        raise UserError(f"{folder / 'config.json'}: its shape and its identity differ in {key}; restore it")
    model = GPT(Shape(**record["shape"]))
    state, errors = (load(checkpoint, model), {}) if checkpoint else load_newest(folder, model)
    if not state:
        raise next(iter(errors.values()), UserError(f"{folder}: no checkpoint yet"))
    for error in errors.values():
        print(f"note: {error}; using step {state['step']}", file=sys.stderr)
    text = record["corpus"]
    tokenizer = Tokenizer.load(text["tokenizer"], folder, text.get("tokenizer_sha"))  # older records have no digest
    return model.eval(), tokenizer, record


def given_tokenizer(folder: Path) -> Tokenizer | None:
    """The BPE of a run that started from other weights and their tokenizer, so that it was not trained on its text."""
    identity = read_record(folder)["identity"]
    return Tokenizer.load("bpe", folder) if "init_sha" in identity and identity.get("tokenizer") == "bpe" else None


def newest_valid(run: Path) -> Path:
    """The newest intact checkpoint. Raises UserError, of the newest one, if there is none."""
    errors = []
    for folder in reversed(_folders(run).values()):
        try:
            verify(folder)
            return folder
        except UserError as error:
            errors.append(error)
    raise next(iter(errors), UserError(f"{run}: no checkpoint yet"))


def newest(run: Path) -> Path | None:
    """The checkpoint with the most steps, or None. Unfinished step-N.tmp folders do not count."""
    return next(reversed(_folders(run).values()), None)


def steps(run: Path) -> list[int]:
    """The steps of the run's checkpoints, ascending."""
    return list(_folders(run))


def prune(run: Path, keep: int, always: tuple[int, ...] = ()) -> None:
    """Delete all but the newest `keep` checkpoints and the steps in `always`, and leftovers of a killed save."""
    for step, folder in list(_folders(run).items())[: -max(keep, 1)]:
        if step not in always:
            shutil.rmtree(folder, ignore_errors=True)
    for leftover in _folders(run, ".tmp").values():
        shutil.rmtree(leftover, ignore_errors=True)


def _folders(run: Path, ending: str = "") -> dict[int, Path]:
    """The folders step-N`ending` by N, ascending."""
    name = re.compile("step-(0|[1-9][0-9]*)" + re.escape(ending))
    found = {path: name.fullmatch(path.name) for path in (run / "checkpoints").glob("step-*") if path.is_dir()}
    return dict(sorted((int(step[1]), path) for path, step in found.items() if step))


def _tensors(model: nn.Module, optimizer: Adam | None) -> dict[str, dict[str, Tensor]]:
    """By file and name: the model's and the optimizer's own tensors, and copies of random-number states."""
    parameters = dict(model.named_parameters())  # a tied matrix once
    files = {MODEL: {name: p.detach() for name, p in parameters.items()}}
    if optimizer is not None:
        moments = {f"{name}/{key}": t for name, p in parameters.items() for key, t in optimizer.state[p].items()}
        device = next(model.parameters()).device
        cuda = {"rng.cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
        files[OPTIMIZER] = {"rng": torch.get_rng_state(), **cuda, **moments}
    return files


def _read(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file. Raises UserError unless their names, shapes and dtypes are those of `like`."""
    found = read_tensors(path)

    def form(tensors: dict[str, Tensor], name: str) -> str:
        return f"{tensors[name].dtype} {list(tensors[name].shape)}" if name in tensors else "missing"

    for name in sorted(found.keys() | like.keys()):
        theirs, ours = form(found, name), form(like, name)
        if theirs != ours:
            raise UserError(f"{path}: {name!r} is {theirs}, in this model {ours}")
    return found
