"""What is in a text file, by its content first and its name second, and its documents.

    file ──> unpacked (gzip, xz, zstd, bzip2) ──> UTF-8 ──> documents: prose, JSON records, rows of parquet

A file that is not what its name says is read as what it is, or refused by name.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import BinaryIO

from nanochin.base.cli import UserError, need
from nanochin.config import TextOptions
from nanochin.data.tokenizer import END_OF_TEXT

PIECE = 1 << 20  # bytes read at a time
HEAD = 1 << 16  # bytes that show the format
MAX_UNDECODABLE = 0.01  # of a file's bytes; above, the file is in another encoding
MANY = 3  # occurrences of end-of-text in a file that are worth a note
MAX_HELD_OUT = 0.05  # maximum fraction of the text held out for validation
MAX_NUL = 0.1  # of a file's bytes; above, the file is binary or UTF-16

TOKENS = ".bin"  # not text: token_files.py
IN_FOLDERS = (".txt", ".jsonl", ".parquet", TOKENS)  # read from a folder
PICKLES = (".pkl", ".pickle", ".pt", ".pth")


@dataclass
class Tally:
    """What was left out of a file, and what may have been overlooked in it."""

    name: str
    skip_bad: bool
    size: int = 0  # bytes of its documents
    undecodable: int = 0  # bytes
    nul: int = 0  # bytes
    records: int = 0  # lines and rows without a text
    separators: int = 0

    def reject(self, where: str, what: str) -> None:
        """Counts a bad record if it is to be skipped, else raises UserError."""
        if not self.skip_bad:
            raise UserError(f"{where}: {what}; `skip_bad` skips bad records")
        self.records += 1


def notes(tallies: list[Tally], separator: str | None, held_out: float = 0) -> list[str]:
    """What was left out of the text, with the file that lost most, and what may have been overlooked in it."""
    said = []
    for name, what in (
        ("undecodable", "bytes that cannot be decoded were left out"),
        ("nul", "NUL bytes were left out"),
        ("records", "lines or rows without a text were skipped"),
    ):
        worst = max(tallies, key=attrgetter(name))
        if most := getattr(worst, name):
            said.append(f"{sum(getattr(t, name) for t in tallies)} {what}, most of them in {worst.name} ({most})")
    most = max(tallies, key=attrgetter("separators"))
    if separator and not most.separators:
        said.append(f"`document_separator` {separator}: not in the text")
    if not separator and most.separators >= MANY and not most.name.endswith(".py"):
        what = f"{END_OF_TEXT} occurs {most.separators} times and is read as text"
        said.append(f"{most.name}: {what}; `document_separator` '{END_OF_TEXT}' splits documents there")
    if round(held_out, 2) > MAX_HELD_OUT:
        why = f"more than {MAX_HELD_OUT:.0%}, since its documents are few or equal"
        said.append(f"{held_out:.0%} of the text is held out, {why}; `val` names other text")
    return said


def check(options: TextOptions) -> None:
    """Raises UserError for an unknown encoding and an empty separator."""
    try:
        known = codecs.lookup(options.encoding)._is_text_encoding
    except LookupError:
        known = False
    if not known:
        raise UserError(f"`encoding` {options.encoding}: unknown; such as utf-8, latin-1, cp1252 or utf-16-le")
    if options.document_separator == "":
        raise UserError("`document_separator`: empty; give the string between documents, such as <|endoftext|>")


def format_of_name(path: str) -> str:
    """books.jsonl.xz -> .jsonl"""
    stem, suffix = os.path.splitext(path)
    return (os.path.splitext(stem)[1] if suffix.lower() in UNPACKERS else suffix).lower()


def format_of_content(path: str, named: str, column: str) -> str:
    """The format of a file whose name says `named`: records and tables are recognised under other names. Raises
    UserError for an archive."""
    if named in (".py", ".parquet", TOKENS):
        return named
    try:
        with open(path, "rb") as raw, _one_line(path):
            head = _open_text(raw, path, "utf-8").read(HEAD)
    except UserError:
        return named  # cannot be unpacked or decoded, which its reader says, unless the text is in the cache
    if head.startswith(b"PK\3\4") or head[257:262] == b"ustar":
        raise UserError(f"{path}: an archive (zip or tar); unpack it first")
    if head.startswith(b"PAR1\x15"):
        return ".parquet"
    is_object = re.match(rb'\s*(\[\s*)?\{\s*"', head)
    has_text = re.search(re.escape(f'"{column}"').encode() + rb'\s*:\s*"', head)
    return ".jsonl" if is_object and has_text else named


def documents(path: str, format: str, options: TextOptions, tally: Tally) -> Iterator[tuple[bytes, bool, int]]:
    """(piece of a document's bytes, whether the document ends with it, bytes of the file read for it)."""
    with open(path, "rb") as raw, _one_line(path):
        seen = 0
        stream = raw if format == ".parquet" else _open_text(raw, path, options.encoding)
        for piece, last in READERS[format](stream, path, options, tally):
            before, seen = seen, raw.tell()
            yield piece, last, seen - before


def refuse_excess(path: str, tally: Tally, encoding: str) -> None:
    """Raises UserError for a file with so many undecodable bytes or NULs that it is not what it was read as."""
    if tally.nul > MAX_NUL * tally.size:
        what = f"{tally.nul / tally.size:.0%} of it are NUL bytes: not UTF-8 text"
        raise UserError(f"{path}: {what}; `encoding` utf-16-le or utf-16-be reads UTF-16 without a byte-order mark")
    if tally.undecodable > MAX_UNDECODABLE * tally.size:
        share = f"{tally.undecodable / tally.size:.0%} of its text cannot be decoded"
        with open(path, "rb") as raw, _one_line(path):
            stream, encoding = _unpack(raw, path, encoding)
            stream = Utf8(stream, path, encoding, f" ({share})")
            while stream.read(PIECE):  # raises at the first undecodable byte
                pass
        raise UserError(f"{path}: {share}")  # inside parquet, or escaped in JSON


@contextmanager
def _one_line(path: str) -> Iterator[None]:
    """Turns the errors of libraries into a UserError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or getattr(error, "filename", None):
            raise
        # Each library has its own: EOFError, zlib.error, LZMAError, ZstdError, ...
        raise UserError(f"{path}: corrupted ({' '.join(str(error).split())})") from error


# ---------------------------------------------------------------------------------------------------------------------
# From bytes to UTF-8


def _open_zst(raw: BinaryIO):
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        zstd = need("backports.zstd", f"{raw.name}: .zst")
    return zstd.open(raw)


UNPACKERS = {".gz": gzip.open, ".xz": lzma.open, ".zst": _open_zst}
MAGIC = {b"\x1f\x8b\x08": gzip.open, b"\xfd7zXZ\0": lzma.open, b"(\xb5/\xfd": _open_zst, b"BZh91AY&SY": bz2.open}
BYTE_ORDER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def packed(head: bytes):
    """The function that unpacks a file that begins with `head`, or None."""
    return next((unpack for magic, unpack in MAGIC.items() if head.startswith(magic)), None)


def _open_text(raw: BinaryIO, path: str, encoding: str) -> io.BufferedReader:
    """A file unpacked, as UTF-8 without a byte-order mark."""
    stream, encoding = _unpack(raw, path, encoding)
    if codecs.lookup(encoding).name != "utf-8":
        stream = io.BufferedReader(Utf8(stream, path, encoding), PIECE)
    if stream.peek(3)[:3] == codecs.BOM_UTF8:
        stream.read(3)
    return stream


def _unpack(raw: BinaryIO, path: str, encoding: str) -> tuple[io.BufferedReader, str]:
    """(a file unpacked, its encoding: that of its byte-order mark, else `encoding`)."""
    stream, unpack = raw, packed(raw.peek(16)) or UNPACKERS.get(os.path.splitext(path)[1].lower())
    while unpack:
        stream = io.BufferedReader(unpack(stream), PIECE)
        unpack = packed(stream.peek(16))
    head = stream.peek(4)
    return stream, next((marked for mark, marked in BYTE_ORDER_MARKS.items() if head.startswith(mark)), encoding)


class Utf8(io.RawIOBase):
    """A stream in `encoding` as UTF-8. Raises UserError at the first byte that cannot be decoded."""

    def __init__(self, stream: BinaryIO, path: str, encoding: str, remark: str = ""):
        self.stream, self.path, self.encoding, self.remark = stream, path, encoding, remark
        self.decoder, self.seen, self.ready = codecs.getincrementaldecoder(encoding)(), 0, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        piece = b"more"
        while piece and not self.ready:
            piece = self.stream.read(PIECE)
            self.seen += len(piece)
            try:
                self.ready = self.decoder.decode(piece, not piece).encode()
            except UnicodeDecodeError as error:
                at = self.seen - len(error.object) + error.start  # error.object is the end of what was seen
                what = f"byte {at} is not {self.encoding}{self.remark}"
                advice = "`encoding` names another, such as latin-1, if all files are in it"
                raise UserError(f"{self.path}: {what}; {advice}") from None
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count


# ---------------------------------------------------------------------------------------------------------------------
# From UTF-8 to documents: one function per format yields (piece of a document's bytes, whether it ends there).


def read_txt(stream: BinaryIO, path: str, options: TextOptions, tally: Tally) -> Iterator[tuple[bytes, bool]]:
    """A file is one document, or several with `document_separator` between them."""
    separator, tail = (options.document_separator or END_OF_TEXT).encode(), b""
    while piece := stream.read(PIECE):
        parts = (tail + piece).split(separator)
        tally.separators += len(parts) - 1
        if not options.document_separator:
            parts = [separator.join(parts)]
        yield from ((document, True) for document in parts[:-1])
        cut = max(0, len(parts[-1]) - len(separator) + 1)  # the rest may be the start of a separator
        yield parts[-1][:cut], False
        tail = parts[-1][cut:]
    yield tail, True


def read_unknown(stream: BinaryIO, path: str, options: TextOptions, tally: Tally) -> Iterator[tuple[bytes, bool]]:
    """A file with an unknown suffix, named explicitly: plain text if it has no NUL."""
    if b"\0" in stream.peek(4096)[:4096]:
        raise UserError(f"{path}: neither text nor a known format ({' '.join(filter(None, READERS))})")
    yield from read_txt(stream, path, options, tally)


def read_records(stream: BinaryIO, path: str, options: TextOptions, tally: Tally) -> Iterator[tuple[bytes, bool]]:
    """A record is one document: a JSON object with a string in the text column."""
    column = options.text_column
    for where, record in _records(stream, path, tally):
        names = record if isinstance(record, dict) else {}
        text = names.get(column)
        if not isinstance(text, str):
            other = f" but {', '.join(names)}"[:200] + " (`text_column`)" if names and column not in names else ""
            tally.reject(where, f'no string "{column}"{other}')
            continue
        try:
            yield text.encode("utf-8", "surrogateescape"), True  # invalid bytes too: `_read_part` drops and counts them
        except UnicodeEncodeError:
            yield text.encode("utf-8", "surrogatepass"), True  # half a surrogate pair, written as \ud83d


def _records(stream: BinaryIO, path: str, tally: Tally) -> Iterator[tuple[str, object]]:
    """(where, value) of each line that is not blank; or of each item of an array, which is read at once."""
    if stream.peek(1).lstrip().startswith(b"["):
        content = stream.read()
        try:
            items = json.loads(content.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError):
            stream = io.BytesIO(content)  # the array is only the first line
        else:
            yield from ((f"{path}, item {number}", item) for number, item in enumerate(items, 1))
            return
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                record = json.loads(line.decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
                tally.reject(f"{path}, line {number}", f"not JSON ({getattr(error, 'msg', error)})")
            else:
                yield f"{path}, line {number}", record


def read_parquet(stream: BinaryIO, path: str, options: TextOptions, tally: Tally) -> Iterator[tuple[bytes, bool]]:
    """A row is one document: the string in its text column."""
    arrow = need("pyarrow", f"{path}: .parquet")
    from pyarrow import parquet

    number, size, column = 0, os.path.getsize(path), options.text_column
    with parquet.ParquetFile(path) as file:
        columns, rows = file.schema_arrow, file.metadata.num_rows
        if column not in columns.names:
            raise UserError(f"{path}: no column '{column}' (`text_column`); it has {', '.join(columns.names)}")
        kind = columns.field(column).type
        if arrow.types.is_dictionary(kind):
            kind = kind.value_type
        if str(kind) not in ("string", "large_string", "string_view"):
            raise UserError(f"{path}: column '{column}' is {kind}, not string")
        for batch in file.iter_batches(1024, columns=[column]):
            for text in batch.column(0).cast(arrow.large_string()).cast(arrow.large_binary()).to_pylist():
                number += 1
                stream.seek(size * number // rows)  # only for the progress bar
                if text is None:
                    tally.reject(f"{path}, row {number}", f"{column} is null")
                else:
                    yield text, True


READERS = {".txt": read_txt, ".py": read_txt, "": read_unknown, ".parquet": read_parquet}
READERS |= {".jsonl": read_records, ".json": read_records}
