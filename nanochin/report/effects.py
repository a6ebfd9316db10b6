"""The effects that the rules of rules.py are about, measured from kept sweeps: a function for each claim, whose results
have the keys of its rules.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np

from nanochin import laws
from nanochin.config import make_shape
from nanochin.laws.gamma import make_surface
from nanochin.laws.law import interval, wilson
from nanochin.laws.parametric import reference_objective
from nanochin.plan.flops import flops_per_token, ledger
from nanochin.report.estimates import (
    Effect,
    Kept,
    a_along_curves,
    a_by_isoflop,
    a_in_laws,
    contrast,
    difference,
    excess_losses,
    mean_of,
    options,
    range_of,
    recounted,
)
from nanochin.runrow import flops_column, params_column


def equal_scaling(books: Kept) -> dict[str, Effect]:
    return {key: a_in_laws(books.laws[key]) for key in ("approach1", "approach2", "approach3", "law")}


def matched_schedule(sweep: Kept, horizons: Kept) -> dict[str, Effect]:
    """Excess losses, and a from the middle of the longest cosine of each size minus a from the ends of all cosines."""
    curves = [(row.params, *horizons.curve(row.run, "flops")) for row in horizons.rows]
    ends = [(N, C[-1], loss[-1]) for N, C, loss in curves]
    first = min(C for _, C, _ in ends)
    longest = {N: max((one for one in curves if one[0] == N), key=lambda one: one[1][-1]) for N, *_ in curves}
    middle = [
        (N, at, loss) for N, C, losses in longest.values() for at, loss in zip(C, losses, strict=True) if at >= first
    ]
    noise = horizons.laws["law"]["noise"]
    a = difference(a_along_curves(middle, noise), a_along_curves(ends, noise))
    return excess_losses(sweep, "cycle") | {"a": a}


def smaller_wins(low: Kept, high: Kept) -> dict[str, Effect]:
    best, large = ("56x2",), ("112x2",)
    groups = low.groups()
    found = {
        "3e12": contrast(groups, (large, best)),
        "1e13": contrast(high.groups(), (("144x2",), ("72x2",))),
        "1.7": contrast(groups, (("72x2",), best)),
        "1/4": contrast(groups, (("24x2",), best)),
    }
    for task in ("cloze", "last-word"):
        if items := [one for one in low.evaluated.get("evaluate-books", []) if one["task"] == task]:
            margins = by_model(items, "margins")
            ours, theirs = (np.mean(margins[model], axis=0) for model in (best, large))
            better, differ = int((ours > theirs).sum()), int((ours != theirs).sum())
            found[task] = Effect(better / differ, *wilson(better, differ), f"better on {better} of {differ}")
    for text in ("python", "peps"):
        if records := low.evaluated.get(f"evaluate-{text}"):
            found[text] = contrast(by_model(records, "bpb"), (large, best))
    return found


def by_model(records: list[dict], name: str) -> dict[tuple, list]:
    """A value of `evaluate --json` by the model of the run, such as 56x2 of '3e12-56x2-s0'; one for each seed."""
    found = defaultdict(list)
    for record in records:
        found[(record["run"].split("-")[1],)].append(record[name])
    return found


def adamw_against_adam(adamw: Kept, adam: Kept) -> dict[str, Effect]:
    runs = defaultdict(list)  # by optimizer, decay and multiple of the rate
    for name, sweep in (("adamw", adamw), ("adam", adam)):
        for row in sorted(sweep.rows, key=lambda row: row.seed):
            named = options(row.run)
            runs[name, named["weight_decay"], named["lr_times"]].append(row)
    losses = {key: [row.loss for row in rows] for key, rows in runs.items()}

    def best(*given: str) -> tuple:
        return min((key for key in losses if key[: len(given)] == given), key=lambda key: np.mean(losses[key]))

    ours, l2, none = best("adamw", "0.1"), best("adam"), best("adamw", "0")
    crossings = []
    for one, other in zip(runs[ours], runs[l2], strict=True):
        (tokens, loss), (_, theirs) = adamw.curve(one.run, "tokens"), adam.curve(other.run, "tokens")
        last = int(np.flatnonzero(np.append(True, theirs <= loss))[-1])  # the last point where AdamW is not lower
        crossings.append(tokens[last] / one.tokens if last < len(tokens) else math.nan)  # nan: not lower at the end
    rates = f"rates by rule times {ours[2]} (AdamW), {l2[2]} (Adam, L2 {l2[1]}), {none[2]} (no decay)"
    ends = min(crossings), max(crossings)
    return {
        "adam": replace(contrast(losses, (l2, ours)), note=rates),
        "none": contrast(losses, (none, ours)),
        "crossing": Effect(float(np.mean(crossings)), *ends, "range over seeds", sampled=False),
    }


# Layers, d_model, d_ff, heads, head size, and FLOPs / 6ND of Table A4.
TABLE_A4 = (
    (10, 640, 2560, 10, 64, 1.03),
    (20, 1024, 4096, 16, 64, 1.10),
    (24, 1280, 5120, 10, 128, 1.08),
    (26, 1792, 7168, 14, 128, 1.04),
    (28, 2048, 8192, 16, 128, 1.03),
    (40, 3584, 14336, 28, 128, 0.99),
)


def six_nd(books: Kept) -> dict[str, Effect]:
    """The paper's N has Transformer-XL's relative positions: a fifth attention matrix and two biases in each layer."""
    layers_only, with_logits, off = [], [], []
    for L, d, f, heads, size, published in TABLE_A4:
        q = heads * size
        six = 6 * (32_000 * d + 2 * d + L * (5 * d * q + 6 * q + 2 * d * f + 6 * d + f))
        shape = make_shape(d, L, vocab_size=32_000, seq_len=2048, head_size=size, ffn=f)
        logits = next(3 * row.physical / 2048 for row in ledger(shape) if row.operation == "logits")
        layers_only.append(flops_per_token(shape, "table_a4") / six)
        with_logits.append((flops_per_token(shape, "table_a4") + logits) / six)
        off.append(layers_only[-1] - published)
    worst = max(off, key=abs)
    N, D, _, C = books.columns()
    return {
        "published": Effect(worst, min(off), max(off), "range over the six models", sampled=False),
        "a4": range_of(layers_only, "range over the six models"),
        "physical": range_of(with_logits, "range over the six models"),
        "runs": range_of(C / (6 * N * D), f"range over {len(N)} runs"),
    }


def other_texts(code: Kept, peps: Kept, books: Kept, second: Kept) -> dict[str, Effect]:
    """The books' rows are those of both sweeps; a run in both counts once."""
    rows = {row.run: row for row in (*second.rows, *books.up_to(1e12).rows)}
    base = a_by_isoflop(replace(books, rows=list(rows.values())))
    return {"code": difference(a_by_isoflop(code), base), "peps": difference(a_by_isoflop(peps), base)}


