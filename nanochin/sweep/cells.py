"""The cells of a sweep: its runs, with their options and costs. Pure functions; no torch.

sweep = read_sweep("sweeps/mini.toml")
cells = plan_cells(sweep, vocab_size=256)                     each with a resolved Config
more = extend_budgets(sweep, cells, losses, vocab_size=256)   more sizes for budgets whose minimum is at an edge
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from dataclasses import dataclass, fields

from nanochin.base.cli import UserError, errors_name
from nanochin.config import Config, Shape, parse_model, shape_maker
from nanochin.laws import BESIROGLU, load_law
from nanochin.plan import ladder
from nanochin.plan.flops import count_params, flops_per_token
from nanochin.sweep.spec import TIMES, Sweep


@dataclass(frozen=True)
class Cell:
    """One run of the sweep. Steps that cooldowns share with their trunk count in the trunk's `spent` only."""

    name: str
    kind: str  # the sweep's
    config: Config
    plan: ladder.Plan
    budget: float | None
    spent: float  # training FLOPs, physical
    trunk: str | None = None  # the run that a cooldown branches from
    step: int = 0  # at which it branches
    is_trunk: bool = False  # a constant-rate run, which gives no row
    varied: str = ""  # options, as in the name

    def digest(self, data_sha: str, val_sha: str) -> str:
        """Hash of the options that the sweep sets for the run, and of its text: equal hash, equal run."""
        options = [f for f in fields(Config) if f.metadata["result"]]
        decided = {f.name: value for f in options if (value := getattr(self.config, f.name)) != f.default}
        known = json.dumps([decided, data_sha, val_sha], sort_keys=True)
        return hashlib.sha256(known.encode()).hexdigest()[:16]


def plan_cells(sweep: Sweep, vocab_size: int, corpus_tokens: float | None = None) -> list[Cell]:
    """All cells, in the order of runs.csv. Raises UserError for an impossible cell or, with `corpus_tokens`, for one of
    more than `max_epochs` epochs."""
    cells = []
    with errors_name(sweep.path):
        for variant in _variants(sweep):
            cells += _PLANNERS[sweep.spec.kind](_Builder(sweep, vocab_size, *variant))
    names = [cell.name for cell in cells]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{sweep.path}: two cells would be named {min(twice)}; make their options differ")
    most = sweep.spec.max_epochs
    for cell in cells if most and corpus_tokens else ():
        if (epochs := cell.plan.tokens / corpus_tokens) > most:
            raise UserError(
                f"{sweep.path}: {cell.name} would train for {epochs:.2g} epochs, max_epochs is {most:g}; "
                "use more text, fewer small sizes or a smaller budget"
            )
    return cells


def extend_budgets(sweep: Sweep, cells: list[Cell], losses: dict[str, float | None], vocab_size: int) -> list[Cell]:
    """New cells for budgets whose cells have all ended and whose lowest loss is at the smallest or largest size.
    `losses`: by run, None for a failed run. The same losses give the same cells, so a rerun adds no others."""
    if sweep.spec.kind != "isoflop" or not sweep.spec.extend:
        return []
    added = []
    for variant in _variants(sweep):
        build = _Builder(sweep, vocab_size, *variant)
        for budget, centre in zip(sweep.spec.budgets, build.centres(), strict=True):
            group = [cell for cell in cells if cell.budget == budget and cell.varied == build.label]
            planned = len(build.isoflop_shapes(budget, centre))
            tried = {cell.plan.shape: cell.plan.params.total for cell in group}
            if any(cell.name not in losses for cell in group) or len(tried) - planned >= sweep.spec.extend_limit:
                continue
            if side := open_side(group, losses):
                edge = side * max(side * math.log(N) for N in tried.values())
                shapes = ladder.affordable(build.make, budget, build.base.flops, build.base.batch_tokens)
                sizes = {shape: math.log(count_params(shape).total) for shape in shapes}
                intervals = sweep.spec.sizes - 1
                target = edge + side * (2 * math.log(sweep.spec.spread) / intervals if intervals else math.log(1.5))
                beyond = {shape: abs(size - target) for shape, size in sizes.items() if side * (size - edge) > 0}
                if beyond:
                    shape = min(beyond, key=beyond.get)
                    added += [build.isoflop_cell(budget, shape, seed) for seed in sweep.spec.seeds]
    return added


