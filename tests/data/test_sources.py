"""Data sets of the hub, here local folders of parquet, which the `datasets` library streams in the same way."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import prepare

from nanochin.base.cli import UserError
from nanochin.config import Config
from nanochin.data import sources as module
from nanochin.data.sources import parse

TEXTS = [f"Document {i}: " + f"{i * 7919 % 1000} words of it, and a ligature ﬁ. " * (1 + i % 9) for i in range(3000)]


def parquet(path: Path, **columns) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    path.parent.mkdir(exist_ok=True)
    write_table(pyarrow.table(columns), path, row_group_size=100)


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> Path:
    """A folder with two parquet files of TEXTS; the library has no network and not the user's cache."""
    pytest.importorskip("datasets", reason="pip install datasets")
    pytest.importorskip("pyarrow", reason="pip install pyarrow")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for i, part in enumerate((TEXTS[:1000], TEXTS[1000:])):
        parquet(tmp_path / f"books/train-{i}.parquet", id=list(range(len(part))), text=part)
    return tmp_path / "books"


def documents(corpus) -> set[bytes]:
    """The text between the end-of-text tokens, in training and validation."""
    both = b"".join(bytes(tokens[:].astype("u1")) for tokens in (corpus.train, corpus.val))
    return set(both.split(b"\0")) - {b""}


def test_first_documents_up_to_max_tokens(dataset, tmp_path, monkeypatch):
    """The documents that fit into `max_tokens`, cached as .jsonl: the second run needs no library."""
    options = {"max_tokens": 100_000, "val_bytes": 2048, "cache": tmp_path / "cache"}
    corpus = prepare(f"hf:{dataset}", **options)
    sizes = 1 + np.cumsum([len(text.encode()) + 1 for text in TEXTS])
    count = int((sizes <= 100_000).sum())
    (path,) = (tmp_path / "cache/hub").rglob("*.jsonl")
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == TEXTS[:count]
    assert documents(corpus) == {text.encode() for text in TEXTS[:count]} and corpus.name == "books"
    assert len(corpus.train) + len(corpus.val) == sizes[count - 1] + 1  # each side begins with end-of-text
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert prepare(f"hf:{dataset}", **options).folder == corpus.folder


def test_max_tokens_with_our_own_bpe(dataset, tmp_path, monkeypatch):
    """Before our BPE is trained, one trained on the first texts counts: within 10% of `max_tokens`."""
    monkeypatch.setattr(module, "SAMPLE", 20_000)
    corpus = prepare(f"hf:{dataset}", max_tokens=30_000, tokenizer="bpe", vocab_size=400, cache=tmp_path / "cache")
    assert 27_000 < len(corpus.train) + len(corpus.val) < 33_000


def test_rows_without_text(dataset, tmp_path):
    """Of the whole data set: nulls are bad lines, rejected with their number, or counted with `skip_bad`."""
    parquet(dataset / "train-0.parquet", id=[0, 1, 2], text=["a", None, "b" * 3000])
    with pytest.raises(UserError, match=r"jsonl, line 2: .*`skip_bad`"):
        prepare(f"hf:{dataset}", max_tokens=1e9, cache=tmp_path / "cache")
    corpus = prepare(f"hf:{dataset}", max_tokens=1e9, skip_bad=True, cache=tmp_path / "cache")
    expected = {b"a", b"b" * 3000, *(text.encode() for text in TEXTS[1000:])}
    assert corpus.skipped_records == 1 and documents(corpus) == expected


def test_errors_are_one_line(dataset, tmp_path):
    """No such data set, no such split, no column `text`, a document above the limit: one line, no file left."""
    parquet(tmp_path / "other/train.parquet", content=["x"], url=["y"])
    parquet(tmp_path / "empty/test.parquet", content=["x"], url=["y"])
    errors = {"nowhere": "Error", "empty": "", "other": "content, url", "books": "`max_tokens` 10"}
    for name, part in errors.items():
        with pytest.raises(UserError, match=f"^`data` hf:{tmp_path}/{name}: .*{part}") as error:
            prepare(f"hf:{tmp_path}/{name}", max_tokens=10, cache=tmp_path / "cache")
        assert "\n" not in str(error.value)
    assert not [p for p in (tmp_path / "cache/hub").rglob("*") if p.suffix in (".jsonl", ".tmp")]


def test_text_column(tmp_path, monkeypatch):
    """The column that `text_column` names is streamed under its own name, and read again by it."""
    rows = SimpleNamespace(load_dataset=lambda *_, **__: [{"content": text, "text": "no"} for text in TEXTS])
    rows.logging = SimpleNamespace(CRITICAL=50, set_verbosity=lambda _: None)
    monkeypatch.setitem(sys.modules, "datasets", rows)
    monkeypatch.setitem(sys.modules, "huggingface_hub", rows)
    options = {"max_tokens": 1e9, "cache": tmp_path}
    corpus = prepare("hf:a/books", text_column="content", **options)
    assert documents(corpus) == {text.encode() for text in TEXTS}
    with pytest.raises(UserError, match="no column 'body' .* content, text"):
        prepare("hf:a/books", text_column="body", **options)


def test_parse():
    """OWNER/NAME and CONFIG; other forms, or no limit, are rejected; different text is a different file."""
    item = "hf:HuggingFaceFW/fineweb-edu:sample-10BT"
    base = Config(max_tokens=1e8)
    source = parse(item, "data", base)
    assert (source.dataset, source.config) == ("HuggingFaceFW/fineweb-edu", "sample-10BT")
    assert source.place.endswith("/fineweb-edu-sample-10BT.jsonl")
    changes = [{"max_tokens": 1e9}, {"text_column": "content"}]
    changes += [{"tokenizer": "bpe", "vocab_size": V} for V in (300, 301)]
    assert len({source.place, *(parse(item, "data", replace(base, **change)).place for change in changes)}) == 5
    for bad, limit in (("hf:", 1e6), ("hf:a/", 1e6), ("hf:a b", 1e6), ("hf:a/b", None)):
        with pytest.raises(UserError, match=f"`val` {bad}: "):
            parse(bad, "val", Config(max_tokens=limit))
