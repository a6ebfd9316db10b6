"""Tables damaged at random: fit.py gives an answer or one line, whatever it reads."""

import csv
import io
import json
import sys
import time
import warnings
from collections import Counter

import numpy as np
import pytest

from nanochin.base.cli import run_command

TABLES, GROUPS = 1000, 20
HEADER = ["params", "tokens", "loss", "flops", "run", "seed", "lr", "tokenizer", "status", "budget", "width"]
JUNK = ["", " ", "nan", "inf", "-1", "0", "1e400", "1e-320", "3,5", "1,000", "22.8M", "12 k", "\u2014", "None", "[1]"]
JUNK += ["'", '"', "\0", "\x1b[31m", "a\nb", "\uff11", "\U0001f600", "True", "1e5", "1e-7", "9" * 400, "x" * 200]
NAMES = ["", "N", "D", "C", "Loss", "val_loss", "num_params", "1e18", "loss", "params", "step_1", "x\ny", "flops_6nd"]
NAMES += ["params_non_embedding", "horizon", "trunk", "val_sha", "unique_tokens"]
OPTIONS = ["--skip-bad", "--skip-bad", "--drop=2", "--flops=6nd", "--fixed-e=1.5", "--target-loss=2", "--cluster=row"]


def sound_table(rng: np.random.Generator) -> list[list]:
    """3 to 6 budgets x 3 to 7 sizes of a law with noise; some columns, in some order."""
    budgets = 10.0 ** (rng.integers(9, 20) + np.arange(rng.integers(3, 7)) * rng.choice([0.5, 1]))
    rows = []
    for C in budgets:
        for ratio in np.geomspace(0.2, 5, rng.integers(3, 8)):
            N = ratio * np.sqrt(C / 120)
            D = C / (6 * N)
            loss = (1.7 + 400 * N**-0.34 + 400 * D**-0.28) * np.exp(rng.choice([0, 0.01]) * rng.standard_normal())
            rows.append([N, D, loss, C, f"r{len(rows)}", 0, 0.01, "bytes", "finished", C, 16])
    kept = [0, 1, 2, *np.flatnonzero(rng.random(len(HEADER)) < 0.3)]
    return [[row[i] for i in dict.fromkeys(kept)] for row in [HEADER, *rows]]


def damage(table: list[list], rng: np.random.Generator) -> list[list]:
    """One thing that people or programs do to a table."""
    row, column = rng.integers(1, max(2, len(table))) % len(table), rng.integers(min(map(len, table)))
    kind = rng.integers(12)
    if kind <= 1:
        table[row][column] = str(rng.choice(JUNK))
    elif kind == 2:  # a column
        for cells in table[1:]:
            cells[column] = str(rng.choice(JUNK)) if rng.random() < 0.5 else cells[column]
    elif kind == 3 and min(map(len, table)) > 1:
        table = [cells[:column] + cells[column + 1 :] for cells in table]
    elif kind == 4:
        table = [[*cells, cells[column]] for cells in table]
    elif kind == 5:
        table[0][column] = str(rng.choice(NAMES))
    elif kind == 6 and len(table) > 1:
        table = table[:1] + [table[i] for i in rng.integers(1, len(table), len(table) - 1)]
    elif kind == 7:
        table = table[: rng.integers(1, len(table) + 1)]
    elif kind in (8, 9):  # another unit, or one row with a slip
        factor = float(rng.choice([1e-300, 1e300, 1e-30, 1e30, 1e-9, 1e-6, 1e6, 1e9, 0.0, -1.0]))
        for cells in table[1:] if kind == 8 else table[row : row + 1]:
            cells[column] = float(cells[column]) * factor if isinstance(cells[column], float) else cells[column]
    elif kind == 10 and len(table) > 1:  # one value throughout, or a column as another
        other = rng.integers(min(map(len, table)))
        for cells in table[1:]:
            cells[column] = table[1][column] if rng.random() < 0.9 else cells[other]
    else:
        table[row] = table[row][: rng.integers(1, len(table[row]) + 1)]
    return [list(cells) for cells in table]


def content(table: list[list], rng: np.random.Generator) -> bytes:
    """The table as a file in some format and encoding."""
    form = rng.integers(8)
    if form < 2:
        objects = [dict(zip(map(str, table[0]), cells, strict=False)) for cells in table[1:]]
        text = json.dumps(objects) if form else "\n".join(map(json.dumps, objects))
    else:
        out = io.StringIO()
        dialect = {"quoting": int(rng.choice([0, 0, 1])), "lineterminator": str(rng.choice(["\n", "\r\n", "\r"]))}
        csv.writer(out, delimiter=str(rng.choice(list(",,,,,;;\t\t|| "))), **dialect).writerows(table)
        text = out.getvalue()
    encoding = str(rng.choice(["utf-8"] * 30 + ["utf-8-sig", "utf-16", "latin-1"]))
    raw = bytearray(text.encode(encoding, errors="replace"))
    if rng.random() < 0.05 and raw:
        raw[rng.integers(len(raw))] = rng.integers(256)
    return bytes(raw)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("group", range(GROUPS))
def test_any_table(tmp_path, monkeypatch, capsys, group):
    """Under random options too: exit code 0 and laws.json without NaN, or 2 and one line; no other exception and no
    warning, under 20 s of CPU."""
    import fit

    outcomes = Counter()
    for i in range(group, TABLES, GROUPS):
        rng = np.random.default_rng(i)
        table = sound_table(rng)
        for _ in range(rng.integers(1, 4)):
            table = damage(table, rng)
        path = tmp_path / f"runs-{i}.csv"
        path.write_bytes(content(table, rng))
        options = [option for option in OPTIONS if rng.random() < 0.2]
        out = ["--bootstrap", "20", "--figures", "none", "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["fit.py", str(path), *options, *out])
        start = time.process_time()
        try:
            with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
                warnings.simplefilter("error")
                run_command(fit.main, "fit.py")
        except BaseException as error:
            raise AssertionError(f"table {i}, {path} {options}: {error!r}") from error
        seconds, (_, err) = time.process_time() - start, capsys.readouterr()
        assert end.value.code == (2 if err else 0) and err.count("\n") == bool(err), f"table {i}, {path}: {err}"
        if not err:
            json.loads((tmp_path / "out/laws.json").read_text(), parse_constant=pytest.fail)  # neither NaN nor Infinity
        assert seconds < 20, f"table {i}, {path}: {seconds:.0f} s"
        outcomes[" ".join(err.partition(f"runs-{i}.csv")[2].split()[:6]) if err else "an answer"] += 1
    print(*(f"{times:4} {what}" for what, times in outcomes.most_common()), sep="\n")
    assert outcomes["an answer"]
