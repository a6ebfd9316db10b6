"""From text files to tokens for training and validation.

    files ──> flat text ──> training and validation ranges ──> shards of token ids in the cache ──> windows
    token files ───────────────────────────────────────────────────────────────────────────────────────┘

`prepare` makes the shards once per corpus and tokenizer and reuses them afterwards: text.py does the first two steps,
cache.py the third. Token files are used in place (token_files.py). windows.py cuts tokens into windows. No torch here.
"""

import errno
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from nanochin.base.cli import UserError
from nanochin.base.console import Progress
from nanochin.base.files import DiskError, read_json
from nanochin.config import Config, TextOptions
from nanochin.data import formats, sources
from nanochin.data.cache import CHECKSUMS, Recipe, build, encode
from nanochin.data.text import MAX_HELD_OUT, File, Stage, Tokens, corpus_name, find_files, fingerprint, read_text
from nanochin.data.token_files import are_token_files, check_ids, hold_out, open_tokens, sibling_val_files
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
    val_bytes: int  # bytes of text in the validation tokens
    train_bytes: int = 0
    documents: int = 0  # with text in the training part, as train_bytes
    val_documents: int = 0
    skipped_bytes: int = 0  # undecodable and NUL
    skipped_records: int = 0  # lines and rows without text
    notes: tuple[str, ...] = ()  # what was left out of the text, or may be unexpected in it
    format: str = "text"  # or the token files' format


def prepare(config: Config, progress: Progress | None = None, bpe: Tokenizer | None = None) -> Corpus:
    """Training and validation tokens of `config.data`: cached in `config.cache`, or token files in place.

    The validation text is `val`; else the files in `data` (or next to token files) with val, valid or validation as a
    word in their name; else what `text.split` selects. At most about `val_bytes` of it are kept, in evenly spaced
    blocks, so it depends only on the text and `val_bytes`. Files in `val` are not trained on. `progress` is called a
    few times a second, possibly from another thread. Raises UserError for data that is missing, empty, unreadable or
    corrupted, an unknown tokenizer, a full disk, a corrupted cache. `bpe`: used instead of one trained on the text.
    """
    tokenizer = config.tokenizer or "bytes"
    check(tokenizer, config.vocab_size)
    formats.check(config)
    find = partial(find_files, progress=progress, column=config.text_column)
    if config.max_tokens and not any(item.startswith(sources.PREFIX) for item in (*config.data, *(config.val or ()))):
        raise UserError(f"`max_tokens` {config.max_tokens:g}: only for hf: data sets; `tokens` limits the training")
    if config.val_bytes < 1024:
        raise UserError(f"`val_bytes` {config.val_bytes}: too little to measure a loss; use at least 1024")
    with _os_errors(config.cache):
        data, val = _fetch("data", config, progress), _fetch("val", config, progress)
        train_files = find(data, "data")
        val_files = find(val, "val") or [file for file in train_files if file.is_validation]
        if not val and len(val_files) == len(train_files):
            val_files = []  # every file is named validation
        if not val_files:
            val_files = find(sibling_val_files(train_files), "val")
        held_out = {file.sha for file in val_files}
        train_files = [file for file in train_files if file.sha not in held_out]
        if not train_files:
            raise UserError(f"`val` {' '.join(val or data)}: the same files as `data`; nothing left to train on")
        if are_token_files(train_files + val_files):
            return _open_token_files(config, corpus_name(data), train_files, val_files, progress)
        if tokenizer.startswith("ids-"):
            raise UserError(
                f"`tokenizer` {tokenizer}: only for token files, but {train_files[0].path} is text; try gpt2"
            )
        vocab_size = (config.vocab_size or BPE_VOCAB) if tokenizer == "bpe" else None
        resolved = replace(config, tokenizer=tokenizer, vocab_size=vocab_size)
        recipe = Recipe(corpus_name(data), train_files, val_files, resolved, bpe)
        folder = Path(config.cache) / f"{recipe.name}-{recipe.key()}"
        _make_once(folder, partial(build, folder, recipe, progress), progress)
        corpus = _load(folder)
        if corpus.skipped_records and not config.skip_bad:
            raise UserError(f"`data`: {corpus.skipped_records} records without a text; `skip_bad` skips them")
        return corpus


def read_tokens(data: tuple[str, ...], tokenizer: Tokenizer, options: TextOptions) -> tuple[np.ndarray, int, list[str]]:
    """(tokens, their bytes of text, notes) of all of `data`. Raises UserError as `prepare` does. Caches nothing."""
    formats.check(options)
    with _os_errors(tempfile.gettempdir()), tempfile.TemporaryDirectory() as folder:
        files = find_files(data, column=options.text_column)
        if are_token_files(files):
            tokens, _, said = _map(files, tokenizer, Stage("checking"))
            return tokens[:], _text_bytes(tokens, tokenizer), said
        text = read_text(files, Path(folder, "text"), Stage("reading"), options)
        tokens = np.concatenate(list(encode(text, text.whole, tokenizer, Stage("tokenising"))))
        return tokens, len(text.bytes), formats.notes(text.tallies, options.document_separator)