def concave(books: Kept) -> dict[str, Effect]:
    found = books.laws["checks"]["curvature"]
    return {"quadratic": Effect(found["quadratic"], *found["intervals"]["95"])}


def repeated(sweep: Kept, books: Kept) -> dict[str, Effect]:
    found, law = excess_losses(sweep, "epochs"), laws.load_law(books.path / "laws.json")
    return {"4": found["4"], "40": found["40"], "R": fit_repeats(sweep, law)}


def fit_repeats(sweep: Kept, law: laws.Law) -> Effect:
    """R_D* of Muennighoff et al. 2023 from the ratio of losses to those without repeats: D tokens of U unique ones are
    worth U + U R (1 - exp(-(D / U - 1) / R)). Its interval is that of noise between seeds. Beside it, a penalty on log
    loss, p ((epochs - 1) N / U)^q, which can express that repeats harm."""
    from scipy.optimize import curve_fit, minimize_scalar

    rows = [(row.params, row.tokens, float(options(row.run)["epochs"]), math.log(row.loss)) for row in sweep.rows]
    N, D, epochs, log_loss = np.array(rows).T
    base = {n: log_loss[(N == n) & (epochs == 1)].mean() for n in np.unique(N)}
    excess, U = log_loss - [base[n] for n in N], D / epochs
    sd = math.sqrt(np.mean([np.var(np.log(v), ddof=1) for v in sweep.groups("epochs").values() if len(v) > 1]))

    def predicted(R: float) -> np.ndarray:
        worth = U * (1 + R * (1 - np.exp(-(epochs - 1) / R)))
        return np.log(law.loss(N, worth)) - np.log(law.loss(N, D))

    def best(y: np.ndarray) -> float:
        cost = minimize_scalar(
            lambda log_r: float(((predicted(math.exp(log_r)) - y) ** 2).sum()), bounds=(-3, 7), method="bounded"
        )
        return math.exp(cost.x)

    rng = np.random.default_rng(0)
    R, draws = best(excess), [best(excess + sd * rng.standard_normal(len(excess))) for _ in range(300)]
    x = (epochs - 1) * N / U
    (p, q), _ = curve_fit(lambda x, p, q: p * x**q, x, excess, p0=(0.01, 1.0))
    rms = [math.sqrt(np.mean((excess - fitted) ** 2)) for fitted in (predicted(R), p * x**q)]
    note = f"rms error {rms[0]:.1%}; of a penalty {p:.2g} ((epochs - 1) N / U)^{q:.2g} {rms[1]:.1%}; seeds {sd:.1%}"
    return Effect(R, *interval(draws, 95), note)


