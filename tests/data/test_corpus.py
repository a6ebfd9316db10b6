"""From files to training windows: contents of the shards, behaviour on faults, order of the windows."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from filelock import FileLock

from nanochin.base.cli import UserError
from nanochin.data import cache as module
from nanochin.data.cache import UNFINISHED
from nanochin.data.corpus import prepare, read_tokens
from nanochin.data.tokenizer import END_OF_TEXT, PATTERN, RANKS_FILE, Tokenizer
from nanochin.data.windows import Windows, eval_windows

ROOT = Path(__file__).resolve().parents[2]


def words(count: int, seed: int) -> str:
    """Text that does not repeat, with a few characters of 2 to 4 bytes."""
    draw = np.random.default_rng(seed).integers(0, 1000, count).tolist()
    return " ".join("é中🙂"[n % 3] * (n < 20) + f"w{n:03d}" for n in draw) + "\n"


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder of 100 documents in two .jsonl files, about 0.5 MB."""
    folder = tmp_path / "books"
    folder.mkdir()
    for part in range(2):
        lines = [json.dumps({"text": words(1000, 50 * part + i)}) for i in range(50)]
        (folder / f"part-{part}.jsonl").write_text("\n".join(lines))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# prepare


def test_shards_are_documents_between_ends_of_text(tmp_path):
    """With bytes, the files worked out by hand: 0, document, 0, document, 0 in little-endian uint16. The record counts
    bytes and documents and has the SHA-256 of the validation text."""
    for name, text in {"b.txt": "second é", "a.txt": "first\r\n", "val.txt": "held out"}.items():
        (tmp_path / name).write_bytes(text.encode())
    c = prepare((str(tmp_path),), cache=tmp_path / "cache")
    expected = [0, *b"first\r\n", 0, *"second é".encode(), 0]
    assert np.fromfile(c.folder / "train-00000.bin", "<u2").tolist() == c.train[:].tolist() == expected
    assert np.fromfile(c.folder / "val-00000.bin", "<u2").tolist() == c.val[:].tolist() == [0, *b"held out", 0]
    assert (c.train_bytes, c.val_bytes, c.documents, c.val_documents, c.skipped_bytes) == (16, 8, 2, 1, 0)
    assert c.val_sha == hashlib.sha256(b"held out").hexdigest()
    assert sorted(contents(c.folder)) == ["meta.json", "train-00000.bin", "val-00000.bin"]
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".tmp"] == []


