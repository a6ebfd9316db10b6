"""Training curves of many runs in one file, curves.csv.gz: a row for each row of their logs that has a loss.

    run,step,tokens,flops,loss,lr,val_loss          blank where the log has none
    read_csv_gz(path)["1e11-12x1-s0"]               [{"step": 16, "tokens": 10240, "loss": 4.25, ...}, ...]

Numbers are read back bit-identical, and the same curves give the same bytes.
"""

import csv
import gzip
import io
import zlib
from pathlib import Path

from nanochin.base.cli import UserError
from nanochin.run.folder import read_log

CURVES = "curves.csv.gz"  # in the folder of a sweep, next to runs.csv
COLUMNS = ("run", "step", "tokens", "flops", "loss", "lr", "val_loss")
MAGIC = b"\x1f\x8b"  # the first bytes of a gzip file

Curves = dict[str, list[dict]]  # by run; a point has the COLUMNS that its row of the log has


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
    """The curves in a curves.csv.gz, also if it is unpacked. Raises UserError for a damaged file or another format."""
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if content.startswith(MAGIC) else content).decode()
        table, curves = csv.reader(io.StringIO(text), strict=True), {}
        if tuple(next(table, ())) != COLUMNS:
            raise ValueError(f"its columns are not {','.join(COLUMNS)}")
        for run, *cells in table:
            named = zip(COLUMNS[1:], cells, strict=True)
            point = {name: _number(cell) for name, cell in named if cell}
            curves.setdefault(run, []).append(point)
    except (OSError, EOFError, zlib.error, csv.Error, ValueError) as error:  # ValueError: also not UTF-8
        raise UserError(f"{path}: cannot be read as training curves ({error}); restore it or delete it") from None
    return curves


def _number(cell: str) -> int | float:
    return int(cell) if cell.isdecimal() and len(cell) < 19 else float(cell)


def is_csv_gz(path: Path) -> bool:
    """Whether a file is gzip, or a table with exactly our columns: `read_csv_gz` reads it, or says why it cannot."""
    try:
        with open(path, "rb") as file:
            first = file.readline(1000)
    except OSError:
        return False
    return first.startswith(MAGIC) or first.strip() == ",".join(COLUMNS).encode()


def log_points(folder: Path) -> list[dict]:
    """The curve of one run, from its log.jsonl; notes and errors as in read_log."""
    rows = (row for row in read_log(folder) if "loss" in row or "val_loss" in row)
    return [{name: row[name] for name in COLUMNS if name in row} for row in rows]
