"""Which form of the parametric law is used: the one that predicts larger budgets best.

    L(N, D) = E + (A / N^alpha + B / D^beta)^gamma     with gamma = 1, gamma free, or gamma free and E = 0

Rolling hold-out over budgets: each form is fitted to all smaller budgets and predicts the next one. Free gamma, which
contains the other two, is used unless one of them has a clearly lower error. The largest budget takes no part in the
choice: its error tests the chosen form.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np

from nanochin.laws.cost import Cost
from nanochin.laws.isoflop import compute_groups
from nanochin.laws.law import FormError, NotIdentified
from nanochin.laws.parametric import ParametricFit, fit_parametric

FORMS = {"free gamma": {"gamma": None}, "gamma = 1": {"gamma": 1.0}, "E = 0": {"gamma": None, "E": 0.0}}
SCORED = 3  # the budgets before the largest whose errors choose the form
MARGIN = 1.5  # an error lower by this factor is clearly lower: two or three budgets tell no finer (docs/fitting.md)
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
    apart: tuple[float, ...]  # median |log| ratio of the losses there by gamma = 1 and by free gamma
    scores: dict[str, float] = field(default_factory=dict)  # root mean square of a form's errors before the largest
    chosen: Form | None = None  # None: no form can be fitted
    why: str = "no form can be fitted to these runs"

    def error(self, form: Form, last: bool = True) -> FormError | None:
        """What the form may get wrong beyond the runs, by the budgets that it predicted, with or without the largest.
        If there is none before the largest, what gamma = 1 and free gamma differ by there. None: unknown."""
        errors, steps = np.array([form.errors, self.steps])
        if not last:
            errors[-1:] = np.nan if np.isfinite(errors[:-1]).any() else self.apart[-1:]
        known = np.isfinite(errors) & (steps > 1)
        if not known.any():
            return None
        tested = float(np.exp(np.log(steps[known]).mean()))
        return FormError(_rms(errors[known]), tested, self.flops[-1] / (1 if last else self.steps[-1]))

    def to_json(self) -> dict:
        """`forms` of laws.json."""
        rows = []
        for form in self.forms:
            errors = {"errors": list(form.errors), "rolling": self.scores.get(form.name)}
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

    def predicted(fit: ParametricFit | NotIdentified, rows) -> np.ndarray:
        return np.full(rows.sum(), np.nan) if isinstance(fit, NotIdentified) else fit.law.loss(N[rows], D[rows])

    def off(one, other) -> float:
        return float(np.median(np.abs(np.log(one / other))))

    forms, held_out = [], [group == k for k in held]
    losses = {name: [] for name in FORMS if E is None or "E" not in FORMS[name]}
    for name, found in losses.items():
        found += [predicted(fitted(name, rows), at) for rows, at in zip(below, held_out, strict=True)]
        errors = (off(one, loss[at]) for one, at in zip(found, held_out, strict=True))
        forms.append(Form(name, fitted(name, slice(None)), tuple(errors)))
    apart = tuple(map(off, losses["gamma = 1"], losses["free gamma"]))
    return _choose(Choice(tuple(forms), flops, steps, apart))


def fit_form(name: str, N, D, loss, *, E: float | None = None, **options) -> ParametricFit:
    """fit_parametric with one of FORMS and `options`. In each of them E = 0 is an answer."""
    return fit_parametric(N, D, loss, allow_bound=("E",), **options | {"E": E} | FORMS[name])


def _choose(choice: Choice) -> Choice:
    """With scores, the chosen form and the reason."""
    known = {form.name: form for form in choice.forms if isinstance(form.fit, ParametricFit)}
    if not known:
        return choice
    errors = np.array([form.errors[:-1] for form in known.values()])
    errors = errors[:, np.isfinite(errors).all(0)]
    first = next(iter(known.values()))
    if not errors.size:
        return replace(choice, chosen=first, why="there are too few budgets to choose a form")
    scores = dict(zip(known, map(_rms, errors), strict=True))
    name = min(scores, key=scores.get)
    many = f"{errors.shape[1]} budget{'s' * (errors.shape[1] > 1)}, each predicted from the smaller ones"
    why = f"its error is {scores[name]:.2%} on {many}"
    if scores[first.name] < MARGIN * scores[name]:
        why = f"no other form's error is lower by a factor of {MARGIN:g} (lowest: {name}, {scores[name]:.2%})"
        name = first.name
        why = f"its error is {scores[name]:.2%} on {many}; {why}"
    choice = replace(choice, scores=scores, chosen=known[name], why=why)
    if name == "E = 0" and not _agree(choice, first):
        why = f"E = 0 has a lower error on {many}, but {first.name} disagrees with it at {FAR:g} times the largest C"
        return replace(choice, chosen=first, why=why)
    return choice


def _agree(choice: Choice, other: Form) -> bool:
    """Whether the two forms' losses of the optimum at FAR times the largest C differ by less than what the chosen form
    may get wrong there, at 95%."""
    law, error, C = choice.chosen.fit.law, choice.error(choice.chosen), FAR * choice.flops[-1]
    at = law.optimal(C)
    return error is not None and abs(math.log(other.fit.law.loss(*at) / law.loss(*at))) < 1.96 * error.at(C)


def _rms(errors) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))
