"""Pre-registered predictions: the law's forecast from before training against the loss."""

import json
from pathlib import Path

import pytest

from nanochin.base.cli import UserError
from nanochin.report.allocate import Prediction

INTERVAL = {"predicted_loss": 2.0, "predicted_low": 1.9, "predicted_high": 2.1}


def write(folder: Path, loss: float, predicted: dict) -> Path:
    """The folder of a finished run."""
    row = {"name": "big", "params": 1000, "tokens": 20_000, "flops": 1.5e8, "loss": loss, "predicted_loss": 9.0}
    (folder / "summary.json").write_text(json.dumps(row))
    (folder / "config.json").write_text(json.dumps({"predicted": predicted}))
    return folder


@pytest.mark.parametrize(
    "loss, off, inside", [(2.02, 0.01, True), (1.9, -0.05, True), (1.8, -0.1, False), (2.2, 0.1, False)]
)
def test_prediction_is_the_one_before_training(tmp_path, loss, off, inside):
    """It comes from config.json, written before the first step, not from the summary."""
    found = Prediction.read(write(tmp_path, loss, INTERVAL))
    assert found.off == pytest.approx(off) and found.inside is inside
    assert f"predicted 2.0000 (95%: 1.9000 to 2.1000), actual {loss:.4f}, {100 * off:+.2f}%" in str(found)
    assert str(found).endswith("inside" if inside else "OUTSIDE")
    assert json.loads(json.dumps(found.to_json()))["inside"] is inside


def test_runs_without_a_prediction(tmp_path):
    """No finished run, no prediction, or one without an interval (laws without a bootstrap)."""
    with pytest.raises(UserError, match=f"{tmp_path}: no finished run"):
        Prediction.read(tmp_path)
    for predicted in ({}, dict.fromkeys(INTERVAL) | {"predicted_loss": 2.0}):
        with pytest.raises(UserError, match="no law predicted its loss with an interval"):
            Prediction.read(write(tmp_path, 2.0, predicted))
