"""The effects that the rules of rules.py are about, measured from kept sweeps. Pure functions of their rows.

Intervals are 95%: Student's t over seeds with the standard deviation pooled over the groups compared; bootstrap over
runs for exponents; MOVER (Zou & Donner 2008) for the difference of two estimates with intervals.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from nanochin import laws
from nanochin.base.cli import UserError
from nanochin.base.files import read_json
from nanochin.config import make_shape
from nanochin.laws.envelope import gaussian_smooth
from nanochin.laws.gamma import make_surface
from nanochin.laws.law import wilson
from nanochin.laws.parametric import reference_objective
from nanochin.plan.flops import flops_per_token, ledger
from nanochin.run.curves import CURVES, read_csv_gz
from nanochin.runrow import RunRow, flops_column, params_column, read_csv


@dataclass(frozen=True)
class Effect:
    """An estimate with its 95% interval, or (not `sampled`) the lowest and highest of several values. `note`: what else
    is worth knowing."""

    value: float
    low: float
    high: float
    note: str = ""
    sampled: bool = True


@dataclass(frozen=True)
class Kept:
    """A kept sweep: its finished rows, its curves by run, laws.json, and the records of `evaluate --json` by file."""

    rows: list[RunRow]
    curves: dict[str, list[dict]] = field(default_factory=dict)
    laws: dict = field(default_factory=dict)
    evaluated: dict[str, list[dict]] = field(default_factory=dict)
    path: Path | None = None

    def columns(self, params: str = "total", flops: str = "physical") -> tuple[np.ndarray, ...]:
        """N, D, loss and C (n,) of the rows."""
        names = params_column(params), "tokens", "loss", flops_column(flops)
        return tuple(np.array([getattr(row, name) for row in self.rows], float) for name in names)

    def up_to(self, budget: float) -> "Kept":
        return replace(self, rows=[row for row in self.rows if row.budget <= 1.001 * budget])

    def groups(self, *keys: str) -> dict[tuple, list[float]]:
        """Losses by model and by these options, as the names of the runs have them; one for each seed."""
        found: dict[tuple, list[float]] = {}
        for row in self.rows:
            named = options(row.run)
            found.setdefault((f"{row.width}x{row.layers}", *(named[key] for key in keys)), []).append(row.loss)
        return found


def read_kept(folder: Path) -> Kept:
    """Raises UserError if there are no rows."""
    rows = [row for row in read_csv(folder / "runs.csv").values() if row.status == "finished"]
    if not rows:
        raise UserError(f"{folder}: no runs.csv with finished runs; run its sweep file with --keep")

    curves = read_csv_gz(folder / CURVES) if (folder / CURVES).exists() else {}
    fitted = read_json(folder / "laws.json") if (folder / "laws.json").exists() else {}
    evaluated = {path.stem: json.loads(path.read_text()) for path in folder.glob("evaluate-*.json")}
    return Kept(rows, curves, fitted, evaluated, folder)


def options(run: str) -> dict[str, str]:
    """'1e12-48x2-cycle=1.5-s0' -> {'cycle': '1.5'}"""
    return dict(re.findall(r"-(\w+)=([^-]+)", run))


# ---------------------------------------------------------------------------------------------------------------------
# Estimates


def contrast(groups: dict[tuple, list[float]], pairs: Iterable[tuple[tuple, tuple]]) -> Effect:
    """The mean over `pairs` of mean(groups[high]) - mean(groups[low])."""
    from scipy.stats import t

    weights: dict[tuple, float] = {}  # of each group's mean in the effect
    for high, low in (pairs := list(pairs)):
        weights[high] = weights.get(high, 0) + 1 / len(pairs)
        weights[low] = weights.get(low, 0) - 1 / len(pairs)
    value = sum(weight * float(np.mean(groups[key])) for key, weight in weights.items())
    freedom = sum(len(groups[key]) - 1 for key in weights)
    if not freedom:
        return Effect(value, math.nan, math.nan)
    squares = sum(((np.array(groups[key]) - np.mean(groups[key])) ** 2).sum() for key in weights)
    variance = squares / freedom * sum(weight**2 / len(groups[key]) for key, weight in weights.items())
    half = float(t.ppf(0.975, freedom)) * math.sqrt(variance)
    return Effect(value, value - half, value + half)


def excess(groups: dict[tuple, list[float]], pairs: Iterable[tuple[tuple, tuple]]) -> Effect:
    """The contrast of log losses, as a relative difference of losses."""
    found = contrast({key: list(np.log(losses)) for key, losses in groups.items()}, pairs)
    return Effect(*map(math.expm1, (found.value, found.low, found.high)))


def difference(x: Effect, y: Effect) -> Effect:
    """x - y of independent estimates, by MOVER."""
    value = x.value - y.value
    low, high = math.hypot(x.value - x.low, y.high - y.value), math.hypot(x.high - x.value, y.value - y.low)
    return Effect(value, value - low, value + high, f"{x.value:.3f} - {y.value:.3f}")


def mean_of(values: list[float]) -> Effect:
    """Mean with Student's interval; nan with fewer than two values."""
    from scipy.stats import t

    n, value = len(values), float(np.mean(values)) if values else math.nan
    half = float(t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Effect(value, value - half, value + half, f"over {n} sweeps")


def range_of(values: Iterable[float], note: str) -> Effect:
    """Geometric mean, and the lowest and highest value instead of an interval."""
    values = list(values)
    return Effect(float(np.exp(np.mean(np.log(values)))), min(values), max(values), note, sampled=False)


def a_by_isoflop(kept: Kept, replicates: int = 2000) -> Effect:
    """a by Approach 2, with a bootstrap over runs."""
    N, D, loss, C = kept.columns()
    fit = laws.fit_isoflop(N, D, loss, C, budget=[row.budget for row in kept.rows])
    return Effect(fit.law.a, *laws.bootstrap(fit, replicates=replicates).interval("a"))


def a_along_curves(N, C, loss, noise: float) -> Effect:
    """a from losses at equal C, interpolated along each size's curve, as Kaplan et al. 2020. N, C and loss (n,) are
    points of curves; the interval is that of noise on the log losses (Porian et al. 2024)."""
    N, C, loss = (np.asarray(v, float) for v in (N, C, loss))
    found = laws.kaplan_procedure(N, C / (6 * N), loss, loss, noise=noise, replicates=1000)
    return Effect(found.a, *found.intervals.get(95, (math.nan, math.nan)))


def noise_of(kept: Kept) -> float:
    """Standard deviation of log loss of a run about the law."""
    return kept.laws["law"]["noise"]


# ---------------------------------------------------------------------------------------------------------------------
# The effects of each claim, by the keys of its rules


def equal_scaling(books: Kept) -> dict[str, Effect]:
    found = {}
    for key in ("approach1", "approach2", "approach3", "law"):
        one = books.laws[key]
        one = one.get("frontier", one)
        found[key] = Effect(one["a"], *(one["ci"]["a"] if "ci" in one else one["a_ci"]))
    return found


def matched_schedule(sweep: Kept, horizons: Kept) -> dict[str, Effect]:
    groups = sweep.groups("cycle")
    models = list(dict.fromkeys(model for model, _ in groups))
    cycles = dict.fromkeys(cycle for _, cycle in groups if cycle != "1")
    found = {
        cycle: excess(groups, [((model, cycle), (model, "1")) for model in models if (model, cycle) in groups])
        for cycle in cycles
    }
    # From the middle of the longest cosine of each size, and from the ends of all.
    longest, ends = {}, []
    for row in horizons.rows:
        points = [point for point in horizons.curves[row.run] if "loss" in point]
        smoothed = gaussian_smooth(np.array([point["loss"] for point in points]), 10)
        curve = [(row.params, point["flops"], loss) for point, loss in zip(points, smoothed, strict=True)]
        ends.append(curve[-1])
        longest[row.params] = max(longest.get(row.params, []), curve, key=lambda c: c[-1][1] if c else 0)
    lowest = min(C for _, C, _ in ends)
    middle = [point for curve in longest.values() for point in curve if point[1] >= lowest]
    noise = noise_of(horizons)
    found["a"] = difference(*(a_along_curves(*np.transpose(points), noise) for points in (middle, ends)))
    return found


def smaller_wins(low: Kept, high: Kept) -> dict[str, Effect]:
    best, large = ("56x2",), ("112x2",)
    groups = low.groups()
    found = {
        "3e12": contrast(groups, [(large, best)]),
        "1e13": contrast(high.groups(), [(("144x2",), ("72x2",))]),
        "1.7": contrast(groups, [(("72x2",), best)]),
        "1/4": contrast(groups, [(("24x2",), best)]),
    }
    for task in ("cloze", "last-word"):
        margins: dict[str, list] = {}  # by size: a row a seed
        for record in low.evaluated.get("evaluate-books", []):
            if record["task"] == task:
                margins.setdefault(model_of(record["run"]), []).append(record["margins"])
        if margins:
            found[task] = share_better(*(np.mean(margins[model], axis=0) for (model,) in (best, large)))
    for text in ("python", "peps"):
        bits: dict[tuple, list[float]] = {}
        for record in low.evaluated.get(f"evaluate-{text}", []):
            bits.setdefault((model_of(record["run"]),), []).append(record["bpb"])
        if bits:
            found[text] = contrast(bits, [(large, best)])
    return found


def model_of(run: str) -> str:
    """'3e12-56x2-s0' -> '56x2'"""
    return run.split("-")[1]


def share_better(ours: np.ndarray, theirs: np.ndarray) -> Effect:
    """The share of items with the larger margin, of those where margins (items,) differ, and Wilson's interval."""
    k, n = int((ours > theirs).sum()), int((ours != theirs).sum())
    return Effect(k / n, *wilson(k, n), f"better on {k} of {n}")


def adamw_against_adam(adamw: Kept, adam: Kept) -> dict[str, Effect]:
    sweeps, decay_rate = (("adamw", adamw), ("adam", adam)), ("weight_decay", "lr_times")
    groups = {(name, *key): losses for name, sweep in sweeps for key, losses in sweep.groups(*decay_rate).items()}

    def best(name: str, decays: Container[str]) -> tuple:
        return min((key for key in groups if key[0] == name and key[2] in decays), key=lambda k: np.mean(groups[k]))

    ours, l2, none = best("adamw", ["0.1"]), best("adam", {key[2] for key in groups}), best("adamw", ["0"])

    def curves(name: str, decay: str, times: str) -> list[list[tuple[float, float]]]:
        kept = adamw if name == "adamw" else adam
        chosen = [r for r in kept.rows if options(r.run) == {"weight_decay": decay, "lr_times": times}]
        return [
            [(p["tokens"] / row.tokens, p["loss"]) for p in kept.curves[row.run] if "loss" in p]
            for row in sorted(chosen, key=lambda row: row.seed)
        ]

    crossings = []
    for a, b in zip(curves("adamw", *ours[2:]), curves("adam", *l2[2:]), strict=True):
        gap = gaussian_smooth(np.array([y for _, y in b]), 10) - gaussian_smooth(np.array([y for _, y in a]), 10)
        last = int(np.flatnonzero(np.append(True, gap <= 0))[-1])  # the last point where AdamW is not lower
        crossings.append(a[last][0] if last < len(a) else math.nan)  # nan: it is not lower at the end
    found = {"adam": contrast(groups, [(l2, ours)]), "none": contrast(groups, [(none, ours)])}
    best_rates = f"rates by rule times {ours[3]} (AdamW), {l2[3]} (Adam, L2 {l2[2]}), {none[3]} (no decay)"
    found["adam"] = replace(found["adam"], note=best_rates)
    found["crossing"] = Effect(
        float(np.mean(crossings)), min(crossings), max(crossings), "range over seeds", sampled=False
    )
    return found


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
    groups = sweep.groups("epochs")
    models = list(dict.fromkeys(model for model, _ in groups))
    found = {epochs: excess(groups, [((model, epochs), (model, "1")) for model in models]) for epochs in ("4", "40")}
    found["R"] = fit_repeats(sweep, laws.load_law(books.path / "laws.json"))
    return found


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
    return Effect(R, *map(float, np.percentile(draws, (2.5, 97.5))), note)


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
    found = [(sweep.laws["law"]["frontier"]["a"], *sweep.laws["law"]["frontier"]["ci"]["a"]) for sweep in sweeps]
    a, low, high = np.array(found).T
    note = "the widest of both sweeps"
    return {"growth": Effect(10 ** float(a.mean()), 10 ** float(low.min()), 10 ** float(high.max()), note)}


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
        logs = np.log([N, D, loss])

        def mean_objective(theta, chosen, logs=logs):
            value, gradient = reference_objective(theta, *logs[:, chosen])
            return value / chosen.sum(), gradient / chosen.sum()

        stopped = [minimize(mean_objective, start, (row > 0,), "L-BFGS-B", jac=True).x for row in weights]
        theirs = np.array([x[4] / (x[3] + x[4]) for x in stopped])
        ours = surface.law(found.theta[found.converged]).a
        width, narrow = (float(np.diff(np.percentile(v, (10, 90)))[0]) for v in (ours, theirs))
        ratios.append(math.log(width / narrow))
    found = mean_of(ratios)
    return {"ratio": Effect(*(math.exp(v) for v in (found.value, found.low, found.high)), f"over {len(ratios)} sweeps")}


def float32_weights(sweep: Kept) -> dict[str, Effect]:
    groups = sweep.groups("weight_dtype")
    return {"bfloat16": contrast(groups, [(("40x2", "bfloat16"), ("40x2", "float32"))])}


def rates(sweep: Kept, books: Kept) -> dict[str, Effect]:
    base, found = a_by_isoflop(books.up_to(1e12)), {}
    for times in ("0.5", "2"):
        rows = [row for row in sweep.rows if options(row.run)["lr_times"] == times]
        found[times] = difference(a_by_isoflop(replace(sweep, rows=rows)), base)
    return found


def huber_delta(*sweeps: Kept) -> dict[str, Effect]:
    """Median absolute error of log loss on the group of largest compute, by Approach 3 fitted to the other runs."""
    larger, smaller = [], []
    for sweep in sweeps:
        N, D, loss, C = sweep.columns()
        budget = [row.budget or math.nan for row in sweep.rows]
        group = laws.compute_groups(C, budget=None if np.isnan(budget).any() else budget)
        held = group == group.max()

        def error(delta: float, rows=(N, D, loss), held=held) -> float:
            law = laws.fit_parametric(*(v[~held] for v in rows), delta=delta, allow_bound=("E",)).law
            N, D, loss = (v[held] for v in rows)
            return float(np.median(np.abs(np.log(law.loss(N, D) / loss))))

        base = error(1e-3)
        for delta, errors in ((0.1, larger), (1e-4, smaller)):
            with contextlib.suppress(laws.NotIdentified):  # does not converge with so few runs
                errors.append(error(delta) - base)
    return {"larger": mean_of(larger), "smaller": mean_of(smaller)}


def inference(books: Kept) -> dict[str, Effect]:
    """At the loss of the optimum of 1e13 FLOPs, with ten times its tokens served."""
    law = laws.load_law(books.path / "laws.json")

    def of(law: laws.Law) -> tuple:
        N, D = law.optimal(1e13)
        n, d = laws.inference_optimal(law, law.loss(N, D), 10 * D)
        return n / N, d / D

    value, drawn = of(law), of(replace(law.replicates, cost=law.cost))
    ends = [np.percentile(v, (2.5, 97.5)) for v in drawn]
    return {
        key: Effect(float(v), *map(float, end)) for key, v, end in zip(("params", "tokens"), value, ends, strict=True)
    }


def kaplan_steps(warmup: Kept, cosine: Kept, matched: Kept, tuned: Kept) -> dict[str, Effect]:
    noise = noise_of(tuned)

    def along(sweep: Kept, params: str, flops: str) -> Effect:
        points = []
        for row in sweep.rows:
            N, total = getattr(row, params_column(params)), getattr(row, flops_column(flops))
            losses = [(p["step"], p["val_loss"]) for p in sweep.curves[row.run] if "val_loss" in p and p["step"]]
            last = losses[-1][0]
            points += [(N, total * step / last, loss) for step, loss in losses]
        return a_along_curves(*np.transpose(points), noise)

    steps = (
        along(warmup, "non_embedding", "kaplan"),
        along(warmup, "with_head", "physical"),
        along(cosine, "with_head", "physical"),
        a_by_isoflop(matched),
        a_by_isoflop(tuned.up_to(3e12)),
    )
    pairs = zip(("head", "warmup", "schedule", "tuning"), steps, steps[1:], strict=False)
    return {key: difference(before, after) for key, before, after in pairs}


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
