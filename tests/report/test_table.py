"""Reading tables of runs: accepted formats, and one line that names what is wrong with the others."""

import csv
import hashlib
import json
import random

import numpy as np
import pytest

from nanochin.base.cli import UserError
from nanochin.report.curves import curves_of_runs
from nanochin.report.table import (
    all_or_no_flops,
    best_tuning,
    by_chance,
    read_curves,
    read_rows,
    require_usable,
    without_highest,
)

HEADER = ["params", "tokens", "loss"]
ROWS = [[10_000 * (i + 1), 10**6 * (7 * i % 10 + 1), 4 - 0.1 * i] for i in range(8)]


def write(path, rows=ROWS, header=HEADER, delimiter=",", before="", end="\n", quote=csv.QUOTE_MINIMAL):
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(before)
        writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quote)
        writer.writerows([header, *rows])
    return path


def write_objects(path, rows, as_list):
    path.write_text(json.dumps(rows, indent=1) if as_list else "\n\n".join(map(json.dumps, rows)))
    return path


def refused(path, **options) -> str:
    with pytest.raises(UserError) as error:
        require_usable(read_rows(path, **options))
    text = str(error.value)
    assert "\n" not in text and len(text) < 300
    return text


@pytest.mark.parametrize(
    "form",
    [
        {"delimiter": "\t"},
        {"delimiter": "|", "end": "\r\n"},
        {"before": "\n\n"},
        {"before": "\ufeff", "delimiter": ";", "quote": csv.QUOTE_ALL},
    ],
    ids=["tabs", "bars and CRLF", "blank lines", "Excel"],
)
def test_csv_dialects(tmp_path, form):
    """Every dialect gives the same float64 columns."""
    rows = read_rows(write(tmp_path / "runs.csv", **form))
    for i, name in enumerate(HEADER):
        assert rows[name].dtype == np.float64
        assert rows[name].tolist() == [float(row[i]) for row in ROWS]


@pytest.mark.parametrize("as_list", [True, False], ids=["list", "lines"])
def test_json(tmp_path, as_list):
    """Failed runs without a loss may come first; a finished run needs one. An optional key may be null, or missing from
    all runs but the last of many. Errors name only keys of the file."""
    objects = [{"run": f"r{i}", "params": 5, "tokens": 5, "status": "failed"} for i in range(1500)]
    objects += [{"run": "x", "status": "finished", **dict(zip(HEADER, row, strict=True))} for row in ROWS]
    objects[-2]["flops"], objects[-1]["flops"], objects[-3]["note"] = None, 5e15, {"any": ["thing"]}
    rows = read_rows(write_objects(tmp_path / "runs.json", objects, as_list))
    assert rows["loss"].tolist() == [row[2] for row in ROWS] and rows.dropped == {"failed": 1500}
    assert np.isnan(rows["flops"]).tolist() == [True] * 7 + [False] and rows["flops"][7] == 5e15
    assert rows.complete("flops") is None
    del objects[1505]["loss"]
    assert f"{'item 1506' if as_list else 'line 3011'}: loss is blank" in refused(
        write_objects(tmp_path / "blank.json", objects, as_list)
    )
    unnamed = [{"params": 1, "tokens": 2, "mean": 3}] * 8
    assert "no column loss among params, tokens, mean;" in refused(
        write_objects(tmp_path / "unnamed.json", unnamed, as_list)
    )


def test_c_is_6nd(tmp_path):
    """Missing tokens, or missing params, are C / 6N or C / 6D, with C from `flops`, else from `budget`; a note names
    the file's column. The FLOPs of the rows are then 6ND."""
    C = [6.0 * N * D for N, D, _ in ROWS]
    for given in (0, 1):
        rows = [[row[given], c, row[2]] for row, c in zip(ROWS, C, strict=True)]
        for name, columns in (("flops", {}), ("budget", {}), ("FLOPs", {"flops": "FLOPs"}), ("C", {"budget": "C"})):
            table = read_rows(write(tmp_path / "a.csv", rows, [HEADER[given], name, "loss"]), columns)
            np.testing.assert_allclose(table[HEADER[1 - given]], [row[1 - given] for row in ROWS], rtol=1e-15)
            np.testing.assert_allclose(6 * table["params"] * table["tokens"], C, rtol=1e-15)
            assert table["flops"].tolist() == C
            (note,) = table.take(np.arange(3)).notes
            assert f"No column {HEADER[1 - given]}:" in note and name in note
    assert not read_rows(write(tmp_path / "b.csv")).notes
    rows[3][1] = 1e-4
    text = refused(write(tmp_path / "d.csv", rows, ["tokens", "flops", "loss"]))
    assert "line 5: params = flops / (6 tokens)" in text and "unit" in text


