"""Text in, windows of tokens out.

    files ──> flat text ──> training and validation ranges ──> shards of token ids in the cache ──> windows
    files of tokens ───────────────────────────────────────────────────────────────────────────────────┘

`prepare` makes the shards once for a corpus and a tokenizer (`text.py` has the first two steps) and opens them from
then on; token files are used where they lie (`tokenfiles.py`). `Windows` and `eval_windows` cut them for training and
evaluation. No torch here.

Threads encode: tiktoken releases Python's lock, and unlike processes they need no second import of the program, no
copies of the text, and leave nothing behind when the program is killed.
"""

import errno
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, repeat
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from nanochin import hub
from nanochin.config import Config, UserError
from nanochin.console import Progress
from nanochin.files import fsync, sha256_of
from nanochin.text import (
    MAX_HELD_OUT,
    File,
    Stage,
    Text,
    Tokens,
    char_start,
    corpus_name,
    count_documents,
    find_files,
    fingerprint,
    read_text,
    split,
    thin,
    total_bytes,
    whole,
)
from nanochin.tokenfiles import check_ids, hold_out, hold_tokens, open_tokens, pickle_beside, validation_beside
from nanochin.tokenizer import BPE_VOCAB, Tokenizer, check, train_bpe

VERSION = 1  # of the cache folder's content; part of its name
SHARD = 100_000_000  # tokens in a shard
UNFINISHED = "nanochin-unfinished"  # an empty file in a cache folder that is being made: the proof that it is ours
JOB = 1 << 20  # bytes of text that a thread encodes at a time
BPE_SAMPLE = 1 << 25  # bytes of text that it is trained on, at most
CHECK_WHOLE = 1 << 28  # shards up to 256 MB in all are hashed in full when opened, larger ones at both ends


@dataclass(frozen=True)
class Corpus:
    """Tokens of one corpus and what they stand for. Our shards begin with end-of-text and every document is followed
    by one, so each byte of the text is predicted exactly once in a pass over them. Of token files that others wrote
    the counts of bytes and documents are 0: unknown."""

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
    skipped_records: int = 0  # lines and rows without text
    format: str = "text"  # or that of the token files


def prepare(
    data: tuple[str, ...],
    *,
    val: tuple[str, ...] | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    val_bytes: int = 1 << 20,
    max_tokens: float | None = None,
    skip_bad: bool = False,
    cache: str | Path = "cache",
    progress: Progress | None = None,
) -> Corpus:
    """Training and validation tokens of `data`, from the folder `cache` or made and kept there, or of token files.

    data: `python`, `python-all`, `hf:` data sets, or files, folders and globs. The validation text is `val`; else the
    files among the data (or beside token files) with val, valid or validation as a word of their name; else what
    `text.split` chooses; of any of these about `val_bytes` at most, in evenly spaced blocks. So it depends on the text
    and `val_bytes` alone. Files that are in `val` are not trained on. vocab_size: of our own BPE (default 4096), or of
    token files without a tokenizer; the other tokenizers have their own. progress: called a few times a second,
    perhaps from another thread.

    Raises UserError for data that is missing, empty, unreadable or damaged, an unknown tokenizer, a full disk, a
    damaged cache.
    """
    check(tokenizer or "bytes", vocab_size)
    if max_tokens and not any(item.startswith(hub.PREFIX) for item in (*data, *(val or ()))):
        raise UserError(f"`max_tokens` {max_tokens:g}: is for hf: data sets; `tokens` says how long to train")
    if val_bytes < 1024:
        raise UserError(f"`val_bytes` {val_bytes}: too little to measure a loss on; give 1024 or more")
    with _os_errors(cache):
        fetch = partial(_fetch, max_tokens, tokenizer or "bytes", vocab_size, Path(cache) / "hub", progress)
        data, val = fetch("data", data), fetch("val", val or ())
        train_files = find_files(data, "data", progress)
        val_files = find_files(val, "val", progress) or [file for file in train_files if file.is_validation]
        if not val and len(val_files) == len(train_files):
            val_files = []  # a corpus that is itself called validation
        if not val_files:
            val_files = find_files(validation_beside(train_files), "val", progress)
        held = {file.sha for file in val_files}
        train_files = [file for file in train_files if file.sha not in held]
        if not train_files:
            raise UserError(f"`val` {' '.join(val or data)}: the same files as `data`; nothing is left to train on")
        if hold_tokens(train_files + val_files):
            return _open(corpus_name(data), train_files, val_files, val_bytes, tokenizer, vocab_size, progress)
        if tokenizer and tokenizer.startswith("ids-"):
            raise UserError(
                f"`tokenizer` {tokenizer}: is for token files, but {train_files[0].path} is text: name the "
                "tokenizer that the model is to read it with, such as gpt2"
            )
        vocab_size = (vocab_size or BPE_VOCAB) if tokenizer == "bpe" else None
        recipe = Recipe(
            corpus_name(data), train_files, val_files, val_bytes, tokenizer or "bytes", vocab_size, skip_bad
        )
        folder = Path(cache) / f"{recipe.name}-{recipe.key()}"
        if not folder.exists():
            with _locked(folder, progress):
                if not folder.exists():  # another run may have made it while this one waited
                    _build(folder, recipe, progress)
        corpus = load(folder)
        if corpus.skipped_records and not skip_bad:
            raise UserError(
                f"`data`: {corpus.skipped_records} lines or rows of it have no text; `skip_bad` goes on without such"
            )
        return corpus


