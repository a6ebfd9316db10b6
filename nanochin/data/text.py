"""Find text files, read them into one flat text, and split it into training and validation ranges.

Later steps work on byte ranges of the flat text on disk and need little memory (16 bytes per document). Work runs on
threads: hashing and decompression release the GIL.
"""

import codecs
import glob
import hashlib
import os
import re
import sysconfig
import threading
import time
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath

import numpy as np

from nanochin.base.cli import UserError
from nanochin.base.console import Progress
from nanochin.base.files import cores, errors_of, sha256_of
from nanochin.config import TextOptions
from nanochin.data import formats
from nanochin.data.formats import MAX_HELD_OUT, TOKENS, Tally, format_of_name

BLOCK = 1 << 16  # bytes: unit of thinning, and of hashing if there are too few documents
PART = 1 << 23  # bytes of files that one thread hashes, or reads into one part of the flat text


# ---------------------------------------------------------------------------------------------------------------------
# Tools


class Tokens:
    """Arrays of any integer types as one array: `len()` and `[start:stop]`. Also used for the flat text, as uint8."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts = parts
        self.starts = np.cumsum([0] + [len(part) for part in parts]).tolist()

    @classmethod
    def map(cls, paths: list[Path], dtype: np.dtype) -> "Tokens":
        """Memory-mapped little-endian files of one type."""
        little = np.dtype(dtype).newbyteorder("<")
        paths = [path for path in paths if path.stat().st_size]  # an empty file cannot be mapped
        return cls([np.memmap(path, little, mode="r").view(np.ndarray) for path in paths])

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, at: slice) -> np.ndarray:
        start, stop, _ = at.indices(len(self))
        found = self.views(start, stop)
        if not found:
            return self.parts[0][:0]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def views(self, start: int, stop: int) -> list[np.ndarray]:
        """The parts of [start:stop] as views, without a copy."""
        if start >= stop:
            return []
        first, last = bisect_right(self.starts, start) - 1, bisect_left(self.starts, stop)
        return [self.parts[i][max(0, start - self.starts[i]) : stop - self.starts[i]] for i in range(first, last)]


class Stage:
    """One stage of the work: runs it on threads and reports to `progress(stage, done, total)`."""

    def __init__(self, name: str, total: int = 0, progress: Progress | None = None):
        self.name, self.total, self.progress = name, total, progress
        self.done, self.reported, self.stopped, self.lock = 0, 0.0, False, threading.Lock()

    def add(self, count: int) -> None:
        """Called by the threads after each `count` bytes; reports a few times a second."""
        with self.lock:
            if self.stopped:  # another thread failed, or Ctrl-C: do not read a long file to its end
                raise CancelledError
            self.done += count
            if self.progress and (time.monotonic() - self.reported > 0.2 or self.done >= self.total):
                self.reported = time.monotonic()
                self.progress(self.name, self.done, self.total)

    def map(self, function: Callable, items: Iterable) -> Iterator:
        """`map` on one thread per core, results in order; few items in flight, to bound memory."""
        threads = cores()
        pool, waiting = ThreadPoolExecutor(threads), deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            self.stopped = True
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def batches(items: Iterable, size: Callable, limit: int) -> Iterator[list]:
    """Items in lists with a total size of about `limit`."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= limit:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True, order=True)
class File:
    key: str  # path relative to the item that the user named: sorts files independently of their location
    sha: str  # SHA-256 of the content
    path: str
    format: str
    size: int

    @property
    def is_validation(self) -> bool:
        """Whether val, valid or validation is a word in its name: gutenberg-val.jsonl.xz, val/00.txt; not interval."""
        return bool(re.search(r"(?<![a-z])val(id|idation)?(?![a-z])", self.key.lower())) and self.format != ".py"


def find_files(
    data: Iterable[str], option: str = "data", progress: Progress | None = None, column: str = TextOptions.text_column
) -> list[File]:
    """The files that `data` names, each once, in an order that does not depend on how they were named. An item is
    `python` (the standard library, without tests), `python-all` (plus all installed packages), a file, a folder (known
    formats, recursively) or a glob. A file with strings in `column` has records, whatever its name. Raises UserError
    for what does not exist and for what is not a file."""
    found: dict[str, tuple[str, str]] = {}  # path -> (key, format)
    for item in data:
        for path, key, format in _expand(item, option):
            found[path] = min((key, format), found.get(path, (key, format)))
    for path in found:
        if not os.path.isfile(path):  # reading a pipe may never end
            raise UserError(f"{path}: not a file (a pipe, a broken link?); remove it or name the files to read")
    sizes = {path: os.path.getsize(path) for path in found}
    stage = Stage("hashing", sum(sizes.values()), progress)

    def examine(paths: list[str]) -> list[File]:
        files = []
        for path in paths:
            key, named = found[path]
            sha, format = sha256_of(path, stage.add), formats.format_of_content(path, named, column)
            files.append(File(key, sha, path, format, sizes[path]))
        return files

    return sorted(chain.from_iterable(stage.map(examine, batches(found, sizes.get, PART))))