def test_many_shards_are_one_array(corpus, tmp_path, monkeypatch):
    """Shards of 70,000 tokens are full except the last, and together equal a single shard."""
    one = prepare((str(corpus),), cache=tmp_path / "one")
    monkeypatch.setattr(module, "SHARD", 70_000)
    many = prepare((str(corpus),), cache=tmp_path / "many")
    sizes = [path.stat().st_size // 2 for path in sorted(many.folder.glob("train-*"))]
    assert len(sizes) > 5 and set(sizes[:-1]) == {70_000} and sum(sizes) == len(one.train)
    assert (many.train[:] == one.train[:]).all() and (many.val[:] == one.val[:]).all()


def test_the_cache_is_reused(corpus, tmp_path):
    """The same data and tokenizer are tokenised once, wherever the data is; another tokenizer, validation size or a
    changed byte gives another folder."""
    first = prepare((str(corpus),), cache=tmp_path / "cache")
    times = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    shutil.copytree(corpus, tmp_path / "elsewhere" / "books")
    again = prepare((str(tmp_path / "elsewhere/books"),), cache=tmp_path / "cache")
    assert again.folder == first.folder
    assert times == {path.name: path.stat().st_mtime_ns for path in again.folder.iterdir()}
    others = [prepare((str(corpus),), cache=tmp_path / "cache", **options).folder
              for options in ({"val_bytes": 5000}, {"tokenizer": "bpe", "vocab_size": 300},
                              {"tokenizer": "bpe", "vocab_size": 301})]  # fmt: skip
    with open(corpus / "part-0.jsonl", "a") as file:
        file.write('\n{"text": "one more"}')
    others.append(prepare((str(corpus),), cache=tmp_path / "cache").folder)
    assert len({first.folder, *others}) == 5


def test_validation_depends_only_on_the_text(corpus, tmp_path):
    """The order of --data, the tokenizer and the folder change neither fingerprints nor validation text."""
    files = [str(path) for path in sorted(corpus.iterdir())]
    a = prepare(tuple(files), cache=tmp_path / "a")
    b = prepare(tuple(files[::-1]), cache=tmp_path / "b", tokenizer="bpe", vocab_size=300)
    c = prepare((str(corpus),), cache=tmp_path / "c")
    assert a.data_sha == b.data_sha == c.data_sha and a.val_sha == b.val_sha == c.val_sha
    assert (a.val[:] == c.val[:]).all() and b.tokenizer.decode(b.val[:]) == a.tokenizer.decode(a.val[:])
    assert 0 < a.val_bytes < 0.15 * a.train_bytes and a.val_bytes == len(a.val) - a.val_documents - 1


def test_named_validation_and_val_option(corpus, tmp_path):
    """A file named validation is held out, --val overrides it, and files in both --data and --val are not trained
    on."""
    (corpus / "validation.txt").write_text(words(500, 1000))
    (tmp_path / "other.txt").write_text(words(400, 2000))
    named = prepare((str(corpus),), cache=tmp_path / "cache")
    assert named.val_sha == hashlib.sha256(words(500, 1000).encode()).hexdigest() and named.documents == 100
    given = prepare((str(corpus),), val=(str(tmp_path / "other.txt"),), cache=tmp_path / "cache")
    assert given.val_sha == hashlib.sha256(words(400, 2000).encode()).hexdigest() and given.documents == 101
    both = prepare((str(corpus),), val=(str(corpus / "validation.txt"),), cache=tmp_path / "cache")
    assert (both.data_sha, both.val_sha, both.folder) == (named.data_sha, named.val_sha, named.folder)
    with pytest.raises(UserError, match="nothing left to train on"):
        prepare((str(corpus / "part-0.jsonl"),), val=(str(corpus),), cache=tmp_path / "cache")


def test_long_validation_text_is_thinned(tmp_path):
    """A validation file of 1 MB is reduced to about val_bytes: three blocks of 64 KB, at its start, middle and end, cut
    at whole characters."""
    (tmp_path / "train.txt").write_text(words(1000, 0))
    text = words(200_000, 1).encode()
    (tmp_path / "val.txt").write_bytes(text)
    c = prepare((str(tmp_path),), cache=tmp_path / "cache", val_bytes=200_000)
    kept = bytes(c.val[1:-1].astype(np.uint8))
    assert len(kept) == c.val_bytes and abs(len(kept) - 3 * 65_536) <= 18

    def whole_character(i):  # the start of the character at i, or the end
        return i if i == len(text) else len(text[:i].decode(errors="ignore").encode())

    starts = [0, (len(text) - 65_536) // 2, len(text) - 65_536]
    assert kept == b"".join(text[whole_character(a) : whole_character(a + 65_536)] for a in starts)


def test_own_bpe_is_trained_on_the_training_text(corpus, tmp_path):
    """tiktoken reads the ranks in the cache folder; its ids of each training document, with end-of-text between, equal
    the shards; decoding gives the text."""
    c = prepare((str(corpus),), cache=tmp_path / "cache", tokenizer="bpe", vocab_size=400)
    ranks = tiktoken.load.load_tiktoken_bpe(str(c.folder / RANKS_FILE))
    special = {END_OF_TEXT: 399}
    theirs = tiktoken.Encoding("theirs", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    texts = theirs.decode(c.train[:].tolist()).split(END_OF_TEXT)
    assert texts[0] == texts[-1] == "" and len(texts) == c.documents + 2
    assert set(texts[1:-1]) < {words(1000, i) for i in range(100)}
    assert theirs.encode(END_OF_TEXT.join(texts), allowed_special="all") == c.train[:].tolist()
    assert c.train_bytes == sum(len(text.encode()) for text in texts)
    assert c.train_bytes / len(c.train) > 1.5


def test_own_bpe_does_not_see_the_validation_text(tmp_path):
    """A word repeated in one held-out document is not a token; the same document in training makes it one."""
    for held_out in (True, False):
        documents = ("zebra " * 1000 + str(n) for n in range(1000))
        zebra = next(text for text in documents
                     if (int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256 < 0.05) == held_out)  # fmt: skip
        texts = [*(words(1000, i) for i in range(50)), zebra]
        (tmp_path / "books.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        c = prepare((str(tmp_path / "books.jsonl"),), cache=tmp_path / "cache", tokenizer="bpe", vocab_size=300)
        assert ("zebra" in c.tokenizer.decode(c.val[:])) == held_out
        assert (len(c.tokenizer.encode(b"zebra")) == 5) == held_out


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "bpe"])
def test_long_documents_are_cut_where_no_token_changes(tmp_path, monkeypatch, name):
    """A document encoded in pieces of 300 bytes on all cores has the same ids as when encoded at once."""
    code = Path(json.__file__).with_name("decoder.py").read_text() + words(3000, 1) + "  \n\t x = 1;  \r\n\r\n//\n" * 50
    (tmp_path / "code.txt").write_text(code)
    if name == "bpe":
        tokenizer = prepare((str(tmp_path),), cache=tmp_path / "cache", tokenizer=name, vocab_size=500).tokenizer
    else:
        cache = os.environ.get("TIKTOKEN_CACHE_DIR", str(ROOT.parent / "shared/data/tiktoken_cache"))
        if not Path(cache).is_dir():
            pytest.skip("needs the ranks of gpt2: shared/data/tiktoken_cache or TIKTOKEN_CACHE_DIR")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache)
        tokenizer = Tokenizer.load(name)
    monkeypatch.setattr(module, "JOB", 300)
    tokens, size = read_tokens((str(tmp_path / "code.txt"),), tokenizer)
    whole = tokenizer.encoding.encode_ordinary(code)
    assert tokens.tolist() == [tokenizer.eot, *whole, tokenizer.eot] and size == len(code.encode())


def test_read_tokens_can_read_a_part(corpus, tmp_path):
    """For evaluation: everything, or evenly spaced blocks of about max_bytes; leaves nothing on disk."""
    tokenizer = Tokenizer("bytes")
    tokens, size = read_tokens((str(corpus),), tokenizer)
    assert size == sum(len(words(1000, i).encode()) for i in range(100)) == len(tokens) - 101
    tokens, size = read_tokens((str(corpus),), tokenizer, 150_000)
    assert abs(size - 2 * 65_536) < 20 and size == np.count_nonzero(tokens)


def test_progress_names_the_stages(corpus, tmp_path):
    """Reports hashing, reading, training the tokenizer and tokenising, each to completion."""
    told = {}
    prepare((str(corpus),), cache=tmp_path / "cache", tokenizer="bpe", vocab_size=300,
            progress=lambda stage, done, total: told.__setitem__(stage, (done, total)))  # fmt: skip
    assert list(told) == ["hashing", "reading", "training the tokenizer", "tokenising"]
    assert all(done == total > 0 for done, total in told.values())


@pytest.mark.parametrize(("options", "message"), [
    ({"tokenizer": "bpe", "vocab_size": 256}, "`vocab_size` 256: bpe needs at least 257"),
    ({"tokenizer": "gtp2"}, "`tokenizer` gtp2: unknown; did you mean gpt2"),
    ({"val": ("nowhere.txt",)}, "`val` nowhere.txt: no such file or folder"),
    ({"val_bytes": 10}, "`val_bytes` 10: too little"),
])  # fmt: skip
def test_bad_options_are_one_line(corpus, tmp_path, options, message):
    """Each error names the option and its value, and leaves no folder in the cache."""
    with pytest.raises(UserError, match=message) as error:
        prepare((str(corpus),), cache=tmp_path / "cache", **options)
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.glob("cache/*") if path.is_dir()]