def prepare_for(config: Config, data: tuple[str, ...], progress: Progress | None = None) -> Corpus:
    """`prepare` as the options of a run say."""
    return prepare(
        data,
        val=config.val,
        tokenizer=config.tokenizer,
        vocab_size=config.vocab_size,
        val_bytes=config.val_bytes,
        max_tokens=config.max_tokens,
        skip_bad=config.skip_bad,
        cache=config.cache,
        progress=progress,
    )


def load(folder: str | Path) -> Corpus:
    """Open a finished cache folder. Raises UserError, naming the file, if one is missing, cut short or changed.

    Checked are the sizes and the SHA-256 of all files; if they are above 256 MB, that of their first and last MB.
    """
    folder = Path(folder)
    again = f"delete {folder} to tokenise again"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        files, about = meta["files"], meta["corpus"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder / 'meta.json'}: missing or damaged; {again}") from None
    check = "sha256" if sum(file["bytes"] for file in files.values()) <= CHECK_WHOLE else "sha256_ends"
    for name, file in files.items():
        path = folder / name
        size = path.stat().st_size if path.exists() else 0
        if size != file["bytes"]:
            raise UserError(f"{path}: {size} bytes, should be {file['bytes']}; {again}")
        if CHECKSUMS[check](path) != file[check]:
            raise UserError(f"{path}: its content has changed since it was written; {again}")
    tokenizer = Tokenizer.load(meta["tokenizer"], folder)
    train, val = (
        Tokens([folder / name for name in sorted(files) if name.startswith(side)], tokenizer.dtype)
        for side in ("train-", "val-")
    )
    return Corpus(train, val, tokenizer, folder=folder, **about)


def read_tokens(data: tuple[str, ...], tokenizer: Tokenizer, max_bytes: int | None = None) -> tuple[np.ndarray, int]:
    """Tokens of all of `data`, or of about `max_bytes` of it in evenly spaced blocks; and the bytes they stand for.

    Raises UserError as `prepare` does. Nothing is cached.
    """
    with _os_errors(tempfile.gettempdir()), tempfile.TemporaryDirectory() as folder:
        files = find_files(data)
        if hold_tokens(files):
            tokens, _ = _map(files, tokenizer, Stage("checking"))
            return tokens[:], _text_bytes(tokens, tokenizer)
        text = read_text(files, Path(folder, "text"), Stage("reading"))
        ranges = whole(text) if max_bytes is None else thin(text, whole(text), max_bytes)
        return np.concatenate(list(encode(text, ranges, tokenizer, Stage("tokenising")))), total_bytes(ranges)