def test_the_highest_losses_are_left_out(tmp_path):
    """Of equal losses, the same ones in any order of the file; of all rows, none is left."""
    header, rows = [*HEADER, "run"], [[*row[:2], 4 - i // 3, f"r{i}"] for i, row in enumerate(ROWS)]
    rows += [[*row[:3], row[3] + "again"] for row in rows[:2]]  # differs only in its name
    kept = []
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        table = without_highest(read_rows(write(tmp_path / "a.csv", rows, header)).in_order(), 4)
        assert table.dropped == {"of highest loss": 4} and table["loss"].max() == 4
        kept.append([table.labels["run"][i] for i in range(len(table))])
    assert len(kept[0]) == 6 and all(names == kept[0] for names in kept)
    assert without_highest(table, 0) is table


def test_flops_of_some_rows_only(tmp_path):
    """A blank among FLOPs is an error with its line, or the row is left out and counted; a blank column is ignored."""
    rows = [[*row, 7e9 * i + 1e9] for i, row in enumerate(ROWS)]
    rows[5][3] = ""
    table = read_rows(write(tmp_path / "a.csv", rows, [*HEADER, "flops"]))
    with pytest.raises(UserError, match="a.csv: line 7: flops is blank"):
        all_or_no_flops(table)
    some = all_or_no_flops(table, skip_bad=True)
    assert some["flops"].tolist() == [7e9 * i + 1e9 for i in (0, 1, 2, 3, 4, 6, 7)]
    assert some.dropped == {"without flops": 1}
    none = read_rows(write(tmp_path / "b.csv", [[*row, ""] for row in ROWS], [*HEADER, "flops"]))
    assert all_or_no_flops(none) is none and none.get("flops") is None


@pytest.mark.parametrize("value", ["abc", "", "nan", "0", "-3", "3e293", "\uff11\uff12"])
@pytest.mark.parametrize("column", ["params", "loss"])
def test_a_bad_value_is_named_by_line_and_column(tmp_path, value, column):
    """The error names line, column and value; with `skip_bad` the line is counted instead."""
    rows = [list(row) for row in ROWS]
    rows[4][HEADER.index(column)] = value
    path = write(tmp_path / "runs.csv", rows)
    text = refused(path)
    assert "line 6" in text and column in text and (value or "blank") in text
    left = read_rows(path, skip_bad=True)
    assert len(left) == 7 and left.dropped == {"not usable": 1}
    assert left["loss"].tolist() == [row[2] for i, row in enumerate(ROWS) if i != 4]


@pytest.mark.parametrize(
    "content, says",
    [
        (b"\xef\xbb\xbf\n \n", "empty"),
        ("params,tokens,loss\n1,2,3\n".encode("utf-16"), "not text"),
        (b"params,tokens,loss,note\n1,2,3,caf\xe9\n", "UTF-8"),
        (b"params,tokens,loss\n", "0 usable"),
        (b"1e6,2e7,3.5\n2e6,2e7,3.4\n", "header"),
        (b"params,tokens,loss\n1,2,3,4\n", "line 2: 4 cells"),
        (b'params,tokens,loss\n1,2,"3\n4,5,6\n', "not CSV"),
        (b'{"params": 1, "tokens": 2, "loss": 3}\n{oops\n', "line 2"),
        (b' [\n {"params": 1, "tokens": 2, "loss": 3}, 5]', "item 2"),
        (b"[[1, 2, 3]]", "item 1"),
        (b"[]", "no columns"),
        (b'{\n "params": 1,\n', "line 1: not JSON"),
        (b'{"params": ' + b"[" * 100_000, "not JSON"),
        (b'{"params": 1, "tokens": 2, "loss": [3]}\n', "line 1"),
    ],
    ids=[
        "blank",
        "UTF-16",
        "Latin-1",
        "no rows",
        "no header",
        "4 cells",
        "quote",
        "broken JSON",
        "JSON list with a number",
        "JSON list of lists",
        "empty JSON list",
        "JSON over lines",
        "deep",
        "list",
    ],
)
def test_files_that_are_no_table(tmp_path, content, says):
    """One line that names the file and the reason."""
    path = tmp_path / "runs.csv"
    path.write_bytes(content)
    text = refused(path)
    assert says in text and str(path) in text


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda rows: rows[:5], "5 usable runs"),
        (lambda rows: [[1e6 * (1 + i % 2), *r[1:]] for i, r in enumerate(rows)], "of params, not 2"),
        (lambda rows: [[r[0], 1e14 / r[0], r[2]] for r in rows], "one budget"),
    ],
    ids=["few", "two sizes", "one budget"],
)
def test_runs_that_identify_no_law(tmp_path, change, says):
    """Too few runs, sizes or token counts, or a single budget."""
    assert says in refused(write(tmp_path / "runs.csv", change(ROWS)))


