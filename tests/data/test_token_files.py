"""Token files of nanoGPT, llm.c and Megatron, written here by their documented formats."""

import gzip
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import prepare
from token_writers import WRITERS, llm_c, megatron, nanogpt

import train
from nanochin.__main__ import run
from nanochin.base.cli import UserError
from nanochin.config import TextOptions
from nanochin.data import token_files as module
from nanochin.data.corpus import read_tokens
from nanochin.data.text import Tokens
from nanochin.data.token_files import hold_out
from nanochin.data.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
V = 300


def some_ids(count: int, seed: int = 0) -> np.ndarray:
    """Ids below V, each likely to follow from the one before, so that a model can learn them."""
    draw = np.random.default_rng(seed)
    return np.cumsum(draw.integers(1, 4, count)) % V


every_format = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@every_format
def test_tokens_are_memory_mapped(tmp_path, write):
    """Not copied, with val.bin as validation tokens. Bytes are unknown, and nothing is written."""
    ids, val = some_ids(1000), some_ids(90, seed=1)
    path = write(tmp_path / "train.bin", ids)
    write(tmp_path / "val.bin", val)
    corpus = prepare(path, vocab_size=V, cache=tmp_path / "cache")
    assert corpus.train[:].tolist() == ids.tolist() and corpus.val[:].tolist() == val.tolist()
    assert (corpus.tokenizer.name, corpus.tokenizer.vocab_size, corpus.val_bytes) == ("ids-300", V, 0)
    assert corpus.format == {nanogpt: "nanoGPT", megatron: "Megatron"}.get(write, "llm.c")
    (part,) = corpus.train.parts
    while part.base is not None and not isinstance(part, np.memmap):
        part = part.base
    assert isinstance(part, np.memmap) and str(part.filename) == str(path)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_integer_types_of_megatron(tmp_path, code):
    """With and without the optional modes of the .idx, found by .bin, .idx and the common prefix."""
    ids = some_ids(777) % 100
    for modes in (False, True):
        path = megatron(tmp_path / "corpus_text_document.bin", ids, code, modes)
        for name in (path, path.with_suffix(".idx"), path.with_suffix("")):
            assert read_tokens((str(name),), Tokenizer.load("ids-100"), TextOptions())[0].tolist() == ids.tolist()


def test_shards_are_one_stream(tmp_path):
    """In the order of their names. Those named val are held out, even if the glob does not match them."""
    shards = [some_ids(500 + i, seed=i) for i in range(3)]
    for i, ids in enumerate(shards):
        llm_c(tmp_path / f"fineweb_train_{i:06d}.bin", ids)
    llm_c(tmp_path / "fineweb_val_000000.bin", some_ids(64, seed=9))
    (tmp_path / "readme.md").write_text("not read")
    for name in (tmp_path, tmp_path / "fineweb_train_*.bin"):
        corpus = prepare(name, vocab_size=V, cache=tmp_path / "cache")
        assert corpus.train[:].tolist() == np.concatenate(shards).tolist()
        assert corpus.val[:].tolist() == some_ids(64, seed=9).tolist()


def test_without_validation_files_blocks_are_held_out(tmp_path):
    """5% of the tokens, at most `val_bytes`; `val` overrides, and is capped too."""
    ids = np.arange(100_000) % 60_000
    path, options = nanogpt(tmp_path / "all.bin", ids), {"vocab_size": 60_000, "cache": tmp_path / "cache"}
    corpus = prepare(path, **options)
    assert len(corpus.val) == 5000 and len(corpus.train) == 95_000
    few = prepare(path, val_bytes=1024, **options)
    assert len(few.val) == 512 and sorted([*few.val[:], *few.train[:]]) == sorted(ids)
    given = prepare(path, val=nanogpt(tmp_path / "other.bin", range(70)), **options)
    assert len(given.train) == 100_000 and given.val[:].tolist() == list(range(70))
    assert len(prepare(path, val=nanogpt(tmp_path / "long.bin", ids[1:]), val_bytes=2048, **options).val) == 1024


