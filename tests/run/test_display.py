"""What a run says before it starts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from nanochin.config import Config
from nanochin.laws import BESIROGLU
from nanochin.laws.law import FormError
from nanochin.run.display import _evaluation_cost, _untested, closing_loss


def test_a_run_farther_than_the_law_was_tested_says_so():
    """By FLOPs as the law's runs count them, else physical: a run at 30 times the largest of the law's, tested at 3.2;
    one at 3 times and other laws say nothing."""
    plan = SimpleNamespace(flops={"physical": 3e16, "causal": 3e15})
    for meta, C in (({"flops_convention": "causal"}, 3e15), ({}, 3e16), ({"flops_convention": []}, 3e16)):
        for times, says in ((30, "; 30 times the compute of the law's largest run, tested at 3.2"), (3, "")):
            law = replace(BESIROGLU, form_error=FormError(0.01, 3.2, C / times), meta=meta)
            assert _untested(SimpleNamespace(law=law, plan=plan)) == says
    assert _untested(SimpleNamespace(law=BESIROGLU, plan=plan)) == ""


def test_cost_of_evaluation():
    """A token held out costs a third of a trained one; evaluations before the last are counted from step 0."""
    setup = SimpleNamespace(
        plan=SimpleNamespace(tokens=10_000, steps=100), corpus=SimpleNamespace(val=range(3000)), config=Config()
    )
    assert _evaluation_cost(setup, 3000) == "10.0% of the training FLOPs, at the end"
    for every, times, share in ((50, 2, "4.0%"), (40, 3, "6.0%"), (100, 1, "2.0%")):
        setup.config = Config(eval_every=every)
        assert _evaluation_cost(setup, 600).endswith(f"; before it {times} times 600: {share}")


@pytest.mark.parametrize("every", [1, 3, 10, 400])
def test_closing_loss(every):
    """The mean over the last 5% of steps, from rows of several steps each, evaluations among them."""
    losses = [1000 - step for step in range(1, 401)]
    rows = [{"step": 390, "val_loss": 7.0}]
    for end in sorted({*range(every, 401, every), 400}):
        start = (end - 1) // every * every
        rows.append({"step": end, "loss": sum(losses[start:end]) / (end - start)})
    expected = sum(losses[380:]) / 20 if every < 20 else sum(losses) / 400
    assert closing_loss(rows, 400) == pytest.approx(expected, abs=every / 20)
