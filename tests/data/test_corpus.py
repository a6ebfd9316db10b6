"""From files to shards in the cache: their contents, and behaviour on faults."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, prepare, words
from filelock import FileLock

from nanochin.base.cli import UserError
from nanochin.config import TextOptions
from nanochin.data import cache as module
from nanochin.data.cache import UNFINISHED
from nanochin.data.corpus import read_tokens
from nanochin.data.text import BLOCK
from nanochin.data.tokenizer import END_OF_TEXT, PATTERN, RANKS_FILE, Tokenizer


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder of 100 documents in two .jsonl files, about 0.5 MB."""
    folder = tmp_path / "books"
    folder.mkdir()
    for part in range(2):
        lines = [json.dumps({"text": words(5000, 50 * part + i)}) for i in range(50)]
        (folder / f"part-{part}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_are_documents_between_ends_of_text(tmp_path, cache):
    """With bytes, shards worked out by hand: 0, document, 0, document, 0 in little-endian uint16."""
    for name, text in {"b.txt": "second é", "a.txt": "first\r\n", "val.txt": "held out"}.items():
        (tmp_path / name).write_bytes(text.encode())
    c = prepare(tmp_path, cache=cache)
    expected = [0, *b"first\r\n", 0, *"second é".encode(), 0]
    assert np.fromfile(c.folder / "train-00000.bin", "<u2").tolist() == c.train[:].tolist() == expected
    assert np.fromfile(c.folder / "val-00000.bin", "<u2").tolist() == c.val[:].tolist() == [0, *b"held out", 0]
    assert (c.train_bytes, c.val_bytes, c.documents, c.val_documents, c.skipped_bytes) == (16, 8, 2, 1, 0)
    assert c.val_sha == sha("held out")
    assert sorted(contents(c.folder)) == ["meta.json", "train-00000.bin", "val-00000.bin"]
    assert not list((cache / UNFINISHED).iterdir())


def test_many_shards_are_one_array(corpus, tmp_path, monkeypatch):
    """Shards of 70,000 tokens are full except the last, and together equal a single shard."""
    one = prepare(corpus, cache=tmp_path / "one")
    monkeypatch.setattr(module, "SHARD", 70_000)
    many = prepare(corpus, cache=tmp_path / "many")
    sizes = [path.stat().st_size // 2 for path in sorted(many.folder.glob("train-*"))]
    assert len(sizes) > 5 and set(sizes[:-1]) == {70_000} and sum(sizes) == len(one.train)
    assert (many.train[:] == one.train[:]).all() and (many.val[:] == one.val[:]).all()


def test_the_cache_is_reused(corpus, tmp_path, cache):
    """Wherever the data is; another tokenizer, validation size or a changed byte gives another folder."""
    first = prepare(corpus, cache=cache)
    times = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    shutil.copytree(corpus, tmp_path / "elsewhere/books")
    assert prepare(tmp_path / "elsewhere/books", cache=cache).folder == first.folder
    assert times == {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    others = [prepare(corpus, cache=cache, val_bytes=5000)]
    others += [prepare(corpus, cache=cache, tokenizer="bpe", vocab_size=size) for size in (300, 301)]
    with open(corpus / "part-0.jsonl", "a") as file:
        file.write('\n{"text": "one more"}')
    others.append(prepare(corpus, cache=cache))
    assert len({c.folder for c in (first, *others)}) == 5


def test_validation_depends_only_on_the_text(corpus, tmp_path):
    """The order of the files, the tokenizer and the folder change neither fingerprints nor validation text."""
    files = sorted(corpus.iterdir())
    a = prepare(*files, cache=tmp_path / "a")
    b = prepare(*files[::-1], cache=tmp_path / "b", tokenizer="bpe", vocab_size=300)
    c = prepare(corpus, cache=tmp_path / "c")
    assert a.data_sha == b.data_sha == c.data_sha and a.val_sha == b.val_sha == c.val_sha
    assert (a.val[:] == c.val[:]).all() and b.tokenizer.decode(b.val[:]) == a.tokenizer.decode(a.val[:])
    assert 0 < a.val_bytes < 0.15 * a.train_bytes and a.val_bytes == len(a.val) - a.val_documents - 1


def test_named_validation_and_val_option(corpus, tmp_path, cache):
    """A file named validation is held out, `val` overrides it, and files in both options are not trained on."""
    (corpus / "validation.txt").write_text(words(2500, 1000))
    (tmp_path / "other.txt").write_text(words(2000, 2000))
    named = prepare(corpus, cache=cache)
    assert named.val_sha == sha(words(2500, 1000)) and named.documents == 100
    given = prepare(corpus, val=tmp_path / "other.txt", cache=cache)
    assert given.val_sha == sha(words(2000, 2000)) and given.documents == 101
    assert prepare(corpus, val=corpus / "validation.txt", cache=cache).folder == named.folder
    long = prepare(corpus, val=corpus / "part-0.jsonl", cache=cache, val_bytes=200_000)
    assert 200_000 - BLOCK < long.val_bytes < 200_000 + 100
    with pytest.raises(UserError, match="nothing left to train on"):
        prepare(corpus / "part-0.jsonl", val=corpus, cache=cache)


def test_own_bpe_is_trained_on_the_training_text(corpus, cache):
    """tiktoken, with the saved ranks, decodes the shards to the documents, and encodes these to the same ids."""
    calls: list = []
    c = prepare(corpus, cache=cache, tokenizer="bpe", vocab_size=400, progress=lambda *call: calls.append(call))
    stages = {stage: done == total > 0 for stage, done, total in calls}
    assert stages == dict.fromkeys(["hashing", "reading", "training the tokenizer", "tokenising"], True)
    ranks = tiktoken.load.load_tiktoken_bpe(str(c.folder / RANKS_FILE))
    theirs = tiktoken.Encoding("theirs", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 399})
    texts = theirs.decode(c.train[:].tolist()).split(END_OF_TEXT)
    assert texts[0] == texts[-1] == "" and len(texts) == c.documents + 2
    assert set(texts[1:-1]) < {words(5000, i) for i in range(100)}
    assert theirs.encode(END_OF_TEXT.join(texts), allowed_special="all") == c.train[:].tolist()
    assert c.train_bytes == sum(len(text.encode()) for text in texts) > 1.5 * len(c.train)


@pytest.mark.parametrize("held_out", [True, False])
def test_own_bpe_does_not_see_the_validation_text(tmp_path, cache, held_out):
    """A word repeated in one held-out document is not a token; the same document in training makes it one."""
    documents = ("zebra " * 1000 + str(n) for n in range(1000))
    zebra = next(text for text in documents if (int(sha(text), 16) / 2**256 < 0.05) == held_out)
    texts = [*(words(5000, i) for i in range(50)), zebra]
    (tmp_path / "books.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    c = prepare(tmp_path / "books.jsonl", cache=cache, tokenizer="bpe", vocab_size=300)
    assert ("zebra" in c.tokenizer.decode(c.val[:])) == held_out
    assert (len(c.tokenizer.encode(b"zebra")) == 5) == held_out


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "bpe"])
def test_long_documents_are_cut_where_no_token_changes(tmp_path, cache, monkeypatch, request, name):
    """A document encoded in pieces of 300 bytes on all cores has the same ids as when encoded at once."""
    code = (
        Path(json.__file__).with_name("decoder.py").read_text() + words(15_000, 1) + "  \n\t x = 1;  \r\n\r\n//\n" * 50
    )
    (tmp_path / "code.txt").write_text(code)
    if name == "bpe":
        tokenizer = prepare(tmp_path, cache=cache, tokenizer=name, vocab_size=500).tokenizer
    else:
        request.getfixturevalue("tiktoken_ranks")
        tokenizer = Tokenizer.load(name)
    monkeypatch.setattr(module, "BATCH", 300)
    tokens, size, _ = read_tokens((str(tmp_path / "code.txt"),), tokenizer, TextOptions())
    whole = tokenizer.encoding.encode_ordinary(code)
    assert tokens.tolist() == [tokenizer.eot, *whole, tokenizer.eot] and size == len(code.encode())


def test_bad_options(corpus, cache):
    """Each error names the option and its value, and leaves no folder in the cache."""
    for options, message in [
        ({"tokenizer": "bpe", "vocab_size": 256}, "`vocab_size` 256: "),
        ({"tokenizer": "gtp2"}, "`tokenizer` gtp2: .*gpt2"),
        ({"val": "nowhere.txt"}, "`val` nowhere.txt: "),
        ({"val_bytes": 10}, "`val_bytes` 10: "),
    ]:
        with pytest.raises(UserError, match=f"^{message}"):
            prepare(corpus, cache=cache, **options)
    assert not cache.exists()


PREPARE = """
import time
from nanochin.config import Config
from nanochin.data.corpus import prepare
def progress(stage, done, total):
    print(stage, flush=True)
    if stage == "tokenising":
        time.sleep({pause})
print(prepare(Config(data=({data!r},), cache={cache!r}), progress).folder)
"""


def child(data: Path, cache: Path, pause: float = 0) -> subprocess.Popen:
    """A process that prepares `data`. With `pause`, returns when it sleeps for so many seconds while tokenising."""
    code = PREPARE.format(data=str(data), cache=str(cache), pause=pause)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "bufsize": 1}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    while pause and (line := process.stdout.readline()).strip() != "tokenising":
        assert line, process.stderr.read()
    return process