# Faults


def child(code: str, **kwargs) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, bufsize=1, **kwargs)  # fmt: skip


PREPARE = """
import sys, time
from nanochin.data.corpus import prepare
def progress(stage, done, total):
    print(stage, flush=True)
    if stage == {pause_at!r}:
        time.sleep({pause})
print(prepare(({data!r},), cache={cache!r}, progress=progress).folder)
"""


def wait_for(process: subprocess.Popen, line: str) -> None:
    while (read := process.stdout.readline()).strip() != line:
        assert read, process.stderr.read()


def test_rerun_after_a_kill(corpus, tmp_path):
    """kill -9 while writing shards: the next run starts at once, gives the same bytes as an uninterrupted run, and
    deletes what the killed one left, also for other corpora."""
    other = tmp_path / "cache" / "other-0123456789ab.tmp"
    (other / "text").mkdir(parents=True)
    (other / UNFINISHED).touch()
    code = PREPARE.format(data=str(corpus), cache=str(tmp_path / "cache"), pause_at="tokenising", pause=60)
    process = child(code)
    wait_for(process, "tokenising")
    temp = next(path for path in (tmp_path / "cache").glob("books-*.tmp"))
    deadline = time.time() + 20
    while not list(temp.glob("train-*.bin")) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list(temp.glob("train-*.bin")) and not temp.with_suffix("").exists()

    after = prepare((str(corpus),), cache=tmp_path / "cache")
    assert after.folder == temp.with_suffix("") and not list((tmp_path / "cache").glob("*.tmp"))
    assert contents(after.folder) == contents(prepare((str(corpus),), cache=tmp_path / "untouched").folder)


