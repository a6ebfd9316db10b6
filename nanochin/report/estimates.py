"""Kept sweeps, and estimates from their rows.

Intervals are 95%: Student's t over seeds with the standard deviation pooled over the groups compared; bootstrap over
runs for exponents; MOVER (Zou & Donner 2008) for the difference of two estimates with intervals.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from nanochin import laws
from nanochin.base.cli import UserError
from nanochin.base.files import read_json
from nanochin.laws.envelope import gaussian_smooth
from nanochin.run.curves import CURVES, read_csv_gz
from nanochin.runrow import RunRow, read_csv


@dataclass(frozen=True)
class Effect:
    """An estimate with its 95% interval, or (not `sampled`) the lowest and highest of several values. `note`: what else
    is worth knowing."""

    value: float
    low: float
    high: float
    note: str = ""
    sampled: bool = True

    def through(self, function: Callable[[float], float]) -> "Effect":
        """Of an increasing function of it."""
        return replace(self, **{name: function(getattr(self, name)) for name in ("value", "low", "high")})


@dataclass(frozen=True)
class Kept:
    """A kept sweep: its finished rows, its curves by run, laws.json, and the records of `evaluate --json` by file."""

    rows: list[RunRow]
    curves: dict[str, list[dict]] = field(default_factory=dict)
    laws: dict = field(default_factory=dict)
    evaluated: dict[str, list[dict]] = field(default_factory=dict)
    path: Path | None = None

    def columns(self) -> tuple[np.ndarray, ...]:
        """N, D, loss and C (n,) of the rows."""
        names = ("params", "tokens", "loss", "flops")
        return tuple(np.array([getattr(row, name) for row in self.rows], float) for name in names)

    def curve(self, run: str, x: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens or FLOPs (`x`) at the logged steps of a run, and the smoothed training loss there."""
        points = [point for point in self.curves[run] if "loss" in point]
        at, loss = (np.array([point[name] for point in points]) for name in (x, "loss"))
        return at, gaussian_smooth(loss, 10)

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


def contrast(groups: dict[tuple, list[float]], *pairs: tuple[tuple, tuple]) -> Effect:
    """The mean over `pairs` of mean(groups[high]) - mean(groups[low])."""
    from scipy.stats import t

    weights: dict[tuple, float] = defaultdict(float)  # of each group's mean in the effect
    for high, low in pairs:
        weights[high] += 1 / len(pairs)
        weights[low] -= 1 / len(pairs)
    value = sum(weight * float(np.mean(groups[key])) for key, weight in weights.items())
    freedom = sum(len(groups[key]) - 1 for key in weights)
    if not freedom:
        return Effect(value, math.nan, math.nan)
    squares = sum(((np.array(groups[key]) - np.mean(groups[key])) ** 2).sum() for key in weights)
    variance = squares / freedom * sum(weight**2 / len(groups[key]) for key, weight in weights.items())
    half = float(t.ppf(0.975, freedom)) * math.sqrt(variance)
    return Effect(value, value - half, value + half)


def excess_losses(sweep: Kept, option: str) -> dict[str, Effect]:
    """By the values of an option: the relative difference of the loss from that with the value 1, over all models."""
    groups = {key: list(np.log(losses)) for key, losses in sweep.groups(option).items()}
    values = dict.fromkeys(value for _, value in groups if value != "1")
    pairs = {value: [((model, v), (model, "1")) for model, v in groups if v == value] for value in values}
    return {value: contrast(groups, *pairs[value]).through(math.expm1) for value in values}


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


def a_in_laws(found: dict) -> Effect:
    """a of an approach in laws.json, in the FLOPs of the runs."""
    found = found.get("frontier", found)
    return Effect(found["a"], *found["ci"]["a"])


def a_by_isoflop(kept: Kept) -> Effect:
    """a by Approach 2, with a bootstrap over runs."""
    N, D, loss, C = kept.columns()
    fit = laws.fit_isoflop(N, D, loss, C, budget=[row.budget for row in kept.rows])
    return Effect(fit.law.a, *laws.bootstrap(fit, replicates=2000).interval("a"))


def along_curves(points: list[tuple[float, float, float]], noise: float) -> laws.KaplanProcedure:
    """Kaplan's procedure (2020) on points of curves, (N, C, loss): losses at equal C, interpolated along each size's
    curve, with draws of noise on the log losses (Porian et al. 2024)."""
    N, C, loss = np.transpose(points)
    return laws.kaplan_procedure(N, C / (6 * N), loss, loss, noise=noise, replicates=1000)


def a_along_curves(points: list[tuple[float, float, float]], noise: float) -> Effect:
    """a by that procedure, with the interval of its draws."""
    found = along_curves(points, noise)
    return Effect(found.a, *found.intervals.get(95, (math.nan, math.nan)))


def recounted(before: list[tuple], after: list[tuple], noise: float) -> Effect:
    """a along the curves `before` minus a along `after`, which have the same losses and, in each draw, noise."""
    x, y = (along_curves(points, noise) for points in (before, after))
    low, high = np.nanpercentile(x.slopes - y.slopes, (2.5, 97.5))
    return Effect(x.a - y.a, float(low), float(high), f"{x.a:.3f} - {y.a:.3f}")
