"""Token files of any content: refused in one line, or read as tokens of the vocabulary."""

import itertools
from pathlib import Path

import numpy as np
from conftest import prepare
from hypothesis import strategies as st
from token_writers import WRITERS

from nanochin.base.cli import UserError

# Offsets of fields, and values with a meaning or at a limit.
PLACES = st.one_of(st.integers(0, 40), st.integers(0, 3000))
BYTES = st.one_of(
    st.binary(min_size=1, max_size=9), st.sampled_from([b"\xff" * 8, bytes(8), b"\1", b"PK\3\4", b"MMIDIDX\0\0"])
)


def read(path: Path, V: int, cache: Path) -> np.ndarray | None:
    """All tokens of a file, in order; None if it is refused."""
    try:
        corpus = prepare(path, vocab_size=V, cache=cache)
    except UserError as error:
        assert str(path.parent) in str(error) and "\n" not in str(error), error
        return None
    parts = [*corpus.train.parts, *corpus.val.parts]
    assert all(0 <= part.min() and part.max() < V for part in parts if len(part))
    return np.concatenate(sorted(parts, key=lambda part: part.__array_interface__["data"][0]))


def test_any_content(tmp_path, for_all):
    """Random bytes as a .bin, with or without an .idx."""
    names = itertools.count()

    def check(content: bytes, index: bytes | None, V: int) -> str:
        path = tmp_path / f"{next(names)}" / "x.bin"
        path.parent.mkdir()
        path.write_bytes(content)
        if index is not None:
            path.with_suffix(".idx").write_bytes(index)
        return "tokens" if read(path, V, tmp_path) is not None else "refused"

    sizes = st.sampled_from([257, 1000, 65_536, 100_000])
    content = st.one_of(st.binary(), st.binary(min_size=1024, max_size=1200))
    for_all(check, content=content, index=st.one_of(st.none(), st.none(), st.binary(max_size=80)), V=sizes)


def test_damaged_files(tmp_path, for_all):
    """A file that we write is read back equal; with damaged bytes or another length it is refused or read as tokens."""
    names = itertools.count()

    def check(kind: str, count: int, damage: list, cut: int) -> str:
        path = tmp_path / f"{next(names)}" / "x.bin"
        path.parent.mkdir()
        ids = np.random.default_rng(count).integers(1, 1000, count)
        WRITERS[kind](path, ids)
        for index, at, new in damage:
            victim = path.with_suffix(".idx") if index and kind == "Megatron" else path
            content = victim.read_bytes()
            victim.write_bytes(content[:at] + new + content[at + len(new) :])
        if cut:
            path.write_bytes(path.read_bytes()[:-cut])
        found = read(path, 1000, tmp_path)
        if not damage and not cut:
            assert found.tolist() == ids.tolist() if count >= 40 else found is None
        return "refused" if found is None else "tokens"

    for_all(
        check,
        kind=st.sampled_from(sorted(WRITERS)),
        count=st.integers(1, 2000),
        damage=st.lists(st.tuples(st.booleans(), PLACES, BYTES), max_size=2),
        cut=st.sampled_from([0, 0, 0, 1, 2, 50]),
    )
