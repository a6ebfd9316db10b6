"""Checks of a law: a check is one function of the analysis and one line of CHECKS.

    results = run_checks(analysis)          {name: CheckResult}, in the order in which they are shown
    results["hold_out"].status              "ok", "doubt" or "not checked"

Terminal and report show the sentences, the report the tables; laws.json stores sentences and JSON.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np

from nanochin import laws
from nanochin.base.console import above, count, powers
from nanochin.laws import NotIdentified, ParametricFit, PowerLaw
from nanochin.report import sensitivity
from nanochin.report.analysis import Analysis, Approach, attempt, resampled_unit, sample_runs
from nanochin.report.doubts import DOUBTS
from nanochin.report.findings import CheckResult, Results, Table, bracketed, doubt_if, four, judged, with_interval
from nanochin.report.sensitivity import SENSITIVITY
from nanochin.report.table import CHANCE, by_chance

MOST_CHECKED = 2000  # runs; of more, a random sample is refitted
FEW_FAIL = 0.02  # share of replicates without an optimum that raises no doubt
BAD_COST = 0.1  # misfit of log C by the curve of cost that raises a doubt
NARROW = 4  # clusters of C whose sizes span a smaller factor may not be isoFLOP curves
GOOD = 0.01  # hold-out error that raises no doubt, however small that in-sample is
MOST_ROWS = 40  # of the table of held-out runs


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


# ---------------------------------------------------------------------------------------------------------------------
# The checks, those that refit last


def doubted(analysis: Analysis, doubt: Callable[[Analysis], str]) -> CheckResult:
    """A doubt about the table itself."""
    said = doubt(analysis)
    return doubt_if(bool(said), f"{said[:1].upper()}{said[1:]}{'' if said.endswith('?') else '.'}")


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
        max(boot.worse, boot.failed) < FEW_FAIL * boot.replicates,  # the better optima are used
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
        which = ", ".join(f"{budget.flops:.3g}: {budget.n_runs} runs" for budget in narrow)
        said += f"; sizes span less than {NARROW}x in {len(narrow)} of them ({which})"
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
    error = f"{held.error:.2%} (median; signed: predicted {above(held.bias)} observed)"
    said = f"Hold-out error on the {m} largest runs {error}, in-sample {held.in_sample_error:.2%}"
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
    head = ("C", "N", "D", "loss predicted", "observed", "predicted / observed - 1", "")
    return (
        Table("", ("C", "N predicted", "N measured", "predicted / measured - 1"), minima, figure="hold-out"),
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
    said = f"In log-log the optimal N against C {bends if found.significant else 'has no significant curvature'}"
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
    del json["slopes"]
    return CheckResult("note", f"{said}; with the law's losses instead, {found.simulated:.3f}.", json, found=found)


CHECKS = (
    Check("forms", forms),
    *(Check(name, partial(doubted, doubt=doubt)) for name, doubt in DOUBTS.items()),
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
    Check("leave_out_highest", sensitivity.leave_out_highest, refits=True, missing=[]),
    Check("delta", sensitivity.delta, refits=True, missing=[]),
    Check("other", sensitivity.other_objectives, refits=True, missing=[]),
    Check("near_minimum", sensitivity.near_minimum, refits=True, missing=[]),
    Check("windows", sensitivity.windows, refits=True, missing={}),
    Check("kaplan_form", sensitivity.kaplan_form, "Kaplan's form", refits=True),
    Check("residuals_by_compute", sensitivity.residuals_by_compute, refits=True, missing=[]),
    Check("counts", sensitivity.counts, refits=True),
    Check("profile_E", sensitivity.profile_e, refits=True, missing=[]),
    *(Check(f"intervals_{number}", partial(intervals, number=number)) for number in (1, 2, 3)),
    Check("independence", independence),
    Check("fewer_resamples", fewer_resamples),
    Check("repeated_text", repeated_text),
    Check("runs", runs),
    Check("left_out", left_out),
)
