"""One run as a record: summary.json in its folder, and a row of a sweep's runs.csv."""

import csv
import io
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from nanochin.base.cli import UserError, value_type
from nanochin.base.files import NUMBER, read_json


def number(default=None):
    """A column that fit.py reads as a number above 0."""
    return field(default=default, metadata={"read": "number"})


def label(default=None):
    """A column that fit.py reads as a word."""
    return field(default=default, metadata={"read": "label"})


@dataclass(frozen=True)
class RunRow:
    """The columns of runs.csv, in order. A column missing from an old record has its default."""

    run: str = label()
    name: str | None = None  # the same as run
    status: str = label("finished")  # or failed, with a reason
    params: int | None = number()  # N: total, a tied matrix once
    params_non_embedding: int | None = number()
    params_with_head: int | None = number()
    tokens: int | None = number()  # D, seen in training
    loss: float | None = number()  # nats per token on the validation text after the last step
    val_bpb: float | None = None  # the same in bits per byte; None: bytes unknown
    flops: float | None = number()  # of training: physical, then the other conventions (nanochin/plan/flops.py)
    flops_causal: float | None = number()
    flops_appendix_f: float | None = number()
    flops_table_a4: float | None = number()
    flops_6nd: float | None = number()
    flops_kaplan: float | None = number()
    budget: float | None = number()  # requested FLOPs
    kind: str | None = label()  # of the sweep: isoflop, horizons, trunk, grid; single: none
    trunk: str | None = label()  # the run that a cooldown branched from
    width: int | None = number()
    layers: int | None = number()
    vocab_size: int | None = label()
    seq_len: int | None = label()  # tokens
    tokenizer: str | None = label()
    data_sha: str | None = label()
    val_sha: str | None = label()
    unique_tokens: int | None = number()  # distinct ones among `tokens`
    epochs: float | None = None
    seed: int | None = label()
    schedule: str | None = label()
    horizon: float | None = number()  # tokens at which a cosine would end
    lr: float | None = label()  # peak
    batch_tokens: int | None = label()  # tokens a step
    beta2: float | None = label()
    warmup_tokens: int | None = None
    predicted_loss: float | None = None  # by the law, before training
    predicted_low: float | None = None
    predicted_high: float | None = None  # of a 95% interval for a single run
    seconds: float | None = None  # of training, without evaluations and checkpoints
    device: str | None = None
    threads: int | None = None
    # What only a sweep knows.
    flops_spent: float | None = None  # physical; without the part that a cooldown shares with its trunk
    cell: str | None = None  # hash of what the sweep file decides about the run
    reason: str | None = None  # why it failed

    @classmethod
    def of(cls, record: dict) -> "RunRow":
        """From summary.json, or from a row of runs.csv as text. Raises ValueError for a cell that is not a number."""
        values = {}
        for f in fields(cls):
            value, kind = record.get(f.name), TYPES[f.name]
            if value in (None, ""):
                continue
            try:
                values[f.name] = int(float(value)) if kind is int else kind(value)
            except (ValueError, OverflowError):
                raise ValueError(f"{f.name} is {value!r}, not a number") from None
        return cls(**values)

    def summary(self) -> dict:
        """The contents of summary.json."""
        return {key: value for key, value in asdict(self).items() if key not in ("flops_spent", "cell", "reason")}


TYPES = {name: value_type(hint) for name, hint in typing.get_type_hints(RunRow).items()}
FORM = {name: (str if kind is str else NUMBER) | None for name, kind in TYPES.items()} | {"loss": NUMBER}


def columns_of(read: str) -> tuple[str, ...]:
    """The columns that fit.py reads as "number" or "label"."""
    return tuple(f.name for f in fields(RunRow) if f.metadata.get("read") == read)


def params_column(convention: str) -> str:
    """The column of a parameter convention."""
    return "params" if convention == "total" else f"params_{convention}"


def flops_column(convention: str) -> str:
    """The column of a FLOP convention."""
    return "flops" if convention == "physical" else f"flops_{convention}"


def to_csv(rows: Iterable[RunRow]) -> bytes:
    """runs.csv. It has a column `reason` only if a run failed."""
    rows = [asdict(row) for row in rows]
    if not any(row["reason"] for row in rows):
        for row in rows:
            del row["reason"]
    return csv_of(rows)


def csv_of(rows: list[dict]) -> bytes:
    """Rows with the same keys as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0] if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def read_summary(path: Path) -> RunRow:
    """The summary.json of a finished run. Raises UserError for anything else."""
    return RunRow.of(read_json(path, FORM, "delete that folder to train the run again"))


def read_csv(path: Path) -> dict[str, RunRow]:
    """The rows of a runs.csv by run; empty if there is no such file. Raises UserError for an invalid table."""
    if not path.exists():
        return {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        return {row["run"]: RunRow.of(row) for row in table}
    except KeyError:
        raise UserError(f"{path}: no column run; is it the table of a sweep?") from None
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a table of runs: {error}") from None