def test_losses_that_cannot_be_compared(tmp_path):
    """Losses of two tokenizers or validation sets are refused; a blank does not count as a second one."""
    rows = [[*row, "bytes" if i else "", "gpt2" if i == 3 else "bytes"] for i, row in enumerate(ROWS)]
    require_usable(read_rows(write(tmp_path / "a.csv", [row[:4] for row in rows], [*HEADER, "tokenizer"])))
    text = refused(write(tmp_path / "b.csv", rows, [*HEADER, "val_sha", "tokenizer"]))
    assert "2 different tokenizer (bytes, gpt2" in text


def test_only_finished_runs_are_fitted(tmp_path):
    """Rows whose status is neither finished nor blank are left out and counted."""
    status = ["finished", "", " Finished ", "running", "crashed", "failed", "finished", ""]
    rows = [[*row, word] for row, word in zip(ROWS, status, strict=True)] + [[5, 5, "", "failed"]]
    path = write(tmp_path / "a.csv", rows, [*HEADER, "status"])
    found = read_rows(path)
    assert found["loss"].tolist() == [ROWS[i][2] for i in (0, 1, 2, 6, 7)]
    assert found.dropped == {"failed": 2, "whose status is not finished": 2}


def test_losses_that_are_chance_alone(tmp_path):
    """F-test at 5% on 400 grids of N and D: of pure noise 0.95^2 are refused, of a law with noise of a tenth of its
    terms none; if the loss depends on N only, D is significant in 5%."""
    rng, sizes, tokens = np.random.default_rng(0), 10.0 ** np.arange(6, 9), 10.0 ** np.arange(9, 13)
    N, D = (grid.ravel() for grid in np.meshgrid(sizes, tokens))
    of_size, of_data = 0.2 * (N / 1e6) ** -0.3, 0.2 * (D / 1e9) ** -0.3
    found = []
    for _ in range(400):
        noise = 0.01 * rng.standard_normal(len(N))
        size_only = by_chance(N, D, np.exp(of_size + noise))
        assert max(by_chance(N, D, np.exp(of_size + of_data + noise))) < 0.05 and size_only[0] < 1e-4
        found.append((min(by_chance(N, D, np.exp(noise))) > 0.05, size_only[1] < 0.05))
    refused_noise, found_data = np.mean(found, axis=0)
    assert refused_noise == pytest.approx(0.95**2, abs=0.04) and found_data == pytest.approx(0.05, abs=0.03)
    for wrong in (1e-3, 0.2, 10.8):  # one misprint does not hide the law
        one = np.where(np.arange(len(N)) == 5, wrong, np.exp(of_size + of_data + noise))
        assert max(by_chance(N, D, one)) < 0.05, wrong
    assert by_chance(N, N * 20, np.exp(of_size)) == (0.0, 0.0)  # D/N is constant: cannot be separated
    write(tmp_path / "a.csv", list(zip(N, D, 3 * np.exp(noise), strict=True)))
    assert "does not depend significantly" in refused(tmp_path / "a.csv")


def test_best_of_several_tunings(tmp_path):
    """Rows that differ only in learning rate or batch (hence in tokens by a step) count once, at the lowest loss;
    another seed, or the same tuning again, is a separate run."""
    header = [*HEADER, "lr", "batch_tokens", "seed"]
    rows = [
        [1000, 50_000, 3.0, 0.01, 500, 0],
        [1000, 50_000, 2.9, 0.02, 500, 0],
        [1000, 50_250, 2.8, 0.02, 750, 0],
        [1000, 50_000, 3.1, 0.01, 500, 1],
        [1000, 99_000, 2.7, 0.01, 500, 0],
        [2000, 50_000, 2.6, 0.01, 500, 0],
        [2000, 50_000, 2.5, 0.01, 500, 0],
    ]
    random.Random(0).shuffle(rows)
    found = best_tuning(read_rows(write(tmp_path / "runs.csv", rows, header)))
    assert sorted(found["loss"], reverse=True) == [3.1, 2.8, 2.7, 2.6, 2.5]
    assert found.dropped == {"worse tunings of a run": 2}


