"""Intervals that include what the form may get wrong; pre-registered predictions against the loss."""

import json
import math
from pathlib import Path

import pytest
from chinchilla import noisy_grid

from nanochin.base.cli import UserError
from nanochin.laws import bootstrap, compute_for_loss, fit_parametric
from nanochin.laws.law import FormError
from nanochin.report.allocate import Prediction, optimum, to_reach
from nanochin.report.analysis import approach, with_form

INTERVAL = {"predicted_loss": 2.0, "predicted_low": 1.9, "predicted_high": 2.1}


def write(folder: Path, loss: float, predicted: dict) -> Path:
    """The folder of a finished run."""
    row = {"name": "big", "params": 1000, "tokens": 20_000, "flops": 1.5e8, "loss": loss, "predicted_loss": 9.0}
    (folder / "summary.json").write_text(json.dumps(row))
    (folder / "config.json").write_text(json.dumps({"identity": {}, "predicted": predicted}))
    return folder


@pytest.mark.parametrize(
    "loss, says, inside",
    [
        (2.05, "2.44% below", True),
        (1.9, "5.26% above", True),
        (1.8, "11.11% above", False),
        (2.2, "9.09% below", False),
    ],
)
def test_prediction_is_the_one_before_training(tmp_path, loss, says, inside):
    """It comes from config.json, written before the first step, not from the summary."""
    found = Prediction.read(write(tmp_path, loss, INTERVAL))
    assert found.error == pytest.approx(2 / loss - 1) and found.inside is inside
    assert f"predicted 2.0000 (95%: 1.9000 to 2.1000), {says} the actual {loss:.4f}" in str(found)
    assert str(found).endswith("inside" if inside else "OUTSIDE")
    assert json.loads(json.dumps(found.to_json()))["inside"] is inside


def test_runs_without_a_prediction(tmp_path):
    """No finished run, no prediction, or one without an interval (laws without a bootstrap)."""
    with pytest.raises(UserError, match=f"{tmp_path}: no finished run"):
        Prediction.read(tmp_path)
    for predicted in ({}, dict.fromkeys(INTERVAL) | {"predicted_loss": 2.0}):
        with pytest.raises(UserError, match="no law predicted its loss with an interval"):
            Prediction.read(write(tmp_path, 2.0, predicted))


@pytest.mark.parametrize("key", ["name", "params", "tokens", "flops", "loss"])
@pytest.mark.parametrize("value", [None, [1], 10**400, True])
def test_damaged_results(tmp_path, key, value):
    """A field of summary.json or config.json that is lost or of another type: one line with the file and the field."""
    path = write(tmp_path, 2.0, INTERVAL) / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"^{path}: cannot be read \\({key} is .*$"):
        Prediction.read(tmp_path)
    write(tmp_path, 2.0, INTERVAL | {"predicted_low": value or "x"})
    with pytest.raises(UserError, match=f"^{tmp_path}/config.json: cannot be read \\(predicted.predicted_low is .*$"):
        Prediction.read(tmp_path)


def test_intervals_include_what_the_form_may_get_wrong():
    """Of noise-free runs all replicates are equal: within the runs there is no interval, ten times beyond the loss is
    known to 1.96 times 2%, and the compute for a loss to that of the losses so much higher and lower."""
    N, D, loss = noisy_grid(0.0)
    C = float((6 * N * D).max())
    law = with_form(
        approach(3, fit_parametric(N, D, loss), (C / 1e4, C), bootstrap, replicates=400), "free gamma", None
    )
    assert law.form == "free gamma" and law.name.endswith("free gamma")
    law = with_form(law, "gamma = 1", FormError(0.02, 10.0, C))
    assert law.name == "Approach 3"
    within, beyond = (optimum(law, at).found["loss"] for at in (C, 10 * C))
    assert within.ends == pytest.approx((within.value, within.value), rel=1e-6)
    factor = math.exp(1.96 * 0.02)
    assert beyond.ends == pytest.approx((beyond.value / factor, beyond.value * factor), rel=1e-3)
    needed = to_reach(law, beyond.value).found["least_flops"]
    assert needed.value == pytest.approx(10 * C, rel=1e-6)
    ends = [compute_for_loss(law.law, beyond.value * by) for by in (factor, 1 / factor)]
    assert needed.ends == pytest.approx(ends, rel=0.05)
