"""Records damaged at random: the value they had, or one line that names the file; never another exception."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import change
from hypothesis import strategies as st

from nanochin.base.cli import UserError
from nanochin.base.files import SEAL, read_json, to_json, write_json
from nanochin.laws.law import load_law
from nanochin.report.allocate import Prediction
from nanochin.run import checkpoint
from nanochin.run.folder import moved, read_log, read_record
from nanochin.runrow import RunRow, read_csv, read_summary, to_csv

DIGEST = "0" * 64
SUMMARY = RunRow(
    "run", name="run", params=1000, tokens=20_000, loss=2.0, val_bpb=3.0, flops=1.5e8, kind="single", lr=0.01
)
PREDICTED = {"predicted_loss": 2.0, "predicted_low": 1.9, "predicted_high": 2.1}
CONFIG = {"identity": {"lr": 0.1, "model": "16x1"}, "options": {"data": ["a"]}, "device": "cpu", "threads": 1,
          "versions": {"torch": "2.13", "git": None}, "predicted": PREDICTED}  # fmt: skip
LAW = {"E": 1.7, "A": 400.0, "B": 400.0, "alpha": 0.34, "beta": 0.28, "cost": {"c": 6.0, "q": 0.0, "s": 1.0},
       "replicates": {key: [1.0, 2.0] for key in ("E", "A", "B", "alpha", "beta")}, "noise": 0.01}  # fmt: skip
LAWS = {"approach3": LAW, "approach1": {"kN": 0.1, "a": 0.5, "kD": 1.6, "b": 0.5},
        "meta": {"params_convention": "total", "flops_convention": "6nd", "reasons": {"approach2": "no"}}}  # fmt: skip
STATE = {"step": 3, "recent": [[2.0, 0.5]], "micro_batch": 4, "sha256": dict.fromkeys(checkpoint.DIGESTS, DIGEST)}
CLOCK = {"seconds": 1.5, "lap": 1.0}


def prediction(path: Path) -> str:
    return str(Prediction.read(path.parent))


def record(path: Path) -> tuple:
    found = read_record(path.parent)
    return found, moved(found, CONFIG)


RECORDS: dict[str, tuple[dict, Callable[[Path], object]]] = {  # what is in it, and a reader of it
    "summary.json": (SUMMARY.summary(), read_summary),
    "config.json": (CONFIG, record),
    "step-3/state.json": (STATE, lambda path: checkpoint.verify(path.parent)),
    "step-3/clock.json": (CLOCK, lambda path: checkpoint.verify(path.parent)),
    "laws.json": (LAWS, lambda path: load_law(path).optimal(1e12)),
    "laws.json, approach 1": (LAWS, lambda path: load_law(path, 1).optimal(1e12)),
    "laws.json, approach 2": (LAWS, lambda path: load_law(path, 2).optimal(1e12)),
    "summary.json of a trial": (SUMMARY.summary(), prediction),
    "config.json of a trial": (CONFIG, prediction),
}
KINDS = st.sampled_from(["type", "remove", "add"])


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a good copy of each record."""
    monkeypatch.setattr(checkpoint, "sha256_of", lambda _: DIGEST)
    (tmp_path / "step-3").mkdir()
    for name, (value, _) in RECORDS.items():
        write_json(tmp_path / name.partition(",")[0].partition(" ")[0], value)
    return tmp_path


def outcome(read: Callable[[], object], folder: Path):
    """What a reader gives; None if it refuses."""
    try:
        return read()
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error), error
        return None


def test_damaged_records(folder, for_all):
    """With its seal a damaged record is refused; without one, as in older records, it is refused or read."""

    def check(name: str, kinds: list[str], sealed: bool, draw: random.Random) -> str:
        value, read = RECORDS[name]
        path = folder / name.partition(",")[0].partition(" ")[0]
        good = path.read_bytes()
        before, damaged = outcome(lambda: read(path), folder), json.loads(json.dumps(value))
        for kind in kinds:
            damaged = change(damaged, draw, kind) if damaged else damaged
        seal = {SEAL: json.loads(good)[SEAL]} if sealed else {}
        path.write_text(json.dumps(damaged | seal))
        after = outcome(lambda: read(path), folder)
        path.write_bytes(good)
        if after is None:
            return "refused"
        assert not sealed or damaged == value and after == before
        return "same" if after == before else "read as changed"

    kinds, draw = st.lists(KINDS, min_size=1, max_size=3), st.randoms(use_true_random=False)
    for_all(check, name=st.sampled_from(sorted(RECORDS)), kinds=kinds, sealed=st.booleans(), draw=draw)


