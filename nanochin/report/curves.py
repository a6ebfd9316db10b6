"""Training curves of the runs in a table, as columns for Approach 1."""

import hashlib
from pathlib import Path

import numpy as np

from nanochin.base.cli import UserError
from nanochin.base.files import sha256_of
from nanochin.report.cells import in_range
from nanochin.report.table import Labels, RunTable, by_run
from nanochin.run.curves import CURVES, log_points, read_csv_gz


def curves_of_runs(path: str | Path, rows: RunTable) -> RunTable | None:
    """Training curves of the runs in `rows`, None if there are none: from a curves.csv.gz, the one in a folder, or the
    logs of the runs in that folder or its runs/. N and FLOPs per token are those of `rows`; the hash is that of the
    file, or of all logs concatenated in the order of `rows`. Raises UserError for a damaged file."""
    path, first = Path(path), {}
    if "run" in rows.labels:
        for i in range(len(rows)):  # several rows of one run have one curve
            first.setdefault(rows.labels["run"][i], i)
    if (path / CURVES).exists():
        path /= CURVES
    if path.is_dir():
        logs = {log.parent.name: log for run in ("*", "runs/*") for log in sorted(path.glob(f"{run}/log.jsonl"))}
        logs = {name: logs[name] for name in first if name in logs}
        try:
            found = {name: log_points(log.parent) for name, log in logs.items()}
            sha256 = hashlib.sha256(b"".join(log.read_bytes() for log in logs.values())).hexdigest()
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}") from None
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
    return by_run(RunTable(str(path), sha256, numbers, {"run": Labels(codes, tuple(names))}))


def _counts(point: dict) -> bool:
    """Whether it is a point of a training curve: it has tokens and a loss."""
    values = {name: point.get(name) for name in ("tokens", "loss")}
    return all(isinstance(value, int | float) and in_range(name, value) for name, value in values.items())