@pytest.mark.parametrize(("total", "keep"), [(20_000, 1), (20_000, 999), (300_000, 150_000), (1_000_001, 140_000)])
def test_held_out_blocks_are_evenly_spaced(total, keep):
    """Both sides have all tokens once; blocks of equal size begin at the first token and end at the last."""
    rest, held = hold_out(Tokens(np.split(np.arange(total), [total // 3])), keep)
    assert sorted([*rest[:], *held[:]]) == list(range(total))
    starts = [held[:][0], *(b for a, b in zip(held[:-1], held[1:], strict=True) if b != a + 1)]
    block = min(65_536, keep)
    assert len(held) == len(starts) * block <= keep < len(held) + block
    assert starts[0] == 0 and (len(starts) == 1 or held[:][-1] == total - 1)
    assert len(starts) == 1 or np.ptp(np.diff(starts)) <= 1


def test_fingerprint_depends_on_the_tokens(tmp_path):
    """And on their type and the validation file, but not on folder and name."""
    ids = some_ids(1000) % 100

    def corpus(name: str, code: int = 8, **options):
        return prepare(megatron(tmp_path / f"{name}.bin", ids, code), vocab_size=V, cache=tmp_path, **options)

    one, two, signed = corpus("train"), corpus("moved"), corpus("signed", code=3)
    other = corpus("train", val=nanogpt(tmp_path / "other.bin", some_ids(100, seed=3)))
    ids[500] += 1
    assert (one.data_sha, one.val_sha) == (two.data_sha, two.val_sha)
    assert len({one.data_sha, signed.data_sha, corpus("changed").data_sha}) == 3
    assert other.val_sha != one.val_sha


def test_shards_of_the_cache_are_token_files(text, tmp_path):
    """Our shards have nanoGPT's format: with the tokenizer's name, tokens and bytes are those of the text."""
    expected = prepare(text, val_bytes=4096, cache=tmp_path / "cache")
    for side in ("train", "val"):
        os.link(expected.folder / f"{side}-00000.bin", tmp_path / f"{side}.bin")
    found = prepare(tmp_path / "train.bin", tokenizer="bytes", cache=tmp_path)
    assert (found.train[:] == expected.train[:]).all() and (found.val[:] == expected.val[:]).all()
    assert found.val_bytes == expected.val_bytes


def test_training_on_ids(tiny, tmp_path, capsys):
    """The loss falls below that of guessing, `evaluate` gives it again, and a changed id is another run."""
    ids, val = some_ids(5000), nanogpt(tmp_path / "val.bin", some_ids(500, seed=2))
    config = tiny(name="run", data=(str(nanogpt(tmp_path / "train.bin", ids)),), vocab_size=V, lr=0.03)
    summary = train.train(config, quiet=True)
    assert summary["loss"] < 0.8 * np.log(V) and summary["val_bpb"] is None and summary["tokenizer"] == "ids-300"
    run("evaluate", str(Path(config.out) / "run"), "--data", str(val))
    assert f"loss {summary['loss']:.4f} nats per token, bits per byte unknown" in capsys.readouterr().out
    ids[17] += 1
    nanogpt(tmp_path / "train.bin", ids)
    with pytest.raises(UserError, match="holds a run with data_sha"):
        train.train(config, quiet=True)


def test_ids_outside_the_vocabulary_are_named(tmp_path, monkeypatch):
    """File, position and value of the first, also if negative; the largest valid id is accepted."""
    monkeypatch.setattr(module, "SCAN", 64)
    nanogpt(tmp_path / "train_0.bin", some_ids(1000))
    ids = some_ids(1000, seed=1)
    ids[[700, 999]] = V, 60_000
    nanogpt(tmp_path / "train_1.bin", ids)
    for options, message in [
        ({"vocab_size": V}, r"train_1\.bin: token id 300 at position 700 .* 300"),
        ({"vocab_size": V + 1}, r"train_1\.bin: token id 60000 at position 999 .* 301"),
        ({"tokenizer": "bytes"}, r"train_0\.bin: token id \d+ at position \d+ .*`tokenizer` bytes has 256"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(tmp_path, cache=tmp_path, **options)
    assert len(prepare(tmp_path, vocab_size=60_001, cache=tmp_path).train) == 1900
    ids[3] = -1
    with pytest.raises(UserError, match=r"m\.bin: token id -1 at position 3 "):
        prepare(megatron(tmp_path / "m.bin", ids, code=4), vocab_size=2**20, cache=tmp_path)


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (llm_c, {"size": 1100}, r"x\.bin: .*1100 bytes.* 100 tokens.* 1224 bytes"),
        (llm_c, {"ids": [], "count": 0}, r"x\.bin: .*1024 bytes"),
        (llm_c, {"version": 2}, "version 2"),
        (llm_c, {"magic": 20240801, "version": 7}, "1224 bytes.* 1424 bytes"),  # uint16 as Llama 3
        (llm_c, {"magic": 20240522}, "magic 20240522"),  # an evaluation set
        (llm_c, {"ids": [0] * 100, "magic": 20240326, "version": 3}, "magic 20240326"),  # a model
        (megatron, {"magic": b"SOMETHING"}, r"x\.idx: not a Megatron index"),
        (megatron, {"version": struct.pack("<Q", 2)}, "version 2"),
        (megatron, {"code": 7}, "type code 7"),  # float
        (megatron, {"modes": True, "bounds": bytes(8)}, "4 sequences and 5 document bounds"),
        (megatron, {"size": 150}, r"x\.idx: .* 200 bytes, but .*x\.bin has 150"),
        (megatron, {"offsets": np.array([0, 20, 99, 140]).tobytes()}, "sequence 2 starts at byte 99"),
        (megatron, {"lengths": np.array([150, -50, 0, 0], "<i4").tobytes()}, "sequence 1 has a negative length"),
    ],
)
def test_invalid_files(tmp_path, write, options, message):
    """Each gives one line that names the file and what is wrong with it."""
    path = write(tmp_path / "x.bin", **{"ids": some_ids(100)} | options)
    with pytest.raises(UserError, match=message) as error:
        prepare(path, vocab_size=65_536, cache=tmp_path / "cache")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_files_of_no_format(tmp_path):
    """An odd number of bytes, compression, an empty file and a broken index: the file is named."""
    files = {"odd.bin": bytes(101), "packed.bin.gz": gzip.compress(bytes(100)), "empty.bin": b""}
    indexed = {"blank.idx": b"", "cut.idx": b"MMIDIDX\0\0short", "blank.bin": bytes(200), "cut.bin": bytes(200)}
    for name, content in (files | indexed).items():
        (tmp_path / name).write_bytes(content)
    for name in (*files, "blank.idx", "cut.idx"):
        with pytest.raises(UserError, match=f"{name}: "):
            prepare(tmp_path / name, vocab_size=65_536, cache=tmp_path / "cache")


def test_uint32_without_a_header(tmp_path):
    """Recognised where uint16 cannot be right: a vocabulary above 65,536, or zeros at every second place. Noted."""
    large, small = some_ids(3000) * 300, some_ids(3000)
    for ids, V in ((large, 100_277), (small, 100_277), (small, 300)):
        path = tmp_path / f"{V}.bin"
        path.write_bytes(ids.astype("<u4").tobytes())
        corpus = prepare(path, vocab_size=V, cache=tmp_path)
        assert sorted([*corpus.train[:], *corpus.val[:]]) == sorted(ids) and "uint32" in corpus.format
        assert len(corpus.notes) == 1 and str(path) in corpus.notes[0] and "uint32" in corpus.notes[0]
    path.write_bytes(small.astype("<u8").tobytes())
    with pytest.raises(UserError, match=r"300\.bin: .*64-bit"):
        prepare(path, vocab_size=V, cache=tmp_path)
    zeros = nanogpt(tmp_path / "zeros.bin", np.arange(3000) // 2 % 2 * small)  # every second is not 0
    assert prepare(zeros, vocab_size=V, cache=tmp_path).format == "nanoGPT"
    for ids, V in ((small, 100_277), (small[1:], 100_277)):  # uint16, of even and odd number
        with pytest.raises(UserError, match=r"u16\.bin: .*uint32"):
            prepare(nanogpt(tmp_path / "u16.bin", ids), vocab_size=V, cache=tmp_path)


@pytest.mark.parametrize("count", [1, 2, 19, 20, 39])
def test_too_few_tokens(tmp_path, count):
    """5% of them is less than two: one line that names the file."""
    path = nanogpt(tmp_path / "few.bin", range(count))
    with pytest.raises(UserError, match=r"few\.bin: too few tokens"):
        prepare(path, vocab_size=V, cache=tmp_path)


def test_text_named_as_tokens(tmp_path):
    """Text and packed files named .bin are refused: as uint16 all their ids may be in the vocabulary."""
    for name, content in {
        "text.bin": b"hello world " * 99,
        "packed.bin": gzip.compress(os.urandom(1000), mtime=0),
    }.items():
        (tmp_path / name).write_bytes(content[: len(content) // 2 * 2])
        with pytest.raises(UserError, match=f"{name}: .*not token ids"):
            prepare(tmp_path / name, vocab_size=65_536, cache=tmp_path)


def test_the_vocabulary_is_not_guessed_nor_unpickled(tmp_path, monkeypatch):
    """Without `tokenizer` or `vocab_size` the vocabulary is unknown; meta.pkl is mentioned and never loaded."""
    path, meta = nanogpt(tmp_path / "train.bin", some_ids(100)), tmp_path / "meta.pkl"
    meta.write_bytes(pickle.dumps({"vocab_size": V}))
    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, None)
    for data, message in ((path, r"train\.bin: .*meta\.pkl may, .* give `tokenizer`"), (meta, r"meta\.pkl: pickles")):
        with pytest.raises(UserError, match=message):
            prepare(data, cache=tmp_path)
    prepare(tmp_path, vocab_size=V, cache=tmp_path / "cache")  # the folder has both files


def test_text_and_tokens_do_not_mix(tmp_path):
    """Nor bpe with ids, `max_tokens` with files, or ids with text; too few tokens leave nothing for validation."""
    path, text = nanogpt(tmp_path / "train.bin", some_ids(100)), tmp_path / "input.txt"
    text.write_text("text")
    few = nanogpt(tmp_path / "few.bin", range(20))
    for data, options, message in [
        (tmp_path, {"vocab_size": V}, r"\.bin has tokens, .*input\.txt has text"),
        (path, {"tokenizer": "bpe"}, "`tokenizer` bpe: "),
        (path, {"vocab_size": V, "max_tokens": 100}, "`max_tokens` 100: "),
        (few, {"vocab_size": V}, r"few\.bin: too few tokens"),
        (text, {"tokenizer": "ids-300"}, "`tokenizer` ids-300: only for token files"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(data, cache=tmp_path / "cache", **options)
