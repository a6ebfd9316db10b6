"""Checks of a law: a check is one function of the analysis and one line of CHECKS.

    results = run_checks(analysis)          {name: CheckResult}, in the order in which they are shown
    results["hold_out"].status              "ok", "doubt" or "not checked"

Terminal and report show the sentences, the report the tables; laws.json stores sentences and JSON.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np

from nanochin import laws
from nanochin.base.console import count, digits, powers
from nanochin.config import PARAM_CONVENTIONS
from nanochin.laws import Cost, NotIdentified, ParametricFit, PowerLaw, Refit
from nanochin.report.analysis import Analysis, Approach, approach, attempt, resampled_unit, sample_runs
from nanochin.report.table import CHANCE, by_chance
from nanochin.runrow import params_column

MOST_CHECKED = 2000  # runs; of more, a random sample is refitted
SENSITIVITY = 200  # replicates of each refit
FEW_FAIL = 0.02  # share of replicates without an optimum that raises no doubt
BAD_COST = 0.1  # misfit of log C by the curve of cost that raises a doubt
NARROW = 4  # clusters of C whose sizes span a smaller factor may not be isoFLOP curves
GOOD = 0.01  # hold-out error that raises no doubt, however small that in-sample is
MOST_ROWS = 40  # of the table of held-out runs


@dataclass(frozen=True)
class Table:
    """For the report. A cell is a text, with exponents after ^; or a number and its interval; or a text, its small
    print and the class of that in report.css; or the reason why the rest of the row is missing."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | tuple[str, ...] | NotIdentified]]
    note: str = ""
    figure: str = ""  # the figure that it belongs to; "": the sensitivity tables
    mark: int | None = None  # the row to highlight


@dataclass(frozen=True)
class CheckResult:
    status: str = "ok"  # or "doubt", "not checked", or "note", which has no verdict
    sentence: str = ""  # "" where there is nothing to say
    json: object = None  # stored in laws.json under the check's name; None: nothing
    tables: tuple[Table, ...] = ()
    found: object = None  # the result of nanochin.laws, for the figures


Results = dict[str, CheckResult]  # by the name of the check


@dataclass(frozen=True)
class Check:
    name: str  # in laws.json, and for the figures
    function: Callable[[Analysis], CheckResult]  # raises NotIdentified if it cannot be run
    title: str = ""  # starts the sentence that says so; "": no sentence, since another check has one
    refits: bool = False  # fits many times, hence on a sample of at most MOST_CHECKED runs
    missing: object = None  # its JSON if it cannot be run and has no title

    def __call__(self, analysis: Analysis) -> CheckResult:
        try:
            return self.function(analysis)
        except NotIdentified as error:
            if not self.title:
                return CheckResult("not checked", json=self.missing)
            why = str(error).removeprefix(f"{self.title.lower()}: ")
            return CheckResult("not checked", f"{self.title} could not be checked: {why}.", {"reason": str(error)})


def run_checks(analysis: Analysis, progress: Callable[[str, float, float], None] = lambda *_: None) -> Results:
    """The result of every check. Calls progress(stage, done, total)."""
    some, results = sample_runs(analysis, MOST_CHECKED, SENSITIVITY), {}
    for done, check in enumerate(CHECKS, 1):
        results[check.name] = check(some if check.refits else analysis)
        progress("checks", done, len(CHECKS))
    return results


def judged(good: bool, sentence: str, *rest) -> CheckResult:
    return CheckResult("ok" if good else "doubt", sentence, *rest)


def doubt_if(bad: bool, sentence: str) -> CheckResult:
    """Without a doubt there is no sentence."""
    return judged(not bad, sentence if bad else "")


three, four = partial(digits, figures=3), partial(digits, figures=4)


def with_interval(text: str, ends: tuple[float, float], show: Callable[[float], str]) -> tuple[str, str]:
    """A number and its interval; a fixed number has none."""
    low, high = ends
    return text, f"{show(low)} – {show(high)}" if low < high else ""