def open_side(group: list[Cell], losses: dict[str, float | None]) -> int:
    """Where a budget's lowest loss (mean over seeds) is: 1 at the largest size, -1 at the smallest, 0 between them or
    unknown."""
    by_size = {}
    for cell in group:
        if (loss := losses.get(cell.name)) is not None:
            by_size.setdefault(cell.plan.params.total, []).append(loss)
    best = min(by_size, key=lambda N: sum(by_size[N]) / len(by_size[N]), default=None)
    return 0 if best is None else 1 if best == max(by_size) else -1 if best == min(by_size) else 0


def _variants(sweep: Sweep):
    """(Config, multiples, label) for each combination of varied options; the label shows those with several values."""
    axes = {**sweep.lists, **{key: getattr(sweep.spec, key) for key in TIMES}}
    if sweep.spec.vary == "product":
        chosen = itertools.product(*axes.values())
    else:  # the first of all, then each list in turn
        first = [values[0] for values in axes.values()]
        chosen = [tuple(first)] + [
            (*first[:i], value, *first[i + 1 :]) for i, values in enumerate(axes.values()) for value in values[1:]
        ]
    for values in chosen:
        point = dict(zip(axes, values, strict=True))
        varied = {key: value for key, value in point.items() if len(axes[key]) > 1}
        if sweep.spec.vary == "one":  # without options at their first value
            varied = {key: value for key, value in varied.items() if value != axes[key][0]}
        label = "".join(f"-{key}={_short(value)}" for key, value in varied.items())
        options = {key: value for key, value in point.items() if key in sweep.lists}
        yield dataclasses.replace(sweep.base, **options), {key: point[key] for key in TIMES}, label


class _Builder:
    """Makes the cells of one variant."""

    def __init__(self, sweep: Sweep, vocab_size: int, base: Config, times: dict[str, float], label: str):
        self.spec, self.base, self.times, self.label = sweep.spec, base, times, label
        self.law = load_law(base.law, base.law_approach) if base.law else BESIROGLU
        self.make = shape_maker(base, vocab_size, base.seq_len)

    def centres(self) -> list[float]:
        """The expected optimal N of each budget."""
        if self.spec.centre:
            return list(self.spec.centre)
        options = {"law": self.law, "convention": self.base.flops, "batch_tokens": self.base.batch_tokens}
        return [ladder.plan(self.make, budget=budget, **options).params.total for budget in self.spec.budgets]

    def isoflop_shapes(self, budget: float, centre: float) -> list[Shape]:
        batch = self.base.batch_tokens
        if not self.spec.models:
            return self.ladder_shapes(budget, centre, self.spec.spread, batch)
        tokens = {shape: budget / flops_per_token(shape, self.base.flops) for shape in self.named_shapes()}
        return [shape for shape, found in tokens.items() if found >= (batch or ladder.MIN_STEPS * shape.seq_len)]

    def ladder_shapes(self, budget: float, centre: float, spread: float, batch: int | None = None) -> list[Shape]:
        options = {"sizes": self.spec.sizes, "convention": self.base.flops, "batch_tokens": batch}
        return [plan.shape for plan in ladder.isoflop(self.make, budget, centre=centre, spread=spread, **options)]

    def named_shapes(self) -> list[Shape]:
        """The sizes that the sweep file names in `models`."""
        return [self.make(*parse_model(model)) for model in self.spec.models]

    def plan(self, shape: Shape, budget: float | None = None, tokens: float | None = None, **fixed) -> ladder.Plan:
        """The plan of this shape by the rules, times this variant's multiples."""
        given = {key: getattr(self.base, key) for key in ("batch_tokens", "lr", "beta2", "warmup_tokens")} | fixed
        cost = {"budget": budget, "tokens": tokens, "law": self.law, "convention": self.base.flops}
        model = shape.width, shape.layers
        plan = ladder.plan(self.make, model=model, **cost, **given)
        given["lr"] = plan.lr * self.times["lr_times"]  # for the batch before batch_times
        if self.times["batch_times"] != 1 and "batch_tokens" not in fixed:
            sequences = max(1, round(plan.batch_tokens * self.times["batch_times"] / shape.seq_len))
            given["batch_tokens"] = sequences * shape.seq_len
        if "warmup_tokens" not in fixed:
            given["warmup_tokens"] = plan.warmup_tokens * self.times["warmup_times"]
        return ladder.plan(self.make, model=model, **cost, **given)

    def cell(
        self, stem: str, plan: ladder.Plan, seed: int, budget=None, trunk=None, step=0, is_trunk=False, **options
    ) -> Cell:
        """`options`: more options of the run."""
        options |= {key: getattr(plan, key) for key in ("batch_tokens", "lr", "beta2")}
        options |= {"tokens": float(plan.tokens), "warmup_tokens": float(plan.warmup_tokens)}
        name = f"{stem}{self.label}-s{seed}"
        options |= {"model": str(plan.shape), "seed": seed, "name": name, "keep": 1, "sample_tokens": 0}
        config, spent = dataclasses.replace(self.base, **options), plan.flops["physical"] * (1 - step / plan.steps)
        return Cell(name, self.spec.kind, config, plan, budget, spent, trunk, step, is_trunk, self.label)

    def isoflop_cell(self, budget: float, shape: Shape, seed: int) -> Cell:
        return self.cell(f"{_short(budget)}-{shape}", self.plan(shape, budget), seed, budget)

    def length_cell(self, plan: ladder.Plan, seed: int, **more) -> Cell:
        return self.cell(f"{plan.shape}-{plan.tokens / 1e6:.3g}M", plan, seed, **more)


