"""Text in, windows of tokens out.

    files ──> flat text ──> training and validation ranges ──> shards of token ids in the cache ──> windows

`prepare` makes the shards once for a corpus and a tokenizer (`text.py` has the first two steps) and opens them from
then on; `Windows` and `eval_windows` cut them for training and evaluation. No torch here.

Threads encode: tiktoken releases Python's lock, and unlike processes they need no second import of the program, no
copies of the text, and leave nothing behind when the program is killed.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from nanochin.config import UserError
from nanochin.text import (
    Meter,
    Progress,
    Text,
    Tokens,
    char_start,
    corpus_name,
    count_documents,
    find_files,
    fingerprint,
    hash_file,
    parallel,
    read_text,
    split,
    thin,
    total_bytes,
)
from nanochin.tokenizer import Tokenizer, check_name, train_bpe

VERSION = 1  # of the cache folder's content; part of its name
SHARD = 100_000_000  # tokens in a shard
JOB = 1 << 20  # bytes of text that a thread encodes at a time
BPE_VOCAB = 4096  # default --vocab-size of our own BPE
BPE_SAMPLE = 1 << 25  # bytes of text that it is trained on, at most
CHECK_WHOLE = 1 << 28  # shards up to 256 MB in all are hashed in full when opened, larger ones at both ends


@dataclass(frozen=True)
class Corpus:
    """Tokens of one corpus and what they stand for. The shards begin with end-of-text and every document is followed
    by one, so each byte of the text is predicted exactly once in a pass over them."""

    train: Tokens
    val: Tokens
    tokenizer: Tokenizer
    name: str  # short and human: "python", or from the names of the files
    folder: Path
    data_sha: str  # SHA-256 over the SHA-256 of the files, in their order
    val_sha: str  # SHA-256 of the validation text
    train_bytes: int
    val_bytes: int  # text bytes that the validation tokens stand for
    documents: int  # with text in the training part
    val_documents: int
    skipped_bytes: int  # invalid UTF-8 and NUL


def prepare(data: tuple[str, ...], *, val: tuple[str, ...] | None = None, tokenizer: str = "bytes",
            vocab_size: int | None = None, val_bytes: int = 1 << 20, cache: str | Path = "cache",
            progress: Progress | None = None) -> Corpus:  # fmt: skip
    """Training and validation tokens of `data`, from `cache` or tokenised into it.

    data: `python`, `python-all`, or files, folders and globs. Validation text is `val`; else the files among the
    data with val, valid or validation as a word of their name; else what `split` chooses; of any of them at most
    about `val_bytes`, in evenly spaced blocks. So it depends on the text and `val_bytes` alone.

    vocab_size: of our own BPE. progress: called a few times a second, maybe from another thread.

    Raises UserError for data that is missing, empty, unreadable or damaged, an unknown tokenizer, a full disk, a
    cache that was damaged.
    """
    check_name(tokenizer)
    progress = progress or (lambda stage, done, total: None)
    train_files, val_files = find_files(data, progress), find_files(val or (), progress)
    if val is None and not all(is_val := [file.is_validation for file in train_files]):
        val_files = [file for file, named in zip(train_files, is_val, strict=True) if named]
    held = {file.sha for file in val_files}
    train_files = [file for file in train_files if file.sha not in held]
    if not train_files:
        raise UserError(f"--val {' '.join(val or ())}: nothing is left to train on; --data has the same files")

    data_sha, vocab = fingerprint(train_files), (vocab_size or BPE_VOCAB) if tokenizer == "bpe" else None
    key = [VERSION, data_sha, fingerprint(val_files), val_bytes, tokenizer, vocab]
    name = corpus_name(data)
    folder = Path(cache) / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}"
    if not folder.exists():
        Path(cache).mkdir(parents=True, exist_ok=True)
        with _locked(folder, progress):
            if not folder.exists():  # another run may have made it while this one waited
                about = {"name": name, "data_sha": data_sha}
                _build(folder, train_files, val_files, tokenizer, vocab, val_bytes, about, progress)
    return load(folder)


def load(folder: str | Path) -> Corpus:
    """Open a finished cache folder. Raises UserError, naming the file, if one is missing, cut short or changed.

    Sizes are always checked, and the SHA-256 of every file; above 256 MB in all, that of its first and last MB.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        files, about = meta["files"], meta["corpus"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder / 'meta.json'}: missing or damaged; delete {folder} to tokenise again") from None
    check = "sha256" if sum(file["bytes"] for file in files.values()) <= CHECK_WHOLE else "sha256_ends"
    for name, file in files.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != file["bytes"]:
            size = f"{path.stat().st_size} bytes" if path.exists() else "missing"
            raise UserError(f"{path}: {size}, expected {file['bytes']} bytes; delete {folder} to tokenise again")
        if _checksum(path, check) != file[check]:
            raise UserError(f"{path}: content has changed ({check}); delete {folder} to tokenise again")
    tokenizer = Tokenizer.load(meta["tokenizer"], folder)
    train, val = (Tokens([folder / name for name in sorted(files) if name.startswith(side)], tokenizer.dtype)
                  for side in ("train-", "val-"))  # fmt: skip
    return Corpus(train=train, val=val, tokenizer=tokenizer, folder=folder, **about)