def bracketed(ends: tuple[float, float]) -> str:
    low, high = ends
    return f" [{low:.3f}, {high:.3f}]" if np.isfinite(low) else ""


# ---------------------------------------------------------------------------------------------------------------------
# The checks, those that refit last


def chance(analysis: Analysis) -> CheckResult:
    """Do the losses depend on both N and D?"""
    found = dict(zip(("params", "tokens"), by_chance(analysis.N, analysis.D, analysis.L), strict=True))
    what = max(found, key=found.get)
    said = f"The loss does not depend significantly on {what} (F-test, p = {found[what]:.2f})"
    return doubt_if(found[what] > CHANCE, f"{said}: the law's dependence on it is noise.")


def no_law(analysis: Analysis) -> CheckResult:
    """Which approaches do the data not support? Approach 1 is not expected without curves."""
    missing = [
        f"Approach {number} gives no law: {str(found).removeprefix(f'Approach {number}: ')}"
        for number, found in analysis.results.items()
        if isinstance(found, NotIdentified) and (number != 1 or analysis.curves is not None)
    ]
    return doubt_if(bool(missing), "; ".join(missing) + ".")


def cost(analysis: Analysis) -> CheckResult:
    """What does a token cost if not 6N, and what is the exponent then instead of that of Eq. 4?"""
    cost, third = analysis.cost, analysis.law
    if cost.is_6nd:
        return CheckResult()
    curve = f"6ND {'times' if cost.s > 0 else 'over'} 1 + {cost.c:.3g} / N^{cost.q:.3g}"
    said = f"C is {analysis.flops_name}: {curve}, within {100 * cost.misfit:.1f}%"
    if isinstance(third, Approach):
        a = f"{third.exponent(third.law):.3f}{bracketed(third.interval(third.exponent))}"
        said += f"; in these FLOPs the law's optimum has a = {a} over the runs; Eq. 4, for 6ND, gives {third.law.a:.3f}"
    return judged(cost.misfit < BAD_COST, said + ".")


def starts(analysis: Analysis) -> CheckResult:
    """Is the optimum of the law's fit the global one?"""
    fit = analysis.need().fit
    said = f"{fit.starts_agreeing} of {fit.starts} starts converge to the same optimum"
    return judged(2 * fit.starts_agreeing >= fit.starts, f"{said} (relative gradient {fit.gradient_norm:.0e}).")


def resamples(analysis: Analysis) -> CheckResult:
    """Are the optima of its replicates?"""
    if not (boot := analysis.need().boot):
        return CheckResult("not checked")
    return judged(
        boot.worse == 0 and boot.failed < FEW_FAIL * boot.replicates,
        f"{boot.replicates} bootstrap replicates over {boot.units} {boot.unit}s: {boot.verified} converged (relative "
        f"gradient at most {boot.gradient_norm:.0e}, Hessian positive definite); {boot.checked} refitted from other "
        f"starts, {boot.worse} of them to a better optimum.",
    )


def irreducible_loss(analysis: Analysis) -> CheckResult:
    """Is E known within a quarter of itself?"""
    third = analysis.need()
    if not third.boot:
        return CheckResult("not checked")
    low, high = third.interval("E")
    said = f"E is poorly determined: 95% interval {low:.2f} to {high:.2f} nats. It is not the entropy of the text."
    return doubt_if(high - low > 0.25 * third.law.E, said)


def agreement(analysis: Analysis) -> CheckResult:
    """Do the approaches agree on the exponent a?"""
    found = analysis.approaches
    if len(found) < 2:
        return CheckResult("not checked")
    numbers = ", ".join(str(one.number) for one in found)
    values = ", ".join(f"{one.exponent(one.law):.3f}" for one in found)
    ends = [one.interval(one.exponent) for one in found if one.boot]
    apart = len(ends) > 1 and max(low for low, _ in ends) > min(high for _, high in ends)
    compared = f": their 95% intervals {'do not all overlap' if apart else 'overlap'}" if len(ends) > 1 else ""
    return judged(not apart, f"Approaches {numbers} give a = {values}{compared}.")


