"""Plan a run from a compute budget: a ladder of shapes, a law to choose from it, rules for the rest.

`plan` computes the third of budget, model and tokens from any two, uses the law if only one is given, and derives
batch, learning rate, warm-up and beta2 by the rules of plan/rules.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from nanochin.base.cli import UserError
from nanochin.base.console import count, format_columns
from nanochin.config import FLOP_CONVENTIONS, Shape, shape_maker
from nanochin.laws import BESIROGLU, Law, PowerLaw, load_law
from nanochin.options import LadderOptions
from nanochin.plan.flops import Params, count_flops, count_params, flops_per_token
from nanochin.plan.rules import rule_batch, rule_beta2, rule_lr, rule_warmup

# (width, layers), from 2 thousand parameters (bytes) to 1 billion. Neighbours differ by less than 1.5x in `with_head`
# for any vocabulary. Width over layers rises to the paper's 40 to 90; from 512x8 on, these are rows of its Table A9.
LADDER = (
    (6, 1), (8, 1), (10, 1), (12, 1), (16, 1), (16, 2), (20, 2), (24, 2), (28, 2), (32, 2),
    (40, 2), (48, 2), (56, 2), (64, 2), (64, 3), (64, 4), (96, 2), (96, 3), (128, 2), (128, 3),
    (128, 4), (160, 3), (192, 3), (192, 4), (256, 3), (256, 4), (256, 5), (320, 4), (320, 5), (384, 5),
    (384, 6), (448, 6), (448, 7), (512, 7),
    (512, 8), (576, 9), (640, 10), (640, 13), (640, 16), (768, 12), (768, 15), (768, 18),
    (896, 14), (896, 16), (896, 18), (1024, 16), (1024, 18), (1024, 20), (1280, 18), (1280, 21), (1408, 18),
    (1280, 24), (1408, 21), (1536, 19), (1408, 24), (1536, 22), (1536, 25), (1792, 20), (1792, 23), (1792, 26),
)  # fmt: skip

MIN_STEPS = 100
Make = Callable[[int, int], Shape]  # make(width, layers): config.make_shape with vocabulary, seq_len, options bound


@dataclass(frozen=True)
class Plan:
    """One planned run. tokens == steps * batch_tokens; `why` has a short reason for each derived quantity."""

    shape: Shape
    tokens: int
    batch_tokens: int
    steps: int
    lr: float
    warmup_tokens: int
    beta2: float
    params: Params
    flops: dict[str, float]  # by convention
    predicted_loss: float | None  # by the law, if it predicts losses
    why: dict[str, str]


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def plan(
    make: Make,
    *,
    budget: float | None = None,
    model: tuple[int, int] | None = None,
    tokens: float | None = None,
    law: Law | PowerLaw = BESIROGLU,
    convention: str = "physical",
    batch_tokens: int | None = None,
    lr: float | None = None,
    warmup_tokens: float | None = None,
    beta2: float | None = None,
) -> Plan:
    """The run for a budget (training FLOPs in `convention`), a model (width, layers), a number of tokens, or any two.

    Two fix the third. Budget alone selects the ladder's shape with the lowest predicted loss; model or tokens alone use
    the law's optimum. Raises UserError if the given values allow no run.
    """
    why = {}
    shape, wanted = _choose(make, budget, model, tokens, law, convention, batch_tokens, why)
    batch = _batch(shape, wanted, batch_tokens, convention, why)
    steps = round(wanted / batch)
    tokens = steps * batch
    params = count_params(shape)

    if lr is None:
        lr = rule_lr(shape.width, batch, params.total)
        why["lr"] = f"0.011 sqrt({batch}) / {shape.width}, by batch and width; at most 3.7 N^-0.36"
    if warmup_tokens is None:
        warmup_tokens = rule_warmup(params.total, tokens)
        why["warmup_tokens"] = "as many tokens as parameters, at most 5% of the run"
    if beta2 is None:
        beta2 = rule_beta2(batch)
        why["beta2"] = "0.99 for batches up to 262,144 tokens, else 0.95"
    _positive("lr", lr, below=1e6)
    if not 0 <= warmup_tokens <= tokens:
        raise UserError(f"`warmup_tokens` {warmup_tokens:g}: must be from 0 to the run's {tokens} tokens")

    predicted = law.loss(_law_params(shape, law), tokens) if isinstance(law, Law) else None
    flops = count_flops(shape, tokens)
    return Plan(shape, tokens, batch, steps, lr, int(warmup_tokens), beta2, params, flops, predicted, why)


def _choose(make, budget, model, tokens, law, convention, batch_tokens, why) -> tuple[Shape, float]:
    """(shape, tokens before rounding to whole steps)."""
    for option, value, limit in (("budget", budget, 1e30), ("tokens", tokens, 1e18)):
        if value is not None:
            _positive(option, value, below=limit)

    def cost(shape: Shape) -> float:
        return flops_per_token(shape, convention)

    shape = None if model is None else make(*model)
    if model is not None:
        why["model"] = "given"
    if tokens is not None:
        why["tokens"] = "given, rounded to whole steps"

    match budget is not None, model is not None, tokens is not None:  # a model with one of the others: nothing to do
        case False, False, False:
            raise UserError("nothing to plan from: give `budget`, `model` or `tokens`")

        case True, True, True:
            total = cost(shape) * tokens
            if abs(total / budget - 1) > 0.01:
                raise UserError(
                    f"`budget` {budget:g}: `model` {shape} on `tokens` {tokens:g} costs {total:.4g} FLOPs "
                    f"({convention}); leave one of the three out"
                )

        case True, False, True:
            shape = min(_ladder(make), key=lambda s: abs(math.log(cost(s) * tokens / budget)))
            why["model"] = "ladder shape whose cost on these tokens is closest to the budget"
            if abs(cost(shape) * tokens / budget - 1) > 0.25:
                raise UserError(
                    f"`budget` {budget:g}: no shape costs that on `tokens` {tokens:g}; the closest, "
                    f"`model` {shape}, needs `tokens` {budget / cost(shape):.3g}"
                )

        case False, True, False:
            tokens, why["tokens"] = law.tokens_for(_law_params(shape, law)), f"optimal for this model by {law.name}"

        case False, False, True:
            optimum = law.params_for(tokens)
            why["model"] = f"ladder shape closest to {count(optimum)} parameters, the optimum by {law.name}"
            shape = min(_ladder(make), key=lambda s: abs(math.log(_law_params(s, law) / optimum)))

        case True, False, False:
            candidates = affordable(make, budget, convention, batch_tokens)
            score, why["model"] = _by_law(law, candidates)
            shape = min(candidates, key=score)
            by_size = sorted(candidates, key=lambda s: _law_params(s, law))
            if shape in (by_size[0], by_size[-1]):
                why["model"] += f" (the {'smallest' if shape == by_size[0] else 'largest'})"

    if tokens is None:
        tokens, why["tokens"] = budget / cost(shape), f"budget / {cost(shape):.4g} FLOPs per token ({convention})"
    return shape, tokens


def _by_law(law: Law | PowerLaw, tokens: dict[Shape, float]) -> tuple[Callable[[Shape], float], str]:
    """(score to minimise over shapes, its description). `tokens`: candidate shapes, with their tokens in the budget."""
    among = f"among {len(tokens)} candidate shapes, by {law.name}"
    if isinstance(law, Law):
        return lambda s: law.loss(_law_params(s, law), tokens[s]), f"lowest predicted loss {among}"

    def distance(s: Shape) -> float:
        C = count_flops(s, tokens[s])[law.flops_convention]  # the budget as the law counts it
        return abs(math.log(_law_params(s, law) / law.optimal(C)[0]))

    return distance, f"closest to the optimum {among}"


def affordable(make: Make, budget: float, convention: str, batch_tokens: int | None) -> dict[Shape, float]:
    """The ladder's shapes that can spend the budget, each with its tokens. Raises UserError if there are none."""
    cost = {shape: flops_per_token(shape, convention) for shape in _ladder(make)}
    tokens = {s: budget / each for s, each in cost.items() if budget / each >= _min_tokens(s, batch_tokens)}
    if not tokens:
        smallest = min(cost, key=cost.get)
        least = _round_up(_min_tokens(smallest, batch_tokens) * cost[smallest])
        raise UserError(
            f"`budget` {budget:g}: too small for every shape of the ladder at `seq_len` "
            f"{smallest.seq_len}; the smallest, {smallest}, needs `budget` {least}"
        )
    return tokens


