"""From text files to tokens for training and validation.

    files ──> flat text ──> training and validation ranges ──> shards of token ids in the cache ──> windows
    token files ───────────────────────────────────────────────────────────────────────────────────────┘

`prepare` makes the shards once per corpus and tokenizer (text.py does the first two steps, cache.py the third) and
reuses them afterwards. Token files are used in place (tokenfiles.py). windows.py cuts tokens into windows for training
and evaluation. No torch here.
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

from nanochin.base.cli import UserError
from nanochin.base.console import Progress
from nanochin.config import Config
from nanochin.data import sources
from nanochin.data.cache import CHECKSUMS, Recipe, build, encode
from nanochin.data.text import (
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
from nanochin.data.token_files import check_ids, hold_out, hold_tokens, open_tokens, pickle_beside, validation_beside
from nanochin.data.tokenizer import BPE_VOCAB, Tokenizer, check

CHECK_WHOLE = 1 << 28  # shards up to 256 MB in total are hashed in full when opened, larger ones at both ends


@dataclass(frozen=True)
class Corpus:
    """Tokens of one corpus and their source. Shards begin with end-of-text and every document is followed by one, so
    one pass predicts each byte of the text exactly once. For token files, counts of bytes and documents are 0 if
    unknown."""

    train: Tokens
    val: Tokens
    tokenizer: Tokenizer
    name: str  # short: "python", or from the names of the files
    folder: Path
    data_sha: str  # SHA-256 over the files' SHA-256, in order
    val_sha: str  # SHA-256 of the validation text
    train_bytes: int
    val_bytes: int  # bytes of text in the validation tokens
    documents: int  # that have text in the training part
    val_documents: int
    skipped_bytes: int  # invalid UTF-8 and NUL
    skipped_records: int = 0  # lines and rows without text
    format: str = "text"  # or the token files' format


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
    """Training and validation tokens of `data`: cached in the folder `cache`, or token files in place.

    data: `python`, `python-all`, `hf:` data sets, or files, folders and globs. The validation text is `val`; else the
    files in `data` (or next to token files) with val, valid or validation as a word in their name; else what
    `text.split` selects. At most about `val_bytes` of it are kept, in evenly spaced blocks. So it depends only on the
    text and `val_bytes`. Files in `val` are not trained on. vocab_size: of our own BPE (default 4096), or of token
    files without a tokenizer; other tokenizers have a fixed size. progress: called a few times a second, possibly from
    another thread.

    Raises UserError for data that is missing, empty, unreadable or corrupted, an unknown tokenizer, a full disk, a
    corrupted cache.
    """
    check(tokenizer or "bytes", vocab_size)
    if max_tokens and not any(item.startswith(sources.PREFIX) for item in (*data, *(val or ()))):
        raise UserError(f"`max_tokens` {max_tokens:g}: only for hf: data sets; `tokens` sets the length of training")
    if val_bytes < 1024:
        raise UserError(f"`val_bytes` {val_bytes}: too little to measure a loss; use at least 1024")
    with _os_errors(cache):
        fetch = partial(_fetch, max_tokens, tokenizer or "bytes", vocab_size, Path(cache) / "hub", progress)
        data, val = fetch("data", data), fetch("val", val or ())
        train_files = find_files(data, "data", progress)
        val_files = find_files(val, "val", progress) or [file for file in train_files if file.is_validation]
        if not val and len(val_files) == len(train_files):
            val_files = []  # all of the corpus is named validation
        if not val_files:
            val_files = find_files(validation_beside(train_files), "val", progress)
        held = {file.sha for file in val_files}
        train_files = [file for file in train_files if file.sha not in held]
        if not train_files:
            raise UserError(f"`val` {' '.join(val or data)}: the same files as `data`; nothing left to train on")
        if hold_tokens(train_files + val_files):
            return _open(corpus_name(data), train_files, val_files, val_bytes, tokenizer, vocab_size, progress)
        if tokenizer and tokenizer.startswith("ids-"):
            raise UserError(
                f"`tokenizer` {tokenizer}: only for token files, but {train_files[0].path} is text; choose a "
                "tokenizer for it, such as gpt2"
            )
        vocab_size = (vocab_size or BPE_VOCAB) if tokenizer == "bpe" else None
        recipe = Recipe(
            corpus_name(data), train_files, val_files, val_bytes, tokenizer or "bytes", vocab_size, skip_bad
        )
        folder = Path(cache) / f"{recipe.name}-{recipe.key()}"
        if not folder.exists():
            with _locked(folder, progress):
                if not folder.exists():  # another run may have built it in the meantime
                    build(folder, recipe, progress)
        corpus = load(folder)
        if corpus.skipped_records and not skip_bad:
            raise UserError(f"`data`: {corpus.skipped_records} records without a text; `skip_bad` skips them")
        return corpus


def prepare_for(config: Config, data: tuple[str, ...], progress: Progress | None = None) -> Corpus:
    """`prepare` with the options of a run."""
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
    """Open a finished cache folder. Raises UserError, naming the file, if one is missing, truncated or changed.

    Checks sizes and SHA-256 of all files; above 256 MB in total, SHA-256 of the first and last MB of each.
    """
    folder = Path(folder)
    again = f"delete {folder} to rebuild it"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        files, about = meta["files"], meta["corpus"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder / 'meta.json'}: missing or corrupted; {again}") from None
    check = "sha256" if sum(file["bytes"] for file in files.values()) <= CHECK_WHOLE else "sha256_ends"
    for name, file in files.items():
        path = folder / name
        size = path.stat().st_size if path.exists() else 0
        if size != file["bytes"]:
            raise UserError(f"{path}: {size} bytes, expected {file['bytes']}; {again}")
        if CHECKSUMS[check](path) != file[check]:
            raise UserError(f"{path}: changed since it was written (SHA-256 differs); {again}")
    tokenizer = Tokenizer.load(meta["tokenizer"], folder)
    train, val = (
        Tokens([folder / name for name in sorted(files) if name.startswith(side)], tokenizer.dtype)
        for side in ("train-", "val-")
    )
    return Corpus(train, val, tokenizer, folder=folder, **about)


def read_tokens(data: tuple[str, ...], tokenizer: Tokenizer, max_bytes: int | None = None) -> tuple[np.ndarray, int]:
    """(tokens, their bytes of text) of all of `data`, or of about `max_bytes` of it in evenly spaced blocks.

    Raises UserError as `prepare` does. Caches nothing.
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
    """`items`, with hub data sets replaced by files in `folder`; streams them there on first use."""
    paths = []
    for item in items:
        if item.startswith(sources.PREFIX):
            source = sources.parse(item, option, max_tokens, tokenizer, vocab_size)
            item = folder / source.place
            if not item.exists():
                with _locked(item, progress):
                    if not item.exists():
                        sources.stream(source, item, progress)
        paths.append(str(item))
    return tuple(paths)