def test_tunings_do_not_chain(tmp_path):
    """1000, 1009 and 1018 tokens: the last is 1.8% longer than the first, hence a separate run, in any order. So are
    cosines of different length over the same tokens."""
    header = [*HEADER, "lr"]
    rows = [[10, 1000, 3.0, 0.01], [10, 1009, 2.9, 0.02], [10, 1018, 2.8, 0.03], [20, 1018, 2.7, 0.01]]
    for order in ((0, 1, 2, 3), (2, 3, 0, 1)):
        found = best_tuning(read_rows(write(tmp_path / "runs.csv", [rows[i] for i in order], header)))
        assert sorted(found["loss"]) == [2.7, 2.8, 2.9]
    rows = [[1000, 50_000, 3.0, 0.01, 50_000], [1000, 50_000, 2.9, 0.02, 100_000]]
    assert len(best_tuning(read_rows(write(tmp_path / "a.csv", rows, [*HEADER, "lr", "horizon"])))) == 2


def test_a_folder_of_runs(tmp_path):
    """Without runs.csv the rows are the summaries of the runs; curves come from their logs, with FLOPs per token of the
    rows and the SHA-256 of all logs. Damaged lines are left out."""
    for i, (N, D, loss) in enumerate(ROWS):
        folder = tmp_path / "runs" / f"run{i}"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(
            json.dumps({"run": f"run{i}", "params": N, "tokens": D, "loss": loss, "flops": 7.0 * N * D, "trunk": None})
        )
        log = [{"step": k, "tokens": D * k / 4, "loss": loss + 1 / k, "flops": 1} for k in (2, 1, 3, 4)]
        log.append({"step": 4, "val_loss": loss})
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log) + '{"step": 5, "tok')
    rows = read_rows(tmp_path)
    assert rows["params"].tolist() == [row[0] for row in ROWS] and "trunk" not in rows.labels
    curves = curves_of_runs(tmp_path, rows)
    assert len(curves) == 32 and len(curves.labels["run"].values) == 8
    np.testing.assert_allclose(curves["flops"], 7.0 * curves["params"] * curves["tokens"])
    logs = b"".join((tmp_path / "runs" / f"run{i}" / "log.jsonl").read_bytes() for i in range(8))
    assert curves.sha256 == hashlib.sha256(logs).hexdigest()
    assert curves["tokens"][:4].tolist() == [ROWS[0][1] * k / 4 for k in (1, 2, 3, 4)]
    log = tmp_path / "runs" / "run3" / "log.jsonl"
    for damage in (b"5\n", b"\xff\n"):
        log.write_bytes(b'{"step": 1, "tokens": 100, "loss": 3.0}\n' + damage)
        assert len(curves_of_runs(tmp_path, rows)) == 29  # of that run the line before it is left
    assert (tmp_path / "runs.csv").write_text("params,tokens,loss\n5,5,5\n") and len(read_rows(tmp_path)) == 1


def test_a_file_of_curves(tmp_path):
    """Rows come back ordered by run and tokens. `columns` are those of the runs: here they may be missing. A column run
    is needed."""
    rows = [[f"r{i % 3}", 100 * (i % 3 + 1), 1000 * (30 - i), 3 + i / 9] for i in range(30)]
    columns = {"params": "N", "tokens": "D", "loss": "val"}
    curves = read_curves(write(tmp_path / "a.csv", rows, ["run", *HEADER], ";"), columns)
    run = curves.labels["run"]
    assert (np.diff(run.codes) >= 0).all()
    assert all((np.diff(curves["tokens"][run.codes == code]) > 0).all() for code in range(3))
    for i, header in enumerate((["run", "N", "D", "val"], ["run", "N", "tokens", "loss"])):
        other = read_curves(write(tmp_path / f"{i}.csv", rows, header), columns)
        assert all(other[name].tolist() == curves[name].tolist() for name in HEADER)
    with pytest.raises(UserError, match="no column run"):
        read_curves(write(tmp_path / "b.csv"))


def test_a_large_file_streams(tmp_path):
    """10,000 rows take under 40 bytes per row and column: arrays, not Python objects."""
    import tracemalloc

    path = tmp_path / "runs.csv"
    with open(path, "w") as file:
        file.write("params,tokens,loss,flops,unknown\n")
        file.writelines(f"{i + 1},{i + 2},{3 + i % 7},{i + 9},{'x' * 50}\n" for i in range(10_000))
    tracemalloc.start()
    rows = read_rows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 10_000 and peak < 40 * 4 * 10_000
