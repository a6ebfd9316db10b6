"""Sweep files of any keys and values: a plan in which all names differ, or one line that names the file."""

import json
import math
import re
import typing
from dataclasses import fields

from conftest import call
from hypothesis import strategies as st
from sweep_files import LONG, PLAIN

import sweep
from nanochin.base.cli import value_type
from nanochin.config import Config
from nanochin.sweep.cells import plan_cells
from nanochin.sweep.spec import Spec, read_sweep

VALID = (
    PLAIN,
    PLAIN | {"kind": "horizons"},
    PLAIN | LONG | {"kind": "trunk"},
    PLAIN | {"kind": "grid", "budgets": [1e10], "models": ["16x1", "24x1"]},
)
# Not the options that would read or download something.
OPTIONS = {
    f.name: f for cls in (Config, Spec) for f in fields(cls) if f.name not in ("tokenizer", "device", "data", "val")
}
HINTS = typing.get_type_hints(Config) | typing.get_type_hints(Spec)
NUMBERS = st.one_of(
    st.integers(-2, 300),
    st.floats(),
    st.sampled_from([1e308, -1e308, 1e-320, 10**12, 2**63, 10**400, 1e6, 1e3, 0.5]),
)
WORDS = st.one_of(st.text(max_size=8), st.sampled_from(["16x1", "0x0", "-1x2", "99999999x1", "bytes", "--lr=5", "-1"]))
JUNK = st.one_of(NUMBERS, WORDS, st.booleans(), st.lists(st.one_of(NUMBERS, WORDS, st.lists(NUMBERS)), max_size=3))
PIECES = (
    "seed = 0x" + "f" * 5000,
    "seeds = " + "9" * 5000,
    "a = " + "[" * 3000,
    "lr = 1979-05-27",
    "[lr]\nx = 1",
    "[[budgets]]",
    "lr = [{x = 1}]",
    "kind = 'grid'",
    "lr-times = 1",
    "help = 1",
    "x",
    "\0",
    "\ufeff",
)


def literal(value) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)


def value_of(name: str):
    """A strategy for values of a key: often of its type, within its choices and bounds."""
    meta, kind = OPTIONS[name].metadata, value_type(HINTS[name])
    many = typing.get_origin(kind) is tuple
    kind = typing.get_args(kind)[0] if many else kind
    low, high = meta["low"] or 0, meta["high"] or 1e12
    if meta["choices"]:
        one = st.sampled_from(meta["choices"])
    else:
        whole = st.integers(math.ceil(low), math.floor(min(high, 1e12)))
        of = {int: whole, float: st.floats(low, high), bool: st.booleans()}
        one = of.get(kind, WORDS)
    return st.one_of(one, st.lists(one, min_size=1, max_size=3), JUNK)


CHANGES = st.sampled_from(sorted(OPTIONS)).flatmap(lambda name: st.tuples(st.just(name), value_of(name)))


def test_any_sweep_file(tmp_path, for_all):
    path = tmp_path / "x.toml"

    def check(table: dict, changes: list, removed: str, piece: str) -> str:
        table = {key: value for key, value in (table | dict(changes)).items() if key != removed}
        text = "".join(f"{key} = {literal(value)}\n" for key, value in ({"corpus_tokens": 1e9} | table).items())
        path.write_text(text + piece, errors="replace")
        code, out, err = call(sweep.main, path, "--dry-run")
        if code:
            line = err.replace(r"\n", " ")
            assert code in (1, 2) and line.count("\n") == 1 and str(path) in line, err
            return "refused"
        names = [cell.name for cell in plan_cells(read_sweep(path), 256)]
        assert not err and len(set(names)) == len(names) == int(re.search(r"x: (\d+) runs", out)[1]) + sum(
            name.startswith("trunk") for name in names
        )
        return "a plan"

    for_all(
        check,
        table=st.sampled_from(VALID),
        changes=st.lists(CHANGES, max_size=3),
        removed=st.sampled_from([*[""] * 20, *PLAIN]),
        piece=st.sampled_from([*[""] * 60, *PIECES]),
    )
