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
    parse_columns,
    read_curves,
    read_rows,
    require_usable,
)

HEADER = ["params", "tokens", "loss"]
ROWS = [[10_000 * (i + 1), 10**6 * (7 * i % 10 + 1), 4 - 0.1 * i] for i in range(8)]


def write(path, rows=ROWS, header=HEADER, delimiter=",", before="", end="\n", quote=csv.QUOTE_MINIMAL):
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(before)
        writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quote)
        writer.writerows([header, *rows])
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


def test_jsonl(tmp_path):
    """Failed runs without a loss may come first; a finished run needs one. An optional column may be null or missing
    from some lines."""
    lines = [{"run": f"r{i}", "params": 5, "tokens": 5, "status": "failed"} for i in range(3)]
    lines += [{"run": "x", "status": "finished", **dict(zip(HEADER, row, strict=True))} for row in ROWS]
    lines[6]["flops"], lines[7]["flops"], lines[8]["note"] = 5e15, None, {"any": ["thing"]}
    path = tmp_path / "runs.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    rows = read_rows(path)
    assert rows["loss"].tolist() == [row[2] for row in ROWS] and rows.dropped == {"failed": 3}
    assert np.isnan(rows["flops"]).tolist() == [i != 3 for i in range(8)] and rows["flops"][3] == 5e15
    assert rows.complete("flops") is None
    del lines[5]["loss"]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert "line 6: loss is blank" in refused(path)


def test_mapped_columns(tmp_path):
    """--columns params=N,tokens=D reads the file's names; one column may serve as N and as another count."""
    path = write(tmp_path / "runs.csv", header=["params_non_embedding", "D", "loss"])
    rows = read_rows(path, parse_columns("params=params_non_embedding, tokens=D"))
    assert rows["params"].tolist() == rows["params_non_embedding"].tolist() == [row[0] for row in ROWS]
    for text in ("params=", "parms=N", "params=N,params=M", "params=N,tokens=N"):
        with pytest.raises(UserError, match="`columns`"):
            parse_columns(text)


@pytest.mark.parametrize(
    "header, columns, says",
    [
        (["params", "Tokens", "loss"], {}, "did you mean `columns` tokens=Tokens"),
        (["params", "tokens", "val_loss"], {}, "did you mean `columns` loss=val_loss"),
        (["params", "tokens", "loss"], {"tokens": "E"}, "'E'"),
        (["params", "tokens", "loss"], {"params": "tokens"}, "params and tokens"),
        (["params", "tokens", "loss", "loss"], {}, "2 times"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path, header, columns, says):
    """A missing column suggests the nearest one of the file. One column is not two of ours, nor twice in a file."""
    path = write(tmp_path / "runs.csv", [[*row, 1.0][: len(header)] for row in ROWS], header)
    assert says in refused(path, columns=columns)


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


@pytest.mark.parametrize("value", ["abc", "", "nan", "inf", "0", "-3", "1,5"])
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
        (b' [\n {"params": 1, "tokens": 2, "loss": 3}]', "JSON list"),
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
        "JSON list",
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
        (lambda rows: [[r[0] * 1e200, r[1] * 1e200, r[2]] for r in rows], "overflows"),
    ],
    ids=["few", "two sizes", "one budget", "overflow"],
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
    rows and the SHA-256 of all logs."""
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
    with pytest.raises(UserError, match="'run'"):
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
