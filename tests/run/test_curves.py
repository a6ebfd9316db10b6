"""curves.csv.gz: what comes back from it, and that it tells Approach 1 what the logs of the runs told."""

import gzip
import json
import math
import random
import struct

import numpy as np
import pytest
from conftest import ROOT
from made_up_sweep import sweep, write_sweep

from nanochin.base.cli import UserError
from nanochin.report.curves import curves_of_runs
from nanochin.report.table import read_rows
from nanochin.run.curves import COLUMNS, CURVES, is_csv_gz, log_points, read_csv_gz, to_csv_gz
from nanochin.runrow import read_csv

KEPT = sorted(ROOT.glob(f"results/*/{CURVES}"))
SOME = {
    "a": [{"step": 1, "tokens": 64, "flops": 0.1, "loss": 4.5, "lr": 0.01}, {"step": 1, "val_loss": 4.25}],
    "trunk, with a comma": [{"step": 2, "loss": 3.0}],
}


def test_round_trip(tmp_path):
    """Every double comes back to the bit, every count as a count, an absent value as absent; runs and points keep their
    order."""
    draw = random.Random(0)
    values = [struct.unpack("d", draw.randbytes(8))[0] for _ in range(3000)]
    values = [abs(value) for value in values if math.isfinite(value)] + [5e-324, 1e22, 0.1, 1e16, 2.0**53, math.inf]
    runs = {"b": [{"step": i, "tokens": 2**40 + i, "loss": value} for i, value in enumerate(values)]} | SOME
    path = tmp_path / CURVES
    path.write_bytes(to_csv_gz(runs))
    found = read_csv_gz(path)
    assert found == runs and list(found) == list(runs)
    assert all(
        type(point[name]) is type(was[name])
        for run in runs
        for point, was in zip(found[run], runs[run], strict=True)
        for name in was
    )
    assert [struct.pack("d", point["loss"]) for point in found["b"]] == [struct.pack("d", value) for value in values]


def test_bytes(tmp_path):
    """The same curves are the same bytes whenever and wherever they are written: gzip's header has no time (bytes 4 to
    8) and no name (its flag). The text is a plain table, which is read as it is too."""
    packed = to_csv_gz(SOME)
    assert packed == to_csv_gz(SOME) and packed[4:8] == bytes(4) and packed[3] == 0
    lines = gzip.decompress(packed).decode().splitlines()
    assert lines == [",".join(COLUMNS), "a,1,64,0.1,4.5,0.01,", "a,1,,,,,4.25", '"trunk, with a comma",2,,,3.0,,']
    path = tmp_path / "curves.csv"
    path.write_bytes(gzip.decompress(packed))
    assert read_csv_gz(path) == SOME and is_csv_gz(path)


def test_points_of_a_log(tmp_path):
    """A line counts if it has a loss; other columns and a line that a kill cut off are left out."""
    lines = [
        {"step": 1, "tokens": 64, "loss": 4.5, "grad_norm": 1.0},
        {"step": 2, "mfu": 0.5},
        {"step": 2, "val_loss": 4.0, "val_bpb": 5.0},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    assert log_points(tmp_path) == [{"step": 1, "tokens": 64, "loss": 4.5}, {"step": 2, "val_loss": 4.0}]


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:-20],
        lambda packed: packed[:40] + b"\0\1\2\3" + packed[44:],
        lambda packed: packed[:5],
        lambda packed: packed[:-8] + bytes(4) + packed[-4:],
        lambda packed: gzip.compress(b"run,loss\na,1\n"),
        lambda packed: gzip.compress(gzip.decompress(packed) + b"a,1,2\n"),
        lambda packed: b"",
        lambda packed: gzip.compress(gzip.decompress(packed) + b"a,1,2,3,x,5,6\n"),
        lambda packed: gzip.compress(b"\xff"),
    ],
    ids=[
        "cut",
        "bytes changed",
        "head only",
        "checksum",
        "other columns",
        "cells too few",
        "empty",
        "no number",
        "no text",
    ],
)
def test_damaged(tmp_path, damage):
    """One line that names the file."""
    path = tmp_path / CURVES
    path.write_bytes(damage(to_csv_gz(SOME)))
    with pytest.raises(UserError, match="cannot be read as training curves") as error:
        read_csv_gz(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_same_as_the_logs(tmp_path):
    """Columns from curves.csv.gz are those from the logs to the bit, with N and the FLOPs of a token of the runs; a run
    without a row, as a trunk is, counts for nothing, and a folder prefers the file."""
    folder = write_sweep(tmp_path / "sweep", sweep(physical=0.5))
    rows = read_rows(folder)
    logs = curves_of_runs(folder, rows)
    points = {log.parent.name: log_points(log.parent) for log in folder.glob("runs/*/log.jsonl")}
    (tmp_path / "c.csv.gz").write_bytes(to_csv_gz({"trunk": [{"step": 1, "tokens": 9, "loss": 9.0}]} | points))
    file = curves_of_runs(tmp_path / "c.csv.gz", rows)
    assert logs.numbers.keys() == file.numbers.keys() >= {"params", "params_non_embedding", "tokens", "loss", "flops"}
    for name in logs.numbers:
        np.testing.assert_array_equal(logs[name], file[name])
    np.testing.assert_array_equal(logs.labels["run"].codes, file.labels["run"].codes)
    assert logs.labels["run"].values == file.labels["run"].values and logs.sha256 != file.sha256
    (tmp_path / "c.csv.gz").rename(folder / CURVES)
    assert curves_of_runs(folder, rows).source == str(folder / CURVES)
    assert curves_of_runs(tmp_path, rows) is None


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.parent.name)
def test_kept_curves(path):
    """The kept sweeps: the runs of runs.csv in its order, then their trunks, steps in order, each run to its last
    token and to the loss of its row; written again they are the same text."""
    found, rows = read_csv_gz(path), read_csv(path.parent / "runs.csv")
    trunks = dict.fromkeys(row.trunk for row in rows.values() if row.trunk)
    assert list(found) == [*rows, *trunks]
    for run, points in found.items():
        steps = [point["step"] for point in points]
        assert steps == sorted(steps)
        if run in rows:
            assert points[-1]["val_loss"] == rows[run].loss and points[-2]["tokens"] == rows[run].tokens
    assert gzip.decompress(to_csv_gz(found)) == gzip.decompress(path.read_bytes())