def read_tokens(data: tuple[str, ...], tokenizer: Tokenizer, max_bytes: int | None = None) -> tuple[np.ndarray, int]:
    """All tokens of `data` (or of about `max_bytes` of it, evenly spaced), and the bytes that they stand for."""
    with tempfile.TemporaryDirectory() as folder:
        text = read_text(find_files(data), Path(folder, "text"), Meter())
        ranges = thin(text, _whole(text), max_bytes or len(text.bytes))
        return np.concatenate(list(encode(text, ranges, tokenizer, Meter()))), total_bytes(ranges)


# ---------------------------------------------------------------------------------------------------------------------
# Making a cache folder


@contextmanager
def _locked(folder: Path, progress: Progress):
    """Held while `folder` is made; a second run waits here. The lock of a killed process is free at once."""
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("waiting for another run that tokenises the same text", 0, 1)
        lock.acquire()
    with lock:
        lock.release()  # `with` holds it a second time
        yield


def _build(folder: Path, train_files: list, val_files: list, tokenizer_name: str, vocab: int | None, val_bytes: int,
           about: dict, progress: Progress) -> None:  # fmt: skip
    """Write everything into a temporary folder beside `folder`, then rename it: finished or not there at all."""
    temp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temp, ignore_errors=True)  # of a run that was killed: we hold the lock
    try:
        temp.mkdir()
        meta = _write(temp, train_files, val_files, tokenizer_name, vocab, val_bytes, about, progress)
        shutil.rmtree(temp / "text")
        files = {path.name: path for path in sorted(temp.iterdir())}
        meta["files"] = {name: {"bytes": path.stat().st_size, **{kind: _checksum(path, kind) for kind in CHECKSUMS}}
                         for name, path in files.items()}  # fmt: skip
        (temp / "meta.json").write_text(json.dumps(meta, indent=2))
        for path in [*temp.iterdir(), temp]:
            _fsync(path)
        temp.rename(folder)
        _fsync(folder.parent)
    except OSError as error:
        raise UserError(f"{error.filename or temp}: {error.strerror}; choose another --cache or make room") from None
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _write(temp: Path, train_files: list, val_files: list, tokenizer_name: str, vocab: int | None, val_bytes: int,
           about: dict, progress: Progress) -> dict:  # fmt: skip
    """Tokens and tokenizer of one corpus into `temp`; returns what meta.json says of them."""
    size = sum(file.path.stat().st_size for file in train_files + val_files)
    meter = Meter(progress, "reading", size)
    reading = [(train_files, temp / "text" / "train"), (val_files, temp / "text" / "val")]
    text, val_text = parallel(lambda job: read_text(*job, meter), reading)
    if val_files:
        train, val = _whole(text), _whole(val_text)
    else:
        val_text = text
        train, val = split(text, val_bytes)
    val = thin(val_text, val, val_bytes)

    if tokenizer_name == "bpe":
        sample = thin(text, train, BPE_SAMPLE)
        progress("training the tokenizer", 0, total_bytes(sample))
        tokenizer = train_bpe((text.bytes[a:b].tobytes().decode() for a, b, _ in _pieces(text, sample)), vocab)
    else:
        tokenizer = Tokenizer.load(tokenizer_name)
    tokenizer.save(temp)

    meter = Meter(progress, "tokenising", total_bytes(train) + total_bytes(val))
    _write_shards(encode(text, train, tokenizer, meter), temp, "train")
    _write_shards(encode(val_text, val, tokenizer, meter), temp, "val")
    val_sha = hashlib.sha256()
    for a, b in val:
        val_sha.update(val_text.bytes[a:b])
    about |= {"val_sha": val_sha.hexdigest(), "train_bytes": total_bytes(train), "val_bytes": total_bytes(val),
              "documents": count_documents(text, train), "val_documents": count_documents(val_text, val),
              "skipped_bytes": text.skipped + (val_text.skipped if val_files else 0)}  # fmt: skip
    return {"version": VERSION, "tokenizer": tokenizer.name, "corpus": about}


def encode(text: Text, ranges: np.ndarray, tokenizer: Tokenizer, meter: Meter) -> Iterator[np.ndarray]:
    """Tokens of `ranges` in order: end-of-text, then each document with end-of-text after its last byte."""
    eot = np.array([tokenizer.eot], tokenizer.dtype)

    def encode_job(job: list[tuple[int, int, bool]]) -> np.ndarray:
        tokens = []
        for start, stop, is_end in job:
            tokens.append(tokenizer.encode(text.bytes[start:stop].tobytes()))
            if is_end:
                tokens.append(eot)
        meter.add(sum(stop - start for start, stop, _ in job))
        return np.concatenate(tokens)

    yield eot
    yield from parallel(encode_job, _jobs(_pieces(text, ranges)))