def test_foreign_files_in_the_cache_are_kept(corpus, tmp_path):
    """Files and folders named .tmp that are not ours keep their content, get no lock file and do not block a run. A
    link to one of our folders does not delete its target."""
    cache = tmp_path / "cache"
    for name in ("thesis.tmp", "books-0123456789ab.tmp", "thesis-unfinished.tmp"):
        (cache / name).mkdir(parents=True)
        (cache / name / "chapter.txt").write_text("precious")
    (cache / "thesis-unfinished.tmp" / UNFINISHED).touch()  # not a name of ours
    (cache / "notes.tmp").write_text("precious")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / UNFINISHED).touch()
    (cache / "link-0123456789ab.tmp").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    alive = cache / "other-0123456789ab.tmp"  # another corpus, being written by a live run
    alive.mkdir()
    (alive / UNFINISHED).touch()
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    with FileLock(alive.with_suffix(".lock")):
        made = prepare((str(corpus),), cache=cache).folder
    assert before.items() <= {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}.items()
    new = {path for path in cache.iterdir() if path not in before} - {alive.with_suffix(".lock")}
    assert new == {made, made.with_name(made.name + ".lock")} and not (made / UNFINISHED).exists()


def test_interrupted_cleanup(corpus, tmp_path, monkeypatch):
    """Wherever deletion is interrupted, the rest is still recognised as ours, and the next run deletes it."""
    folder = prepare((str(corpus),), cache=tmp_path / "first").folder
    temp = tmp_path / "cache" / (folder.name + ".tmp")
    for after in range(4):
        (temp / "text").mkdir(parents=True, exist_ok=True)
        for name in (UNFINISHED, "train-00000.bin", "text/part", "zzz"):
            (temp / name).touch()
        count = itertools.count()

        def unlink(path, *args, after=after, count=count, plain=os.unlink, **kwargs):
            if next(count) >= after:
                raise KeyboardInterrupt
            plain(path, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "unlink", unlink)
            prepare((str(corpus),), cache=tmp_path / "cache")
        assert (temp / UNFINISHED).exists()
    made = prepare((str(corpus),), cache=tmp_path / "cache").folder
    assert contents(made) == contents(folder) and not temp.exists()


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_our_temporary_name_is_taken(corpus, tmp_path, kind):
    """Something foreign with the name of our temporary folder gives a one-line error that names it, and stays. An empty
    folder, as left by an early kill, is reused."""
    folder = prepare((str(corpus),), cache=tmp_path / "first").folder
    place = tmp_path / "cache" / (folder.name + ".tmp")
    place.parent.mkdir()
    precious = place / "chapter.txt" if kind == "folder" else tmp_path / "elsewhere" if kind == "link" else place
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("precious")
    if kind == "link":
        place.symlink_to(precious)
    with pytest.raises(UserError, match="not a temporary folder of nanochin;") as refused:
        prepare((str(corpus),), cache=tmp_path / "cache")
    assert str(place) in str(refused.value) and precious.read_text() == "precious"
    precious.unlink()
    if kind == "folder":
        assert contents(prepare((str(corpus),), cache=tmp_path / "cache").folder) == contents(folder)


