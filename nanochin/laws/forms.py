"""Which form of the parametric law is used: the one that predicts larger budgets best.

    L(N, D) = E + (A / N^alpha + B / D^beta)^gamma     with gamma = 1, gamma free, or gamma free and E = 0

Rolling hold-out over budgets: each form is fitted to all smaller budgets and predicts the next one. The form of lowest
error is used. The largest budget takes no part in the choice: its error tests the chosen form.
"""

import math
from dataclasses import dataclass

import numpy as np

from nanochin.laws.cost import Cost
from nanochin.laws.isoflop import compute_groups
from nanochin.laws.law import FormError, NotIdentified
from nanochin.laws.parametric import ParametricFit, fit_parametric

FORMS = {"free gamma": {"gamma": None}, "gamma = 1": {"gamma": 1.0}, "E = 0": {"gamma": None, "E": 0.0}}
SCORED = 3  # the budgets before the largest whose errors choose the form
TIE = 1.01  # ratio of errors up to which the earlier form in FORMS is used
FAR = 10.0  # times the largest C: there E = 0 must agree with free gamma


@dataclass(frozen=True)
class Form:
    """One form: its fit to all runs, and how well it predicts."""

    name: str
    fit: ParametricFit | NotIdentified
    errors: tuple[float, ...]  # of each held-out budget: median |log predicted - log observed loss|; nan: no fit

    @property
    def last(self) -> float:
        """Error of the largest budget, which takes no part in the choice."""
        return self.errors[-1] if self.errors else math.nan

    @property
    def in_sample(self) -> float:
        return float(np.median(np.abs(self.fit.residuals)))


@dataclass(frozen=True)
class Choice:
    """The forms in the order of FORMS, and the one to use."""

    forms: tuple[Form, ...]
    flops: tuple[float, ...]  # largest C of each held-out budget
    steps: tuple[float, ...]  # the same over the largest C of the runs below it
    scores: dict[str, float]  # by form: root mean square of its errors before the largest budget; {}: none comparable
    chosen: Form | None  # None: no form can be fitted
    why: str

    def error(self, form: Form, last: bool = True) -> FormError | None:
        """What the form may get wrong beyond the runs, by its held-out budgets, with or without the largest; None if it
        predicted none."""
        errors, steps = np.array([form.errors, self.steps])[:, : None if last else -1]
        known = np.isfinite(errors) & (steps > 1)
        if not known.any():
            return None
        tested = float(np.exp(np.log(steps[known]).mean()))
        return FormError(_rms(errors[known]), tested, self.flops[-1] / (1 if last else self.steps[-1]))

    def to_json(self) -> dict:
        """`forms` of laws.json."""
        rows = []
        for form in self.forms:
            errors = {"errors": [e if e == e else None for e in form.errors], "rolling": self.scores.get(form.name)}
            if isinstance(form.fit, NotIdentified):
                rows.append({"form": form.name, "reason": str(form.fit)} | errors)
            else:
                own = {"E": form.fit.law.E, "gamma": form.fit.law.gamma, "in_sample": form.in_sample}
                rows.append({"form": form.name} | own | errors)
        return {"chosen": self.chosen and self.chosen.name, "why": self.why, "flops": list(self.flops), "forms": rows}


def choose_form(N, D, loss, C=None, *, budget=None, E: float | None = None, **options) -> Choice:
    """Fit every form to all runs (n,) and, by rolling hold-out over budgets, to those below each of the SCORED + 1
    largest. `budget` (n,) as in compute_groups. With a fixed `E` there is no form E = 0. `options` go to
    fit_parametric."""
    N, D, loss = (np.asarray(v, np.float64) for v in (N, D, loss))
    C = 6 * N * D if C is None else np.asarray(C, np.float64)
    group = compute_groups(C, budget=budget)
    held = range(max(2, group.max() - SCORED), group.max() + 1)
    below = [group < k for k in held]
    flops = tuple(float(C[group == k].max()) for k in held)
    steps = tuple(last / float(C[rows].max()) for last, rows in zip(flops, below, strict=True))

    def fitted(name: str, rows) -> ParametricFit | NotIdentified:
        try:
            cost = Cost.of(N[rows], D[rows], C[rows])
            return fit_form(name, N[rows], D[rows], loss[rows], E=E, cost=cost, **options)
        except NotIdentified as error:
            return error

    def error(fit: ParametricFit | NotIdentified, rows) -> float:
        if isinstance(fit, NotIdentified):
            return math.nan
        return float(np.median(np.abs(np.log(fit.law.loss(N[rows], D[rows]) / loss[rows]))))

    forms = []
    for name in FORMS if E is None else ("free gamma", "gamma = 1"):
        errors = tuple(error(fitted(name, rows), group == k) for k, rows in zip(held, below, strict=True))
        forms.append(Form(name, fitted(name, slice(None)), errors))
    return _choose(tuple(forms), flops, steps)


def fit_form(name: str, N, D, loss, *, E: float | None = None, **options) -> ParametricFit:
    """fit_parametric with one of FORMS and `options`. In each of them E = 0 is an answer."""
    return fit_parametric(N, D, loss, allow_bound=("E",), **options | {"E": E} | FORMS[name])


def _choose(forms: tuple[Form, ...], flops, steps) -> Choice:
    known = {form.name: form for form in forms if isinstance(form.fit, ParametricFit)}
    if not known:
        return Choice(forms, flops, steps, {}, None, "no form can be fitted to these runs")
    errors = np.array([form.errors[:-1] for form in known.values()])
    errors = errors[:, np.isfinite(errors).all(0)]
    first = next(iter(known.values()))
    if not errors.size:
        few = "there are too few budgets to choose a form"
        return Choice(forms, flops, steps, {}, first, f"{few}: {first.name} is used")
    scores = dict(zip(known, map(_rms, errors), strict=True))
    lowest = min(scores.values())
    name = next(name for name, score in scores.items() if score <= TIE * lowest)
    many = f"{errors.shape[1]} budget{'s' * (errors.shape[1] > 1)}, each predicted from the smaller ones"
    choice = Choice(forms, flops, steps, scores, known[name], f"its error is lowest on {many}: {scores[name]:.2%}")
    if name == "E = 0" and (free := known.get("free gamma")) and not _agree(choice, free):
        why = f"E = 0 has a lower error on {many}, but free gamma disagrees with it at {FAR:g} times the largest C"
        return Choice(forms, flops, steps, scores, free, why)
    return choice


def _agree(choice: Choice, other: Form) -> bool:
    """Whether the two forms' losses of the optimum at FAR times the largest C differ by less than what the chosen form
    may get wrong there, at 95%."""
    law, C = choice.chosen.fit.law, FAR * choice.flops[-1]
    at = law.optimal(C)
    return abs(math.log(other.fit.law.loss(*at) / law.loss(*at))) < 1.96 * choice.error(choice.chosen).at(C)


def _rms(errors) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))
