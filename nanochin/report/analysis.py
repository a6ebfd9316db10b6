"""The three approaches fitted to one set of runs, with intervals.

  analysis = analyse(rows)        three laws with intervals
  run_checks(analysis)            sensitivity and hold-out (nanochin/report/checks.py)
  optimum(analysis.best, 1e18)    what to train, with intervals (nanochin/report/allocate.py)

If the data cannot identify a result, a NotIdentified with the reason takes its place.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from nanochin import laws
from nanochin.base.cli import UserError
from nanochin.laws import Bootstrap, Choice, Cost, FormError, Law, NotIdentified, PowerLaw
from nanochin.report.table import RunTable
from nanochin.runrow import flops_column, params_column

MOST_INTERPOLATED = 2000  # runs; a spline through more would follow the noise
MOST_CHOSEN = 2000  # runs by which the form of the law is chosen; of more, a random sample
USUAL, LEAST, FEWEST = 4000, 200, 20  # replicates: default, default for very many rows, smallest allowed
WORK = 2e7  # rows x replicates by default, about 20 seconds


@dataclass(frozen=True)
class Settings:
    """How to fit: the options of fit.py that are not about files."""

    params: str = "total"  # parameter convention of N
    flops: str | None = None  # FLOP convention of C; None: that of the rows
    delta: float = 1e-3
    fixed_e: float | None = None
    bootstrap: int | None = None  # replicates; None: by the number of rows, see `resamples`
    cluster: str = "auto"  # unit of resampling: run or row; auto: run if there is such a column
    seed: int = 0


@dataclass(frozen=True)
class Approach:
    """One of the three approaches, or the law that answers: its fit and intervals."""

    number: int
    fit: object  # EnvelopeFit, IsoflopFit or ParametricFit
    boot: Bootstrap | None
    flops_range: tuple[float, float]  # FLOPs of the smallest and the largest run
    why: str = ""  # why there are no intervals, if requested
    form: str = ""  # of the law that answers, one of laws.FORMS

    @property
    def name(self) -> str:
        return f"Approach {self.number}" if self.form in ("", "gamma = 1") else f"Approach 3, {self.form}"

    @property
    def law(self) -> Law | PowerLaw:
        return self.fit.law

    def interval(self, quantity: str | Callable, level: float = 95) -> tuple[float, float]:
        return (np.nan, np.nan) if self.boot is None else self.boot.interval(quantity, level)

    def exponent(self, law: Law | PowerLaw, which: int = 0):
        """Exponent of the optimal N (`which` 0) or D (1) in C by `law`, over the FLOPs of the runs."""
        return laws.exponents(law, *self.flops_range)[which]

    def exponent_json(self) -> dict:
        ends = {"a_ci": self.interval(self.exponent)} if self.boot else {}
        return {"a": float(self.exponent(self.law)), "a_eq4": self.law.a} | ends


@dataclass(frozen=True)
class Analysis:
    rows: RunTable
    curves: RunTable | None
    settings: Settings
    N: np.ndarray  # (n,) the fitted runs
    D: np.ndarray
    L: np.ndarray
    C: np.ndarray  # in flops_convention
    unit: np.ndarray | None  # (n,) resampling unit of each row; None: each row is one
    flops_convention: str
    flops_name: str  # its name in titles
    results: dict[int, Approach | NotIdentified]
    akima: Approach | NotIdentified  # Approach 2 by interpolation, with its seed-noise interval
    choice: Choice  # of the form of the law
    law: Approach | NotIdentified  # Approach 3 with the chosen form
    cost: Cost
    note: str = ""  # if there are fewer replicates than usual
    whole: "Analysis | None" = None  # the analysis that this one samples
    index: np.ndarray | None = None  # (n,) indices of its runs in `whole`

    @property
    def approaches(self) -> list[Approach]:
        """The approaches that have a law."""
        return [found for found in self.results.values() if isinstance(found, Approach)]

    @property
    def everything(self) -> list[Approach]:
        """The approaches, and the law if it is none of them."""
        other = self.best.name not in [one.name for one in self.approaches]
        return [*self.approaches, *([self.best] if other else [])]

    @property
    def best(self) -> Approach:
        """The one used for answers: the law of the chosen form, else 2, else 1."""
        return self.law if isinstance(self.law, Approach) else self.approaches[-1]

    def is_tested(self, C: float) -> bool:
        """Whether rolling hold-out has tested the law that answers this far beyond the runs."""
        error = getattr(self.best.law, "form_error", None)
        return error is None or error.is_tested(C)

    @property
    def convention(self) -> str:
        """For titles and footers."""
        return f"N {self.settings.params}, C {self.flops_name}"

    def need(self, number: int | None = None) -> Approach:
        """The approach, or the law that answers. Raises NotIdentified if there is none."""
        if isinstance(found := self.law if number is None else self.results[number], NotIdentified):
            raise NotIdentified(str(found))
        return found

    def resampling(self, most: int) -> dict:
        """Arguments for functions of nanochin.laws that resample: the requested number, but at most `most`."""
        return {"runs": self.unit, "replicates": min(most, self.settings.bootstrap), "seed": self.settings.seed}


def attempt(function: Callable, *args, **kwargs):
    """The result, or the NotIdentified that it raises; also one if a number overflows or is divided by 0."""
    try:
        return function(*args, **kwargs)
    except NotIdentified as error:
        return error
    except ArithmeticError:
        return NotIdentified("the constants of the law are too extreme")


# ---------------------------------------------------------------------------------------------------------------------
# The fits


def resamples(n: int, asked: int | None) -> tuple[int, str]:
    """(replicates for n rows, note): `asked`, else USUAL, or fewer if WORK allows no more, with a note. Raises
    UserError if `asked` is too few."""
    if asked is not None and 0 < asked < FEWEST:
        raise UserError(f"`bootstrap` {asked}: too few for an interval; use 0 or at least {FEWEST}")
    chosen = int(np.clip(WORK / n, LEAST, USUAL)) if asked is None else asked
    if asked is not None or chosen == USUAL:
        return chosen, ""
    minutes = math.ceil(n * chosen / WORK)
    time = f"about {minutes} minute{'s' * (minutes > 1)}"
    return chosen, f"{n:,} rows: {chosen} resamples instead of {USUAL}, {time}; set `bootstrap` {USUAL} for all"


def analyse(
    rows: RunTable,
    curves: RunTable | None = None,
    settings: Settings | None = None,
    progress: Callable[[str, float, float], None] = lambda *_: None,
    choice: Choice | None = None,
) -> Analysis:
    """Fit all approaches, and the law in the form of `choice`, by default chosen here. Calls progress(stage, done,
    total). Raises UserError if none has a law."""
    settings = settings or Settings()
    replicates, note = resamples(len(rows), settings.bootstrap)
    settings = replace(settings, bootstrap=replicates)
    rows = rows.in_order()
    N, D, L = params_of(rows, settings.params), rows["tokens"], rows["loss"]
    C, flops_convention, flops_name = flops_of(rows, settings.flops)
    if settings.fixed_e is not None and settings.fixed_e >= L.min():
        raise UserError(f"`fixed_e` {settings.fixed_e:g}: must be below every loss; the lowest is {L.min():g}")
    unit = resampled_unit(rows, settings.cluster)
    cost = Cost.of(N, D, C)
    flops_range = float(C.min()), float(max(C.max(), 1.01 * C.min()))
    labels = {"params_convention": settings.params, "flops_convention": flops_convention}

    if curves is None:
        envelope = NotIdentified("no training curves: give `curves`, or a folder of runs with log.jsonl files")
    else:
        run, n = curves.labels["run"].codes, params_of(curves, settings.params)
        spent = 6 * n * curves["tokens"] * np.exp(np.interp(np.log(n), *laws.ratios(N, D, C)))  # counted as in C
        envelope = attempt(laws.fit_envelope, run, n, curves["tokens"], curves["loss"], spent, **labels)
    budget = laws.group_budgets(C, budget=rows.get("budget"))
    parabola = attempt(laws.fit_isoflop, N, D, L, C, budget=budget, **labels)
    akima = NotIdentified(f"more than {MOST_INTERPOLATED} runs: a spline would follow the noise")
    if len(N) <= MOST_INTERPOLATED:
        akima = attempt(laws.fit_isoflop, N, D, L, C, budget=budget, method="akima", **labels)
    options = {"delta": settings.delta, "params_convention": settings.params}
    third = attempt(laws.fit_parametric, N, D, L, E=settings.fixed_e, cost=cost, **options)
    fits = {1: envelope, 2: parabola, 3: third}
    if choice is None:
        some, column = random_rows(len(N), MOST_CHOSEN, settings.seed), rows.get("budget")
        how = options | {"budget": None if column is None else column[some], "E": settings.fixed_e}
        choice = laws.choose_form(N[some], D[some], L[some], C[some], **how)
    how = {"runs": unit, "replicates": settings.bootstrap, "seed": settings.seed}
    how["verify"] = int(np.clip(WORK / 10 / len(N), 4, 200))  # each costs as much as about fifteen replicates
    results = {}
    for number, fit in fits.items():
        shown = partial(progress, f"resampling for approach {number}")
        results[number] = approach(number, fit, flops_range, progress=shown, **how)
    law = NotIdentified(choice.why)
    if form := choice.chosen:
        law = results[3]
        if form.name != "gamma = 1" or isinstance(law, NotIdentified):
            fit = attempt(laws.fit_form, form.name, N, D, L, E=settings.fixed_e, cost=cost, **options)
            law = approach(3, fit, flops_range, progress=partial(progress, "resampling for the law"), **how)
        law = with_form(law, form.name, choice.error(form))
    if not any(isinstance(found, Approach) for found in (*results.values(), law)):
        reasons = (f"Approach {k}: {str(why).removeprefix(f'Approach {k}').lstrip(': ')}" for k, why in fits.items())
        raise UserError(f"{rows.source}: no approach can be fitted to these runs: {'; '.join(reasons)}")
    how = {"replicates": min(1000, settings.bootstrap), "seed": settings.seed}
    akima = approach(2, akima, flops_range, laws.bootstrap_seed_noise, **how)
    found = results, akima, choice, law
    return Analysis(rows, curves, settings, N, D, L, C, unit, flops_convention, flops_name, *found, cost, note)


def with_form(law: Approach | NotIdentified, form: str, error: FormError | None) -> Approach | NotIdentified:
    """The law that answers: it knows what its form may get wrong, and each replicate has a draw of that."""
    if isinstance(law, NotIdentified):
        return law
    fit, boot = replace(law.fit, law=replace(law.law, form_error=error)), law.boot
    if boot:
        draws = np.random.default_rng(0).permutation(laws.normal_quantiles(len(boot.law.a)))
        boot = replace(boot, law=replace(boot.law, form_error=error, draw=draws))
    return replace(law, fit=fit, boot=boot, form=form)


def approach(number: int, fit, flops_range: tuple, resample: Callable | None = None, **how) -> Approach | NotIdentified:
    """The approach of a fit, with intervals by resample(fit, **how), laws.bootstrap by default; none if replicates=0.
    A NotIdentified is returned unchanged."""
    if isinstance(fit, NotIdentified):
        return fit
    boot = attempt(resample or laws.bootstrap, fit, **how) if how["replicates"] else None
    if isinstance(boot, NotIdentified):
        return Approach(number, fit, None, flops_range, str(boot))
    return Approach(number, fit, boot, flops_range)


def random_rows(n: int, most: int, seed: int) -> np.ndarray:
    """The indices of `most` of n rows, ascending; all of them if there are no more."""
    return np.sort(np.random.default_rng(seed).choice(n, min(most, n), replace=False))


def sample_runs(analysis: Analysis, most: int, replicates: int) -> Analysis:
    """The analysis, or that of `most` random runs if it has more, with intervals of Approach 3 and the law only, by at
    most `replicates` replicates."""
    if (n := len(analysis.N)) <= most:
        return analysis
    index = random_rows(n, most, analysis.settings.seed)
    rows = analysis.rows.keep(np.isin(np.arange(n), index), "not checked")
    some = analyse(rows, settings=replace(analysis.settings, bootstrap=0), choice=analysis.choice)
    some = replace(some, settings=analysis.settings, whole=analysis, index=index)
    third, law = some.results[3], some.law
    if isinstance(third, Approach):
        third = approach(3, third.fit, third.flops_range, verify=0, **some.resampling(replicates))
    if isinstance(law, Approach):
        again = approach(3, law.fit, law.flops_range, verify=0, **some.resampling(replicates))
        law = with_form(again, law.form, law.law.form_error)
    return replace(some, results=some.results | {3: third}, law=law)


def params_of(rows: RunTable, convention: str) -> np.ndarray:
    return column_of(rows, params_column(convention), f"`params` {convention}")


def flops_of(rows: RunTable, convention: str | None) -> tuple[np.ndarray, str, str]:
    """(C, its convention, its name): the given convention, else the column flops, else 6ND. In tables from elsewhere
    that column may have any convention; plans take it as physical."""
    six = 6 * rows["params"] * rows["tokens"]  # 6ND counts all parameters, however the law counts N
    if convention == "6nd" or (convention is None and "flops" not in rows.numbers):
        return six, "6nd", "6ND"
    C = column_of(rows, flops_column(convention or "physical"), f"`flops` {convention or 'physical'}")
    if convention:
        return C, convention, convention
    if np.allclose(C, six, rtol=1e-3):
        return C, "6nd", "6ND"
    ours = any(name.startswith("flops_") for name in rows.numbers)
    return C, "physical", "physical" if ours else "as in the column flops"


def column_of(rows: RunTable, name: str, option: str) -> np.ndarray:
    if (column := rows.complete(name)) is None:
        where = f"is blank at {rows.blanks[name]}" if name in rows.blanks else "is missing"
        raise UserError(f"{option}: {rows.source}: column {name} {where}")
    return column


def resampled_unit(rows: RunTable, cluster: str) -> np.ndarray | None:
    """(n,) resampling unit of each row: cooldowns of one trunk, else rows of one run; None: each row is one."""
    if cluster == "row" or (cluster == "auto" and "run" not in rows.labels):
        return None
    if "run" not in rows.labels:
        raise UserError(f"`cluster` run: {rows.source} has no column run")
    run, trunk = rows.labels["run"], rows.labels.get("trunk")
    # A row without a name is a run of its own; a name in a file cannot start with a newline.
    names = np.array([(trunk and trunk[i]) or run[i] or f"\n{i}" for i in range(len(rows))])
    return np.unique(names, return_inverse=True)[1]
