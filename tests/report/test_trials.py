import json

import pytest

from nanochin.base.cli import UserError
from nanochin.report.allocate import read_trial


@pytest.fixture
def write(tmp_path):
    """`write(loss, predicted)`: the folder of a finished run."""

    def make(loss: float, predicted: dict | None):
        row = {"name": "big", "params": 1000, "tokens": 20_000, "flops": 1.5e8, "loss": loss, "predicted_loss": 9.0}
        (tmp_path / "summary.json").write_text(json.dumps(row))
        (tmp_path / "config.json").write_text(
            json.dumps({"options": {}} | ({"predicted": predicted} if predicted else {}))
        )
        return tmp_path

    return make


@pytest.mark.parametrize("loss, off, inside", [(2.02, 0.01, True), (1.9, -0.05, True), (1.8, -0.1, False),
                                               (2.2, 0.1, False)])  # fmt: skip
def test_prediction_is_the_one_before_training(write, loss, off, inside):
    """It is that of config.json, written before the first step, not that of the summary."""
    trial = read_trial(write(loss, {"predicted_loss": 2.0, "predicted_low": 1.9, "predicted_high": 2.1}))
    assert trial.off == pytest.approx(off) and trial.inside is inside
    assert f"predicted 2.0000 (95%: 1.9000 to 2.1000), actual {loss:.4f}, {100 * off:+.2f}%" in str(trial)
    assert str(trial).endswith("inside" if inside else "OUTSIDE")
    assert json.loads(json.dumps(trial.to_json()))["inside"] is inside


NOTHING = dict.fromkeys(("predicted_loss", "predicted_low", "predicted_high"))


@pytest.mark.parametrize("predicted", [None, NOTHING, NOTHING | {"predicted_loss": 2.0}])
def test_a_run_without_a_prediction_is_refused(write, predicted):
    """No law, a law for another text, or a law without intervals."""
    with pytest.raises(UserError, match="no law predicted its loss with an interval"):
        read_trial(write(2.0, predicted))


def test_unfinished(tmp_path):
    """A folder without a summary is refused by name."""
    with pytest.raises(UserError, match=f"`trials` {tmp_path}: no finished run"):
        read_trial(tmp_path)