def _fetch(
    max_tokens: float | None,
    tokenizer: str,
    vocab_size: int | None,
    folder: Path,
    progress: Progress | None,
    option: str,
    items: tuple[str, ...],
) -> tuple[str, ...]:
    """`items` with the data sets of the hub among them as files in `folder`, streamed there the first time."""
    paths = []
    for item in items:
        if item.startswith(hub.PREFIX):
            source = hub.parse(item, option, max_tokens, tokenizer, vocab_size)
            item = folder / source.place
            if not item.exists():
                with _locked(item, progress):
                    if not item.exists():
                        hub.stream(source, item, progress)
        paths.append(str(item))
    return tuple(paths)


# ---------------------------------------------------------------------------------------------------------------------
# Token files, which are used as they are


def _open(
    name: str,
    train: list[File],
    val: list[File],
    val_bytes: int,
    tokenizer: str | None,
    vocab_size: int | None,
    progress: Progress | None,
) -> Corpus:
    """Token files as a corpus. Without validation files blocks of the tokens are held out, at most 5% of them."""
    if tokenizer == "bpe":
        raise UserError(
            "`tokenizer` bpe: is trained on text, these are token files; name the tokenizer that wrote "
            "them, or give `vocab_size`"
        )
    if tokenizer is None and vocab_size is None:
        raise UserError(
            f"{train[0].path}: what its ids mean is not in the file{pickle_beside(train[0].path)}; give "
            "`tokenizer`, such as gpt2, or `vocab_size`"
        )
    tokenizer = Tokenizer.load(tokenizer or f"ids-{vocab_size}")
    stage = Stage("checking", sum(file.size for file in train + val), progress)
    tokens, sha = _map(train, tokenizer, stage)
    keep = val_bytes // tokens.parts[0].itemsize
    if val:
        held, _ = _map(val, tokenizer, stage)
        held = hold_out(held, keep)[1] if len(held) > keep else held
    else:
        tokens, held = hold_out(tokens, min(keep, int(MAX_HELD_OUT * len(tokens))))
    if len(held) < 2:
        raise UserError(f"{(val or train)[0].path}: too few tokens to keep some for validation; give `val`")
    val_sha = hashlib.sha256()
    for part in held.parts:
        val_sha.update(part.astype("<i8").tobytes())
    return Corpus(tokens, held, tokenizer, name, folder=Path(train[0].path).parent, data_sha=sha,
                  val_sha=val_sha.hexdigest(), train_bytes=0, val_bytes=_text_bytes(held, tokenizer), documents=0,
                  val_documents=0, skipped_bytes=0, format=open_tokens(train[0].path).format)  # fmt: skip


def _map(files: list[File], tokenizer: Tokenizer, stage: Stage) -> tuple[Tokens, str]:
    """The ids of token files in their order, all below the vocabulary; and the fingerprint of what they are."""
    opened = [open_tokens(file.path) for file in files]
    check_ids(opened, tokenizer, stage)
    kinds = [replace(file, format=f"{o.format} {o.ids.dtype}") for file, o in zip(files, opened, strict=True)]
    return Tokens.of([o.ids for o in opened]), fingerprint(kinds)


def _text_bytes(tokens: Tokens, tokenizer: Tokenizer) -> int:
    """How many bytes of text the tokens stand for; 0 where nobody knows."""
    return 0 if tokenizer.numbers else sum(len(tokenizer.decode_bytes(part)) for part in tokens.parts)


# ---------------------------------------------------------------------------------------------------------------------
# Making a cache folder


@dataclass(frozen=True)
class Recipe:
    """All that decides the content of a cache folder."""

    name: str
    train: list[File]
    val: list[File]  # none: part of the training files
    val_bytes: int
    tokenizer: str
    vocab_size: int | None  # of our own BPE
    skip_bad: bool

    def key(self) -> str:
        """Not of skip_bad: text without bad records comes out alike, and `prepare` refuses what it does not allow."""
        parts = [VERSION, fingerprint(self.train), fingerprint(self.val), self.val_bytes]
        return hashlib.sha256(json.dumps([*parts, self.tokenizer, self.vocab_size]).encode()).hexdigest()[:12]


