"""From a sweep file to its cells: the runs of a sweep, with their options and costs. Pure functions; no torch.

    sweep = read_sweep("sweeps/mini.toml")
    cells = plan_cells(sweep, vocab_size=256)       each a resolved train.Config and its place in the sweep
    more = extend(sweep, cells, losses, vocab_size=256)   more sizes for budgets whose minimum is at an edge

A sweep file is TOML: keys of `Grid` below, and any option of train.py. An option of train.py with a single value may
also be a list: the sweep takes the product of all lists (or, with `vary = "one"`, one list at a time).
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from nanochin.base.cli import UserError, did_you_mean, opt, parse
from nanochin.config import Config, Shape, parse_model, shape_maker
from nanochin.laws import BESIROGLU, load_law
from nanochin.plan import ladder
from nanochin.plan.flops import count_params, flops_per_token

KINDS = ("isoflop", "horizons", "trunk", "grid")


@dataclass(frozen=True)
class Grid:
    """The keys of a sweep file that are not options of train.py. Kinds at the start of a help are those that use it."""

    kind: str | None = opt(
        None,
        "isoflop: several sizes per budget (Approach 2 and 3); horizons: each size at several "
        "lengths (Approach 1); trunk: the same, by cooldowns from one constant-rate run per size; "
        "grid: models x budgets",
        choices=KINDS,
    )
    budgets: tuple[float, ...] = opt((), "training FLOPs, in the convention of --flops", above=0)
    models: tuple[str, ...] = opt((), "sizes, such as 16x2 48x2; default: from the ladder, around the optimum")
    sizes: int = opt(7, "number of sizes", low=1)
    spread: float = opt(4.0, "isoflop: N ranges from 1/spread to spread times the optimum", low=1)
    centre: tuple[float, ...] = opt((), "expected optimal N (total) of each budget; default: by --law", above=0)
    seeds: tuple[int, ...] = opt((0,), "seeds of every cell", low=0, high=10**9)
    centre_seeds: tuple[int, ...] = opt((), "isoflop: more seeds for the size closest to each centre", low=0)
    extend: bool = opt(False, "isoflop: add sizes beyond the edge if a budget's minimum is at an edge")
    extend_limit: int = opt(3, "maximum number of sizes added to a budget", low=1)
    horizons: int = opt(4, "horizons, trunk: number of lengths per size", low=2)
    span: float = opt(16.0, "horizons, trunk: longest / shortest", above=1)
    reach: float = opt(
        4.0,
        "horizons, trunk: cost of the longest run as a multiple of the budget for which its size is "
        "optimal, at most the largest budget",
        above=0,
    )
    paired: bool = opt(False, "grid: pair the first model with the first budget, and so on")
    lr_times: tuple[float, ...] = opt((1.0,), "multiples of the learning rate by rule", above=0)
    batch_times: tuple[float, ...] = opt((1.0,), "multiples of the batch by rule", above=0)
    warmup_times: tuple[float, ...] = opt((1.0,), "multiples of the warm-up by rule", low=0)
    vary: str = opt(
        "product",
        "lists: their product, or one list at a time with the first value of the others",
        choices=("product", "one"),
    )
    bootstrap: int = opt(4000, "bootstrap replicates of the fit at the end", low=0)
    max_epochs: float | None = opt(None, "reject cells that repeat the text more often", above=0)
    corpus_tokens: float | None = opt(None, "expected tokens of the text, so that --dry-run need not read it", above=0)
    throughput: float | None = opt(None, "FLOP/s (physical) per worker, for planned hours", above=0)
    step_seconds: float = opt(0.0, "fixed overhead per step in seconds, for planned hours", low=0)
    assumes: str | None = opt(None, "source of throughput and step_seconds")


TIMES = ("lr_times", "batch_times", "warmup_times")
# Options of train.py that the sweep sets itself.
OURS = {"name", "out", "branch_from", "init_from", "save_steps", "sample_tokens", "threads", "keep", "log_every"}
# One text, tokenised once, per sweep.
SINGLE = {"val_bytes", "max_tokens", "skip_bad", "tokenizer", "vocab_size", "seq_len", "cache", "device"}
BY_GRID = {"budget": "budgets", "model": "models", "tokens": "budgets", "seed": "seeds"}  # to use instead


@dataclass(frozen=True)
class Sweep:
    """A parsed sweep file: its grid, the options that all cells share, and the lists to vary."""

    path: str
    name: str
    grid: Grid
    base: Config
    lists: dict[str, tuple] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One run of the sweep. Steps that cooldowns share with their trunk count in the trunk's `spent` only."""

    name: str
    kind: str  # the sweep's
    config: Config
    plan: ladder.Plan
    budget: float | None
    spent: float  # training FLOPs, physical
    trunk: str | None = None  # run that a cooldown branches from
    step: int = 0  # step at which it branches
    is_trunk: bool = False  # a constant-rate run, which gives no row
    varied: str = ""  # varied options, as in the name

    def digest(self, data_sha: str, val_sha: str) -> str:
        """Hash of the options that the sweep sets for the run, and of its text: equal hash, equal run."""
        decided = {
            f.name: value
            for f in fields(Config)
            if f.metadata["result"] and (value := getattr(self.config, f.name)) != f.default
        }
        known = json.dumps([decided, data_sha, val_sha], sort_keys=True)
        return hashlib.sha256(known.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# The file


def read_sweep(path: str | Path, **overrides) -> Sweep:
    """Read a sweep file; `overrides` that are not None replace its options of train.py. Raises UserError, one line with
    file and key, if the file is invalid."""
    try:
        table = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML: {error}") from None
    if twice := [key for key in table if "-" in key and key.replace("-", "_") in table]:
        raise UserError(f"{path}: {twice[0]}: given twice, also as {twice[0].replace('-', '_')}")
    table = {key.replace("-", "_"): value for key, value in table.items()}
    table |= {key: list(value) for key, value in overrides.items() if value is not None}
    own, many = {f.name for f in fields(Grid)}, _tuples(Grid) | _tuples(Config)
    known = own | {f.name for f in fields(Config)}
    for key, value in table.items():
        if key in BY_GRID and key not in own:
            raise UserError(f"{path}: {key}: use {BY_GRID[key]} in a sweep file")
        if key in OURS:
            raise UserError(f"{path}: {key}: set by the sweep itself; leave it out")
        if key not in known:
            near = did_you_mean(key, sorted(known - OURS - BY_GRID.keys()))
            raise UserError(f"{path}: unknown key {key}{near}")
        if isinstance(value, dict) or (isinstance(value, list) and not value):
            raise UserError(f"{path}: {key}: expected a value or a list of values")
        if isinstance(value, list) and (key in SINGLE or (key in own and key not in many)):
            raise UserError(f"{path}: {key}: expected one value, not a list")

    lists = {key: value for key, value in table.items() if key not in own | many and isinstance(value, list)}
    scalars = {key: value for key, value in table.items() if key not in own and key not in lists}
    grid = _parse(Grid, {key: value for key, value in table.items() if key in own}, path)
    base = _parse(Config, scalars, path)
    lists = {
        key: tuple(getattr(_parse(Config, {key: value}, path), key) for value in values)
        for key, values in lists.items()
    }
    _check(grid, base, path)
    for f in fields(Grid):
        if f.name in table and grid.kind not in (kinds := _kinds(f)):
            raise UserError(f"{path}: {f.name}: only for kind {' or '.join(kinds)}, but this sweep is {grid.kind}")
    return Sweep(str(path), Path(path).stem, grid, base, lists)


def _kinds(f: dataclasses.Field) -> tuple[str, ...]:
    """The kinds of sweep that use a key of Grid: those at the start of its help text, else all."""
    named = tuple(f.metadata["help"].partition(": ")[0].split(", "))
    return named if f.name != "kind" and set(named) <= set(KINDS) else KINDS


def _tuples(cls) -> set[str]:
    """Options that take several values."""
    hints = get_type_hints(cls)
    return {name for name, hint in hints.items() if any(get_origin(arm) is tuple for arm in (hint, *get_args(hint)))}


def _parse(cls, table: dict, path):
    """`table` as options of `cls`, by the command-line parser: same types, bounds and errors."""
    argv = []
    for key, value in table.items():
        flag = "--" + key.replace("_", "-")
        argv += [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    return parse(cls, argv, prog=f"sweep.py: {path}", description="")


def _check(grid: Grid, base: Config, path) -> None:
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(f"{path}: {message}")

    need(grid.kind is not None, f"kind: missing; one of {', '.join(KINDS)}")
    need(base.seq_len is not None, "seq_len: missing; no default, since a sweep must not depend on the device")
    need(bool(grid.budgets), "budgets: missing; training FLOPs, such as [1e11, 1e12]")
    need(not grid.centre or len(grid.centre) == len(grid.budgets), "centre: one number for each of budgets")
    for key in ("budgets", "seeds", "models"):
        values = getattr(grid, key)
        need(len(set(values)) == len(values), f"{key}: duplicate value")
    if grid.kind in ("horizons", "trunk") and not grid.models:
        need(len(grid.budgets) > 1, "budgets: needs two or more, whose optima bound the sizes; or give models")
    need(tuple(sorted(grid.budgets)) == grid.budgets or grid.kind == "grid", "budgets: must be ascending")
    need(not set(grid.seeds) & set(grid.centre_seeds), "centre_seeds: must not repeat values of seeds")
    if grid.kind == "grid":
        need(bool(grid.models), 'models: missing; such as ["16x2", "48x2"]')
        need(not grid.paired or len(grid.models) == len(grid.budgets), "paired: needs as many models as budgets")
    if grid.kind == "trunk":
        need(base.schedule in ("cosine", "wsd"), "schedule: leave it out; the cooldowns of a trunk use wsd")


# ---------------------------------------------------------------------------------------------------------------------
# The cells


def plan_cells(sweep: Sweep, vocab_size: int, corpus_tokens: float | None = None) -> list[Cell]:
    """All cells, in the order of runs.csv. Raises UserError for an impossible cell or, with `corpus_tokens`, for one of
    more than `max_epochs` epochs."""
    cells = []
    try:
        for variant in _variants(sweep):
            cells += _PLANNERS[sweep.grid.kind](_Builder(sweep, vocab_size, *variant))
    except UserError as error:  # the same message as from train.py
        raise UserError(f"{sweep.path}: {error}") from None
    names = [cell.name for cell in cells]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{sweep.path}: two cells would be named {min(twice)}; make their options differ")
    most = sweep.grid.max_epochs
    for cell in cells:
        if most and corpus_tokens and cell.plan.tokens > most * corpus_tokens:
            epochs = cell.plan.tokens / corpus_tokens
            raise UserError(
                f"{sweep.path}: {cell.name} would train for {epochs:.2g} epochs, max_epochs is {most:g}; "
                "use more text, fewer small sizes or a smaller budget"
            )
    return cells


def extend(sweep: Sweep, cells: list[Cell], losses: dict[str, float | None], vocab_size: int) -> list[Cell]:
    """New cells for budgets whose cells have all ended and whose lowest loss is at the smallest or largest size.
    `losses`: by run, None for a failed run. The same losses give the same cells, so a rerun adds no others."""
    if sweep.grid.kind != "isoflop" or not sweep.grid.extend:
        return []
    added = []
    for variant in _variants(sweep):
        build = _Builder(sweep, vocab_size, *variant)
        for budget, centre in zip(sweep.grid.budgets, build.centres(), strict=True):
            group = [cell for cell in cells if cell.budget == budget and cell.varied == build.label]
            planned = len(build.isoflop_shapes(budget, centre))
            tried = {cell.plan.shape: cell.plan.params.total for cell in group}
            if any(cell.name not in losses for cell in group) or len(tried) - planned >= sweep.grid.extend_limit:
                continue
            if side := open_side(group, losses):
                edge = side * max(side * math.log(N) for N in tried.values())
                log_size = {shape: math.log(count_params(shape).total) for shape in build.affordable(budget)}
                beyond = [shape for shape, size in log_size.items() if side * (size - edge) > 0]
                target = edge + side * build.spacing()
                if beyond:
                    shape = min(beyond, key=lambda s, size=log_size, target=target: abs(size[s] - target))
                    added += [build.isoflop_cell(budget, shape, seed) for seed in sweep.grid.seeds]
    return added


def open_side(group: list[Cell], losses: dict[str, float | None]) -> int:
    """Where a budget's lowest loss (mean over seeds) is: -1 at the smallest size, 1 at the largest, 0 between them or
    unknown."""
    by_size = {}
    for cell in group:
        if (loss := losses.get(cell.name)) is not None:
            by_size.setdefault(cell.plan.params.total, []).append(loss)
    if not by_size:
        return 0
    mean = {N: sum(found) / len(found) for N, found in by_size.items()}
    best, sizes = min(mean, key=mean.get), sorted(mean)
    return 1 if best == sizes[-1] else -1 if best == sizes[0] else 0


def _variants(sweep: Sweep):
    """(Config, multiples, label) for each combination of varied options; the label shows those with several values."""
    axes = {**sweep.lists, **{key: getattr(sweep.grid, key) for key in TIMES}}
    if sweep.grid.vary == "product":
        chosen = itertools.product(*axes.values())
    else:  # the first of all, then each list in turn
        first = [values[0] for values in axes.values()]
        chosen = [tuple(first)] + [
            (*first[:i], value, *first[i + 1 :]) for i, values in enumerate(axes.values()) for value in values[1:]
        ]
    for values in chosen:
        point = dict(zip(axes, values, strict=True))
        varied = {key: value for key, value in point.items() if len(axes[key]) > 1}
        if sweep.grid.vary == "one":  # without options at their first value
            varied = {key: value for key, value in varied.items() if value != axes[key][0]}
        label = "".join(f"-{key}={_short(value)}" for key, value in varied.items())
        options = {key: value for key, value in point.items() if key in sweep.lists}
        yield dataclasses.replace(sweep.base, **options), {key: point[key] for key in TIMES}, label


class _Builder:
    """Makes the cells of one variant."""

    def __init__(self, sweep: Sweep, vocab_size: int, base: Config, times: dict[str, float], label: str):
        self.sweep, self.grid, self.base, self.times, self.label = sweep, sweep.grid, base, times, label
        self.law = load_law(base.law, base.law_approach) if base.law else BESIROGLU
        self.make = shape_maker(base, vocab_size, base.seq_len)

    # Sizes

    def affordable(self, budget: float):
        return ladder.affordable(self.make, budget, self.base.flops, self.base.batch_tokens)

    def centres(self) -> list[float]:
        """The expected optimal N of each budget."""
        if self.grid.centre:
            return list(self.grid.centre)
        best = [
            ladder.plan(
                self.make, budget=budget, law=self.law, convention=self.base.flops, batch_tokens=self.base.batch_tokens
            )
            for budget in self.grid.budgets
        ]
        return [plan.params.total for plan in best]

    def isoflop_shapes(self, budget: float, centre: float) -> list[Shape]:
        if self.grid.models:
            return [shape for shape in map(self.named, self.grid.models) if self.can_spend(budget, shape)]
        plans = ladder.isoflop(
            self.make,
            budget,
            sizes=self.grid.sizes,
            spread=self.grid.spread,
            centre=centre,
            convention=self.base.flops,
            batch_tokens=self.base.batch_tokens,
        )
        return [plan.shape for plan in plans]

    def can_spend(self, budget: float, shape: Shape) -> bool:
        least = self.base.batch_tokens or ladder.MIN_STEPS * shape.seq_len
        return budget / flops_per_token(shape, self.base.flops) >= least

    def spacing(self) -> float:
        """The distance in log N between planned sizes."""
        return 2 * math.log(self.grid.spread) / (self.grid.sizes - 1) if self.grid.sizes > 1 else math.log(1.5)

    def named(self, model: str) -> Shape:
        return self.make(*parse_model(model))

    # Plans and cells

    def plan(self, shape: Shape, budget: float | None = None, tokens: float | None = None, **fixed) -> ladder.Plan:
        """The plan of this shape by the rules, times this variant's multiples."""
        given = {
            "batch_tokens": self.base.batch_tokens,
            "lr": self.base.lr,
            "beta2": self.base.beta2,
            "warmup_tokens": self.base.warmup_tokens,
        } | fixed
        make = functools.partial(
            ladder.plan,
            self.make,
            budget=budget,
            tokens=tokens,
            model=(shape.width, shape.layers),
            law=self.law,
            convention=self.base.flops,
        )
        plan = make(**given)
        given["lr"] = plan.lr * self.times["lr_times"]  # for the batch before batch_times
        if self.times["batch_times"] != 1 and "batch_tokens" not in fixed:
            sequences = max(1, round(plan.batch_tokens * self.times["batch_times"] / shape.seq_len))
            given["batch_tokens"] = sequences * shape.seq_len
        if "warmup_tokens" not in fixed:
            given["warmup_tokens"] = plan.warmup_tokens * self.times["warmup_times"]
        return make(**given)

    def cell(self, stem: str, plan: ladder.Plan, seed: int, budget: float | None = None, **more) -> Cell:
        """`more`: trunk, step, is_trunk of the cell, and options of its Config."""
        place = {key: more.pop(key) for key in ("trunk", "step", "is_trunk") if key in more}
        config = dataclasses.replace(
            self.base, model=str(plan.shape), tokens=float(plan.tokens), batch_tokens=plan.batch_tokens, lr=plan.lr,
            warmup_tokens=float(plan.warmup_tokens), beta2=plan.beta2, seed=seed, name=f"{stem}{self.label}-s{seed}",
            keep=1, sample_tokens=0, **more)  # fmt: skip
        shared = place.get("step", 0) / plan.steps
        spent = plan.flops["physical"] * (1 - shared)
        return Cell(config.name, self.grid.kind, config, plan, budget, spent, varied=self.label, **place)

    def isoflop_cell(self, budget: float, shape: Shape, seed: int) -> Cell:
        return self.cell(f"{_short(budget)}-{shape}", self.plan(shape, budget), seed, budget)


def _isoflop(build: _Builder) -> list[Cell]:
    """Approach 2: several sizes spend the same budget."""
    cells = []
    for budget, centre in zip(build.grid.budgets, build.centres(), strict=True):
        shapes = build.isoflop_shapes(budget, centre)
        if not shapes:
            raise UserError(f"no model can spend the budget {budget:g}")
        middle = min(shapes, key=lambda s, centre=centre: abs(math.log(count_params(s).total / centre)))
        for shape in shapes:
            seeds = build.grid.seeds + (build.grid.centre_seeds if shape == middle else ())
            cells += [build.isoflop_cell(budget, shape, seed) for seed in seeds]
    return cells


def _lengths(build: _Builder) -> list[tuple[Shape, list[float]]]:
    """(shape, its ascending numbers of tokens) for horizons and trunk."""
    grid, convention = build.grid, build.base.flops
    budgets, centres = grid.budgets, build.centres()
    if grid.models:
        shapes = [build.named(model) for model in grid.models]
    else:
        ends = math.log(centres[0]), math.log(centres[-1])
        plans = ladder.isoflop(
            build.make,
            budgets[-1],
            sizes=grid.sizes,
            centre=math.exp(sum(ends) / 2),
            spread=math.exp((ends[1] - ends[0]) / 2),
            convention=convention,
        )
        shapes = [plan.shape for plan in plans]
    found = []
    for shape in shapes:
        best_for = _interpolate(count_params(shape).total, centres, budgets)
        longest = min(grid.reach * best_for, budgets[-1]) / flops_per_token(shape, convention)
        steps = range(grid.horizons - 1, -1, -1)
        found.append((shape, [longest * grid.span ** (-i / (grid.horizons - 1)) for i in steps]))
    return found


def _interpolate(x: float, xs: list[float], ys: tuple[float, ...]) -> float:
    """y at x, on a power law through the first and the last point; C ~ N^2 if there is only one."""
    slope = math.log(ys[-1] / ys[0]) / math.log(xs[-1] / xs[0]) if xs[-1] != xs[0] else 2.0
    return ys[0] * (x / xs[0]) ** slope


def _horizons(build: _Builder) -> list[Cell]:
    """Approach 1: each size at several lengths, each with a schedule of that length."""
    cells = []
    for shape, lengths in _lengths(build):
        for tokens in lengths:
            plan = build.plan(shape, tokens=tokens)
            cells += [build.cell(f"{shape}-{plan.tokens / 1e6:.3g}M", plan, seed) for seed in build.grid.seeds]
    return cells


def _trunk(build: _Builder) -> list[Cell]:
    """The same lengths by cooldowns that branch from one constant-rate run per size (Haegele et al. 2024). Batch by the
    rule for the geometric mean of the lengths, warm-up by the rule for the shortest."""
    cells, share = [], build.base.cooldown
    for shape, lengths in _lengths(build):
        middle = math.exp(sum(map(math.log, lengths)) / len(lengths))
        batch = build.plan(shape, tokens=middle).batch_tokens
        warmup = build.plan(shape, tokens=lengths[0], batch_tokens=batch).warmup_tokens
        fixed = {"batch_tokens": batch, "warmup_tokens": warmup}
        plans = [build.plan(shape, tokens=tokens, **fixed) for tokens in lengths]
        steps = [math.floor(plan.steps * (1 - share)) for plan in plans]  # wsd is constant up to here
        if not all(warmup / batch < step < plan.steps for step, plan in zip(steps, plans, strict=True)):
            raise UserError(f"{shape}: {min(steps)} steps are too few for warm-up and cooldown")
        whole = build.plan(shape, tokens=steps[-1] * batch, **fixed)
        for seed in build.grid.seeds:
            trunk = build.cell(
                f"trunk-{shape}", whole, seed, schedule="constant", save_steps=tuple(steps), is_trunk=True
            )
            cells.append(trunk)
            for plan, step in zip(plans, steps, strict=True):
                cells.append(
                    build.cell(
                        f"{shape}-{plan.tokens / 1e6:.3g}M",
                        plan,
                        seed,
                        schedule="wsd",
                        trunk=trunk.name,
                        step=step,
                        branch_from=f"{trunk.name}@{step}",
                    )
                )
    return cells


def _grid(build: _Builder) -> list[Cell]:
    """Every model at every budget, or, if paired, at its own."""
    models, budgets = map(build.named, build.grid.models), build.grid.budgets
    pairs = zip(models, budgets, strict=True) if build.grid.paired else itertools.product(models, budgets)
    return [build.isoflop_cell(budget, shape, seed) for shape, budget in pairs for seed in build.grid.seeds]


_PLANNERS = {"isoflop": _isoflop, "horizons": _horizons, "trunk": _trunk, "grid": _grid}


def _short(value) -> str:
    """1e12 -> '1e12', 0.01 -> '0.01', 'gelu' -> 'gelu', for folder names."""
    if isinstance(value, int | float):
        return re.sub(r"e[+]?(-?)0*", r"e\1", f"{value:g}")
    return str(value).replace("/", "_")