def _batch(shape: Shape, tokens: float, given: int | None, convention: str, why: dict) -> int:
    """Tokens per step: whole sequences, and at least MIN_STEPS steps unless the batch is given."""
    T, cost = shape.seq_len, flops_per_token(shape, convention)
    least = _min_tokens(shape, given)
    if given is not None and (given < T or given % T):
        raise UserError(f"`batch_tokens` {given}: must be a multiple of `seq_len` {T}")
    if tokens < least and given is not None:
        raise UserError(
            f"{tokens:.4g} tokens for {shape} are less than one step of `batch_tokens` {given}; it needs "
            f"`budget` {_round_up(least * cost)}"
        )
    if tokens < least:
        shorter = f" or `seq_len` {math.floor(tokens / MIN_STEPS)}" if tokens >= MIN_STEPS else ""
        raise UserError(
            f"{tokens:.4g} tokens for {shape} are fewer than {MIN_STEPS} steps of one {T}-token sequence; "
            f"it needs `tokens` {MIN_STEPS * T} (`budget` {_round_up(least * cost)}){shorter}"
        )
    if given is not None:
        return given
    why["batch_tokens"] = "0.03 D^0.69"
    return max(1, round(rule_batch(tokens) / T)) * T  # below 1% of the tokens whenever there are enough of them