@contextmanager
def _os_errors(place: str | Path) -> Iterator[None]:
    """What the operating system refuses, as one line: a file that may not be read, a disk that is full."""
    try:
        yield
    except OSError as error:
        advice = "; make room or choose another `cache`" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(f"{error.filename or place}: {error.strerror or error}{advice}") from error


@contextmanager
def _locked(folder: Path, progress: Progress | None) -> Iterator[None]:
    """Held while `folder` is made; a second run waits here. The lock of a killed process is free at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            progress("waiting for another run that makes the same tokens", 0, 1)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(folder: Path, recipe: Recipe, progress: Progress | None) -> None:
    """Make `folder` under a temporary name, then rename it: finished, or not there at all."""
    temp = folder.with_name(folder.name + ".tmp")
    for leftover in folder.parent.glob("*.tmp"):
        with suppress(OSError):  # somebody else's; Timeout is one, too: another run is still writing it
            if _is_unfinished(leftover):
                with nullcontext() if leftover == temp else FileLock(leftover.with_suffix(".lock"), timeout=0):
                    _discard(leftover)
    if temp.is_symlink() or temp.exists() and not (temp.is_dir() and not any(temp.iterdir())):
        raise UserError(
            f"{temp}: already exists and is not a temporary folder of nanochin's; move or delete it, then run again"
        )
    temp.mkdir(exist_ok=True)
    try:
        (temp / UNFINISHED).touch()
        meta = _write(temp, recipe, progress)
        made = sorted(path for path in temp.iterdir() if path.name != UNFINISHED)
        meta["files"] = {
            path.name: {"bytes": path.stat().st_size, **{kind: f(path) for kind, f in CHECKSUMS.items()}}
            for path in made
        }
        (temp / "meta.json").write_text(json.dumps(meta, indent=2))
        for path in [*temp.iterdir(), temp]:
            fsync(path)
        temp.rename(folder)
        fsync(folder.parent)
        (folder / UNFINISHED).unlink()
    finally:
        _discard(temp)


def _is_unfinished(path: Path) -> bool:
    """Whether `path` is a cache folder that a run of ours began. Its name alone is no proof."""
    named = re.fullmatch(r".+-[0-9a-f]{12}\.tmp", path.name)
    return bool(named) and not path.is_symlink() and (path / UNFINISHED).is_file()


def _discard(temp: Path) -> None:
    """Delete an unfinished folder; what proves that it is ours goes last, in case this is interrupted."""
    with suppress(OSError):
        for path in temp.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != UNFINISHED:
                path.unlink()
        (temp / UNFINISHED).unlink(missing_ok=True)
        temp.rmdir()


def _write(temp: Path, recipe: Recipe, progress: Progress | None) -> dict:
    """Shards and tokenizer of the corpus into `temp`. Returns what meta.json says of them."""
    if recipe.tokenizer != "bpe":
        tokenizer = Tokenizer.load(recipe.tokenizer)  # first: without a network it fails, and reading may take long
    stage = Stage("reading", sum(file.size for file in recipe.train + recipe.val), progress)
    text = val_text = read_text(recipe.train, temp / "text", stage, recipe.skip_bad)
    if recipe.val:
        val_text = read_text(recipe.val, temp / "val-text", stage, recipe.skip_bad)
        train, val = whole(text), whole(val_text)
    else:
        train, val = split(text, recipe.val_bytes)
    val = thin(val_text, val, recipe.val_bytes)

    if recipe.tokenizer == "bpe":
        sample = thin(text, train, BPE_SAMPLE)
        stage = Stage("training the tokenizer", total_bytes(sample), progress)
        tokenizer = train_bpe(_strings(text, sample, stage), recipe.vocab_size)
    tokenizer.save(temp)

    stage = Stage("tokenising", total_bytes(train) + total_bytes(val), progress)
    _write_shards(encode(text, train, tokenizer, stage), temp, "train")
    _write_shards(encode(val_text, val, tokenizer, stage), temp, "val")
    val_sha = hashlib.sha256()
    for start, stop, _ in _pieces(val_text, val):
        val_sha.update(val_text.bytes[start:stop])
    texts = (text, val_text) if recipe.val else (text,)
    for name in ("text", "val-text")[: len(texts)]:
        shutil.rmtree(temp / name)
    corpus = {
        "name": recipe.name,
        "data_sha": fingerprint(recipe.train),
        "val_sha": val_sha.hexdigest(),
        "train_bytes": total_bytes(train),
        "val_bytes": total_bytes(val),
        "documents": count_documents(text, train),
        "val_documents": count_documents(val_text, val),
        "skipped_bytes": sum(t.skipped for t in texts),
        "skipped_records": sum(t.bad for t in texts),
    }
    return {"version": VERSION, "tokenizer": tokenizer.name, "corpus": corpus}


def encode(text: Text, ranges: np.ndarray, tokenizer: Tokenizer, stage: Stage) -> Iterator[np.ndarray]:
    """Tokens of `ranges` in order: end-of-text, then each document with end-of-text after its last byte."""
    eot = np.array([tokenizer.eot], tokenizer.dtype)

    def encode_job(job: list[tuple[int, int, bool]]) -> np.ndarray:
        tokens = []
        for start, stop, is_end in job:
            tokens.append(tokenizer.encode(text.bytes[start:stop].tobytes()))
            if is_end:
                tokens.append(eot)
        stage.add(sum(stop - start for start, stop, _ in job))
        return np.concatenate(tokens)

    yield eot
    yield from stage.map(encode_job, _jobs(_pieces(text, ranges)))


def _pieces(text: Text, ranges: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    """`ranges` in pieces (start, stop, whether a document ends there) of one document and at most JOB bytes each."""
    for start, stop in ranges.tolist():
        first, last = np.searchsorted(text.ends, [start + 1, stop + 1])
        ends = zip(map(int, text.ends[first:last]), repeat(True), strict=False)
        for end, is_end in chain(ends, [(stop, False)]):
            while end - start > JOB:
                cut = _cut(text, start)
                yield start, cut, False
                start = cut
            if start < end:
                yield start, end, is_end
            start = end


def _cut(text: Text, start: int) -> int:
    """Where to cut within JOB bytes of `start` so that no token changes: before a space after a visible ASCII
    character, which no pattern of tiktoken joins. Failing that (rare), at a character."""
    window = text.bytes[start : start + JOB].tobytes()
    last = re.match(rb".*[!-~](?= )", window, re.DOTALL)
    return start + last.end() if last else char_start(text, start + JOB)


def _strings(text: Text, ranges: np.ndarray, stage: Stage) -> Iterator[str]:
    for start, stop, _ in _pieces(text, ranges):
        yield text.bytes[start:stop].tobytes().decode()
        stage.add(stop - start)


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


def _hash_ends(path: Path) -> str:
    """SHA-256 of the first and last MB of a file."""
    with open(path, "rb") as file:
        sha = hashlib.sha256(file.read(1 << 20))
        file.seek(max(0, path.stat().st_size - (1 << 20)))
        sha.update(file.read())
    return sha.hexdigest()


CHECKSUMS = {"sha256": sha256_of, "sha256_ends": _hash_ends}


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
            raise UserError(
                f"`seq_len` {seq_len}: the training text has only {len(tokens)} tokens, less than one "
                "window; give more text or a shorter length"
            )
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
            head = min(T + 1, size - first)
            row[:head] = self.tokens[first : first + head]
            if head <= T:  # over the end of the ring
                row[head:] = self.tokens[: T + 1 - head]
        return out


@lru_cache(maxsize=2)  # a batch may lie across two epochs
def _order(seed: int, epoch: int, windows: int, seq_len: int) -> tuple[int, np.ndarray]:
    """Where epoch `epoch` cuts the ring, and the order of its windows."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed % 2**64, epoch])))
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
