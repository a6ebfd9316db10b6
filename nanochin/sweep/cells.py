"""The cells of a sweep: its runs, with their options and costs. Pure functions; no torch.

sweep = read_sweep("sweeps/mini.toml")
cells = plan_cells(sweep, vocab_size=256)       each a resolved train.Config and its place in the sweep
more = extend_budgets(sweep, cells, losses, vocab_size=256)   more sizes for budgets whose minimum is at an edge
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
from dataclasses import dataclass, fields

from nanochin.base.cli import UserError
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


def plan_cells(sweep: Sweep, vocab_size: int, corpus_tokens: float | None = None) -> list[Cell]:
    """All cells, in the order of runs.csv. Raises UserError for an impossible cell or, with `corpus_tokens`, for one of
    more than `max_epochs` epochs."""
    cells = []
    try:
        for variant in _variants(sweep):
            cells += _PLANNERS[sweep.spec.kind](_Builder(sweep, vocab_size, *variant))
    except UserError as error:  # the same message as from train.py
        raise UserError(f"{sweep.path}: {error}") from None
    names = [cell.name for cell in cells]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{sweep.path}: two cells would be named {min(twice)}; make their options differ")
    most = sweep.spec.max_epochs
    for cell in cells:
        if most and corpus_tokens and cell.plan.tokens > most * corpus_tokens:
            epochs = cell.plan.tokens / corpus_tokens
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
                log_size = {shape: math.log(count_params(shape).total) for shape in build.affordable(budget)}
                beyond = [shape for shape, size in log_size.items() if side * (size - edge) > 0]
                target = edge + side * build.spacing()
                if beyond:
                    shape = min(beyond, key=lambda s, size=log_size, target=target: abs(size[s] - target))
                    added += [build.isoflop_cell(budget, shape, seed) for seed in sweep.spec.seeds]
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
        self.sweep, self.spec, self.base, self.times, self.label = sweep, sweep.spec, base, times, label
        self.law = load_law(base.law, base.law_approach) if base.law else BESIROGLU
        self.make = shape_maker(base, vocab_size, base.seq_len)

    # Sizes

    def affordable(self, budget: float):
        return ladder.affordable(self.make, budget, self.base.flops, self.base.batch_tokens)

    def centres(self) -> list[float]:
        """The expected optimal N of each budget."""
        if self.spec.centre:
            return list(self.spec.centre)
        best = [
            ladder.plan(
                self.make, budget=budget, law=self.law, convention=self.base.flops, batch_tokens=self.base.batch_tokens
            )
            for budget in self.spec.budgets
        ]
        return [plan.params.total for plan in best]

    def isoflop_shapes(self, budget: float, centre: float) -> list[Shape]:
        if self.spec.models:
            return [shape for shape in map(self.named, self.spec.models) if self.can_spend(budget, shape)]
        plans = ladder.isoflop(
            self.make,
            budget,
            sizes=self.spec.sizes,
            spread=self.spec.spread,
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
        return 2 * math.log(self.spec.spread) / (self.spec.sizes - 1) if self.spec.sizes > 1 else math.log(1.5)

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
        return Cell(config.name, self.spec.kind, config, plan, budget, spent, varied=self.label, **place)

    def isoflop_cell(self, budget: float, shape: Shape, seed: int) -> Cell:
        return self.cell(f"{_short(budget)}-{shape}", self.plan(shape, budget), seed, budget)


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
    spec, convention = build.spec, build.base.flops
    budgets, centres = spec.budgets, build.centres()
    if spec.models:
        shapes = [build.named(model) for model in spec.models]
    else:
        ends = math.log(centres[0]), math.log(centres[-1])
        plans = ladder.isoflop(
            build.make,
            budgets[-1],
            sizes=spec.sizes,
            centre=math.exp(sum(ends) / 2),
            spread=math.exp((ends[1] - ends[0]) / 2),
            convention=convention,
        )
        shapes = [plan.shape for plan in plans]
    found = []
    for shape in shapes:
        best_for = _interpolate(count_params(shape).total, centres, budgets)
        longest = min(spec.reach * best_for, budgets[-1]) / flops_per_token(shape, convention)
        steps = range(spec.horizons - 1, -1, -1)
        found.append((shape, [longest * spec.span ** (-i / (spec.horizons - 1)) for i in steps]))
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
            cells += [build.cell(f"{shape}-{plan.tokens / 1e6:.3g}M", plan, seed) for seed in build.spec.seeds]
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
        for seed in build.spec.seeds:
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
    models, budgets = map(build.named, build.spec.models), build.spec.budgets
    pairs = zip(models, budgets, strict=True) if build.spec.paired else itertools.product(models, budgets)
    return [build.isoflop_cell(budget, shape, seed) for shape, budget in pairs for seed in build.spec.seeds]


_PLANNERS = {"isoflop": _isoflop, "horizons": _horizons, "trunk": _trunk, "grid": _grid}


def _short(value) -> str:
    """1e12 -> '1e12', 0.01 -> '0.01', 'gelu' -> 'gelu', for folder names."""
    if isinstance(value, int | float):
        return re.sub(r"e[+]?(-?)0*", r"e\1", f"{value:g}")
    return str(value).replace("/", "_")
