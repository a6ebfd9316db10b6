"""curves.csv.gz: values, bytes, damaged files, and that Approach 1 reads the same from it as from the logs."""

import gzip
import json
import math
import random

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
    """Every float is read back bit-identical, every integer as an integer, an absent value as absent; runs and points
    keep their order."""
    values = np.frombuffer(random.Random(0).randbytes(24_000)).tolist()
    values = [abs(value) for value in values if math.isfinite(value)] + [5e-324, 1e22, 0.1, 1e16, 2.0**53, math.inf]
    runs = {"b": [{"step": i, "tokens": 2**40 + i, "loss": value} for i, value in enumerate(values)]} | SOME
    path = tmp_path / CURVES
    path.write_bytes(to_csv_gz(runs))
    found = read_csv_gz(path)
    assert found == runs and list(found) == list(runs)
    assert all(type(point["tokens"]) is int and type(point["loss"]) is float for point in found["b"])


def test_bytes(tmp_path):
    """The same curves always give the same bytes: gzip's header has no time (bytes 4 to 8) and no name (its flag). The
    text is a plain table, which can be read unpacked."""
    packed = to_csv_gz(SOME)
    assert packed == to_csv_gz(SOME) and packed[4:8] == bytes(4) and packed[3] == 0
    lines = gzip.decompress(packed).decode().splitlines()
    assert lines == [",".join(COLUMNS), "a,1,64,0.1,4.5,0.01,", "a,1,,,,,4.25", '"trunk, with a comma",2,,,3.0,,']
    path = tmp_path / "curves.csv"
    path.write_bytes(gzip.decompress(packed))
    assert read_csv_gz(path) == SOME and is_csv_gz(path)


def test_points_of_a_log(tmp_path):
    """Rows with a loss; other columns and a line truncated by a kill are left out."""
    lines = [
        {"step": 1, "tokens": 64, "loss": 4.5, "grad_norm": 1.0},
        {"step": 2, "mfu": 0.5},
        {"step": 2, "val_loss": 4.0, "val_bpb": 5.0},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    assert log_points(tmp_path) == [{"step": 1, "tokens": 64, "loss": 4.5}, {"step": 2, "val_loss": 4.0}]


DAMAGE = {
    "truncated": lambda packed: packed[:-20],
    "bytes changed": lambda packed: packed[:40] + b"\0\1\2\3" + packed[44:],
    "checksum": lambda packed: packed[:-8] + bytes(4) + packed[-4:],
    "other columns": lambda packed: gzip.compress(b"run,loss\na,1\n"),
    "too few cells": lambda packed: gzip.compress(gzip.decompress(packed) + b"a,1,2\n"),
    "not a number": lambda packed: gzip.compress(gzip.decompress(packed) + b"a,1,2,3,x,5,6\n"),
    "not text": lambda packed: gzip.compress(b"\xff"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged(tmp_path, damage):
    """Raises UserError: one line that names the file."""
    path = tmp_path / CURVES
    path.write_bytes(DAMAGE[damage](to_csv_gz(SOME)))
    with pytest.raises(UserError, match=CURVES) as error:
        read_csv_gz(path)
    assert "\n" not in str(error.value)


def test_the_same_as_the_logs(tmp_path):
    """Columns from curves.csv.gz equal those from the logs to the bit, with N and the FLOPs per token of the runs. A
    run without a row (a trunk) is left out. A folder prefers the file to the logs."""
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
    assert logs.labels["run"].values == file.labels["run"].values
    (tmp_path / "c.csv.gz").rename(folder / CURVES)
    assert curves_of_runs(folder, rows).source == str(folder / CURVES)
    assert curves_of_runs(tmp_path, rows) is None


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.parent.name)
def test_kept_curves(path):
    """The kept sweeps have the runs of runs.csv in its order, then their trunks; steps in order; each run up to its
    last token and the loss of its row. Written again they are the same text."""
    found, rows = read_csv_gz(path), read_csv(path.parent / "runs.csv")
    trunks = dict.fromkeys(row.trunk for row in rows.values() if row.trunk)
    assert list(found) == [*rows, *trunks]
    for run, points in found.items():
        steps = [point["step"] for point in points]
        assert steps == sorted(steps)
        if run in rows:
            assert points[-1]["val_loss"] == rows[run].loss and points[-2]["tokens"] == rows[run].tokens
    assert gzip.decompress(to_csv_gz(found)) == gzip.decompress(path.read_bytes())
