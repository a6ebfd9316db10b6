"""The record of a run: old records are read, and written again in the same bytes."""

import json
from dataclasses import asdict, replace

import pytest
from conftest import ROOT

from nanochin.base.cli import UserError
from nanochin.config import FLOP_CONVENTIONS, PARAM_CONVENTIONS
from nanochin.runrow import TYPES, RunRow, columns_of, flops_column, params_column, read_csv, read_summary, to_csv

TABLES = sorted(ROOT.glob("results/*/runs.csv"))
ROW = RunRow("a", params=10, tokens=100, loss=2.5, flops=6e3, budget=1e4)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.parent.name)
def test_kept_tables_round_trip(path):
    """Every kept runs.csv, to the byte."""
    rows = read_csv(path)
    assert to_csv(rows.values()) == path.read_bytes()
    assert all(isinstance(row.loss, float) and isinstance(row.tokens, int) for row in rows.values())


def test_summaries_round_trip():
    """summary.json of a run of version 0.1."""
    record = json.loads((ROOT / "results/books-3e13/summary.json").read_text())
    assert RunRow.of(record).summary() == record


def test_records_of_other_versions():
    """A missing column has its default, an unknown one is ignored."""
    record = {"run": "a", "params": "10", "tokens": 100, "loss": "2.5", "flops": "6e3", "budget": 1e4, "mood": 1}
    row = RunRow.of(record)
    assert row == ROW and row.status == "finished" and row.threads is None
    assert read_csv(ROOT / "nowhere.csv") == {}


def test_reason_is_a_column_only_if_a_run_failed(tmp_path):
    failed = replace(ROW, run="b", status="failed", loss=None, reason='no room, as "they" say\nit')
    assert to_csv([ROW]).decode().splitlines()[0].endswith(",flops_spent,cell")
    path = tmp_path / "runs.csv"
    path.write_bytes(to_csv([ROW, failed]))
    assert read_csv(path) == {"a": ROW, "b": failed}


@pytest.mark.parametrize(
    "content, words",
    [(b"run,loss\na,1.2.3\n", "loss is '1.2.3'"), (b"name,loss\na,1\n", "no column run"), (b"\xff", "utf-8")],
)
def test_invalid_tables(tmp_path, content, words):
    """The error names the file, the column and the value."""
    path = tmp_path / "runs.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read_csv(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", '{"run": "a"}', '{"params": "many"}', '{"params": []}'])
def test_invalid_summaries(tmp_path, text):
    """An empty file, no object, no loss, no number: one line that names the file."""
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_summary(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_conventions_have_columns():
    """Every count of parameters and FLOPs has a column of numbers that fit.py reads."""
    wanted = {*map(params_column, PARAM_CONVENTIONS), *map(flops_column, FLOP_CONVENTIONS), "tokens", "loss"}
    assert wanted <= set(columns_of("number")) and not set(columns_of("number")) & set(columns_of("label"))
    assert set(asdict(ROW)) == set(TYPES) and set(TYPES.values()) == {int, float, str}