def test_rerun_after_a_kill(corpus, tmp_path, cache):
    """kill -9 while writing shards: the next run starts at once, gives the same bytes as an uninterrupted run, and
    deletes what killed runs left, also for other corpora, but not what a live run is writing."""
    unfinished = cache / UNFINISHED
    for name in ("other-0123456789ab", "alive-0123456789ab"):
        (unfinished / name / "text").mkdir(parents=True)
    process = child(corpus, cache, pause=60)
    (temp,) = unfinished.glob("books-*")
    deadline = time.time() + 20
    while not list(temp.glob("train-*.bin")) and time.time() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert list(temp.glob("train-*.bin")) and not (cache / temp.name).exists()
    (unfinished / "alive-0123456789ab").mkdir(exist_ok=True)
    with FileLock(cache / "alive-0123456789ab.lock"):
        after = prepare(corpus, cache=cache)
    assert after.folder == cache / temp.name and [path.name for path in unfinished.iterdir()] == ["alive-0123456789ab"]
    assert contents(after.folder) == contents(prepare(corpus, cache=tmp_path / "untouched").folder)


def test_two_runs_at_once_tokenise_once(corpus, tmp_path, cache):
    """The second waits, reports it, and opens what the first built."""
    first = child(corpus, cache, pause=1)
    second = child(corpus, cache)
    out, errors = second.communicate(timeout=60)
    first_out, first_errors = first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), first_errors + errors
    waiting, folder = [line for line in out.splitlines() if line != "hashing"]
    assert waiting.startswith("waiting for another run") and folder == first_out.splitlines()[-1]
    assert contents(Path(folder)) == contents(prepare(corpus, cache=tmp_path / "alone").folder)


