"""Sweep files. Pure functions; no torch.

A sweep file is TOML: keys of `Spec`, and options of train.py. An option that takes one value may also be a list: the
sweep takes the product of all lists (or, with `vary = "one"`, one list at a time).
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_origin, get_type_hints

from nanochin.base.cli import UserError, did_you_mean, errors_name, opt, parse, read_toml, to_arguments, value_type
from nanochin.config import Config, TextOptions

KINDS = ("isoflop", "horizons", "trunk", "grid")
KIND_HELP = (
    "isoflop: several sizes per budget (Approach 2 and 3); horizons: each size at several lengths (Approach 1); "
    "trunk: the same, by cooldowns from one constant-rate run per size; grid: models x budgets"
)


@dataclass(frozen=True)
class Spec:
    """The keys of a sweep file that train.py lacks. A help text starts with the kinds that use the key, if not all."""

    kind: str | None = opt(None, KIND_HELP, choices=KINDS)
    budgets: tuple[float, ...] = opt((), "training FLOPs, in the convention of --flops", above=0)
    models: tuple[str, ...] = opt((), "sizes, such as 16x2 48x2; default: from the ladder, around the optimum")
    sizes: int = opt(7, "number of sizes", low=1, high=1000)
    spread: float = opt(4.0, "isoflop: N ranges from 1/spread to spread times the optimum", low=1)
    centre: tuple[float, ...] = opt((), "expected optimal N (total) of each budget; default: by --law", above=0)
    seeds: tuple[int, ...] = opt((0,), "seeds of every cell", low=0, high=10**9)
    centre_seeds: tuple[int, ...] = opt(
        (), "isoflop: more seeds for the size closest to each centre", low=0, high=10**9
    )
    extend: bool = opt(False, "isoflop: add sizes beyond the edge if a budget's minimum is at an edge")
    extend_limit: int = opt(3, "maximum number of sizes added to a budget", low=1, high=1000)
    horizons: int = opt(4, "horizons, trunk: number of lengths per size", low=2, high=1000)
    span: float = opt(16.0, "horizons, trunk: longest / shortest", above=1)
    reach: float = opt(
        4.0, "horizons, trunk: cost of the longest run / budget its size is optimal for, up to the last budget", above=0
    )
    paired: bool = opt(False, "grid: pair the first model with the first budget, and so on")
    lr_times: tuple[float, ...] = opt((1.0,), "multiples of the learning rate by rule", above=0, high=1e6)
    batch_times: tuple[float, ...] = opt((1.0,), "multiples of the batch by rule", above=0, high=1e6)
    warmup_times: tuple[float, ...] = opt((1.0,), "multiples of the warm-up by rule", low=0, high=1e6)
    vary: str = opt(
        "product", "lists: their product, or one at a time with the first of the others", choices=("product", "one")
    )
    bootstrap: int = opt(4000, "bootstrap replicates of the fit at the end", low=0)
    max_epochs: float | None = opt(None, "reject cells that repeat the text more often", above=0)
    corpus_tokens: float | None = opt(None, "expected tokens of the text, so that --dry-run need not read it", above=0)
    throughput: float | None = opt(None, "FLOP/s (physical) per worker, for planned hours", above=0)
    step_seconds: float = opt(0.0, "fixed overhead per step in seconds, for planned hours", low=0)
    assumes: str | None = opt(None, "source of throughput and step_seconds")


TIMES = ("lr_times", "batch_times", "warmup_times")
# Options that the sweep sets itself.
OURS = {"name", "out", "branch_from", "init_from", "save_steps", "sample_tokens", "threads", "keep", "log_every"}
# One text per sweep, tokenised once.
SINGLE = {"val_bytes", "max_tokens", "tokenizer", "vocab_size", "seq_len", "cache", "device"}
SINGLE |= {f.name for f in fields(TextOptions)}
USE_INSTEAD = {"budget": "budgets", "model": "models", "tokens": "budgets", "seed": "seeds"}


@dataclass(frozen=True)
class Sweep:
    """A parsed sweep file: its keys, the options that all cells share, and the lists to vary."""

    path: str
    name: str
    spec: Spec
    base: Config
    lists: dict[str, tuple]


def read_sweep(path: str | Path, **overrides) -> Sweep:
    """Read a sweep file; `overrides` that are not None replace its options. Raises UserError, one line with file and
    key, if the file is invalid."""
    with errors_name(path):
        table = read_toml(path)
    if twice := [key for key in table if "-" in key and key.replace("-", "_") in table]:
        raise UserError(f"{path}: {twice[0]}: given twice, also as {twice[0].replace('-', '_')}")
    table = {key.replace("-", "_"): value for key, value in table.items()}
    table |= {key: list(value) for key, value in overrides.items() if value is not None}
    own, many = {f.name for f in fields(Spec)}, _tuples(Spec) | _tuples(Config)
    known = own | {f.name for f in fields(Config)}
    for key, value in table.items():
        if key in USE_INSTEAD and key not in own:
            raise UserError(f"{path}: {key}: use {USE_INSTEAD[key]} in a sweep file")
        if key in OURS:
            raise UserError(f"{path}: {key}: set by the sweep itself; leave it out")
        if key not in known:
            near = did_you_mean(key, sorted(known - OURS - USE_INSTEAD.keys()))
            raise UserError(f"{path}: unknown key {key}{near}")
        if isinstance(value, dict) or (isinstance(value, list) and not value):
            raise UserError(f"{path}: {key}: expected a value or a list of values")
        if isinstance(value, list) and (key in SINGLE or (key in own and key not in many)):
            raise UserError(f"{path}: {key}: expected one value, not a list")

    spec = _parse(Spec, {key: value for key, value in table.items() if key in own}, path)
    options, lists = {}, {}
    for key, value in table.items():
        if isinstance(value, list) and key not in own | many:
            lists[key] = tuple(getattr(_parse(Config, {key: each}, path), key) for each in value)
        elif key not in own:
            options[key] = value
    base = _parse(Config, options, path)
    _validate(spec, base, path)
    for f in fields(Spec):
        kinds = f.metadata["help"].partition(": ")[0].split(", ")
        if f.name in table and f.name != "kind" and set(kinds) <= set(KINDS) and spec.kind not in kinds:
            raise UserError(f"{path}: {f.name}: only for kind {' or '.join(kinds)}, but this sweep is {spec.kind}")
    return Sweep(str(path), Path(path).stem, spec, base, lists)


def _tuples(cls) -> set[str]:
    """Options that take several values."""
    return {name for name, hint in get_type_hints(cls).items() if get_origin(value_type(hint)) is tuple}


def _parse(cls, table: dict, path):
    """`table` as options of `cls`, by the command-line parser: same types, bounds and errors."""
    with errors_name(path):
        argv = to_arguments(table)
    return parse(cls, argv, prog=f"sweep.py: {path}", description="")


def _validate(spec: Spec, base: Config, path) -> None:
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(f"{path}: {message}")

    need(spec.kind is not None, f'kind is missing; set one of {", ".join(KINDS)}, such as kind = "isoflop"')
    need(base.seq_len is not None, "seq_len is missing; set the context in tokens, such as seq_len = 256")
    need(bool(spec.budgets), "budgets is missing; set training FLOPs, such as budgets = [1e11, 1e12]")
    need(not spec.centre or len(spec.centre) == len(spec.budgets), "centre: one number for each of budgets")
    for key in ("budgets", "seeds", "models"):
        values = getattr(spec, key)
        need(len(set(values)) == len(values), f"{key}: duplicate value")
    if spec.kind in ("horizons", "trunk") and not spec.models:
        need(len(spec.budgets) > 1, "budgets: needs two or more, whose optima bound the sizes; or give models")
    need(tuple(sorted(spec.budgets)) == spec.budgets or spec.kind == "grid", "budgets: must be ascending")
    need(not set(spec.seeds) & set(spec.centre_seeds), "centre_seeds: must not repeat values of seeds")
    if spec.kind == "grid":
        need(bool(spec.models), 'models is missing; set sizes, such as models = ["16x2", "48x2"]')
        need(not spec.paired or len(spec.models) == len(spec.budgets), "paired: needs as many models as budgets")
    if spec.kind == "trunk":
        need(base.schedule in ("cosine", "wsd"), "schedule: leave it out; the cooldowns of a trunk use wsd")
