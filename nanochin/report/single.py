"""A law of one variable for a table that identifies no law of N and D: which one, its fit and its answers."""

from dataclasses import dataclass

import numpy as np

from nanochin.base.cli import UserError
from nanochin.base.console import count, format_columns, three
from nanochin.laws import NotIdentified
from nanochin.laws.bootstrap import FEW
from nanochin.laws.law import line
from nanochin.laws.single import MIN_POINTS, SingleFit, fit_single
from nanochin.report.analysis import Settings, attempt, column_of, flops_of, params_of, resampled_unit, resamples
from nanochin.report.findings import four, plus
from nanochin.report.table import RunTable, require_comparable
from nanochin.runrow import flops_column

EQUAL = 0.02  # range of log values that are one up to rounding: 1% either way
MOST = 1e40  # of x


@dataclass(frozen=True)
class Single:
    of: str  # C, D or N
    rows: RunTable  # those fitted
    why: str  # there is no law of N and D
    counted: tuple[str, str]  # FLOP convention and its name
    fit: SingleFit
    caveat: str  # of the intervals

    def to_json(self, at: tuple[float, ...], target: float | None) -> dict:
        """`single` of laws.json, with the loss at each of `at`, and the x that reaches the loss `target`."""
        fit, note = self.fit, f"{self.why}. {self.caveat}".rstrip()
        losses = [{self.of: x, "loss": fit.law.loss(x), "ci": fit.forecast(x), "tested": fit.is_tested(x)} for x in at]
        out = {"of": self.of} | fit.to_json() | {"predictions": losses, "note": note}
        if target is None:
            return out
        x = attempt(fit.law.reaching, target)
        found = {"reason": str(x)} if isinstance(x, NotIdentified) else {self.of: x}
        return out | {"to_reach": {"loss": target} | found}

    def text(self, found: dict) -> str:
        """`found`, the result of `to_json`, for the terminal."""
        fit, of, x, law = self.fit, self.of, self.fit.x, self.fit.law
        left_out = "".join(f", left out: {number} {reason}" for reason, number in self.rows.dropped.items())
        name = f" ({self.counted[1]})" if of == "C" else ""
        ends = ", ".join(f"{key} {low:.4g} to {high:.4g}" for key, (low, high) in found["ci"].items())
        rows = [[of, "loss", "95%", ""]]
        for one in found["predictions"]:
            told = "[{:.4f}, {:.4f}]".format(*one["ci"]) if one["ci"] else ""
            far = "" if one["tested"] else "not tested at this distance"
            rows.append([self.show(one[of]), f"{one['loss']:.4f}", told, far])
        lines = [
            f"{self.rows.source}: {len(x)} runs, {of} {self.show(x.min())} to {self.show(x.max())}{name}{left_out}",
            f"{self.why[0].upper()}{self.why[1:]}. Fitted is a law of {of} alone.\n",
            f"L({of}) = {plus(law.E)}{four(law.K)} {of}^-{four(law.c)}",
            f"95%: {ends}" if ends else "",
            f"{self.caveat}" if ends else "",
            f"\n{self.hold_out()}\n\npredicted loss",
            format_columns([[f"{cell}  " for cell in row] for row in rows]),
        ]
        if asked := found.get("to_reach"):
            lines.append("\n" + (asked.get("reason") or f"loss {asked['loss']:g}: {of} = {self.show(asked[of])}"))
            lines[-1] += "" if "reason" in asked or fit.is_tested(asked[of]) else ", not tested at this distance"
        return "\n".join(line.rstrip() for text in lines if text for line in text.split("\n"))

    def hold_out(self) -> str:
        if not self.fit.hold_out:
            return f"hold-out: none; it needs at least {MIN_POINTS} smaller {self.of}"
        *before, last = self.fit.hold_out
        found = f"hold-out: {self.of} = {self.show(last.x)}, {three(last.step)} times beyond those below, is"
        found += f" {last.error:.2%} off"
        if before:
            off = np.sqrt(np.mean([one.error**2 for one in before]))
            found += f"; the {len(before)} before it, each predicted from those below, {off:.2%} (root mean square)"
        return found

    def show(self, x: float) -> str:
        return f"{x:.3g} FLOPs" if self.of == "C" else count(x)


def analyse_single(rows: RunTable, settings: Settings) -> Single | None:
    """The law of one variable of these rows; None if they may identify a law of N and D. Raises UserError with the
    reason if there is no such law either."""
    if not len(rows) or (known := variable(rows, settings)) is None:
        return None
    of, x, why, *counted = known
    require_comparable(rows, rows.source)
    order = np.lexsort((rows["loss"], x))
    rows, x = rows.take(order), x[order]
    if "params" not in rows.numbers:  # of models of several sizes
        lowest = np.append(True, np.diff(x) > 0)
        rows, x = rows.keep(lowest, "not the lowest loss of their C"), x[lowest]
    if not x.max() < MOST:
        raise UserError(f"{rows.source}: {of} up to {x.max():.3g}; are the columns named correctly?")
    runs, caveat = resampled_unit(rows, settings.cluster), ""
    units = len(rows) if runs is None else len(np.unique(runs))
    if units < MIN_POINTS:
        runs, caveat = None, f"too few independent runs ({units}): rows were resampled, and intervals may be too narrow"
    elif units < FEW:
        caveat = f"only {units} independent runs: the intervals of E, K and c are too narrow"
    options = {"delta": settings.delta, "E": settings.fixed_e, "seed": settings.seed, "runs": runs}
    try:
        fit = fit_single(x, rows["loss"], replicates=resamples(len(rows), settings.bootstrap)[0], **options)
    except NotIdentified as error:
        raise UserError(f"{rows.source}: {why}; a law of {of} alone cannot be fitted either: {error}") from None
    return Single(of, rows, why, tuple(counted), fit, caveat)


def variable(rows: RunTable, settings: Settings) -> tuple[str, np.ndarray, str, str, str] | None:
    """(C, D or N; its values (n,); why there is no law of N and D; FLOP convention; its name). None if there may be
    one, or if all runs have one budget."""
    if "params" not in rows.numbers:
        own = "flops" if "flops" in rows.numbers else "budget"
        name = flops_column(settings.flops) if settings.flops else own
        C = column_of(rows, name, f"`flops` {settings.flops}" if settings.flops else "`columns`")
        return "C", C, "no columns params and tokens", settings.flops or "physical", f"as in the column {name}"
    n, d = np.log(rows["params"]), np.log(rows["tokens"])
    one_size, one_d = np.ptp(n) < EQUAL, np.ptp(d) < EQUAL
    offset, slope = line(n, d)
    together = slope > 0 and len(rows) >= MIN_POINTS and np.ptp(d - offset - slope * n) < EQUAL
    if one_size and one_d or not (one_size or one_d or together):
        return None
    with np.errstate(over="ignore"):
        N, (C, *counted) = params_of(rows, settings.params), flops_of(rows, settings.flops)
    if one_size:
        return "D", rows["tokens"], f"all runs have one size, N = {count(np.exp(n.mean()))}", *counted
    if one_d:
        return "N", N, f"all runs have one D, {count(np.exp(d.mean()))} tokens", *counted
    ratio = f"D / N is {three(np.exp(np.mean(d - n)))}" if np.ptp(d - n) < EQUAL else f"D grows as N^{slope:.3g}"
    return "C", C, f"N and D cannot be told apart: they rise together, {ratio} in all runs", *counted
