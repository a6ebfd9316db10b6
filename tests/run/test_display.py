"""What a run says before it starts."""

from dataclasses import replace
from types import SimpleNamespace

from nanochin.laws import BESIROGLU
from nanochin.laws.law import FormError
from nanochin.run.display import _untested


def test_a_run_farther_than_the_law_was_tested_says_so():
    """A run at 300 times the compute of the law's runs, tested at 3.2; one at 3 times and other laws say nothing."""
    plan = SimpleNamespace(tokens=5e8, params=SimpleNamespace(total=1e7))
    for times, says in ((300, "; 3e+02 times the compute of the law's runs, tested at 3.2"), (3, "")):
        error = FormError(0.01, 3.2, 6 * 1e7 * 5e8 / times)
        assert _untested(SimpleNamespace(law=replace(BESIROGLU, form_error=error), plan=plan)) == says
    assert _untested(SimpleNamespace(law=BESIROGLU, plan=plan)) == ""