FRONTIERS = (laws.HOFFMANN_1, laws.HOFFMANN_2, laws.HOFFMANN, laws.BESIROGLU)
FOUR_LAWS = "range of the three approaches and of Besiroglu et al."
TABLE_1 = {  # parameters and training tokens
    "LaMDA": (137e9, 168e9),
    "GPT-3": (175e9, 300e9),
    "Jurassic-1": (178e9, 300e9),
    "Gopher": (280e9, 300e9),
    "MT-NLG": (530e9, 270e9),
}


def large_models() -> dict[str, Effect]:
    return {
        name: range_of((N / law.optimal(6 * N * D)[0] for law in FRONTIERS), FOUR_LAWS)
        for name, (N, D) in TABLE_1.items()
    }


def tokens_of_175b() -> dict[str, Effect]:
    tokens = [law.tokens_for(175e9) / 4.2e12 for law in FRONTIERS]
    return {"tokens": range_of(tokens, f"{FOUR_LAWS}: {', '.join(f'{4.2 * t:.1f}' for t in tokens)} trillion")}


def ten_times(*sweeps: Kept) -> dict[str, Effect]:
    found = [a_in_laws(sweep.laws["law"]) for sweep in sweeps]
    widest = min(one.low for one in found), max(one.high for one in found)
    a = Effect(float(np.mean([one.value for one in found])), *widest, "the widest of both sweeps")
    return {"growth": a.through(lambda power: 10**power)}


def narrow_intervals(*sweeps: Kept) -> dict[str, Effect]:
    """As the paper: 100 resamples of 80% of the runs. There the objective was the mean and the optimizer, L-BFGS with
    default tolerances, started at the optimum of all runs; here the sum, to convergence."""
    from scipy.optimize import minimize

    ratios = []
    for sweep in sweeps:
        N, D, loss, _ = sweep.columns()
        fit = laws.fit_parametric(N, D, loss, allow_bound=("E",))
        law, n, rng = fit.law, len(N), np.random.default_rng(0)
        weights = np.zeros((100, n))
        for row in weights:
            row[rng.choice(n, round(0.8 * n), replace=False)] = 1
        surface = make_surface(N, D, loss, **fit.options)
        found = surface.minimise(np.tile(surface.z(law), (100, 1)), weights)
        start = (*np.log([law.A, law.B, max(law.E, 1e-9)]), law.alpha, law.beta)
        data = (*np.log([N, D, loss]), 1e-3)
        means = weights / weights.sum(1, keepdims=True)
        stopped = [minimize(reference_objective, start, (*data, row), "L-BFGS-B", jac=True).x for row in means]
        theirs = np.array([x[4] / (x[3] + x[4]) for x in stopped])
        ours = surface.law(found.theta[found.converged]).a
        width, narrow = (float(np.diff(np.percentile(v, (10, 90)))[0]) for v in (ours, theirs))
        ratios.append(math.log(width / narrow))
    return {"ratio": mean_of(ratios).through(math.exp)}