def _isoflop(build: _Builder) -> list[Cell]:
    """Approach 2: several sizes spend the same budget."""
    cells = []
    for budget, centre in zip(build.spec.budgets, build.centres(), strict=True):
        shapes = build.isoflop_shapes(budget, centre)
        if not shapes:
            raise UserError(f"no model can spend the budget {budget:g}")
        middle = min(shapes, key=lambda s, centre=centre: abs(math.log(count_params(s).total / centre)))
        for shape in shapes:
            seeds = build.spec.seeds + (build.spec.centre_seeds if shape == middle else ())
            cells += [build.isoflop_cell(budget, shape, seed) for seed in seeds]
    return cells


def _lengths(build: _Builder) -> list[tuple[Shape, list[float]]]:
    """(shape, its ascending numbers of tokens) for horizons and trunk."""
    spec, budgets, centres = build.spec, build.spec.budgets, build.centres()
    shapes = build.named_shapes()
    if not shapes:
        low, high = math.log(centres[0]), math.log(centres[-1])
        shapes = build.ladder_shapes(budgets[-1], math.exp((low + high) / 2), math.exp((high - low) / 2))
    # The budget that a size is optimal for, by a power law through the first and the last centre.
    slope = 2.0
    if centres[-1] != centres[0]:
        slope = math.log(budgets[-1] / budgets[0]) / math.log(centres[-1] / centres[0])
    found = []
    for shape in shapes:
        best_for = budgets[0] * (count_params(shape).total / centres[0]) ** slope
        longest = min(spec.reach * best_for, budgets[-1]) / flops_per_token(shape, build.base.flops)
        steps = range(spec.horizons - 1, -1, -1)
        found.append((shape, [longest * spec.span ** (-i / (spec.horizons - 1)) for i in steps]))
    return found


def _horizons(build: _Builder) -> list[Cell]:
    """Approach 1: each size at several lengths, each with a learning-rate schedule of that length."""
    plans = [build.plan(shape, tokens=tokens) for shape, lengths in _lengths(build) for tokens in lengths]
    return [build.length_cell(plan, seed) for plan in plans for seed in build.spec.seeds]


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
        steps = tuple(math.floor(plan.steps * (1 - share)) for plan in plans)  # wsd is constant up to here
        if not all(warmup / batch < step < plan.steps for step, plan in zip(steps, plans, strict=True)):
            raise UserError(f"{shape}: {min(steps)} steps are too few for warm-up and cooldown")
        whole = build.plan(shape, tokens=steps[-1] * batch, **fixed)
        constant = {"schedule": "constant", "save_steps": steps, "is_trunk": True}
        for seed in build.spec.seeds:
            cells.append(trunk := build.cell(f"trunk-{shape}", whole, seed, **constant))
            for plan, step in zip(plans, steps, strict=True):
                branch = {"trunk": trunk.name, "step": step, "branch_from": f"{trunk.name}@{step}"}
                cells.append(build.length_cell(plan, seed, schedule="wsd", **branch))
    return cells


def _grid(build: _Builder) -> list[Cell]:
    """Every model at every budget, or, if paired, at its own."""
    models, budgets = build.named_shapes(), build.spec.budgets
    pairs = zip(models, budgets, strict=True) if build.spec.paired else itertools.product(models, budgets)
    return [build.isoflop_cell(budget, shape, seed) for shape, budget in pairs for seed in build.spec.seeds]


_PLANNERS = {"isoflop": _isoflop, "horizons": _horizons, "trunk": _trunk, "grid": _grid}


def _short(value) -> str:
    """1e12 -> '1e12', 0.01 -> '0.01', 'gelu' -> 'gelu', for folder names."""
    if isinstance(value, int | float):
        return re.sub(r"e[+]?(-?)0*", r"e\1", f"{value:g}")
    return str(value).replace("/", "_")
