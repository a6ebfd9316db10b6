"""Training curves of many runs in one file, curves.csv.gz: a row for each line of their logs that has a loss.

    run,step,tokens,flops,loss,lr,val_loss          blank where a line has none
    read_csv_gz(path)["1e11-12x1-s0"]               [{"step": 16, "tokens": 10240, "loss": 4.25, ...}, ...]
    curves_of_runs(folder, rows)                    as plain columns for Approach 1, with the N of each run

Numbers come back to the bit, and the same curves are the same bytes.
"""

import csv
import gzip
import hashlib
import io
import math
import zlib
from pathlib import Path

import numpy as np

from nanochin.base.files import sha256_of
from nanochin.config import UserError
from nanochin.report.table import Labels, Rows, by_run
from nanochin.run.folder import read_log

CURVES = "curves.csv.gz"  # in the folder of a sweep, beside runs.csv
COLUMNS = ("run", "step", "tokens", "flops", "loss", "lr", "val_loss")
MAGIC = b"\x1f\x8b"  # with which gzip begins

Curves = dict[str, list[dict]]  # by run; a point has those of COLUMNS that its line of the log has


# ---------------------------------------------------------------------------------------------------------------------
# The file


def to_csv_gz(curves: Curves) -> bytes:
    """curves.csv.gz."""
    text, packed = io.StringIO(), io.BytesIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows({"run": run} | point for run, points in curves.items() for point in points)
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as file:  # no name and no time in the bytes
        file.write(text.getvalue().encode())
    return packed.getvalue()


def read_csv_gz(path: Path) -> Curves:
    """The curves in a curves.csv.gz, also unpacked. Raises UserError for a file that is damaged or something else."""
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if content.startswith(MAGIC) else content).decode()
        table, curves = csv.reader(io.StringIO(text), strict=True), {}
        if tuple(next(table, ())) != COLUMNS:
            raise ValueError(f"its columns are not {','.join(COLUMNS)}")
        for run, *cells in table:
            named = zip(COLUMNS[1:], cells, strict=True)
            curves.setdefault(run, []).append({name: _number(cell) for name, cell in named if cell})
    except (OSError, EOFError, zlib.error, csv.Error, ValueError) as error:  # ValueError: also what is not UTF-8
        raise UserError(f"{path}: cannot be read as training curves ({error}); restore it or delete it") from None
    return curves


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def is_csv_gz(path: Path) -> bool:
    """Whether `read_csv_gz` should read a file, or say why it cannot: gzip, or a table of just our columns."""
    try:
        with open(path, "rb") as file:
            first = file.readline(1000)
    except OSError:
        return False
    return first.startswith(MAGIC) or first.strip() == ",".join(COLUMNS).encode()


# ---------------------------------------------------------------------------------------------------------------------
# Curves of runs


def log_points(folder: Path) -> list[dict]:
    """The curve of one run, from its log.jsonl."""
    lines = (row for row in read_log(folder) if "loss" in row or "val_loss" in row)
    return [{name: row[name] for name in COLUMNS if name in row} for row in lines]


def curves_of_runs(path: str | Path, rows: Rows) -> Rows | None:
    """Training curves of the runs in `rows`, None if there are none, from a curves.csv.gz, from the one in a folder, or
    from the logs of the runs in that folder or in its runs/. N and the FLOPs of a token are those of `rows`; the hash
    is that of the file, or of all logs, one after the other in the order of `rows`."""
    path, first = Path(path), {}
    if "run" in rows.labels:
        for i in range(len(rows)):  # several rows may be of one run, which has one curve
            first.setdefault(rows.labels["run"][i], i)
    if (path / CURVES).exists():
        path /= CURVES
    if path.is_dir():
        logs = {log.parent.name: log for run in ("*", "runs/*") for log in sorted(path.glob(f"{run}/log.jsonl"))}
        logs = {name: logs[name] for name in first if name in logs}
        found = {name: log_points(log.parent) for name, log in logs.items()}
        sha256 = hashlib.sha256(b"".join(log.read_bytes() for log in logs.values())).hexdigest()
    else:
        found, sha256 = read_csv_gz(path), sha256_of(path)

    names = [name for name in first if name in found]
    points = [(code, first[name], point) for code, name in enumerate(names) for point in found[name] if _counts(point)]
    if not points:
        return None
    codes, row = np.array([(code, i) for code, i, _ in points]).T
    numbers = {name: np.array([point[name] for *_, point in points], float) for name in ("tokens", "loss")}
    for name in rows.numbers:
        if name.startswith("params"):  # N, however it is counted
            numbers[name] = rows[name][row]
        elif name.startswith("flops"):
            numbers[name] = (rows[name] / rows["tokens"])[row] * numbers["tokens"]
    return by_run(Rows(str(path), sha256, numbers, {"run": Labels(codes, tuple(names))}))


def _counts(point: dict) -> bool:
    """Whether it is one of a training curve: tokens and loss, both finite and above 0."""
    values = [point.get("tokens"), point.get("loss")]
    return all(isinstance(value, int | float) and 0 < value < math.inf for value in values)