def test_two_runs_at_once_tokenise_once(corpus, tmp_path):
    """The second waits, reports it, and opens what the first built."""
    cache = str(tmp_path / "cache")
    first = child(PREPARE.format(data=str(corpus), cache=cache, pause_at="tokenising", pause=1.0))
    wait_for(first, "tokenising")
    second = child(PREPARE.format(data=str(corpus), cache=cache, pause_at="", pause=0))
    out, errors = second.communicate(timeout=60)
    first_out, first_errors = first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), first_errors + errors
    stages = [line for line in out.splitlines() if line != "hashing"]
    assert stages[0].startswith("waiting for another run") and len(stages) == 2
    assert stages[-1] == first_out.splitlines()[-1]
    assert contents(Path(stages[-1])) == contents(prepare((str(corpus),), cache=tmp_path / "alone").folder)


def test_a_full_disk_is_one_line_and_leaves_nothing(corpus, tmp_path):
    """If the system fails to write (a limit of 200 KB per file), the error names the path and the temporary folder is
    deleted."""
    pytest.importorskip("resource")
    code = f"""
import resource
from nanochin.base.cli import UserError
from nanochin.data.corpus import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    prepare(({str(corpus)!r},), cache={str(tmp_path / "cache")!r})
except UserError as error:
    print(error)
"""
    out, errors = child(code).communicate(timeout=60)
    assert out.startswith(str(tmp_path / "cache")) and "File too large" in out and out.count("\n") == 1, errors
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_no_space_left_gives_advice(corpus, tmp_path, monkeypatch):
    """ENOSPC, raised by the system for /dev/full, adds the advice."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    real = open

    def full(path, mode="r", *args, **kwargs):
        return real("/dev/full" if str(path).endswith("train-00000.bin") else path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(UserError, match="No space left on device; make room or choose another `cache`") as error:
        prepare((str(corpus),), cache=tmp_path / "cache")
    assert str(tmp_path / "cache") in str(error.value)


@pytest.mark.parametrize("file", ["train-00000.bin", "val-00000.bin", RANKS_FILE, "meta.json"])
@pytest.mark.parametrize("whole", [True, False])
def test_damaged_shards_are_named(corpus, tmp_path, monkeypatch, file, whole):
    """A file that is truncated, changed or missing is named, with the folder to delete; large corpora are checked at
    both ends of each file."""
    if not whole:
        monkeypatch.setattr("nanochin.data.corpus.CHECK_WHOLE", 0)
    options = {"cache": tmp_path / "cache", "tokenizer": "bpe", "vocab_size": 300}
    folder = prepare((str(corpus),), **options).folder
    good = (folder / file).read_bytes()
    changed = bytearray(good)
    changed[-1 if whole else 0] ^= 1
    for bad in (good[:-1], good[:100], b"", bytes(changed), None):
        (folder / file).unlink()
        if bad is not None:
            (folder / file).write_bytes(bad)
        with pytest.raises(UserError, match=f"{file}: .*delete {folder} to rebuild it"):
            prepare((str(corpus),), **options)
        (folder / file).write_bytes(good)
    prepare((str(corpus),), **options)


def test_skipped_lines_are_in_the_record(corpus, tmp_path):
    """--skip-bad reads the rest and counts the lines that it skips, also from the cache; without it, cached tokens are
    rejected just like the file."""
    with open(corpus / "part-1.jsonl", "a") as file:
        file.write("\n{broken\n" + json.dumps({"text": words(1000, 200)}) + "\nnull\n")
    for _ in range(2):
        with pytest.raises(UserError, match="`skip_bad` skips"):
            prepare((str(corpus),), cache=tmp_path / "cache")
        found = prepare((str(corpus),), cache=tmp_path / "cache", skip_bad=True)
        assert found.skipped_records == 2 and found.documents + found.val_documents == 101


# Windows


def spans(w: Windows, start: int, count: int) -> list[int]:
    """First tokens of windows over np.arange: the position of each. Checks that the rest follows, around the ring."""
    rows = w.batch(start, count)
    assert rows.dtype == np.int64 and rows.shape == (count, w.seq_len + 1)
    assert (rows == (rows[:, :1] + np.arange(w.seq_len + 1)) % len(w.tokens)).all()
    return rows[:, 0].tolist()


@pytest.mark.parametrize(("tokens", "T"), [(1001, 10), (1000, 10), (1009, 10), (500, 1), (11, 10), (777, 64)])
def test_each_window_of_an_epoch_is_drawn_once(tokens, T):
    """In each of four epochs the windows do not overlap: no token is a target twice, and all but fewer than T+1 are
    targets."""
    w = Windows(np.arange(tokens), T, seed=3)
    assert w.per_epoch == (tokens - 1) // T
    shifts = set()
    for epoch in range(4):
        firsts = spans(w, epoch * w.per_epoch, w.per_epoch)
        targets = Counter((first + i) % tokens for first in firsts for i in range(1, T + 1))
        assert max(targets.values()) == 1 and len(targets) == w.per_epoch * T > tokens - T - 1
        shift = {first % T for first in firsts if first + T < tokens}
        shifts |= shift
        assert epoch > 0 or sorted(firsts) == list(range(0, w.per_epoch * T, T))
    assert len(shifts) > 1 or T == 1 or w.per_epoch == 1


def test_order_depends_only_on_seed_and_epoch():
    """Windows are shuffled, differently for each seed and epoch, whatever the batches."""
    w = Windows(np.arange(10_001), 10, seed=0)
    first, second = spans(w, 0, 1000), spans(w, 1000, 1000)
    assert first != sorted(first) and [a - second[0] for a in first] != [a - second[0] for a in second]
    assert spans(Windows(np.arange(10_001), 10, seed=1), 0, 1000) != first
    for cut in (7, 995, 1000):  # also across epochs
        parts = np.concatenate([w.batch(990, cut), w.batch(990 + cut, 1010 - cut)])
        assert (parts == Windows(np.arange(10_001), 10, seed=0).batch(990, 1010)).all()


def test_order_is_stable_across_numpy_versions():
    """A resumed run needs the same order under any NumPy version: Philox, SeedSequence with seed and epoch as entropy,
    a permutation of uint32."""
    w = Windows(np.arange(101), 10, seed=1234)
    philox = np.random.Generator(np.random.Philox(np.random.SeedSequence([1234, 0])))
    assert [a // 10 for a in spans(w, 0, 10)] == philox.permutation(np.arange(10, dtype=np.uint32)).tolist()
    assert spans(w, 0, 20) == [50, 40, 70, 60, 90, 30, 80, 20, 0, 10, 58, 8, 88, 68, 38, 18, 28, 48, 98, 78]


def test_windows_span_shards(corpus, tmp_path, monkeypatch):
    """Windows that span two shards, or the end of the ring, equal those of the tokens as one array."""
    monkeypatch.setattr(module, "SHARD", 1000)
    tokens = prepare((str(corpus / "part-0.jsonl"),), cache=tmp_path / "cache").train
    assert len(tokens.parts) > 100
    a, b = Windows(tokens, 300, seed=5), Windows(tokens[:], 300, seed=5)
    assert (a.batch(0, 3 * a.per_epoch) == b.batch(0, 3 * a.per_epoch)).all()


def test_too_few_tokens_for_one_window():
    """T+1 tokens are one window; with T tokens the error says how many there are."""
    assert Windows(np.arange(9), 8, seed=0).batch(0, 2).tolist()[0] == list(range(9))
    with pytest.raises(UserError, match="`seq_len` 8: the training text has only 8 tokens"):
        Windows(np.arange(8), 8, seed=0)


@pytest.mark.parametrize(
    ("tokens", "T", "rows"), [(101, 10, 10), (102, 10, 11), (100, 10, 10), (2, 10, 1), (11, 10, 1)]
)
def test_every_token_but_the_first_is_evaluated_once(tokens, T, rows):
    """Targets are 1, 2, ... in order, each following its input, padded with -1 to whole rows."""
    x, y = eval_windows(np.arange(tokens), T)
    assert x.shape == y.shape == (rows, T) and x.dtype == y.dtype == np.int64
    assert y[y >= 0].tolist() == list(range(1, tokens))
    assert (x[y >= 0] == y[y >= 0] - 1).all() and (x >= 0).all()
    assert y.ravel()[tokens - 1 :].tolist() == [-1] * (rows * T - tokens + 1)
