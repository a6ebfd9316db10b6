"""Pre-registered predictions: runs whose loss a law predicted before they were trained."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochin.base.files import read_json
from nanochin.config import UserError


@dataclass(frozen=True)
class Trial:
    """One run of train.py with a law. Losses in nats per token; low and high end the predicted 95% interval."""

    run: str
    params: float
    tokens: float
    flops: float  # physical
    predicted: float
    low: float
    high: float
    loss: float  # actual

    @property
    def off(self) -> float:
        """Actual loss / predicted loss - 1."""
        return self.loss / self.predicted - 1

    @property
    def inside(self) -> bool:
        return self.low <= self.loss <= self.high

    def __str__(self) -> str:
        return (
            f"{self.run}, {self.flops:.3g} FLOPs: predicted {self.predicted:.4f} (95%: {self.low:.4f} to "
            f"{self.high:.4f}), actual {self.loss:.4f}, {100 * self.off:+.2f}%, "
            f"{'inside' if self.inside else 'OUTSIDE'}"
        )

    def to_json(self) -> dict:
        return asdict(self) | {"off": self.off, "inside": self.inside}


def read_trial(folder: str | Path) -> Trial:
    """The trial of a finished run, with the prediction that was written to its config.json before training.

    Raises UserError if there is no finished run in the folder, or no prediction with an interval."""
    folder = Path(folder)
    if not (folder / "summary.json").exists():
        raise UserError(f"`trials` {folder}: no finished run")
    row, before = read_json(folder / "summary.json"), read_json(folder / "config.json").get("predicted") or {}
    found = {key: before.get(f"predicted_{key}") for key in ("loss", "low", "high")}
    if not all(isinstance(value, float) and math.isfinite(value) for value in found.values()):
        raise UserError(
            f"`trials` {folder}: no law predicted its loss with an interval; train it with `law` laws.json "
            "from a fit on the same text"
        )
    return Trial(
        row["name"], row["params"], row["tokens"], row["flops"], found["loss"], found["low"], found["high"], row["loss"]
    )