def test_a_full_disk_is_one_line_and_leaves_nothing(corpus, cache):
    """With 200 KB per file, the error names the path and the temporary folder is deleted."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(UserError, match=f"^{cache}.*: File too large$"):
            prepare(corpus, cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in cache.iterdir() if path.suffix != ".lock" and path.name != UNFINISHED]
    assert not list((cache / UNFINISHED).iterdir())


@pytest.mark.parametrize("whole", [True, False])
def test_damaged_shards_are_named(corpus, cache, monkeypatch, whole):
    """A file that is truncated, changed or missing; large corpora are checked at both ends of each file."""
    if not whole:
        monkeypatch.setattr("nanochin.data.corpus.CHECK_WHOLE", 0)
    options = {"cache": cache, "tokenizer": "bpe", "vocab_size": 300}
    folder = prepare(corpus, **options).folder
    for name in ("train-00000.bin", "val-00000.bin", RANKS_FILE, "meta.json"):
        good = (folder / name).read_bytes()
        changed = bytearray(good)
        changed[-1 if whole else 0] ^= 1
        for bad in (good[:-1], b"", bytes(changed), None):
            (folder / name).unlink()
            if bad is not None:
                (folder / name).write_bytes(bad)
            with pytest.raises(UserError, match=f"{name}: .*delete {folder} to rebuild it"):
                prepare(corpus, **options)
        (folder / name).write_bytes(good)
    prepare(corpus, **options)


def test_skipped_lines_are_in_the_record(corpus, cache):
    """Skipped lines are counted, also from the cache; without `skip_bad`, cached tokens are rejected too."""
    with open(corpus / "part-1.jsonl", "a") as file:
        file.write("\n{broken\n" + json.dumps({"text": words(5000, 200)}) + "\nnull\n")
    for _ in range(2):
        with pytest.raises(UserError, match="`skip_bad`"):
            prepare(corpus, cache=cache)
        found = prepare(corpus, cache=cache, skip_bad=True)
        assert found.skipped_records == 2 and found.documents + found.val_documents == 101


def test_notes_are_kept_in_the_cache(tmp_path, cache):
    """What was left out is said again when the shards come from the cache."""
    (tmp_path / "a.txt").write_bytes(words(50_000).encode() + b"\0\xff")
    first = prepare(tmp_path / "a.txt", cache=cache)
    again = prepare(tmp_path / "a.txt", cache=cache)
    assert len(first.notes) >= 2 and list(again.notes) == list(first.notes)
    assert first.skipped_bytes == again.skipped_bytes == 2 and "a.txt" in first.notes[0]


def test_held_out_share_above_its_limit_is_noted(tmp_path, cache):
    """Of four equal files a fifth is held out; of a hundred documents 5%."""
    for i in range(4):
        (tmp_path / f"same/{i}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / f"same/{i}.txt").write_text(words(100_000))
    same = prepare(tmp_path / "same", cache=cache)
    assert 0.19 < same.val_bytes / (same.val_bytes + same.train_bytes) < 0.21
    (note,) = same.notes
    assert note.startswith("20% of the text is held out")
    (tmp_path / "other.txt").write_text(words(2000, 5))
    assert not prepare(tmp_path / "same", val=tmp_path / "other.txt", cache=cache).notes


def test_options_of_reading_are_part_of_the_key(corpus, cache):
    """At their default they are not, so that existing folders keep their names; skip_bad is not either."""
    first = prepare(corpus, cache=cache).folder
    assert prepare(corpus, cache=cache, skip_bad=True, text_column="text", encoding="utf-8").folder == first
    others = ({"encoding": "latin-1"}, {"document_separator": "x"}, {"document_separator": "y"})
    assert len({first, *(prepare(corpus, cache=cache, **options).folder for options in others)}) == 4


def test_folders_of_earlier_versions(tmp_path, cache):
    """Those that may have the text of another encoding, whose notes are missing, are refused."""
    (tmp_path / "a.txt").write_bytes(words(50_000).encode())
    meta = prepare(tmp_path / "a.txt", cache=cache).folder / "meta.json"
    content = json.loads(meta.read_text())
    del content["corpus"]["notes"]
    meta.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"^{meta}: .*; delete {meta.parent}"):
        prepare(tmp_path / "a.txt", cache=cache)
