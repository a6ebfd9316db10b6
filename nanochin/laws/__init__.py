"""Scaling laws: from runs (N, D, loss) to the compute-optimal model for a budget C. Functions take plain arrays.

    N parameters, D training tokens, C training FLOPs, L validation loss in nats per token; each a float array (n,)

    law.py         Law, PowerLaw, laws.json           result of a fit, input of a planner
    cost.py        Cost                               FLOPs per token, if not 6 N
    published.py   HOFFMANN, BESIROGLU, KAPLAN ...    published laws, for comparison
    envelope.py    fit_envelope(run, N, D, loss)      Approach 1: lower envelope of the training curves
    isoflop.py     fit_isoflop(N, D, loss)            Approach 2: the minimum of each budget's curve
    parametric.py  fit_parametric(N, D, loss)         Approach 3: L = E + A / N^alpha + B / D^beta
    gamma.py       GammaSurface                       its objective with (A / N^alpha + B / D^beta)^gamma
    forms.py       choose_form(N, D, loss, C)         the form that predicts larger budgets best
    single.py      fit_single(x, loss)                L = E + K x^-c, for runs that identify no law of N and D
    solver.py      Surface, minimise                  its objective and Newton's method, thousands of problems at once
    bootstrap.py   bootstrap(fit, runs=...)           intervals for all three, by resampling runs
    checks.py      hold_out, leave_out_highest ...    what changes the answer, and how well it extrapolates
    allocation.py  target loss, inference, few data   optima beyond Eq. 4

If the data cannot identify a parameter, a fit raises NotIdentified, which says why in one line. docs/fitting.md has an
example.
"""

# ruff: noqa: F401

from nanochin.laws.allocation import DataConstrained, compute_for_loss, inference_optimal, loss_of_compute, off_optimum
from nanochin.laws.bootstrap import LEVELS, Bootstrap, bootstrap, bootstrap_seed_noise
from nanochin.laws.checks import (
    HoldOut,
    KaplanProcedure,
    Refit,
    delta_sensitivity,
    frontier_curvature,
    hold_out,
    kaplan_procedure,
    leave_out_highest,
    near_minimum,
    profile_e,
    refit,
    residuals_by_compute,
)
from nanochin.laws.cost import Cost, ratios
from nanochin.laws.envelope import EnvelopeFit, fit_envelope
from nanochin.laws.forms import FORMS, Choice, Form, choose_form, fit_form
from nanochin.laws.isoflop import IsoflopFit, compute_groups, fit_isoflop, group_budgets
from nanochin.laws.law import (
    FormError,
    Law,
    NotIdentified,
    PowerLaw,
    exponents,
    laws_json,
    laws_text,
    load_law,
    normal_quantiles,
)
from nanochin.laws.parametric import ParametricFit, fit_kaplan_form, fit_parametric
from nanochin.laws.published import BESIROGLU, HOFFMANN, HOFFMANN_1, HOFFMANN_2, KAPLAN, PUBLISHED, TABLE_3, advice