def late_winners(analysis: Analysis) -> CheckResult:
    """Does the envelope of Approach 1 consist of the ends of runs?"""
    late = analysis.need(1).fit.late_share
    said = f"Approach 1: only {late:.0%} of the envelope comes from the last 15% of a run (all of it in the paper). "
    return doubt_if(late < 0.5, said + "Earlier, while the learning rate is still high, the loss is too high.")


def budgets(analysis: Analysis) -> CheckResult:
    """If clusters of C were used as budgets, what does Approach 2 give without some of them?"""
    second = analysis.need(2).fit
    if analysis.rows.get("budget") is not None:
        return CheckResult()
    good = [budget for budget in second.budgets if budget.bracketed]
    one = [law.a for law in (attempt(second.without, [budget]) for budget in good) if isinstance(law, PowerLaw)]
    said = f"Approach 2: no column of budgets; {len(good)} clusters of C are used instead"
    said += f"; leaving out any one of them gives a from {min(one):.3f} to {max(one):.3f}" if one else ""
    narrow = [budget for budget in good if budget.width < NARROW]
    without = attempt(second.without, narrow)
    if narrow and isinstance(without, PowerLaw):
        which = ", ".join(f"{budget.flops:.3g} of {budget.n_runs}" for budget in narrow)
        said += f"; sizes span less than {NARROW}x in {len(narrow)} of them ({which} runs)"
        said += f"; without these a is {without.a:.3f}"
    return judged(not narrow, said + ".")


def intervals(analysis: Analysis, number: int) -> CheckResult:
    """Warnings about the intervals of an approach, or why it has none."""
    found = analysis.need(number)
    if found.why:
        return CheckResult("doubt", f"Approach {number} has no intervals: {found.why}.")
    if not (boot := found.boot) or not boot.warnings:
        return CheckResult()
    minor = len(boot.warnings) == 1 and 0 < boot.failed < FEW_FAIL * boot.replicates
    return judged(minor, f"Approach {number}: {'; '.join(boot.warnings)}.")


def independence(analysis: Analysis) -> CheckResult:
    """Are rows of one run resampled as if they were independent?"""
    n, settings = len(analysis.N), analysis.settings
    if "run" not in analysis.rows.labels:
        table = np.stack([analysis.N, analysis.D, analysis.L])
        same = int((np.diff(table[:, np.lexsort(table)]) == 0).all(0).sum())
        said = f"{same} rows are identical to others and there is no column run: if they are copies"
        return doubt_if(same > 0, f"{said}, the intervals are too narrow.")
    runs = len(np.unique(resampled_unit(analysis.rows, "run"))) if settings.cluster == "row" else n
    said = f"{n} rows belong to {runs} runs, but `cluster` row resamples rows as if they were independent"
    return doubt_if(runs < n, f"{said}: the intervals are too narrow.")


def repeated_text(analysis: Analysis) -> CheckResult:
    unique = analysis.rows.get("unique_tokens")
    again = 0 if unique is None else int(np.sum(analysis.D / unique > 1.001))
    return doubt_if(again > 0, f"{again} runs saw their text more than once; the law assumes new text.")


def fewer_resamples(analysis: Analysis) -> CheckResult:
    return CheckResult("note", f"{analysis.note}." if analysis.note else "")


def runs(analysis: Analysis) -> CheckResult:
    """How many runs do the checks that refit use?"""
    n, some = len(analysis.N), min(len(analysis.N), MOST_CHECKED)
    said = f"Checks that refit use a random sample of {some} of the {n} runs."
    return CheckResult("note", said if some < n else "", some)


