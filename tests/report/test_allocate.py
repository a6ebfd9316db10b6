"""Pre-registered predictions: the law's forecast from before training against the loss."""

import json

import pytest

from nanochin.base.cli import UserError
from nanochin.report.allocate import Prediction

INTERVAL = {"predicted_loss": 2.0, "predicted_low": 1.9, "predicted_high": 2.1}


@pytest.fixture
def write(tmp_path):
    """`write(loss, predicted)`: the folder of a finished run."""

    def make(loss: float, predicted: dict | None):
        row = {"name": "big", "params": 1000, "tokens": 20_000, "flops": 1.5e8, "loss": loss, "predicted_loss": 9.0}
        (tmp_path / "summary.json").write_text(json.dumps(row))
        (tmp_path / "config.json").write_text(json.dumps({"predicted": predicted} if predicted else {}))
        return tmp_path

    return make


@pytest.mark.parametrize(
    "loss, off, inside", [(2.02, 0.01, True), (1.9, -0.05, True), (1.8, -0.1, False), (2.2, 0.1, False)]
)
def test_prediction_is_the_one_before_training(write, loss, off, inside):
    """It comes from config.json, written before the first step, not from the summary."""
    found = Prediction.read(write(loss, INTERVAL))
    assert found.off == pytest.approx(off) and found.inside is inside
    assert f"predicted 2.0000 (95%: 1.9000 to 2.1000), actual {loss:.4f}, {100 * off:+.2f}%" in str(found)
    assert str(found).endswith("inside" if inside else "OUTSIDE")
    assert json.loads(json.dumps(found.to_json()))["inside"] is inside


@pytest.mark.parametrize(
    "predicted", [None, dict.fromkeys(INTERVAL), dict.fromkeys(INTERVAL) | {"predicted_loss": 2.0}]
)
def test_run_without_a_prediction(write, predicted):
    """No law, a law for another text, or a law without intervals."""
    with pytest.raises(UserError, match="no law predicted its loss with an interval"):
        Prediction.read(write(2.0, predicted))


def test_unfinished_run(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no finished run"):
        Prediction.read(tmp_path)