@contextmanager
def _os_errors(place: str | Path) -> Iterator[None]:
    """Turns an OSError (no permission, disk full) into a one-line UserError."""
    try:
        yield
    except OSError as error:
        advice = "; make room or choose another `cache`" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(f"{error.filename or place}: {error.strerror or error}{advice}") from error


@contextmanager
def _locked(folder: Path, progress: Progress | None) -> Iterator[None]:
    """Holds a lock while `folder` is built; other runs wait. The lock of a killed process is released at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            progress("waiting for another run to build the same cache", 0, 1)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------------------------------------------------------------
# Token files


def _open(
    name: str,
    train: list[File],
    val: list[File],
    val_bytes: int,
    tokenizer: str | None,
    vocab_size: int | None,
    progress: Progress | None,
) -> Corpus:
    """Token files as a corpus. Without validation files, blocks of at most 5% of the tokens are held out."""
    if tokenizer == "bpe":
        raise UserError(
            "`tokenizer` bpe: is trained on text, but these are token files; give the tokenizer that wrote "
            "them, or `vocab_size`"
        )
    if tokenizer is None and vocab_size is None:
        raise UserError(
            f"{train[0].path}: the file does not name its tokenizer{pickle_beside(train[0].path)}; give "
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
        raise UserError(f"{(val or train)[0].path}: too few tokens to hold some out for validation; give `val`")
    val_sha = hashlib.sha256()
    for part in held.parts:
        val_sha.update(part.astype("<i8").tobytes())
    return Corpus(tokens, held, tokenizer, name, folder=Path(train[0].path).parent, data_sha=sha,
                  val_sha=val_sha.hexdigest(), train_bytes=0, val_bytes=_text_bytes(held, tokenizer), documents=0,
                  val_documents=0, skipped_bytes=0, format=open_tokens(train[0].path).format)  # fmt: skip


def _map(files: list[File], tokenizer: Tokenizer, stage: Stage) -> tuple[Tokens, str]:
    """(ids of the token files in order, checked against the vocabulary; fingerprint of types and contents)."""
    opened = [open_tokens(file.path) for file in files]
    check_ids(opened, tokenizer, stage)
    kinds = [replace(file, format=f"{o.format} {o.ids.dtype}") for file, o in zip(files, opened, strict=True)]
    return Tokens.of([o.ids for o in opened]), fingerprint(kinds)


def _text_bytes(tokens: Tokens, tokenizer: Tokenizer) -> int:
    """Bytes of text in the tokens; 0 if unknown."""
    return 0 if tokenizer.numbers else sum(len(tokenizer.decode_bytes(part)) for part in tokens.parts)