def _min_tokens(shape: Shape, batch_tokens: int | None) -> float:
    """Minimum tokens of a run: one step of a given batch, else MIN_STEPS (rounded) of one sequence."""
    return batch_tokens or (MIN_STEPS - 0.5) * shape.seq_len


def _ladder(make: Make) -> list[Shape]:
    """The shapes of the ladder that the bound options allow: with head size 128, only its multiples."""
    shapes = []
    for width, layers in LADDER:
        try:
            shapes.append(make(width, layers))
        except UserError as error:
            rejected = error
    if not shapes:
        raise rejected
    return shapes


def _law_params(shape: Shape, law: Law | PowerLaw) -> int:
    """N as the law counts it."""
    return getattr(count_params(shape), law.params_convention)


def _positive(option: str, value: float, below: float) -> None:
    if not 0 < value < below:
        raise UserError(f"`{option}` {value:g}: must be above 0 and below {below:g}")


def _round_up(value: float) -> str:
    """Rounded up to two digits, so that a suggested value is enough: 1234 -> 1.3e+03."""
    digit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / digit) * digit:.1e}"


# ---------------------------------------------------------------------------------------------------------------------
# The isoFLOP grid


def isoflop(
    make: Make, budget: float, *, sizes: int = 7, spread: float = 4.0, centre: float | None = None, **options
) -> list[Plan]:
    """Plans for one budget, smallest first: up to `sizes` ladder shapes, evenly spaced in log N from 1/`spread` to
    `spread` times `centre` (default: the law's choice). Shapes that cannot spend the budget are left out. `options` go
    to `plan`."""
    centre = centre or plan(make, budget=budget, **options).params.total
    candidates = affordable(make, budget, options.get("convention", "physical"), options.get("batch_tokens"))
    size = {shape: math.log(count_params(shape).total) for shape in candidates}
    ratios = [2 * i / (sizes - 1) - 1 for i in range(sizes)] if sizes > 1 else [0.0]
    chosen = set()
    for target in (math.log(centre) + ratio * math.log(spread) for ratio in ratios):
        chosen.add(min(candidates, key=lambda s: abs(size[s] - target)))
    models = [(s.width, s.layers) for s in sorted(chosen, key=size.get)]
    return [plan(make, budget=budget, model=model, **options) for model in models]


def main(options: LadderOptions) -> None:
    if not options.budget:
        raise UserError("`budget`: give at least one, such as `budget` 1e15 3e15")
    law = BESIROGLU if options.law is None else load_law(options.law, options.law_approach)
    make, total = shape_maker(options, options.vocab_size, options.seq_len), 0.0
    for budget in options.budget:
        bound = {"law": law, "convention": options.flops}
        best = plan(make, budget=budget, **bound)
        grid = isoflop(make, budget, sizes=options.sizes, spread=options.spread, **bound)
        print(f"{budget:g} FLOPs ({options.flops}): {best.shape}, {best.why['model']}")
        print(_grid_table(grid, best, options), end="\n\n")
        total += sum(p.flops[options.flops] for p in grid)
    hours = f", {total / options.throughput / 3600:.3g} hours" if options.throughput else ""
    print(f"all shapes: {total:.3g} FLOPs ({options.flops}){hours}; * is what the law would train")


def _grid_table(grid: list[Plan], best: Plan, options: LadderOptions) -> str:
    """One line per shape; * marks the law's choice."""
    columns: dict[str, Callable[[Plan], str]] = {
        "shape": lambda p: f"{p.shape}{'*' if p.shape == best.shape else ''}",
        "params": lambda p: count(p.params.total),
        "with_head": lambda p: count(p.params.with_head),
        "tokens": lambda p: count(p.tokens),
        "D/N": lambda p: f"{p.tokens / p.params.total:.3g}",
        "batch": lambda p: str(p.batch_tokens),
        "steps": lambda p: str(p.steps),
        "lr": lambda p: f"{p.lr:.2g}",
        **{name: lambda p, name=name: f"{p.flops[name]:.3e}" for name in FLOP_CONVENTIONS},
    }
    if options.corpus_tokens:
        columns["epochs"] = lambda p: f"{p.tokens / options.corpus_tokens:.3g}"
    if options.throughput:
        columns["hours"] = lambda p: f"{p.flops[options.flops] / options.throughput / 3600:.3g}"
    return format_columns([[*columns], *([cell(p) for cell in columns.values()] for p in grid)])