def left_out(analysis: Analysis) -> CheckResult:
    dropped = analysis.rows.dropped
    said = ", ".join(f"{lost} {reason}" for reason, lost in dropped.items())
    return CheckResult("doubt" if "not usable" in dropped else "note", f"Left out: {said}." if said else "")


def forms(analysis: Analysis) -> CheckResult:
    """Which form of the law answers, and how well does each predict larger budgets?"""
    choice, rows, mark = analysis.choice, [], None
    for i, form in enumerate(choice.forms):
        mark = i if form is choice.chosen else mark
        cells = [form.fit]
        if isinstance(form.fit, ParametricFit):
            errors, law = (form.in_sample, choice.scores.get(form.name, np.nan), form.last), form.fit.law
            cells = [f"{error:.2%}" if np.isfinite(error) else "-" for error in errors]
            cells += [f"{law.gamma:.3g}", four(law.E), f"{law.a:.3f}"]
        rows.append([form.name, *cells])
    head = ("form", "error in-sample", "next budget", "largest budget", "gamma", "E", "a (Eq. 4)")
    note = "Median errors of the loss. The largest budget, predicted from the others, takes no part in the choice."
    said = f"Of the forms of the law, {choice.chosen.name} is used: {choice.why}." if choice.chosen else ""
    table = Table("Forms of the law", head, rows, note, "forms", mark)
    return CheckResult("note" if choice.scores else "not checked", said, tables=(table,), found=choice)


def hold_out(analysis: Analysis) -> CheckResult:
    """How well does the law of the smaller runs predict the largest?"""
    form, choice = analysis.need().form, analysis.choice
    options = {"delta": analysis.settings.delta, "E": analysis.settings.fixed_e, **laws.FORMS[form]}
    options |= {"form_error": choice.error(choice.chosen, last=False), **analysis.resampling(1000)}
    budget = analysis.rows.get("budget")
    held = laws.hold_out(analysis.N, analysis.D, analysis.L, analysis.C, budget=budget, **options)
    m, good = len(held.rows), held.error < max(3 * held.in_sample_error, GOOD)
    error = f"{100 * held.error:.2f}% (median; {100 * held.bias:+.2f}% signed)"
    said = f"Hold-out error on the {m} largest runs {error}, in-sample {100 * held.in_sample_error:.2f}%"
    said += f", at {held.reach:.2g}x the compute"
    if held.bootstrap:
        good &= held.outside <= max(1, 0.15 * m)
        said += f"; {held.outside} of {m} runs fall outside the predicted 95% interval ({0.05 * m:.2g} expected)"
    elif held.why:
        good, said = False, f"{said}; no intervals: {held.why}"
    tables = hold_out_tables(analysis, held)
    held = held if analysis.index is None else replace(held, rows=analysis.index[held.rows])
    return judged(good, said + ".", held.to_json(), tables, held)


def hold_out_tables(analysis: Analysis, held: laws.HoldOut) -> tuple[Table, ...]:
    """Predicted and measured minima of the held-out budgets, predicted and observed losses of their runs."""
    minima = [
        [powers(C), with_interval(count(predicted), ends, count), count(N), f"{100 * (predicted / N - 1):+.0f}%"]
        for C, N, predicted, ends in held.optima
    ]
    rows = []
    for i, predicted, low, high, L in zip(held.rows, held.predicted, held.low, held.high, held.observed, strict=True):
        run = powers(analysis.C[i]), count(analysis.N[i]), count(analysis.D[i])
        inside = "" if np.isnan(low) else "inside" if low <= L <= high else "OUTSIDE"
        loss = with_interval(four(predicted), (low, high), four), four(L), f"{100 * (predicted / L - 1):+.2f}%"
        rows.append([*run, *loss, inside])
    note = f"The first {MOST_ROWS} of {len(rows)}." if len(rows) > MOST_ROWS else ""
    head = ("C", "N", "D", "loss predicted", "observed", "off by", "")
    return (
        Table("", ("C", "N predicted", "N measured", "off by"), minima, figure="hold-out"),
        Table("", head, rows[:MOST_ROWS], note, "hold-out"),
    )


