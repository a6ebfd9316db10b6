"""Checks that fit again: what changes if runs, objective, form, window or the count of parameters do."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from nanochin import laws
from nanochin.base.console import digits, powers
from nanochin.config import PARAM_CONVENTIONS
from nanochin.laws import Cost, NotIdentified, ParametricFit, Refit
from nanochin.report.analysis import Analysis, Approach, approach, attempt
from nanochin.report.findings import CheckResult, Table, bracketed, four, three, with_interval
from nanochin.runrow import params_column

SENSITIVITY = 200  # replicates of each refit


def refitted(title: str, refits: list[Refit], first: str = "", words: Callable = str, note: str = "") -> CheckResult:
    """The constants of other fits of Approach 3. words(change) goes into the column `first`."""
    names, rows = ("a", "alpha", "beta", "E", "A", "B"), []
    for one in refits:
        cells = [one.fit]
        if isinstance(one.fit, ParametricFit):
            cells = [with_interval(digits(getattr(one.fit.law, name), 5), one.interval(name), four) for name in names]
            cells += [digits(one.fit.objective, 6)]
        rows.append([words(one.change), *cells])
    table = Table(title, (first, "a (Eq. 4)", "α", "β", "E", "A", "B", "objective"), rows, note)
    return CheckResult(json=[one.to_json() for one in refits], tables=(table,), found=refits)


def leave_out_highest(analysis: Analysis) -> CheckResult:
    third = analysis.need(3)
    refits = [Refit(0, third.fit, third.boot)]
    refits += laws.leave_out_highest(third.fit, (1, 3, 5, 8, 15), **analysis.resampling(SENSITIVITY))
    note = f"95% intervals, here and below, by {SENSITIVITY} resamples of each fit." if third.boot else ""
    result = refitted("Without the runs of highest loss", refits, "runs left out", note=note)
    (low, high), five = third.interval("a"), next(one.fit for one in refits if one.change == 5)
    if not third.boot or isinstance(five, NotIdentified) or low <= five.law.a <= high:
        return result
    said = f"Approach 3 depends on few runs: without the 5 of highest loss a is {five.law.a:.3f}, outside of its 95%"
    return replace(result, status="doubt", sentence=f"{said} interval{bracketed((low, high))}.")


def delta(analysis: Analysis) -> CheckResult:
    third, own = analysis.need(3), analysis.settings.delta
    others = [other for other in (1e-6, 1e-4, 1e-3, 1e-2, 1e-1) if other != own]
    refits = [Refit(own, third.fit, third.boot)]
    refits += laws.delta_sensitivity(third.fit, others, **analysis.resampling(SENSITIVITY))
    refits.sort(key=lambda one: one.change)
    return refitted("With another δ of the Huber loss", refits, "δ", powers)


def other_objectives(analysis: Analysis) -> CheckResult:
    third = analysis.need(3)
    lower = min(0.98 * third.law.E, 0.99 * float(analysis.L.min()))
    changes = {
        "least squares": {"delta": np.inf},
        "Huber on the loss itself": {"space": "linear"},
        "alpha = beta": {"tied": True},
        f"E fixed below, at {lower:.4g}": {"E": lower},
    }
    options = analysis.resampling(SENSITIVITY)
    refits = [laws.refit(words, third.fit, **change, **options) for words, change in changes.items()]
    return refitted("With another objective or form", refits)


def near_minimum(analysis: Analysis) -> CheckResult:
    """Do the runs near the minimum of their budget confirm E, or do the ends of the isoFLOP curves drive it?"""
    E = (analysis.whole or analysis).need(3).law.E
    refits = laws.near_minimum(analysis.need(3).fit, analysis.need(2).fit, **analysis.resampling(SENSITIVITY))
    said = [
        f"In Approach 3, E ({E:.4g}) depends on models far from compute-optimal: the {runs} runs within {factor:g}x of "
        f"the optimum give {low:.4g} to {high:.4g}."
        for factor, runs, (low, high) in ((*one.change, one.boot.interval("E")) for one in refits if one.boot)
        if not low <= E <= high
    ]
    title = "Only runs near the minimum of their budget"
    result = refitted(title, refits, words=lambda near: f"N within {near[0]:g}x: {near[1]} runs")
    json = [one.to_json() | {"change": f"within {one.change[0]:g} times", "runs": one.change[1]} for one in refits]
    return replace(result, status="doubt" if said else "ok", sentence=said[0] if said else "", json=json)


def windows(analysis: Analysis) -> CheckResult:
    """What does Approach 2 give if it fits more or fewer sizes around each minimum?"""
    second, rows, json = analysis.need(2), [], {}
    fit, budget = second.fit, analysis.rows.get("budget")
    for name, window in (("4x", 4.0), ("8x", 8.0), ("16x", 16.0), ("all", np.inf)):
        other = attempt(laws.fit_isoflop, fit.N, fit.D, fit.loss, fit.C, budget=budget, window=window)
        found = approach(2, other, second.flops_range, **analysis.resampling(SENSITIVITY))
        json[name], cells = {"reason": str(found)}, [found]
        if isinstance(found, Approach):
            used = f"{sum(one.bracketed for one in other.budgets)} of {len(other.budgets)}"
            ends = (with_interval(f"{getattr(found.law, one):.4f}", found.interval(one), three) for one in "ab")
            json[name], cells = found.exponent_json(), [used, *ends]
        rows.append([name, *cells])
    title = "Approach 2 with other sizes around each minimum"
    table = Table(title, ("within", "budgets used", "a", "b"), rows, "Approach 2 above uses 8x; Akima's spline all.")
    return CheckResult(json=json, tables=(table,))


def kaplan_form(analysis: Analysis) -> CheckResult:
    found = laws.fit_kaplan_form(analysis.N, analysis.D, analysis.L, delta=analysis.settings.delta)
    json = {name: getattr(found, name) for name in ("N_c", "D_c", "alpha_N", "alpha_D", "objective")}
    title = "With the form of Kaplan et al. 2020, ((Nc / N)^(αN / αD) + Dc / D)^αD, without E"
    head = ("Nc", "Dc", "αN", "αD", "objective")
    return CheckResult(json=json, tables=(Table(title, head, [[f"{value:.5g}" for value in json.values()]]),))


def residuals_by_compute(analysis: Analysis) -> CheckResult:
    found = laws.residuals_by_compute(analysis.need().fit)
    rows = []
    for part in found:
        low, high = powers(part["flops_low"]), powers(part["flops_high"])
        rows.append([f"{low} to {high}", str(part["n"]), f"{part['median']:+.2%}", f"{part['sd']:.2%}"])
    head = ("6ND", "runs", "median", "robust sd")
    return CheckResult(json=found, tables=(Table("Residuals, predicted / observed - 1", head, rows),), found=found)


def counts(analysis: Analysis) -> CheckResult:
    """Approaches 3 and 2 with N counted in every convention that has a column; C is the same."""
    D, L, C, settings, json, rows = analysis.D, analysis.L, analysis.C, analysis.settings, {}, []
    again = partial(approach, flops_range=analysis.best.flops_range, verify=0, **analysis.resampling(SENSITIVITY))
    for convention in PARAM_CONVENTIONS:
        both, N = (analysis.results[3], analysis.results[2]), analysis.rows.complete(params_column(convention))
        if convention != settings.params:
            if N is None:
                continue
            of_n = {"delta": settings.delta, "E": settings.fixed_e, "cost": Cost.of(N, D, C)}
            isoflop = attempt(laws.fit_isoflop, N, D, L, C, budget=analysis.rows.get("budget"))
            both = again(3, attempt(laws.fit_parametric, N, D, L, **of_n)), again(2, isoflop)
        found = [{"reason": str(one)} if isinstance(one, NotIdentified) else one.exponent_json() for one in both]
        json[convention] = dict(zip(("approach3", "approach2"), found, strict=True))
        cells = [with_interval(f"{a['a']:.4f}", a.get("a_ci", (0, 0)), three) if "a" in a else "–" for a in found]
        rows.append([convention.replace("_", " "), *cells])
    if len(rows) < 2:
        return CheckResult("not checked", json={})
    table = Table("With another parameter count", ("N counts", "a, approach 3", "a, approach 2"), rows)
    return CheckResult(json=json, tables=(table,))


def profile_e(analysis: Analysis) -> CheckResult:
    fit = analysis.need(3).fit
    E, objective = laws.profile_e(fit, 61)
    rise = objective / fit.objective
    return CheckResult(json=np.stack([E, rise], 1)[np.isfinite(rise)].tolist(), found=(E, rise))