def _load(folder: Path) -> Corpus:
    """Open a finished cache folder. Raises UserError, naming the file, if one is missing, truncated or changed: checks
    size and SHA-256 of each; above 256 MB in total, SHA-256 of the first and last MB."""
    remedy = f"delete {folder} to rebuild it"
    meta = read_json(folder / "meta.json", {"tokenizer": str, "files": dict, "corpus": {"notes": list}}, remedy)
    files = meta["files"]
    checksum = "sha256" if sum(file["bytes"] for file in files.values()) <= CHECK_WHOLE else "sha256_ends"
    for name, file in files.items():
        path = folder / name
        size = path.stat().st_size if path.exists() else 0
        if size != file["bytes"]:
            raise UserError(f"{path}: {size} bytes, expected {file['bytes']}; {remedy}")
        if CHECKSUMS[checksum](path) != file[checksum]:
            raise UserError(f"{path}: changed since it was written (SHA-256 differs); {remedy}")
    tokenizer = Tokenizer.load(meta["tokenizer"], folder)
    train, val = (
        Tokens.map([folder / name for name in sorted(files) if name.startswith(side)], tokenizer.dtype)
        for side in ("train-", "val-")
    )
    return Corpus(train, val, tokenizer, folder=folder, **meta["corpus"])


def _fetch(option: str, config: Config, progress: Progress | None) -> tuple[str, ...]:
    """The value of `option` (data or val), with hub data sets replaced by files that are streamed on first use."""
    paths = []
    for item in getattr(config, option) or ():
        if item.startswith(sources.PREFIX):
            source = sources.parse(item, option, config)
            path = Path(config.cache, "hub", source.place)
            _make_once(path, partial(sources.stream, source, path, progress), progress)
            item = str(path)
        paths.append(item)
    return tuple(paths)


@contextmanager
def _os_errors(place: str | Path) -> Iterator[None]:
    """Turns an OSError (no permission, disk full) into a one-line UserError; a DiskError if the disk is full."""
    try:
        yield
    except OSError as error:
        where, why = error.filename or place, error.strerror or error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(f"{where}: cannot write: {why}; make room or choose another `cache`") from error
        raise UserError(f"{where}: {why}") from error


def _make_once(path: Path, make: Callable[[], None], progress: Progress | None) -> None:
    """Calls `make` unless `path` exists, under a lock that ends with the process; other runs wait."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        if progress:
            progress("waiting for another run to build the same cache", 0, 1)
        held = lock.acquire()
    with held:
        if not path.exists():  # another run may have made it in the meantime
            make()


# ---------------------------------------------------------------------------------------------------------------------
# Token files


def _open_token_files(
    config: Config, name: str, train: list[File], val: list[File], progress: Progress | None
) -> Corpus:
    """Token files as a corpus. Without validation files, blocks of at most 5% of the tokens are held out."""
    path = train[0].path
    if config.tokenizer == "bpe":
        raise UserError("`tokenizer` bpe: these are token files, not text; give the tokenizer that wrote them")
    if config.tokenizer is None and config.vocab_size is None:
        meta = Path(path).with_name("meta.pkl")  # nanoGPT's
        note = f" ({meta} may, but is not read: pickles can run code)" if meta.exists() else ""
        raise UserError(f"{path}: does not name its tokenizer{note}; give `tokenizer`, such as gpt2, or `vocab_size`")
    tokenizer = Tokenizer.load(config.tokenizer or f"ids-{config.vocab_size}")
    stage = Stage("checking", sum(file.size for file in train + val), progress)
    tokens, sha, said = _map(train, tokenizer, stage)
    keep = config.val_bytes // tokens.parts[0].itemsize
    if val:
        held_out, _, more = _map(val, tokenizer, stage)
        said += more
        if len(held_out) > keep:
            _, held_out = hold_out(held_out, keep)
    elif keep := min(keep, int(MAX_HELD_OUT * len(tokens))):
        tokens, held_out = hold_out(tokens, keep)
    if not keep or len(held_out) < 2:
        raise UserError(f"{(val or train)[0].path}: too few tokens to hold some out for validation; give `val`")
    val_sha = hashlib.sha256()
    for part in held_out.parts:
        val_sha.update(part.astype("<i8"))
    val_bytes, format = _text_bytes(held_out, tokenizer), open_tokens(path, tokenizer.vocab_size).format
    place, val_sha = Path(path).parent, val_sha.hexdigest()
    return Corpus(tokens, held_out, tokenizer, name, place, sha, val_sha, val_bytes, format=format, notes=tuple(said))


def _map(files: list[File], tokenizer: Tokenizer, stage: Stage) -> tuple[Tokens, str, list[str]]:
    """(ids of the token files in order, checked against the vocabulary; fingerprint of types and contents; notes)."""
    opened = [open_tokens(file.path, tokenizer.vocab_size) for file in files]
    check_ids(opened, tokenizer, stage)
    typed = [replace(file, format=f"{o.format} {o.ids.dtype}") for file, o in zip(files, opened, strict=True)]
    return Tokens([o.ids for o in opened]), fingerprint(typed), [f"{o.path}: {o.note}" for o in opened if o.note][:1]


def _text_bytes(tokens: Tokens, tokenizer: Tokenizer) -> int:
    """Bytes of text in the tokens; 0 if unknown."""
    return 0 if tokenizer.numbers else sum(len(tokenizer.decode_bytes(part)) for part in tokens.parts)
