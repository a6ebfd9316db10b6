"""Text in, windows of tokens out.

    files ──> flat text ──> training and validation ranges ──> shards of token ids in the cache ──> windows
    files of tokens ───────────────────────────────────────────────────────────────────────────────────┘

`prepare` makes the shards once for a corpus and a tokenizer (text.py has the first two steps, cache.py the third) and
opens them from then on; token files are used where they lie (tokenfiles.py). windows.py cuts them for training and
evaluation. No torch here.
"""

import errno
import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from nanochin import hub
from nanochin.cache import CHECKSUMS, Recipe, build, encode
from nanochin.config import Config, UserError
from nanochin.console import Progress
from nanochin.text import (
    MAX_HELD_OUT,
    File,
    Stage,
    Tokens,
    corpus_name,
    find_files,
    fingerprint,
    read_text,
    thin,
    total_bytes,
    whole,
)
from nanochin.tokenfiles import check_ids, hold_out, hold_tokens, open_tokens, pickle_beside, validation_beside
from nanochin.tokenizer import BPE_VOCAB, Tokenizer, check

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
                    build(folder, recipe, progress)
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
