"""Training curves of many runs in one file, curves.csv.gz: a row for each line of their logs that has a loss.

    run,step,tokens,flops,loss,lr,val_loss          blank where a line has none
    read_csv_gz(path)["1e11-12x1-s0"]               [{"step": 16, "tokens": 10240, "loss": 4.25, ...}, ...]

Numbers come back to the bit, and the same curves are the same bytes.
"""

import csv
import gzip
import io
import zlib
from pathlib import Path

from nanochin.base.cli import UserError
from nanochin.run.folder import read_log

CURVES = "curves.csv.gz"  # in the folder of a sweep, beside runs.csv
COLUMNS = ("run", "step", "tokens", "flops", "loss", "lr", "val_loss")
MAGIC = b"\x1f\x8b"  # with which gzip begins

Curves = dict[str, list[dict]]  # by run; a point has those of COLUMNS that its line of the log has


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


def log_points(folder: Path) -> list[dict]:
    """The curve of one run, from its log.jsonl."""
    lines = (row for row in read_log(folder) if "loss" in row or "val_loss" in row)
    return [{name: row[name] for name in COLUMNS if name in row} for row in lines]
