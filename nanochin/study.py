"""All that one set of runs has to say: the three approaches with their intervals, and the checks upon them.

    study = study_runs(rows)                 the answer: three laws, how sure each is
    checks = check(study)                    what would change it, and how far it may be trusted
    optimum(study.best, 1e18)                what to train, with intervals (nanochin/answers.py)

What the data cannot support is the NotIdentified that says so, in the place of a result.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from nanochin import laws
from nanochin.config import UserError
from nanochin.laws import Bootstrap, Cost, Law, NotIdentified, PowerLaw, Refit
from nanochin.rows import CHANCE, Rows, all_or_no_flops, by_chance, identical

MOST_CHECKED = 2000  # runs: of more, a sample is checked
USUAL, LEAST, FEWEST = 4000, 200, 20  # resamples: for a few thousand rows, for any number, that may be asked for
WORK = 2e7  # rows x resamples that are done unasked, some 20 seconds
FEW_FAIL = 0.02  # share of resamples without an optimum that is no reason for doubt
BAD_COST = 0.1  # of log C: runs' FLOPs that the curve of cost by size misses by more are a reason for doubt
NARROW = 4  # clusters of C whose sizes span less than this may be no isoFLOP curve
SENSITIVITY = 200  # resamples of each refit among the checks
COUNTS = {"total": "params", "non_embedding": "params_non_embedding", "with_head": "params_with_head"}


@dataclass(frozen=True)
class Settings:
    """How to fit; the options of fit.py that are not about files."""

    params: str = "total"  # parameter convention of N
    flops: str | None = None  # FLOP convention of C; None: what the rows have
    delta: float = 1e-3
    fixed_e: float | None = None
    drop: int = 0  # rows of highest loss left out
    bootstrap: int | None = None  # resamples; None: as many as the number of rows allows, see `resamples`
    cluster: str = "auto"  # the unit that is resampled: run, row; auto is run where there is such a column
    seed: int = 0


@dataclass(frozen=True)
class Approach:
    """One of the three: its fit, and how sure it is."""

    number: int
    fit: object  # EnvelopeFit, IsoflopFit or ParametricFit
    sure: Bootstrap | None
    reach: tuple[float, float]  # FLOPs of the smallest and the largest run
    why: str = ""  # there are no intervals, though some were asked for

    @property
    def law(self) -> Law | PowerLaw:
        return self.fit.law

    def interval(self, quantity: str | Callable, level: float = 95) -> tuple[float, float]:
        return (np.nan, np.nan) if self.sure is None else self.sure.interval(quantity, level)

    def exponent(self, law: Law | PowerLaw, which: int = 0):
        """By `law` the optimal N (0) or D (1) grows as this power of C, over the FLOPs of the runs."""
        return laws.exponents(law, *self.reach)[which]


@dataclass(frozen=True)
class Study:
    rows: Rows
    curves: Rows | None
    settings: Settings
    N: np.ndarray  # (n,) the runs that were fitted
    D: np.ndarray
    L: np.ndarray
    C: np.ndarray  # in flops_convention
    unit: np.ndarray | None  # (n,) what is resampled together; None: every row by itself
    flops_convention: str
    flops_name: str  # how titles call it
    results: dict[int, Approach | NotIdentified]
    akima: Approach | NotIdentified  # Approach 2 by interpolation, with its seed-noise interval
    cost: Cost
    note: str = ""  # that there are fewer resamples than usual

    @property
    def approaches(self) -> list[Approach]:
        """Those that the data support."""
        return [found for found in self.results.values() if isinstance(found, Approach)]

    @property
    def best(self) -> Approach:
        """The one that answers: 3, else 2, else 1."""
        return self.approaches[-1]

    @property
    def convention(self) -> str:
        """For titles and footers."""
        return f"N {self.settings.params}, C {self.flops_name}"


def attempt(function: Callable, *args, **kwargs):
    """The result, or the NotIdentified that says why there is none."""
    try:
        return function(*args, **kwargs)
    except NotIdentified as error:
        return error


# ---------------------------------------------------------------------------------------------------------------------
# The answer


def resamples(n: int, asked: int | None) -> tuple[int, str]:
    """How many resamples of n rows: those asked for, else the usual number or as many as WORK allows, and a sentence
    that says so where there are fewer."""
    if asked is not None:
        return asked, ""
    chosen = int(np.clip(WORK / n, LEAST, USUAL))
    minutes = math.ceil(n * chosen / WORK)
    note = (
        f"{n:,} rows are many: {chosen} resamples instead of {USUAL}, about {minutes} minute{'s' * (minutes > 1)}; "
        f"--bootstrap={USUAL} insists"
    )
    return chosen, note if chosen < USUAL else ""


def silent(stage: str, done: float, total: float) -> None:
    """Progress that nobody wants to see."""


def study_runs(
    rows: Rows,
    curves: Rows | None = None,
    settings: Settings | None = None,
    progress: Callable[[str, float, float], None] = silent,
) -> Study:
    """Fit what can be fitted; `progress` is told (stage, done, total). Raises UserError if no approach can."""
    settings = settings or Settings()
    replicates, note = resamples(len(rows), settings.bootstrap)
    settings = replace(settings, bootstrap=replicates)
    if 0 < settings.bootstrap < FEWEST:
        raise UserError(f"--bootstrap {settings.bootstrap}: too few for an interval; give 0, or {FEWEST} and more")
    if settings.drop:
        rows = rows.keep(np.argsort(np.argsort(-rows["loss"], kind="stable")) >= settings.drop, "of highest loss")
    N, D, L = _params(rows, settings.params), rows["tokens"], rows["loss"]
    C, flops_convention, flops_name = _flops(rows, settings.flops)
    if settings.fixed_e is not None and settings.fixed_e >= L.min():
        raise UserError(
            f"--fixed-e {settings.fixed_e:g}: {rows.source} has a loss of {L.min():g}, below it; E is the "
            "loss that no model beats"
        )
    unit = _unit(rows, settings.cluster)
    cost = Cost.of(N, D, C)
    reach = float(C.min()), float(max(C.max(), 1.01 * C.min()))
    labels = {"params_convention": settings.params, "flops_convention": flops_convention}
    verify = int(np.clip(WORK / 10 / len(N), 4, 200))  # each costs as much as some fifteen resamples

    def approach(number: int, fit) -> Approach | NotIdentified:
        if isinstance(fit, NotIdentified):
            return fit
        given = {} if number == 1 else {"runs": unit}
        told = partial(progress, f"resampling for approach {number}")
        sure = settings.bootstrap and attempt(
            laws.bootstrap,
            fit,
            replicates=settings.bootstrap,
            seed=settings.seed,
            verify=verify,
            progress=told,
            **given,
        )
        why = str(sure) if isinstance(sure, NotIdentified) else ""
        return Approach(number, fit, sure if isinstance(sure, Bootstrap) else None, reach, why)

    if curves is None:
        envelope = NotIdentified("no training curves: give --curves, or a folder of runs with their log.jsonl")
    else:
        run, n = curves.labels["run"].codes, _params(curves, settings.params)
        spent = 6 * n * curves["tokens"] * np.exp(np.interp(np.log(n), *laws.ratios(N, D, C)))  # as the runs had it
        envelope = attempt(laws.fit_envelope, run, n, curves["tokens"], curves["loss"], spent, **labels)
    budget = laws.group_budgets(C, budget=rows.get("budget"))
    parabola = attempt(laws.fit_isoflop, N, D, L, C, budget=budget, **labels)
    akima = NotIdentified(f"more than {MOST_CHECKED} runs: a spline through all of them would follow their noise")
    if len(N) <= MOST_CHECKED:
        akima = attempt(laws.fit_isoflop, N, D, L, C, budget=budget, method="akima", **labels)
    parametric = attempt(
        laws.fit_parametric,
        N,
        D,
        L,
        delta=settings.delta,
        E=settings.fixed_e,
        params_convention=settings.params,
        cost=cost,
    )
    results = {1: approach(1, envelope), 2: approach(2, parabola), 3: approach(3, parametric)}
    if not any(isinstance(found, Approach) for found in results.values()):
        reasons = "; ".join(
            str(found) if f"{found}".startswith("Approach") else f"Approach {number}: {found}"
            for number, found in results.items()
        )
        raise UserError(f"{rows.source}: no law can be told from these runs: {reasons}")
    if not isinstance(akima, NotIdentified):
        noise = settings.bootstrap and attempt(
            laws.bootstrap_seed_noise, akima, replicates=min(1000, settings.bootstrap), seed=settings.seed
        )
        akima = Approach(2, akima, noise if isinstance(noise, Bootstrap) else None, reach)
    return Study(rows, curves, settings, N, D, L, C, unit, flops_convention, flops_name, results, akima, cost, note)


def _params(rows: Rows, convention: str) -> np.ndarray:
    return _column(rows, COUNTS[convention], f"--params {convention}")


def _flops(rows: Rows, convention: str | None) -> tuple[np.ndarray, str, str]:
    """(C, its convention, its name): what is asked for, else the column flops, else 6ND. In a table of others that
    column counts what they say; a plan takes it for physical."""
    six = 6 * rows["params"] * rows["tokens"]  # 6ND counts all parameters, however the law counts N
    if convention is None and "flops" in rows.numbers:
        C = all_or_no_flops(rows)["flops"]
        ours = any(name.startswith("flops_") for name in rows.numbers)
        named = ("physical", "physical" if ours else "as in the column flops")
        return C, *(("6nd", "6ND") if np.allclose(C, six, rtol=1e-3) else named)
    if convention in (None, "6nd"):
        return six, "6nd", "6ND"
    name = "flops" if convention == "physical" else f"flops_{convention}"
    return _column(rows, name, f"--flops {convention}"), convention, convention


def _column(rows: Rows, name: str, option: str) -> np.ndarray:
    if (column := rows.complete(name)) is None:
        where = f"is blank at {rows.blanks[name]}" if name in rows.blanks else "is not there"
        raise UserError(f"{option}: {rows.source} lacks {name}: the column {where}")
    return column


def _unit(rows: Rows, cluster: str) -> np.ndarray | None:
    """(n,) what is resampled together: cooldowns of one trunk, else rows of one run, else each row by itself."""
    if cluster == "row" or (cluster == "auto" and "run" not in rows.labels):
        return None
    if "run" not in rows.labels:
        raise UserError(f"--cluster run: {rows.source} has no column run")
    run, trunk = rows.labels["run"], rows.labels.get("trunk")
    # A row without a name is a run of its own; its stand-in is no name that a file could hold.
    names = np.array([(trunk and trunk[i]) or run[i] or f"\n{i}" for i in range(len(rows))])
    return np.unique(names, return_inverse=True)[1]


# ---------------------------------------------------------------------------------------------------------------------
# The checks


@dataclass(frozen=True)
class Checks:
    """Each a result of nanochin.laws, or the NotIdentified in its place."""

    leave_out: list[Refit]  # without the k runs of highest loss
    deltas: list[Refit]
    profile: tuple  # (E, objective over its minimum)
    by_compute: list  # dicts
    variants: list[Refit]  # what is other, in words
    near: list[Refit]  # (factor, runs): the runs within that factor of the minimum of their budget alone
    counts: list  # (convention, Approach 3, Approach 2), either may be NotIdentified
    hold_out: object
    curvature: object
    loss_line: object
    kaplan: object  # KaplanProcedure
    kaplan_form: object
    runs: int  # on how many runs the checks were made

    def to_json(self) -> dict:
        """The object `checks` of laws.json; what could not be made has its reason."""

        def of(found, *names: str) -> dict:
            if isinstance(found, NotIdentified):
                return {"reason": str(found)}
            values = {name: getattr(found, name) for name in names}
            return {name: v.tolist() if isinstance(v, np.ndarray | np.generic) else v for name, v in values.items()}

        def refits(every: list[Refit]) -> list[dict]:
            names = ("a", "alpha", "beta", "E", "A", "B")
            return [
                {"change": str(one.change)}
                | (
                    of(one.fit)
                    if isinstance(one.fit, NotIdentified)
                    else of(one.fit.law, *names)
                    | {"objective": one.fit.objective}
                    | ({"ci": {name: one.sure.interval(name) for name in names}} if one.sure else {})
                )
                for one in every
            ]

        def exponent(found) -> dict:
            if isinstance(found, NotIdentified):
                return of(found)
            ends = {"a_ci": found.interval(found.exponent)} if found.sure else {}
            return {"a": float(found.exponent(found.law)), "a_eq4": found.law.a} | ends

        held = of(self.hold_out, "bias", "error", "in_sample_error", "reach", "rows", "predicted", "observed")
        if isinstance(self.hold_out, laws.HoldOut):
            held["minima"] = [
                {"flops": C, "params_measured": seen, "params_predicted": told}
                | ({"ci": ends} if np.isfinite(ends[0]) else {})
                for C, seen, told, ends in self.hold_out.optima
            ]
            if self.hold_out.bootstrap:
                held |= of(self.hold_out, "low", "high", "outside")
        E, rise = self.profile
        return {
            "runs": self.runs,
            "hold_out": held,
            "curvature": of(self.curvature, "quadratic", "intervals"),
            "loss_line": of(self.loss_line, "exponent", "flops", "measured", "predicted"),
            "kaplan_procedure": of(self.kaplan, "a", "simulated", "intervals", "between", "levels", "flops", "params"),
            "kaplan_form": of(self.kaplan_form, "N_c", "D_c", "alpha_N", "alpha_D", "objective"),
            "leave_out_highest": refits(self.leave_out),
            "delta": refits(self.deltas),
            "other": refits(self.variants),
            "near_minimum": [
                found | {"change": f"within {one.change[0]:g} times", "runs": one.change[1]}
                for one, found in zip(self.near, refits(self.near), strict=True)
            ],
            "counts": {
                how: {"approach3": exponent(third), "approach2": exponent(second)} for how, third, second in self.counts
            },
            "residuals_by_compute": self.by_compute,
            "profile_E": [[float(e), float(r)] for e, r in zip(E, rise, strict=True) if np.isfinite(r)],
        }


def check(study: Study, progress: Callable[[str, float, float], None] = silent) -> Checks:
    """All checks. Those of Approach 3 are empty where it has no fit. Of more than MOST_CHECKED runs a sample is
    checked: it is some fifty fits, and they show tendencies."""
    if (n := len(study.N)) > MOST_CHECKED:
        chosen = np.sort(np.random.default_rng(study.settings.seed).choice(n, MOST_CHECKED, replace=False))
        rows = study.rows.keep(np.isin(np.arange(n), chosen), "not checked")
        some = study_runs(rows, settings=replace(study.settings, bootstrap=0, drop=0))
        checks = check(replace(some, settings=study.settings), progress)
        if isinstance(checks.hold_out, laws.HoldOut):
            checks = replace(checks, hold_out=replace(checks.hold_out, rows=chosen[checks.hold_out.rows]))
        return checks

    N, D, L = study.N, study.D, study.L
    budget = study.rows.get("budget")
    replicates, seed = min(1000, study.settings.bootstrap), study.settings.seed
    third, second = study.results[3], study.results[2]
    step = partial(progress, "checks")
    step(0, 5)
    form = attempt(laws.fit_kaplan_form, N, D, L, delta=study.settings.delta)
    held = attempt(laws.hold_out, N, D, L, study.C, budget=budget, budgets=_budgets_to_hold_out(study.C, budget),
                   runs=study.unit, replicates=replicates, seed=seed, delta=study.settings.delta,
                   E=study.settings.fixed_e)  # fmt: skip
    curvature = straight = NotIdentified("it takes Approach 2 and a bootstrap")
    if isinstance(second, Approach) and replicates:
        curvature = attempt(laws.frontier_curvature, second.fit, runs=study.unit, replicates=replicates, seed=seed)
    if isinstance(second, Approach):
        straight = attempt(laws.loss_line, second.fit)
    step(1, 5)
    if isinstance(third, NotIdentified):
        return Checks(
            leave_out=[], deltas=[], profile=(np.empty(0), np.empty(0)), by_compute=[], variants=[], near=[],
            counts=_by_count(study), hold_out=held, curvature=curvature, loss_line=straight, kaplan=third,
            kaplan_form=form, runs=len(N))  # fmt: skip

    delta = study.settings.delta
    again = {"runs": study.unit, "replicates": min(SENSITIVITY, study.settings.bootstrap), "seed": seed}

    def unchanged(name) -> Refit:
        return Refit(name, third.fit, third.sure) if third.sure else Refit.attempt(name, lambda: third.fit, **again)

    leave_out = [unchanged(0), *laws.leave_out_highest(third.fit, (1, 3, 5, 8, 15), **again)]
    step(2, 5)
    others = [other for other in (1e-6, 1e-4, 1e-3, 1e-2, 1e-1) if other != delta]
    deltas = sorted([unchanged(delta), *laws.delta_sensitivity(third.fit, others, **again)], key=lambda r: r.change)
    step(3, 5)
    lower = min(0.98 * third.law.E, 0.99 * float(L.min()))
    changes = {
        "least squares": {"delta": np.inf},
        "Huber on the loss itself": {"space": "linear"},
        "alpha = beta": {"tied": True},
        f"E fixed below, at {lower:.4g}": {"E": lower},
    }
    variants = [
        Refit.attempt(words, partial(laws.refit, third.fit, **change), **again) for words, change in changes.items()
    ]
    near = laws.near_minimum(third.fit, second.fit, **again) if isinstance(second, Approach) else []
    step(4, 5)
    kaplan = NotIdentified("the rows have no params_non_embedding")
    if (non_embedding := study.rows.complete("params_non_embedding")) is not None:
        kaplan = attempt(laws.kaplan_procedure, non_embedding, D, L, third.law.loss(N, D), budget=budget,
                         noise=third.fit.noise, replicates=replicates, seed=seed)  # fmt: skip
    E, objective = laws.profile_e(third.fit, 61)
    step(5, 5)
    return Checks(
        leave_out=leave_out,
        deltas=deltas,
        profile=(E, objective / third.fit.objective),
        by_compute=laws.residuals_by_compute(third.fit),
        variants=variants,
        near=near,
        counts=_by_count(study),
        hold_out=held,
        curvature=curvature,
        loss_line=straight,
        kaplan=kaplan,
        kaplan_form=form,
        runs=len(N),
    )


def _budgets_to_hold_out(C: np.ndarray, budget: np.ndarray | None, least: int = 5) -> int:
    """How many of the largest budgets it takes to have `least` runs."""
    groups = laws.group_budgets(C, budget=budget)
    runs = np.unique(groups[~np.isnan(groups)], return_counts=True)[1]
    return 1 + int(np.searchsorted(np.cumsum(runs[::-1]), least))


def _by_count(study: Study) -> list:
    """Approaches 3 and 2 with N counted in every way for which there is a column (C as it is)."""
    found, D, L, C, settings = [], study.D, study.L, study.C, study.settings
    replicates, reach = min(SENSITIVITY, settings.bootstrap), (float(C.min()), float(max(C.max(), 1.01 * C.min())))

    def approach(number: int, fit) -> Approach | NotIdentified:
        if isinstance(fit, NotIdentified):
            return fit
        sure = replicates and attempt(
            laws.bootstrap, fit, runs=study.unit, replicates=replicates, seed=settings.seed, verify=0
        )
        return Approach(number, fit, sure if isinstance(sure, Bootstrap) else None, reach)

    for convention, name in COUNTS.items():
        if convention == settings.params:
            found.append((convention, study.results[3], study.results[2]))
        elif (N := study.rows.complete(name)) is not None:
            parametric = attempt(
                laws.fit_parametric, N, D, L, delta=settings.delta, E=settings.fixed_e, cost=Cost.of(N, D, C)
            )
            isoflop = attempt(laws.fit_isoflop, N, D, L, C, budget=study.rows.get("budget"))
            found.append((convention, approach(3, parametric), approach(2, isoflop)))
    return found if len(found) > 1 else []


# ---------------------------------------------------------------------------------------------------------------------
# In words


def frontier_in_words(study: Study) -> str:
    """What a token costs where that is not 6N, and what this makes of Eq. 4."""
    cost, third = study.cost, study.results[3]
    said = (
        f"C is {study.flops_name}: the runs spent 6ND {'times' if cost.s > 0 else 'over'} 1 + {cost.c:.3g} / "
        f"N^{cost.q:.3g}, give or take {100 * cost.misfit:.1f}%"
    )
    if not isinstance(third, Approach):
        return f"{said}."
    low, high = third.interval(third.exponent)
    ends = f" [{low:.3f}, {high:.3f}]" if np.isfinite(low) else ""
    return (
        f"{said}; least loss by the law at such C has a = {third.exponent(third.law):.3f}{ends} over the runs, "
        f"where Eq. 4, for 6ND, has {third.law.a:.3f}."
    )


def _on_found_budgets(fit) -> tuple[bool, str]:
    """What Approach 2 would say without some of the clusters that were taken for budgets, as a finding."""
    good = [budget for budget in fit.budgets if budget.bracketed]
    one = [law.a for law in (attempt(fit.without, [budget]) for budget in good) if isinstance(law, PowerLaw)]
    said = f"Approach 2: no column tells the budgets; {len(good)} clusters of C serve as such"
    said += f", without any one of which a is {min(one):.3f} to {max(one):.3f}" if one else ""
    narrow = [budget for budget in good if budget.width < NARROW]
    without = attempt(fit.without, narrow)
    if narrow and isinstance(without, PowerLaw):
        which = ", ".join(f"{budget.flops:.3g} of {budget.n_runs}" for budget in narrow)
        said += (
            f"; sizes span less than {NARROW}x in {len(narrow)} of them ({which} runs), without which it is "
            f"{without.a:.3f}"
        )
    return not narrow, said + "."


def kaplan_in_words(found: laws.KaplanProcedure) -> str:
    where = f"at {len(found.flops)} of {found.levels} {'levels between the runs' if found.between else 'budgets'}"
    low, high = found.intervals.get(95, (np.nan, np.nan))
    ends = f" [{low:.3f}, {high:.3f}]" if np.isfinite(low) else ""
    return (
        f"Kaplan's procedure (non-embedding N and C, losses interpolated, {where}) gives a = {found.a:.3f}{ends}; "
        f"the law's losses in their place give {found.simulated:.3f}."
    )


def findings(study: Study, checks: Checks) -> list[tuple[bool, str]]:
    """What one should know before believing the law: (reassuring or not, a sentence)."""
    said = []

    def say(good: bool, text: str) -> None:
        said.append((good, text))

    for what, chance in zip(("params", "tokens"), by_chance(study.N, study.D, study.L), strict=True):
        if chance > CHANCE:
            say(
                False,
                f"The losses do not follow {what} more closely than chance would have it (F test, p = "
                f"{chance:.2f}): what the law says of {what} is noise.",
            )
    for number, found in study.results.items():
        if isinstance(found, NotIdentified) and (number != 1 or study.curves is not None):
            say(False, f"Approach {number} gives no law: {str(found).removeprefix(f'Approach {number}: ')}.")
    third = study.results[3]
    if not study.cost.is_6nd:
        say(study.cost.misfit < BAD_COST, frontier_in_words(study))
    if isinstance(third, Approach):
        fit, sure = third.fit, third.sure
        say(
            2 * fit.starts_agreeing >= fit.starts,
            f"{fit.starts_agreeing} of {fit.starts} starts end in the same optimum, where the gradient is "
            f"{fit.gradient_norm:.0e} of its terms.",
        )
        if sure is not None:
            say(
                sure.worse == 0 and sure.failed < FEW_FAIL * sure.replicates,
                f"{sure.replicates} resamples of {sure.units} {sure.unit}s; at {sure.verified} of their optima the "
                f"gradient is at most {sure.gradient_norm:.0e} of its terms and the Hessian positive definite; "
                f"{sure.checked} fitted again from other starts, {sure.worse} of them to a better one.",
            )
            low, high = third.interval("E")
            if high - low > 0.25 * third.law.E:
                say(
                    False,
                    f"E is hardly known: 95% interval {low:.2f} to {high:.2f} nats. It is not the entropy of the text.",
                )
            for near in (one for one in checks.near if one.sure):
                (factor, runs), (low, high) = near.change, near.sure.interval("E")
                if not low <= third.law.E <= high:
                    say(
                        False,
                        f"E, {third.law.E:.3g}, comes from runs far from the minimum of their budget: the "
                        f"{runs} within {factor:g} times of it give {low:.3g} to {high:.3g}.",
                    )
                    break
    exponents = {
        approach.number: (approach.exponent(approach.law), approach.interval(approach.exponent))
        for approach in study.approaches
    }
    if len(exponents) > 1:
        ends = [ends for _, ends in exponents.values() if np.isfinite(ends[0])]
        apart = len(ends) > 1 and max(low for low, _ in ends) > min(high for _, high in ends)
        values = ", ".join(f"{a:.3f}" for a, _ in exponents.values())
        compared = f": their 95% intervals {'do not all overlap' if apart else 'overlap'}" if len(ends) > 1 else ""
        say(not apart, f"Approaches {', '.join(map(str, exponents))} give a = {values}{compared}.")
    first, second = study.results[1], study.results[2]
    if isinstance(first, Approach) and first.fit.late_share < 0.5:
        say(
            False,
            f"Approach 1: only {first.fit.late_share:.0%} of the winners are in the last 15% of their run, in "
            "the paper all; in the middle of a decaying schedule the loss is too high.",
        )
    if isinstance(second, Approach) and study.rows.get("budget") is None:
        say(*_on_found_budgets(second.fit))
    held = checks.hold_out
    if isinstance(held, laws.HoldOut):
        say(
            held.error < 3 * max(held.in_sample_error, 1e-3),
            f"Fitted without the {len(held.rows)} largest runs and asked about them, the law is off by "
            f"{100 * held.error:.2f}% (median; {100 * held.bias:+.2f}% on balance), inside by "
            f"{100 * held.in_sample_error:.2f}%; they lie {held.reach:.2g} times beyond the rest.",
        )
        if held.bootstrap:
            m = len(held.rows)
            say(
                held.outside <= max(1, 0.15 * m),
                f"{held.outside} of these {m} losses lie outside the 95% interval "
                f"that was predicted of them, where {0.05 * m:.2g} are to be expected.",
            )
        elif held.why:
            say(False, f"The hold-out has no intervals: {held.why}.")
    if isinstance(checks.curvature, laws.Curvature):
        low, high = checks.curvature.intervals[95]
        bends = f"bends {'down' if checks.curvature.quadratic < 0 else 'up'}, more than chance would make it"
        say(
            not checks.curvature.significant,
            f"In log-log the frontier {bends if checks.curvature.significant else 'has no bend beyond chance'}: "
            f"quadratic term {checks.curvature.quadratic:+.3f} [{low:+.3f}, {high:+.3f}].",
        )
    if isinstance(checks.loss_line, laws.LossLine):
        straight = checks.loss_line
        say(
            True,
            f"The least losses of the budgets go as C^-{straight.exponent:.4f}; the straight line through those "
            f"of the smaller ones is off by {100 * (straight.predicted / straight.measured - 1):+.2f}% at the "
            "largest.",
        )
    if isinstance(checks.kaplan, laws.KaplanProcedure):
        say(True, kaplan_in_words(checks.kaplan))
    refused = {
        "Hold-out": held,
        "Curvature": checks.curvature,
        "Kaplan's form": checks.kaplan_form,
        "Kaplan's procedure": checks.kaplan,
    }
    for what, reason in refused.items():
        if study.settings.bootstrap and isinstance(reason, NotIdentified):
            why = str(reason).removeprefix(f"{what.lower()}: ")
            say(reason is checks.kaplan, f"{what} could not be checked: {why}.")
    for approach in study.approaches:
        sure = approach.sure
        if approach.why:
            say(False, f"Approach {approach.number} has no intervals: {approach.why}.")
        warnings = () if sure is None else sure.warnings
        minor = len(warnings) == 1 and 0 < sure.failed < FEW_FAIL * sure.replicates  # a few replicates without optimum
        for warning in warnings:
            say(minor, f"Approach {approach.number}: {warning}.")
    if study.settings.cluster == "row" and "run" in study.rows.labels:
        n, runs = len(study.N), len(np.unique(_unit(study.rows, "run")))
        if runs < n:
            say(
                False,
                f"{n} rows belong to {runs} runs, but --cluster=row draws each by itself, as if rows of one run "
                "did not share its luck: the intervals are too narrow.",
            )
    copies = 0 if "run" in study.rows.labels else identical(study.N, study.D, study.L)
    if copies:
        say(
            False,
            f"{copies} rows are identical to others, and no column run tells whether they are copies: each "
            "counts as a run of its own, so if they are, the intervals are too narrow.",
        )
    if study.note:
        say(True, f"{study.note}.")
    unique = study.rows.get("unique_tokens")
    if unique is not None and (again := int(np.sum(study.D / unique > 1.001))):
        say(False, f"{again} runs read their text more than once; the law assumes fresh text.")
    if checks.runs < len(study.N):
        say(True, f"The checks were made on {checks.runs} of the {len(study.N)} runs, chosen at random.")
    for reason, lost in study.rows.dropped.items():
        say(reason != "not usable", f"Left out: {lost} {reason}.")
    return said