def curvature(analysis: Analysis) -> CheckResult:
    """Is the frontier a power law?"""
    second = analysis.results[2]
    if isinstance(second, NotIdentified) or not analysis.settings.bootstrap:
        raise NotIdentified("it takes Approach 2 and a bootstrap")
    found = laws.frontier_curvature(second.fit, **analysis.resampling(1000))
    low, high = found.intervals[95]
    bends = f"bends {'down' if found.quadratic < 0 else 'up'} significantly"
    said = f"In log-log the frontier {bends if found.significant else 'has no significant curvature'}"
    said += f": quadratic term {found.quadratic:+.3f} [{low:+.3f}, {high:+.3f}]."
    return judged(not found.significant, said, {"quadratic": found.quadratic, "intervals": found.intervals})


def kaplan_procedure(analysis: Analysis) -> CheckResult:
    """Which exponent does the procedure of Kaplan et al. give for these runs?"""
    third, N = analysis.need(), analysis.rows.complete("params_non_embedding")
    if N is None:
        raise NotIdentified("the rows have no params_non_embedding")
    noise = analysis.resampling(1000) | {"noise": third.fit.noise, "budget": analysis.rows.get("budget")}
    del noise["runs"]  # noise is drawn for each row
    found = laws.kaplan_procedure(N, analysis.D, analysis.L, third.law.loss(analysis.N, analysis.D), **noise)
    where = f"at {len(found.flops)} of {found.levels} {'levels between the runs' if found.between else 'budgets'}"
    ends = bracketed(found.intervals.get(95, (np.nan, np.nan)))
    said = f"Kaplan's procedure (non-embedding N and C, losses interpolated, {where}) gives a = {found.a:.3f}{ends}"
    json = asdict(found) | {"flops": found.flops.tolist(), "params": found.params.tolist()}
    return CheckResult("note", f"{said}; with the law's losses instead, {found.simulated:.3f}.", json, found=found)


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
    return refitted("Without the runs of highest loss", refits, "runs left out", note=note)


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
        f"E ({E:.3g}) is driven by models far from compute-optimal: the {runs} runs within {factor:g}x of the optimum "
        f"give {low:.3g} to {high:.3g}."
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
    return CheckResult(json=found, tables=(Table("Residuals by compute", head, rows),), found=found)


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


CHECKS = (
    Check("forms", forms),
    Check("chance", chance),
    Check("no_law", no_law),
    Check("cost", cost),
    Check("starts", starts),
    Check("resamples", resamples),
    Check("E", irreducible_loss),
    Check("agreement", agreement),
    Check("late_winners", late_winners),
    Check("budgets", budgets),
    Check("hold_out", hold_out, "Hold-out", refits=True),
    Check("curvature", curvature, "Curvature", refits=True),
    Check("kaplan_procedure", kaplan_procedure, "Kaplan's procedure", refits=True),
    Check("leave_out_highest", leave_out_highest, refits=True, missing=[]),
    Check("delta", delta, refits=True, missing=[]),
    Check("other", other_objectives, refits=True, missing=[]),
    Check("near_minimum", near_minimum, refits=True, missing=[]),
    Check("windows", windows, refits=True, missing={}),
    Check("kaplan_form", kaplan_form, "Kaplan's form", refits=True),
    Check("residuals_by_compute", residuals_by_compute, refits=True, missing=[]),
    Check("counts", counts, refits=True),
    Check("profile_E", profile_e, refits=True, missing=[]),
    *(Check(f"intervals_{number}", partial(intervals, number=number)) for number in (1, 2, 3)),
    Check("independence", independence),
    Check("fewer_resamples", fewer_resamples),
    Check("repeated_text", repeated_text),
    Check("runs", runs),
    Check("left_out", left_out),
)