def test_damaged_bytes(folder, for_all):
    """Bytes replaced, inserted or cut off: refused, or the value that it had."""

    def check(name: str, at: float, cut: int, new: bytes) -> str:
        _, read = RECORDS[name]
        path = folder / name.partition(",")[0].partition(" ")[0]
        good, before = path.read_bytes(), outcome(lambda: read(path), folder)
        place = int(at * len(good))
        path.write_bytes(good[:place] + new + good[place + cut :])
        after = outcome(lambda: read(path), folder)
        if after is not None and after != before:
            assert SEAL.encode() not in path.read_bytes(), path.read_bytes()  # the damage hit the seal's key
        path.write_bytes(good)
        return "refused" if after is None else "same"

    new = st.one_of(
        st.binary(max_size=4), st.sampled_from([b"[" * 5000, b"9" * 5000, b"NaN", b" ", b"\n", b'"', b"e9"])
    )
    cut = st.one_of(st.integers(0, 3), st.just(10**6))
    for_all(check, name=st.sampled_from(sorted(RECORDS)), at=st.floats(0, 1, exclude_max=True), cut=cut, new=new)


ROWS = [{"step": step, "tokens": 9.0 * step, "loss": 2.5, "mfu": None} for step in range(1, 5)]


def test_damaged_logs(tmp_path, for_all):
    """Each line of log.jsonl is a row as it was, a row of finite numbers, or left out and counted."""

    def check(changes: list, ends: int, junk: bytes) -> str:
        lines = [json.dumps(row).encode() for row in ROWS]
        for at, kind, draw in changes:
            lines[at] = json.dumps(change(json.loads(json.dumps(ROWS[at])), draw, kind)).encode()
        content = b"\n".join(lines)
        (tmp_path / "log.jsonl").write_bytes(content[: len(content) - ends] + b"\n" + junk)
        notes = []
        rows = read_log(tmp_path, notes.append)
        assert len(notes) <= 1 and all("\n" not in note for note in notes)
        assert all(row in rows for i, row in enumerate(ROWS[:3]) if i not in {at for at, *_ in changes})
        for row in rows:
            json.loads(json.dumps(row), parse_constant=pytest.fail)
            assert type(row["step"]) is int and all(isinstance(v, int | float | None) for v in row.values())
        return "noted" if notes else "same" if rows == ROWS else "read as changed"

    draw = st.randoms(use_true_random=False)
    changes = st.lists(st.tuples(st.integers(0, 3), KINDS, draw), max_size=2)
    for_all(check, changes=changes, ends=st.integers(0, 30), junk=st.one_of(st.just(b""), st.binary(max_size=20)))


def test_damaged_tables(tmp_path, for_all):
    """A runs.csv is rows of a sweep or one line that names it; without damage, the rows that were written."""
    path, rows = tmp_path / "runs.csv", {"run": SUMMARY}
    good = to_csv(rows.values())

    def check(at: float, cut: int, new: bytes) -> str:
        place = int(at * len(good))
        path.write_bytes(good[:place] + new + good[place + cut :])
        found = outcome(lambda: read_csv(path), tmp_path)
        assert found == rows or cut or new
        return "refused" if found is None else "same" if found == rows else "read as changed"

    new = st.one_of(
        st.just(b""), st.binary(max_size=4), st.sampled_from([b'"', b",", b"\n", b"\r", b"9" * 5000, b"inf,nan"])
    )
    for_all(check, at=st.floats(0, 1, exclude_max=True), cut=st.integers(0, 5), new=new)


def test_any_object(tmp_path, for_all):
    """What `to_json` writes is read back equal."""
    scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
    values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)

    def check(value: dict) -> str:
        (tmp_path / "x.json").write_bytes(to_json(value))
        assert read_json(tmp_path / "x.json") == value
        return "same"

    keys = st.text().filter(lambda key: key != SEAL)
    for_all(check, value=st.dictionaries(keys, values, max_size=4))
