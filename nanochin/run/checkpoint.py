"""Atomic checkpoints: a resumed run is bit-identical to an uninterrupted one.

    checkpoints/step-N/model.safetensors      float32 weights
                       optimizer.safetensors  Adam's moments by parameter name, random-number state
                       state.json             step, counters, SHA-256 of the other two and of itself

Written as step-N.tmp, fsynced, renamed; older checkpoints are deleted only after that. No pickle anywhere.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from nanochin.base.cli import UserError
from nanochin.base.files import fsync, read_json, replacing, sha256_of, writing
from nanochin.config import Shape
from nanochin.data.tokenizer import Tokenizer
from nanochin.model import GPT
from nanochin.run.optim import Adam


def save(run: Path, step: int, model: nn.Module, optimizer: Adam, state: dict) -> None:
    """Write checkpoint `step` of the run; `state` is any JSON object. Raises RunError if it cannot be written."""
    final = run / "checkpoints" / f"step-{step}"
    temp = final.with_name(final.name + ".tmp")
    last = newest(run)
    remark = f"; the last good checkpoint is {last}" if last else "; there is no earlier checkpoint"
    with writing(final, remark):
        try:
            shutil.rmtree(temp, ignore_errors=True)
            temp.mkdir(parents=True)
            weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}  # a tied matrix once
            moments = _optimizer_tensors(model, optimizer)
            digests = {}
            for name, tensors in (("model.safetensors", weights), ("optimizer.safetensors", moments)):
                save_file(tensors, temp / name)
                fsync(temp / name)
                digests[name] = sha256_of(temp / name)
            state = {"step": step, **state, "sha256": digests}
            with replacing(temp / "state.json") as file:
                file.write(json.dumps(state | {"state_sha256": _digest(state)}, indent=1).encode())
            os.rename(temp, final)
            fsync(final.parent)
        except (OSError, SafetensorError) as error:  # SafetensorError: also a full disk
            shutil.rmtree(temp, ignore_errors=True)
            raise OSError(*error.args) from None


def load(folder: Path, model: nn.Module, optimizer: Adam | None = None) -> dict:
    """Load the model (and the optimizer) from a checkpoint folder and return its state.

    Raises UserError naming the file if one is missing, truncated or corrupted.
    """
    state = verify(folder)
    weights = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    if optimizer is not None:
        tensors = load_file(folder / "optimizer.safetensors")
        torch.set_rng_state(tensors.pop("rng"))
        device = next(model.parameters()).device
        if device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], device)
        for name, parameter in model.named_parameters():
            for field, value in optimizer.state[parameter].items():
                value.copy_(tensors[f"{name}/{field}"])
    return state


def verify(folder: Path) -> dict:
    """The state of an intact checkpoint. Raises UserError naming the file that is missing, truncated or corrupted."""
    state = read_json(folder / "state.json")
    if state.pop("state_sha256", None) != _digest(state):
        raise UserError(f"{folder / 'state.json'}: corrupted (SHA-256 differs)")
    for name, digest in state.pop("sha256").items():
        path = folder / name
        if not path.exists():
            raise UserError(f"{path}: missing")
        if sha256_of(path) != digest:
            raise UserError(f"{path}: truncated or corrupted (SHA-256 differs)")
    return state


def load_run(folder: Path) -> tuple[GPT, Tokenizer, dict]:
    """(model in float32 on the CPU, tokenizer, config.json) of a run, from its newest checkpoint.

    Raises UserError if the run has no checkpoint yet.
    """
    record = read_json(folder / "config.json")
    last = newest(folder)
    if last is None:
        raise UserError(f"{folder}: no checkpoint yet")
    model = GPT(Shape(**record["shape"]))
    load(last, model)
    tokenizer = Tokenizer.load(record["corpus"]["tokenizer"], folder)
    return model.eval(), tokenizer, record


def newest(run: Path) -> Path | None:
    """The checkpoint with the most steps, or None. Unfinished step-N.tmp folders do not count."""
    found = steps(run)
    return run / "checkpoints" / f"step-{found[-1]}" if found else None


def steps(run: Path) -> list[int]:
    """The steps of the run's checkpoints, ascending."""
    return sorted(_numbered(run, r"step-(\d+)").values())


def newest_valid(run: Path, warn) -> Path | None:
    """The newest checkpoint that verifies, or None. Newer ones are renamed step-N.broken, with a `warn(message)`."""
    while folder := newest(run):
        try:
            verify(folder)
            return folder
        except UserError as error:
            broken = folder.with_name(folder.name + ".broken")
            warn(f"warning: {error}; renamed to {broken.name}")
            shutil.rmtree(broken, ignore_errors=True)
            os.rename(folder, broken)
    return None


def prune(run: Path, keep: int, always: tuple[int, ...] = ()) -> None:
    """Delete all but the newest `keep` checkpoints and the steps in `always`, and leftovers of a killed save."""
    for step in steps(run)[: -max(keep, 1)]:
        if step not in always:
            shutil.rmtree(run / "checkpoints" / f"step-{step}", ignore_errors=True)
    for leftover in _numbered(run, r"step-(\d+)\.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _numbered(run: Path, pattern: str) -> dict[Path, int]:
    """The checkpoint folders whose full name matches, with the step in the name."""
    folders = (run / "checkpoints").glob("step-*")
    return {folder: int(name[1]) for folder in folders if (name := re.fullmatch(pattern, folder.name))}


def _optimizer_tensors(model: nn.Module, optimizer: Adam) -> dict[str, torch.Tensor]:
    tensors = {"rng": torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    for name, parameter in model.named_parameters():
        for field, value in optimizer.state[parameter].items():
            tensors[f"{name}/{field}"] = value.detach().contiguous()
    return tensors


def _digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