def _pieces(text: Text, ranges: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    """`ranges` in pieces (start, stop, whether a document ends there) of one document and at most JOB bytes each."""
    for start, stop in ranges.tolist():
        ends = text.ends[slice(*np.searchsorted(text.ends, [start + 1, stop + 1]))].tolist()
        for end in ends + [stop] * (ends[-1:] != [stop]):
            while end - start > JOB:
                middle = _cut(text, start)
                yield start, middle, False
                start = middle
            yield start, end, end in ends[-1:] or end != stop
            start = end


def _cut(text: Text, start: int) -> int:
    """Where to cut the JOB bytes after `start` without changing a token: before a space after a visible ASCII
    character, which no tiktoken pattern joins. Failing that (rare), at a character."""
    window = text.bytes[start : start + JOB].tobytes()
    last = re.match(rb".*[!-~](?= )", window, re.DOTALL)
    return start + last.end() if last else char_start(text, start + JOB)


def _jobs(pieces: Iterable[tuple[int, int, bool]]) -> Iterator[list[tuple[int, int, bool]]]:
    """Pieces in lists of about JOB bytes."""
    job, size = [], 0
    for piece in pieces:
        job.append(piece)
        size += piece[1] - piece[0]
        if size >= JOB:
            yield job
            job, size = [], 0
    if job:
        yield job


def _write_shards(arrays: Iterable[np.ndarray], folder: Path, side: str) -> None:
    """One stream of tokens as little-endian files side-00000.bin, ... of SHARD tokens."""
    arrays, number = iter(arrays), 0
    tokens = next(arrays)
    while len(tokens):
        with open(folder / f"{side}-{number:05d}.bin", "wb") as file:
            room, number = SHARD, number + 1
            while room and len(tokens):
                written, tokens = tokens[:room], tokens[room:]
                file.write(written.astype(written.dtype.newbyteorder("<"), copy=False).tobytes())
                room -= len(written)
                if not len(tokens):
                    tokens = next(arrays, tokens)


def _whole(text: Text) -> np.ndarray:
    return np.array([[0, len(text.bytes)]])


CHECKSUMS = ("sha256", "sha256_ends")


def _checksum(path: Path, kind: str) -> str:
    """SHA-256 of a file, or of its first and last MB (`sha256_ends`)."""
    if kind == "sha256" or path.stat().st_size <= 2 << 20:
        return hash_file(path)
    with open(path, "rb") as file:
        sha = hashlib.sha256(file.read(1 << 20))
        file.seek(-(1 << 20), os.SEEK_END)
        sha.update(file.read())
    return sha.hexdigest()


def _fsync(path: Path) -> None:
    with suppress(PermissionError):  # Windows does not open folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------
# Windows


class Windows:
    """Training windows of T+1 tokens, T apart, so that each token is a target at most once in an epoch.

    They are drawn without replacement, in an order that (seed, epoch) alone fix. The tokens are seen as a ring that
    each epoch after the first cuts at a place of its own, so its windows are not those of the epoch before.
    Raises UserError when there are fewer than T+1 tokens.
    """

    def __init__(self, tokens: Tokens | np.ndarray, seq_len: int, seed: int):
        if len(tokens) < seq_len + 1:
            raise UserError(f"--seq-len {seq_len}: the training text has only {len(tokens)} tokens, less than one "
                            "window; give more text or a shorter length")  # fmt: skip
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.per_epoch = (len(tokens) - 1) // seq_len

    def batch(self, start: int, count: int) -> np.ndarray:
        """(count, T+1) int64: windows number start, start+1, ... since the beginning of the run."""
        T, size = self.seq_len, len(self.tokens)
        out = np.empty((count, T + 1), np.int64)
        for row, number in zip(out, range(start, start + count), strict=True):
            epoch, index = divmod(number, self.per_epoch)
            shift, order = _order(self.seed, epoch, self.per_epoch, T)
            first = (shift + int(order[index]) * T) % size
            head = min(T + 1, size - first)  # less where the window runs over the end of the ring
            row[:head] = self.tokens[first : first + head]
            row[head:] = self.tokens[: T + 1 - head]
        return out


@lru_cache(maxsize=2)  # a batch may lie across two epochs
def _order(seed: int, epoch: int, windows: int, seq_len: int) -> tuple[int, np.ndarray]:
    """Where epoch `epoch` cuts the ring, and the order of its windows."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    shift = int(random.integers(seq_len)) if epoch else 0
    return shift, random.permutation(np.arange(windows, dtype=np.uint32))


def eval_windows(tokens: Tokens | np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, (n, T) int64 each: every token but the first is a target exactly once, in order.

    The last row is filled up with input 0 and target -1, which the loss ignores.
    """
    n = -(-(len(tokens) - 1) // seq_len)
    x, y = np.zeros(n * seq_len, np.int64), np.full(n * seq_len, -1, np.int64)
    x[: len(tokens) - 1] = tokens[: len(tokens) - 1]
    y[: len(tokens) - 1] = tokens[1 : len(tokens)]
    return x.reshape(n, seq_len), y.reshape(n, seq_len)