def float32_weights(sweep: Kept) -> dict[str, Effect]:
    groups = sweep.groups("weight_dtype")
    return {"bfloat16": contrast(groups, (("40x2", "bfloat16"), ("40x2", "float32")))}


def rates(sweep: Kept, books: Kept) -> dict[str, Effect]:
    base, found = a_by_isoflop(books.up_to(1e12)), {}
    for times in ("0.5", "2"):
        rows = [row for row in sweep.rows if options(row.run)["lr_times"] == times]
        found[times] = difference(a_by_isoflop(replace(sweep, rows=rows)), base)
    return found


def huber_delta(*sweeps: Kept) -> dict[str, Effect]:
    larger, smaller = [], []
    for sweep in sweeps:
        budget = [row.budget or math.nan for row in sweep.rows]
        how = {"budget": None if np.isnan(budget).any() else budget, "replicates": 0}
        base = laws.hold_out(*sweep.columns(), delta=1e-3, **how).error
        for delta, errors in ((0.1, larger), (1e-4, smaller)):
            with suppress(laws.NotIdentified):  # does not converge with so few runs
                errors.append(laws.hold_out(*sweep.columns(), delta=delta, **how).error - base)
    return {"larger": mean_of(larger), "smaller": mean_of(smaller)}


def inference(books: Kept) -> dict[str, Effect]:
    """At the loss of the optimum of 1e13 FLOPs, with ten times its tokens served."""
    law = laws.load_law(books.path / "laws.json")

    def of(law: laws.Law) -> tuple:
        N, D = law.optimal(1e13)
        n, d = laws.inference_optimal(law, law.loss(N, D), 10 * D)
        return n / N, d / D

    pairs = zip(("params", "tokens"), of(law), of(replace(law.replicates, cost=law.cost)), strict=True)
    return {key: Effect(float(value), *interval(drawn, 95)) for key, value, drawn in pairs}


def kaplan_steps(warmup: Kept, cosine: Kept, matched: Kept, tuned: Kept) -> dict[str, Effect]:
    noise = tuned.laws["law"]["noise"]

    def points(sweep: Kept, params: str, flops: str) -> list[tuple[float, float, float]]:
        found = []
        for row in sweep.rows:
            N, total = getattr(row, params_column(params)), getattr(row, flops_column(flops))
            losses = [(p["step"], p["val_loss"]) for p in sweep.curves[row.run] if "val_loss" in p and p["step"]]
            last = losses[-1][0]
            found += [(N, total * step / last, loss) for step, loss in losses]
        return found

    without_head = points(warmup, "non_embedding", "kaplan")
    long, short = (points(sweep, "with_head", "physical") for sweep in (warmup, cosine))
    steps = (
        a_along_curves(long, noise),
        a_along_curves(short, noise),
        a_by_isoflop(matched),
        a_by_isoflop(tuned.up_to(3e12)),
    )
    pairs = zip(("warmup", "schedule", "tuning"), steps, steps[1:], strict=False)
    return {"head": recounted(without_head, long, noise)} | {key: difference(x, y) for key, x, y in pairs}


EFFECTS: dict[int, Callable[..., dict[str, Effect]]] = {
    1: equal_scaling,
    2: matched_schedule,
    3: smaller_wins,
    4: adamw_against_adam,
    5: six_nd,
    6: other_texts,
    7: concave,
    8: repeated,
    9: large_models,
    10: tokens_of_175b,
    11: ten_times,
    12: narrow_intervals,
    13: float32_weights,
    16: rates,
    17: huber_delta,
    18: inference,
    19: kaplan_steps,
}