def fingerprint(files: list[File]) -> str:
    """SHA-256 over formats and contents in order, whatever the paths."""
    return hashlib.sha256("".join(f"{file.format} {file.sha}\n" for file in files).encode()).hexdigest()


def corpus_name(data: Iterable[str]) -> str:
    """Common prefix of the names: gutenberg-train-00.jsonl.xz and -01 give gutenberg-train. A file named train takes
    its folder's name."""
    paths = [Path(re.split(r"[*?[]", item)[0]).resolve() for item in data]
    stems = [path.parent.name if path.stem == "train" else path.name.split(".")[0] for path in paths]
    name = stems[0] if len(stems) == 1 else os.path.commonprefix(stems).rstrip("0123456789")
    return re.sub(r"[^\w-]+", "-", name).strip("-_")[:40] or "text"


def _expand(item: str, option: str) -> Iterator[tuple[Path, str, str]]:
    """(path, key, format) of each file that one item names."""
    if item in ("python", "python-all"):
        roots = [sysconfig.get_path("stdlib")]
        if item == "python-all":
            roots += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        for root in dict.fromkeys(roots):
            yield from ((path, key, ".py") for path, key in _walk(root, NOT_SOURCE) if path.endswith(".py"))
        return
    named = [item] if os.path.exists(item) else _glob(item)
    if not named and os.path.exists(item + ".idx"):
        named = [item + ".idx"]  # Megatron names a pair of files by their common prefix
    if not named:
        raise UserError(f"`{option}` {item}: no such file or folder")
    for path in map(os.path.abspath, named):
        if not os.path.isdir(path):
            path = re.sub(r"\.idx$", TOKENS, path)  # the .bin has the tokens
            format = format_of_name(path)
            if format in formats.PICKLES:
                raise UserError(f"`{option}` {path}: pickles can run code, so they are not read; give text or tokens")
            yield path, os.path.basename(path), format if format in (*formats.READERS, TOKENS) else ""
            continue
        files = [(file, key, format_of_name(file)) for file, key in _walk(path, follow=True)]
        for known in (formats.IN_FOLDERS, (".json",)):  # .json is often about the data: read if there is nothing else
            if inside := [file for file in files if file[2] in known]:
                break
        if not inside:
            known = f"{' '.join(formats.IN_FOLDERS)} .json, also with {' '.join(formats.UNPACKERS)}"
            raise UserError(f"`{option}` {item}: no text in this folder; looked for {known}")
        yield from inside


def _glob(pattern: str) -> Iterable[str]:
    """Like `glob.glob`, whose `**` would follow links in circles."""
    start, *rest = re.split(r"(?<![^/])\*\*/", pattern, maxsplit=1)
    if not rest:
        return glob.glob(pattern)
    found = {}
    for top in glob.glob(start) if start else ["."]:
        for key in (PurePath(key) for _, key in _walk(top, follow=True)):
            found |= {os.path.join(top, name): True for name in (key, *key.parents) if name.match(*rest)}
    return found


NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def _walk(root: str, skip: set[str] = frozenset(), follow: bool = False) -> Iterator[tuple[str, str]]:
    """(path, path relative to `root`) of the files below `root` that are not hidden. With `follow` also of those in
    linked folders, each once, after all others; a folder that cannot be read is then an OSError."""

    def fail(error: OSError) -> None:
        raise error

    tops, seen = [root], set()
    for top in tops:  # grows
        for folder, folders, files in os.walk(top, onerror=fail if follow else None):
            status = os.stat(folder)
            place = status.st_dev, status.st_ino
            if place in seen:
                folders.clear()
                continue
            seen.add(place)
            folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
            if follow:
                tops += [path for name in folders if os.path.islink(path := os.path.join(folder, name))]
            prefix = folder[len(root) :].strip(os.sep).replace(os.sep, "/")
            for name in files:
                if not name.startswith("."):
                    yield os.path.join(folder, name), f"{prefix}/{name}" if prefix else name


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class Text:
    """The flat text: documents back to back, valid UTF-8 without NUL."""

    bytes: Tokens  # uint8
    ends: np.ndarray  # (documents,) int64: end of each document
    hashes: np.ndarray  # (documents,) uint64: first 8 bytes of its SHA-256
    tallies: list[Tally]  # of each file

    @property
    def whole(self) -> np.ndarray:
        """All of it as one range, (1, 2)."""
        return np.array([[0, len(self.bytes)]])


def read_text(files: list[File], folder: Path, stage: Stage, options: TextOptions) -> Text:
    """Write the flat text of `files` into `folder`, several files at a time, and open it. Raises UserError for a line
    or row without a text, unless `skip_bad`, and for a file that is not text in the encoding it should have."""
    folder.mkdir(parents=True)
    numbered = enumerate(batches(files, lambda file: file.size, PART))
    parts = list(stage.map(lambda one: _read_part(one[1], folder / f"text-{one[0]:05d}", stage, options), numbered))
    starts = np.cumsum([0] + [len(part.bytes) for part in parts])
    if not starts[-1]:
        raise UserError(f"{files[0].path}{' and others' * (len(files) > 1)}: no text in it")
    return Text(
        Tokens([piece for part in parts for piece in part.bytes.parts]),
        np.concatenate([part.ends + start for part, start in zip(parts, starts, strict=False)]),
        np.concatenate([part.hashes for part in parts]),
        [tally for part in parts for tally in part.tallies],
    )


