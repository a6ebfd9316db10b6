"""From a budget to a run: a ladder of shapes, and the plan that a law makes of it.

    python -m nanochin.ladder --budget 1e15 3e15 1e16

`plan` turns any two of budget, model and tokens into the third, asks the law where only one is given, and derives
batch, learning rate, warm-up and beta2 by the numbered rules below.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from nanochin.config import Shape, UserError
from nanochin.flops import Params, count_flops, count_params, flops_per_token
from nanochin.laws import BESIROGLU, Law, PowerLaw

# (width, layers), from 2 thousand parameters (bytes) to 1 billion. Neighbours differ by less than 1.5x in
# `with_head` whatever the vocabulary. Width over layers rises to the paper's 40-70; from 512x8 on these are the
# rows of its Table A9. Widths are such that the head size is min(64, width), 96 and 160 excepted.
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
    """One run, decided. tokens == steps * batch_tokens; `why` holds a short reason for each derived quantity."""

    shape: Shape
    tokens: int
    batch_tokens: int
    steps: int
    lr: float
    warmup_tokens: int
    beta2: float
    params: Params
    flops: dict[str, float]  # by convention
    budget: float | None
    predicted_loss: float | None  # by the law, where it has a loss
    why: dict[str, str]


# ---------------------------------------------------------------------------------------------------------------------
# The rules. N non-embedding or total parameters, D tokens.


def rule_batch(tokens: float) -> float:
    """1) Batch in tokens: Step Law, 0.58 D^0.571 (Li et al. 2025, 2503.04715, fitted on 60M-1B parameters)."""
    return 0.58 * tokens**0.571


def rule_lr(non_embedding_params: int, tokens: float) -> float:
    """2) Peak learning rate: Step Law, 1.79 N^-0.713 D^0.307 with N non-embedding, capped at 0.02, since below 10M
    parameters it is extrapolated."""
    return min(0.02, 1.79 * non_embedding_params**-0.713 * tokens**0.307)


def rule_warmup(params: int, tokens: int) -> int:
    """3) Warm-up: as many tokens as total parameters (Porian et al. 2024, 2406.19146: a fixed long warm-up bends the
    exponent), at most 5% of the run."""
    return min(params, tokens // 20)


def rule_beta2(batch_tokens: int) -> float:
    """4) Adam's beta2: 0.99 for batches under 131,072 tokens, whose noise wants a longer memory, else 0.95 (Porian
    et al. 2024)."""
    return 0.99 if batch_tokens < 131_072 else 0.95


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
    """The run that a budget (training FLOPs in `convention`), a model (width, layers) or a number of tokens asks for.

    Two of them fix the third; budget alone takes the ladder's shape of least predicted loss, model or tokens alone
    the law's optimum for it. Raises UserError where no run can be made of what is given.
    """
    why = {}
    shape, wanted = _choose(make, budget, model, tokens, law, convention, batch_tokens, why)
    batch = _batch(shape, wanted, batch_tokens, convention, why)
    steps = round(wanted / batch)
    tokens = steps * batch
    params = count_params(shape)

    if lr is None:
        lr = rule_lr(params.non_embedding, tokens)
        why["lr"] = "Step Law, at most 0.02"
    if warmup_tokens is None:
        warmup_tokens = rule_warmup(params.total, tokens)
        why["warmup_tokens"] = "as many tokens as parameters, at most 5% of the run"
    if beta2 is None:
        beta2 = rule_beta2(batch)
        why["beta2"] = "0.99 for batches under 131,072 tokens, else 0.95"
    _positive("lr", lr, below=1e6)
    if not 0 <= warmup_tokens <= tokens:
        raise UserError(f"--warmup-tokens {warmup_tokens:g}: must be from 0 to the run's {tokens} tokens")
    if not 0 <= beta2 < 1:
        raise UserError(f"--beta2 {beta2:g}: must be at least 0 and below 1")

    predicted = law.loss(_count(shape, law), tokens) if isinstance(law, Law) else None
    flops = count_flops(shape, tokens)
    return Plan(shape, tokens, batch, steps, lr, int(warmup_tokens), beta2, params, flops, budget, predicted, why)


def _choose(make, budget, model, tokens, law, convention, batch_tokens, why) -> tuple[Shape, float]:
    """The shape, and the tokens before they are rounded to whole steps."""
    if budget is not None:
        _positive("budget", budget, below=1e30)
    if tokens is not None:
        _positive("tokens", tokens, below=1e18)
    shape = None if model is None else make(*model)
    for name, given in (("model", model), ("tokens", tokens)):
        if given is not None:
            why[name] = "given"

    def cost(shape: Shape, tokens: float) -> float:
        return flops_per_token(shape, convention) * tokens

    if budget is None and model is None and tokens is None:
        raise UserError("nothing to plan from: give --budget, --model or --tokens")

    if model is not None and tokens is not None:
        if budget is not None and abs(cost(shape, tokens) / budget - 1) > 0.01:
            raise UserError(f"--budget {budget:g}: --model {shape} on --tokens {tokens:g} costs "
                            f"{cost(shape, tokens):.4g} FLOPs ({convention}); leave one of the three out")  # fmt: skip
        return shape, tokens

    if model is not None and budget is not None:
        why["tokens"] = f"the budget over {flops_per_token(shape, convention):.4g} FLOPs a token ({convention})"
        return shape, budget / flops_per_token(shape, convention)

    if model is not None:
        why["tokens"] = f"optimal for this model by {law.name}"
        return shape, law.tokens_for(_count(shape, law))

    shapes = _ladder(make)
    if budget is None:
        why["model"] = f"nearest in the ladder to the optimum for these tokens by {law.name}"
        optimum = law.params_for(tokens)
        return min(shapes, key=lambda s: abs(math.log(_count(s, law) / optimum))), tokens

    if tokens is not None:
        shape = min(shapes, key=lambda s: abs(math.log(cost(s, tokens) / budget)))
        if abs(cost(shape, tokens) / budget - 1) > 0.25:
            fits = budget / flops_per_token(shape, convention)
            raise UserError(f"--budget {budget:g}: no shape costs that on --tokens {tokens:g}; the nearest, "
                            f"--model {shape}, would take --tokens {fits:.3g}")  # fmt: skip
        why["model"] = "the ladder's shape whose cost on these tokens comes nearest the budget"
        return shape, tokens

    spend = {shape: budget / flops_per_token(shape, convention) for shape in shapes}
    able = [shape for shape in shapes if spend[shape] >= _least_tokens(shape, batch_tokens)]
    if not able:
        least = min(cost(shape, _least_tokens(shape, batch_tokens)) for shape in shapes)
        raise UserError(f"--budget {budget:g}: too small for every shape of the ladder with sequences of "
                        f"{shapes[0].seq_len} tokens; the smallest needs --budget {_up(least)}")  # fmt: skip
    if isinstance(law, Law):
        shape = min(able, key=lambda s: law.loss(_count(s, law), spend[s]))
        why["model"] = f"least loss of {len(able)} shapes at this budget by {law.name}"
    else:
        shape = min(able, key=lambda s: _off_optimum(s, spend[s], law))
        why["model"] = f"nearest of {len(able)} shapes to the optimum by {law.name}"
    if shape in (able[0], able[-1]) and len(able) > 1:
        why["model"] += f" (the {'smallest' if shape == able[0] else 'largest'} that can spend it)"
    why["tokens"] = f"the budget over {flops_per_token(shape, convention):.4g} FLOPs a token ({convention})"
    return shape, spend[shape]


def _batch(shape: Shape, tokens: float, given: int | None, convention: str, why: dict) -> int:
    """Tokens a step: whole sequences, and at least MIN_STEPS steps unless the batch is given."""
    T = shape.seq_len
    if given is not None:
        if given < T or given % T:
            raise UserError(f"--batch-tokens {given}: must be a multiple of --seq-len {T}")
        if tokens < given:
            raise UserError(f"{tokens:.4g} tokens for {shape} are too few for a single step of --batch-tokens {given}; "
                            f"--budget {_up(given * flops_per_token(shape, convention))} would do")  # fmt: skip
        return given
    if tokens < _least_tokens(shape, None):
        need = _up(MIN_STEPS * T * flops_per_token(shape, convention))
        fits = math.floor(tokens / MIN_STEPS)
        raise UserError(f"{tokens:.4g} tokens for {shape} are fewer than {MIN_STEPS} steps of one {T}-token sequence; "
                        f"--budget {need}" + (f" or --seq-len {fits}" if fits else "") + " would do")  # fmt: skip
    by_rule = max(1, round(rule_batch(tokens) / T))
    most = max(1, math.floor(tokens / (MIN_STEPS * T)))
    why["batch_tokens"] = "Step Law" if by_rule <= most else f"Step Law's {by_rule * T} cut, for {MIN_STEPS} steps"
    return min(by_rule, most) * T


def _least_tokens(shape: Shape, batch_tokens: int | None) -> float:
    """What a run needs: one step of a given batch, else MIN_STEPS (rounded) of one sequence."""
    return batch_tokens or (MIN_STEPS - 0.5) * shape.seq_len


def _ladder(make: Make) -> list[Shape]:
    """The shapes of the ladder that the bound options allow: `--head-size 128` leaves its multiples."""
    shapes = []
    for width, layers in LADDER:
        try:
            shapes.append(make(width, layers))
        except UserError as error:
            refused = error
    if not shapes:
        raise refused
    return shapes


def _count(shape: Shape, law: Law | PowerLaw) -> int:
    """N as the law counts it."""
    return getattr(count_params(shape), law.params_convention)


def _off_optimum(shape: Shape, tokens: float, law: PowerLaw) -> float:
    """|log(N / N_opt(C))|, both as the law counts them."""
    C = count_flops(shape, tokens)[law.flops_convention]
    return abs(math.log(_count(shape, law) / law.optimal(C)[0]))


def _positive(option: str, value: float, below: float) -> None:
    if not 0 < value < below:
        raise UserError(f"--{option} {value:g}: must be above 0 and below {below:g}")


def _up(value: float) -> str:
    """Rounded up to two digits, so that what is suggested suffices: 1234 -> 1.3e+03."""
    digit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / digit) * digit:.1e}"
