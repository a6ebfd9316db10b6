"""The cache of tokenised text: builds a folder of shards atomically.

Encoding uses threads, since tiktoken releases the GIL. Unlike processes, threads import nothing again, copy no text and
leave nothing behind when the program is killed.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields
from itertools import chain, repeat
from pathlib import Path

import numpy as np
from filelock import FileLock

from nanochin.base.console import Progress
from nanochin.base.files import errors_of, fsync, sha256_of
from nanochin.config import Config, TextOptions
from nanochin.data import formats
from nanochin.data.text import File, Stage, Text, batches, char_start, fingerprint, read_text, split, thin, total_bytes
from nanochin.data.tokenizer import Tokenizer, train_bpe

VERSION = 2  # of the cache folder's content; part of its name
SHARD = 100_000_000  # tokens per shard
UNFINISHED = "nanochin-unfinished"  # folder in the cache in which folders are built
BATCH = 1 << 20  # bytes of text that a thread encodes at a time
BPE_SAMPLE = 1 << 25  # maximum bytes of text to train a BPE on


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the content of a cache folder."""

    name: str
    train: list[File]
    val: list[File]  # empty: split from the training files
    config: Config  # `tokenizer` is set, `vocab_size` for our own BPE only
    bpe: Tokenizer | None = None  # a given one; default: trained on the text

    def key(self) -> str:
        """Hash of all but skip_bad: it changes only text with bad records, which `prepare` rejects without it. Options
        at their default are left out, so that they may be added."""
        parts = [VERSION, fingerprint(self.train), fingerprint(self.val), self.config.val_bytes]
        parts += [self.config.tokenizer, self.config.vocab_size]
        parts += [hashlib.sha256(self.bpe.rank_lines()).hexdigest()] if self.bpe else []
        values = {f: getattr(self.config, f.name) for f in fields(TextOptions) if f.metadata["result"]}
        parts += [[f.name, value] for f, value in values.items() if value != f.default]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def build(folder: Path, recipe: Recipe, progress: Progress | None) -> None:
    """Build `folder` within UNFINISHED, a folder beside it, then move it. Deletes what killed runs left there."""
    temp = folder.parent / UNFINISHED / folder.name
    for leftover in temp.parent.glob("*-" + 12 * "[0-9a-f]"):
        lock = nullcontext() if leftover == temp else FileLock(folder.with_name(f"{leftover.name}.lock"), timeout=0)
        with suppress(OSError), lock:  # no permission; or Timeout, an OSError: another run is still writing it
            shutil.rmtree(leftover)
    temp.mkdir(parents=True)
    try:
        meta = _write(temp, recipe, progress)
        meta["files"] = {
            path.name: {"bytes": path.stat().st_size} | {kind: f(path) for kind, f in CHECKSUMS.items()}
            for path in sorted(temp.iterdir())
        }
        with errors_of(temp / "meta.json"):
            (temp / "meta.json").write_text(json.dumps(meta, indent=2))
        for path in [*temp.iterdir(), temp]:
            fsync(path)
        temp.rename(folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(temp, ignore_errors=True)  # after an error


def _write(temp: Path, recipe: Recipe, progress: Progress | None) -> dict:
    """Write shards and tokenizer into `temp`. Returns the content of meta.json, except for the files."""
    tokenizer, config = recipe.bpe, recipe.config
    if config.tokenizer != "bpe":
        tokenizer = Tokenizer.load(config.tokenizer)  # before the text is read, since it may fail (no network)
    stage = Stage("reading", sum(file.size for file in recipe.train + recipe.val), progress)
    text = read_text(recipe.train, temp / "text/train", stage, config)
    texts = [text]
    if recipe.val:
        texts.append(read_text(recipe.val, temp / "text/val", stage, config))
        train, val = (text.whole for text in texts)
    else:
        train, val = split(text, config.val_bytes)
    val_text, held_out = texts[-1], 0 if recipe.val else total_bytes(val) / len(text.bytes)
    tallies = [tally for text in texts for tally in text.tallies]
    notes = formats.notes(tallies, config.document_separator, held_out)
    val = thin(val_text, val, config.val_bytes)

    if tokenizer is None:
        sample = thin(text, train, BPE_SAMPLE)
        stage = Stage("training the tokenizer", total_bytes(sample), progress)
        tokenizer = train_bpe(_strings(text, sample, stage), config.vocab_size)
    tokenizer.save(temp)

    stage = Stage("tokenising", total_bytes(train) + total_bytes(val), progress)
    _write_shards(encode(text, train, tokenizer, stage), temp, "train")
    _write_shards(encode(val_text, val, tokenizer, stage), temp, "val")
    val_sha = hashlib.sha256()
    for start, stop in val:
        val_sha.update(val_text.bytes[start:stop])
    shutil.rmtree(temp / "text")
    corpus = {"name": recipe.name, "data_sha": fingerprint(recipe.train), "val_sha": val_sha.hexdigest(),
        "train_bytes": total_bytes(train), "val_bytes": total_bytes(val), "documents": _count_documents(text, train),
        "val_documents": _count_documents(val_text, val), "skipped_records": sum(t.records for t in tallies),
        "skipped_bytes": sum(t.undecodable + t.nul for t in tallies), "notes": notes}  # fmt: skip
    return {"version": VERSION, "tokenizer": tokenizer.name, "corpus": corpus}


def encode(text: Text, ranges: np.ndarray, tokenizer: Tokenizer, stage: Stage) -> Iterator[np.ndarray]:
    """Tokens of `ranges` in order: end-of-text, then each document followed by end-of-text."""
    eot = np.array([tokenizer.eot], tokenizer.dtype)

    def encode_batch(batch: list[tuple[int, int, bool]]) -> np.ndarray:
        tokens = []
        for start, stop, is_end in batch:
            tokens.append(tokenizer.encode(text.bytes[start:stop].tobytes()))
            if is_end:
                tokens.append(eot)
        stage.add(sum(stop - start for start, stop, _ in batch))
        return np.concatenate(tokens)

    yield eot
    yield from stage.map(encode_batch, batches(_pieces(text, ranges), lambda piece: piece[1] - piece[0], BATCH))


def _pieces(text: Text, ranges: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    """`ranges` as pieces (start, stop, whether a document ends there) of at most BATCH bytes of one document."""
    for start, stop in ranges.tolist():
        first, last = np.searchsorted(text.ends, [start + 1, stop + 1])
        ends = zip(map(int, text.ends[first:last]), repeat(True), strict=False)
        for end, is_end in chain(ends, [(stop, False)]):
            while end - start > BATCH:
                cut = _cut(text, start)
                yield start, cut, False
                start = cut
            if start < end:
                yield start, end, is_end
            start = end


def _cut(text: Text, start: int) -> int:
    """Where to cut within BATCH bytes of `start` without changing a token: before a space that follows a visible ASCII
    character, where every tiktoken pattern splits. If there is none (rare), at a character boundary."""
    part = text.bytes[start : start + BATCH].tobytes()
    last = re.match(rb".*[!-~](?= )", part, re.DOTALL)
    return start + last.end() if last else char_start(text, start + BATCH)


def _count_documents(text: Text, ranges: np.ndarray) -> int:
    """Number of documents with text in `ranges`."""
    first = np.searchsorted(text.ends, ranges[:, 0], "right")
    last = np.searchsorted(text.ends, ranges[:, 1] - 1, "right")
    return int((last - first + 1).sum() - (first[1:] == last[:-1]).sum())


def _strings(text: Text, ranges: np.ndarray, stage: Stage) -> Iterator[str]:
    for start, stop, _ in _pieces(text, ranges):
        yield text.bytes[start:stop].tobytes().decode()
        stage.add(stop - start)


def _write_shards(arrays: Iterable[np.ndarray], folder: Path, side: str) -> None:
    """Write a stream of tokens as little-endian files side-00000.bin, ... of SHARD tokens each."""
    arrays, number = iter(arrays), 0
    tokens = next(arrays)
    while len(tokens):
        path = folder / f"{side}-{number:05d}.bin"
        with errors_of(path), open(path, "wb") as file:
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