def _read_part(files: list[File], path: Path, stage: Stage, options: TextOptions) -> Text:
    """Write the text of `files` to `path`, and open it."""
    ends, hashes, tallies, position = array("q"), array("Q"), [], 0
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    with errors_of(path), open(path, "wb") as out:
        for file in files:
            start, sha = position, hashlib.sha256()
            tallies.append(tally := Tally(file.key, options.skip_bad))
            for piece, last, read in formats.documents(file.path, file.format, options, tally):
                stage.add(read)
                valid = decoder.decode(piece, last).encode()
                clean = valid.replace(b"\0", b"")
                tally.size += len(piece)
                tally.undecodable += len(piece) - len(valid)
                tally.nul += len(valid) - len(clean)
                position += len(clean)
                sha.update(clean)
                out.write(clean)
                if last and position > start:
                    ends.append(position)
                    hashes.append(int.from_bytes(sha.digest()[:8], "big"))
                    start, sha = position, hashlib.sha256()
            if file.format != ".py":  # an installed package must not make `python-all` unusable
                formats.refuse_excess(file.path, tally, options.encoding)
    return Text(Tokens.map([path], np.uint8), np.array(ends), np.array(hashes), tallies)


# ---------------------------------------------------------------------------------------------------------------------
# Training and validation split: (n, 2) arrays of byte ranges [start, stop) of the flat text


def split(text: Text, val_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """(training ranges, validation ranges) by content hash: equal documents are on the same side, and file order and
    names do not matter.

    A document is held out if its hash, as a fraction, is below min(5%, 2 val_bytes / all bytes). If this selects
    nothing or more than a quarter of the text, it falls back to hashes of 64 KB blocks (smaller for a text under
    1.3 MB), then to the block with the smallest hash. Raises UserError if all of the text would be held out.
    """
    total = len(text.bytes)
    limit = min(MAX_HELD_OUT, 2 * val_bytes / total) * 2.0**64
    ends, held = text.ends, text.hashes < limit
    if not 0 < np.diff(ends, prepend=0)[held].sum() <= total / 4:
        ends = _block_ends(text, min(BLOCK, total // 20 + 1))
        digests = [hashlib.sha256(text.bytes[a:b]).digest() for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        hashes = np.array([int.from_bytes(digest[:8], "big") for digest in digests], np.uint64)
        held = hashes < limit
        if not 0 < np.diff(ends, prepend=0)[held].sum() <= total / 4:
            held = hashes == hashes.min()
        if held.all():
            raise UserError("`data`: cannot split off validation text (too short, or all the same); give `val`")
    units = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
    return _merge(units[~held]), _merge(units[held])


def thin(text: Text, ranges: np.ndarray, keep: int) -> np.ndarray:
    """`ranges`, or evenly spaced blocks of them with `keep` bytes in total, up to character boundaries."""
    lengths = ranges[:, 1] - ranges[:, 0]
    offsets, total = np.cumsum(lengths) - lengths, lengths.sum()  # offset of each range in their concatenation
    if total <= keep:
        return ranges
    block, kept = min(BLOCK, keep), []
    for start in spaced(total, block, keep):
        a = np.maximum(start, offsets)
        b = np.minimum(start + block, offsets + lengths)
        kept.append((np.stack([a, b], axis=1) + (ranges[:, 0] - offsets)[:, None])[a < b])
    kept = np.array([[char_start(text, a), char_start(text, b)] for a, b in np.concatenate(kept)])
    return _merge(kept[kept[:, 0] < kept[:, 1]])


def spaced(total: int, block: int, keep: int) -> list[int]:
    """Evenly spaced starts of the blocks that together have about `keep` of `total`, from the beginning to the end."""
    count = max(1, keep // block)
    return [i * (total - block) // max(1, count - 1) for i in range(count)]


def _block_ends(text: Text, block: int) -> np.ndarray:
    ends, start = [], 0
    for end in text.ends.tolist():
        ends += [char_start(text, i) for i in range(start + block, end, block)] + [end]
        start = end
    return np.unique(ends)  # a character longer than a block gives two equal ends


def char_start(text: Text, i: int) -> int:
    """The last position at or before `i` where a character starts (or the text ends)."""
    while i < len(text.bytes) and text.bytes[i : i + 1][0] & 0xC0 == 0x80:
        i -= 1
    return i


def _merge(ranges: np.ndarray) -> np.ndarray:
    """Merge adjacent ranges."""
    new = np.concatenate([[True], ranges[1:, 0] != ranges[:-1, 1]])
    return np.stack([ranges[new, 0], ranges[np.append(new[1:], True), 1]], axis=1)


def total_bytes(ranges: np.ndarray) -> int:
    return int((ranges[:, 1] - ranges[:, 0]).sum())
