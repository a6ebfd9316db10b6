"""From files to one flat text, and which of its bytes are held out."""

import gzip
import hashlib
import io
import json
import lzma
import os
import re
import stat
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import words

from nanochin.base.cli import UserError
from nanochin.config import TextOptions
from nanochin.data import formats
from nanochin.data import text as module
from nanochin.data.text import BLOCK, Stage, Text, Tokens, find_files, fingerprint, read_text, split, thin


def pack(suffix: str, content: bytes) -> bytes:
    if suffix == ".zst":
        module = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
        return pytest.importorskip(module, reason="pip install backports.zstd").compress(content)
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix](content)


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def read(tmp_path):
    """`read(path, skip_bad=True, ...)`: the flat text of a file or folder, in a new folder each time."""
    count = iter(range(100))

    def run(path: Path, **options) -> Text:
        how = TextOptions(**options)
        files = find_files([str(path)], column=how.text_column)
        return read_text(files, tmp_path / f"flat{next(count)}", Stage("reading"), how)

    return run


def documents(text: Text) -> list[bytes]:
    return [text.bytes[a:b].tobytes() for a, b in zip([0, *text.ends[:-1]], text.ends, strict=True)]


def skipped(text: Text) -> int:
    """Bytes that were left out."""
    return sum(tally.undecodable + tally.nul for tally in text.tallies)


def pick(text: Text, ranges: np.ndarray) -> bytes:
    return b"".join(text.bytes[a:b].tobytes() for a, b in ranges)


def jsonl(texts) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def fraction(content: bytes | str) -> float:
    """SHA-256 as a fraction of 2^256."""
    return int(hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest(), 16) / 2**256


def test_file_order_does_not_depend_on_how_files_are_named(tmp_path):
    """A folder, its files in any order, a glob, and a copy elsewhere give the same files in the same order, so the same
    fingerprint; changing a byte changes it."""
    for name in ("b.txt", "a.jsonl", "deep/c.txt", "a.txt.gz", "z.md", ".hidden.txt", "deep/.git/x.txt"):
        write(tmp_path / "one" / name, name)
    one = find_files([str(tmp_path / "one")])
    assert [file.key for file in one] == ["a.jsonl", "a.txt.gz", "b.txt", "deep/c.txt"]
    assert one[0].sha == hashlib.sha256(b"a.jsonl").hexdigest()

    os.rename(tmp_path / "one", tmp_path / "two")
    two = find_files([str(tmp_path / "two"), str(tmp_path / "two/b.txt"), str(tmp_path / "two/../two")])
    assert [file.key for file in two] == [file.key for file in one] and fingerprint(two) == fingerprint(one)

    paths = [str(tmp_path / "two" / name) for name in ("b.txt", "a.jsonl")]
    assert find_files(paths) == find_files(paths[::-1]) == find_files([str(tmp_path / "two/[ab].[tj]*[tl]")])
    before = fingerprint(find_files(paths))
    os.rename(paths[0], paths[0] + ".txt")
    assert fingerprint(find_files([paths[0] + ".txt", paths[1]])) == before
    write(tmp_path / "two/b.txt", "B.txt")
    assert fingerprint(find_files(paths)) != before


def test_python_is_the_standard_library_without_tests():
    """`python` is the library's own source, without its tests and installed packages."""
    keys = [file.key for file in find_files(["python"])]
    assert "json/decoder.py" in keys and "os.py" in keys
    assert not [key for key in keys if {"test", "tests", "site-packages"} & set(key.split("/"))]
    everything = {file.key for file in find_files(["python-all"])}
    assert set(keys) < everything and "numpy/__init__.py" in everything


def test_which_names_mean_validation(tmp_path):
    """val, valid and validation count only as whole words of a name."""
    expected = {"gutenberg-val.jsonl.xz", "val_00.txt", "validation-00000-of-1.jsonl", "val/1.txt", "Valid.txt"}
    for name in expected | {"interval.txt", "value.txt", "carnival/1.txt"}:
        write(tmp_path / name, "text")
    assert {file.key for file in find_files([str(tmp_path)]) if file.is_validation} == expected


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_formats_agree(tmp_path, suffix, read):
    """.txt files and .jsonl lines, compressed or not, give the same documents."""
    texts = ["one\r\ntwo\n", "中 🙂", words(5000)]
    for i, text in enumerate(texts):
        write(tmp_path / f"txt/{i}.txt{suffix}", pack(suffix, text.encode()))
    write(tmp_path / f"all.jsonl{suffix}", pack(suffix, jsonl(texts).replace("\n", "\n\n").encode()))
    for source in ("txt", f"all.jsonl{suffix}"):
        text = read(tmp_path / source)
        assert documents(text) == [t.encode() for t in texts] and skipped(text) == 0
        assert text.hashes[1] == int(hashlib.sha256(texts[1].encode()).hexdigest()[:16], 16)


def test_many_threads_read_what_one_reads(tmp_path, monkeypatch, read):
    """Files read in groups of 5 KB, several at a time, give the same text as one thread."""
    for i in range(30):
        write(tmp_path / f"books/{i:02d}.jsonl", jsonl([words(100 * i, i), words(1000, i)]))
    one = read(tmp_path / "books")
    monkeypatch.setattr(module, "PART", 5000)
    many = read(tmp_path / "books")
    assert len(one.bytes.parts) == 1 and len(many.bytes.parts) > 10
    assert documents(one) == documents(many) and (one.hashes == many.hashes).all()


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compressed_files(tmp_path, suffix, read):
    """Concatenated frames are one file; a truncated or changed file is named in the error."""
    frames = pack(suffix, words(3000).encode()) + pack(suffix, b" and more")
    path = write(tmp_path / f"a.txt{suffix}", frames)
    assert documents(read(path)) == [words(3000).encode() + b" and more"]
    for damaged in (frames[:-7], frames[:40] + b"garbage" + frames[47:]):
        write(path, damaged)
        with pytest.raises(UserError, match=rf"a\.txt\{suffix}: corrupted"):
            read(path)


@pytest.mark.parametrize("piece", [1, 2, 3, 1 << 20])
def test_invalid_bytes_are_skipped_and_counted(tmp_path, monkeypatch, piece, read):
    """Also NUL and a byte-order mark; CRLF and characters that span two reads are kept."""
    monkeypatch.setattr(formats, "PIECE", piece)
    start, rest = b"\xef\xbb\xbfa\xff\r\nb\x00\xe4\xb8\xad\xf0\x9f\x99\x82", b"x" * 400
    text = read(write(tmp_path / "a.txt", start + rest + b"\xe4\xb8"))
    assert documents(text) == ["a\r\nb中🙂".encode() + rest]
    assert skipped(text) == 4 and text.tallies[0].nul == 1  # FF, NUL, and the two bytes of half a character
    lines = b'\xef\xbb\xbf{"text": "a\xff\xc3\xa9\\u0000%s"}\n{"text": ""}\n{"text": "b\\ud83d"}' % rest
    text = read(write(tmp_path / "a.jsonl", lines))
    assert documents(text) == ["aé".encode() + rest, b"b"]  # an empty document does not count
    assert skipped(text) == 5  # FF, NUL, and three for half a surrogate pair


def test_bad_lines_are_rejected_or_counted(tmp_path, read):
    """A line that is not JSON, or has no text or a text of another type, is named by file and number. With skip_bad all
    of them are counted and the rest is read, across files and parts."""
    good = '{"text": "good"}\n'
    bad = ['{"text": "a"', "{not json", "[1]", '["text"]', '{"content": "x"}', '{"text": 3}', '"text"']
    for i, line in enumerate(bad):
        path = write(tmp_path / f"bad/{i}.jsonl", good * 2 + "\n" + line + "\n" + good)
        with pytest.raises(UserError, match=rf"{i}\.jsonl, line 4: .*`skip_bad`"):
            read(path)
    text = read(tmp_path / "bad", skip_bad=True)
    assert documents(text) == [b"good"] * 3 * len(bad) and [tally.records for tally in text.tallies] == [1] * len(bad)


def test_sources_without_text_are_named(tmp_path, read):
    """A missing path, a folder without known formats, an empty file and a binary file are named."""
    readme = write(tmp_path / "folder/readme.md", "text")
    write(tmp_path / "empty.txt", "\ufeff")
    write(tmp_path / "model.gguf", bytes(100))
    for item in ("nothing.txt", "*.rst", "folder", "empty.txt", "model.gguf"):
        with pytest.raises(UserError, match=re.escape(str(tmp_path / item))):
            read(tmp_path / item)
    assert documents(read(readme)) == [b"text"]


UTF8 = "été, ".encode() + words(3000).encode()


@pytest.mark.parametrize(
    "name", ["a.json", "a.json.gz", "a.jsonl", "a.txt", "a.ndjson", "a.jsonl.xz", "a.txt.zst", "a.gz", "a.unknown"]
)
@pytest.mark.parametrize("kind", ["lines", "array", "indented", "utf-16"])
def test_records_under_any_name(tmp_path, name, kind, read):
    """JSON objects by line or in an array, packed or not, give their texts, whatever the name says."""
    texts = ["one\r\ntwo [1]", "{中} 🙂", words(5000)]
    records = [{"id": i, "text": text, "more": {"text": 1}} for i, text in enumerate(texts)]
    content = {"lines": jsonl(texts), "array": json.dumps(records), "utf-16": json.dumps(records, ensure_ascii=False)}
    content["indented"] = "\n" + json.dumps(records, indent=2)
    suffix = Path(name).suffix if name.endswith((".gz", ".xz", ".zst")) else ""
    packed = pack(suffix, content[kind].encode("utf-16" if kind == "utf-16" else "utf-8"))
    assert documents(read(write(tmp_path / name, packed))) == [text.encode() for text in texts]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a", "a.jsonl"])
def test_packed_under_any_name(tmp_path, suffix, name, read):
    """A compressed file is unpacked by its content, also twice, also with another suffix."""
    content = UTF8 if name != "a.jsonl" else jsonl([UTF8.decode()]).encode()
    for packed in (pack(suffix, content), pack(".gz", pack(suffix, content))):
        assert documents(read(write(tmp_path / name, packed))) == [UTF8]


def test_what_is_not_text_is_named(tmp_path, read):
    """Archives, plain text named .gz or .parquet, JSON without a text, other binary files: one line with the file."""
    archive, tape = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", UTF8)
    with tarfile.open(fileobj=tape, mode="w:gz") as file:
        file.add(write(tmp_path / "in.txt", UTF8), "in.txt")
    files = {
        **dict.fromkeys(("a.zip", "b.txt", "c.jsonl", "d.json"), archive.getvalue()),
        **dict.fromkeys(("a.tar.gz", "a.tgz", "e.txt"), tape.getvalue()),
        **{"plain.gz": UTF8, "plain.parquet": UTF8, "object.json": b'{"data": []}', "numbers.json": b"[1, 2]"},
        **{
            "prose.json": UTF8,
            "cut.json": b'[{"text": "a"}, {"te',
            "zeros.txt": bytes(999),
            "bytes.txt": b"\x9c\0" * 99,
        },
    }
    for name, content in files.items():
        with pytest.raises(UserError, match=re.escape(str(tmp_path / name))) as error:
            read(write(tmp_path / name, content))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_byte_order_marks(tmp_path, monkeypatch, mark, piece, read):
    """They decide the encoding, even against `encoding`; a character cut off at the end is named with its byte."""
    monkeypatch.setattr(formats, "PIECE", piece)
    text = "é中🙂\r\nword " * 50
    content = ("\ufeff" * mark.endswith("e") + text).encode(mark)
    for encoding in ("utf-8", "latin-1"):
        assert documents(read(write(tmp_path / "a.txt", content), encoding=encoding)) == [text.encode()]
    if mark != "utf-8-sig":
        path = write(tmp_path / "cut.txt", content[:-1])
        with pytest.raises(UserError, match=rf"cut\.txt: byte {len(content) - (4 if '32' in mark else 2)} is not utf-"):
            read(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz"])
def test_other_encodings(tmp_path, name, read):
    """Text of which more than 1% is not UTF-8 is refused with its first such byte; `encoding` reads it."""
    text = "plain ASCII " * 10 + "café été " * 30
    records = json.dumps([{"text": text}] if name == "a.json" else {"text": text}, ensure_ascii=False)
    latin = (records if ".json" in name else text).encode("latin-1")
    path = write(tmp_path / name, pack(".gz" if name.endswith(".gz") else "", latin))
    first = next(i for i, byte in enumerate(latin) if byte > 127)
    with pytest.raises(UserError, match=re.escape(f"{path}: byte {first} is not utf-8")):
        read(path)
    assert documents(read(path, encoding="latin-1")) == [text.encode()]
    with pytest.raises(UserError, match=re.escape(f"{path}: byte {first} is not ascii")):
        read(path, encoding="ascii")


def test_utf_16_without_a_mark(tmp_path, read):
    """Refused, since half of it is NUL; `encoding` reads it."""
    path = write(tmp_path / "a.txt", UTF8.decode().encode("utf-16-be"))
    with pytest.raises(UserError, match=r"a\.txt: \d+% .* NUL bytes.*utf-16"):
        read(path)
    assert documents(read(path, encoding="utf-16-be")) == [UTF8]


def test_unknown_encodings(tmp_path):
    """A name that is unknown or not an encoding of text, and an empty separator, are refused."""
    for options in ({"encoding": "latin-99"}, {"encoding": "hex"}, {"document_separator": ""}):
        with pytest.raises(UserError, match=f"^`{next(iter(options))}`"):
            formats.check(TextOptions(**options))


def test_notes_name_the_worst_file(tmp_path, read):
    """What was left out, with the file that lost most; an end-of-text string that is read as text."""
    write(tmp_path / "t/a.txt", UTF8 * 2 + b"\0\xff")
    write(tmp_path / "t/b.txt", UTF8 + b"\0\0\xff\xff\xff")
    write(tmp_path / "t/c.jsonl", jsonl(["x", "y"]) + "null\n")
    write(tmp_path / "t/d.txt", b"story <|endoftext|> " * 299)
    text = read(tmp_path / "t", skip_bad=True)
    said = formats.notes(text.tallies, None)
    for note, parts in zip(
        said, (("4 ", "b.txt (3)"), ("3 NUL", "b.txt (2)"), ("1 ", "c.jsonl"), ("d.txt", "299")), strict=True
    ):
        assert all(part in note for part in parts)
    assert formats.notes(read(write(tmp_path / "fine.txt", UTF8)).tallies, None) == []


@pytest.mark.parametrize("piece", [1, 5, 13, 1 << 20])
def test_document_separator(tmp_path, monkeypatch, piece, read):
    """Splits a .txt, also where it spans two reads; without the option it is text, and is counted once each."""
    monkeypatch.setattr(formats, "PIECE", piece)
    path = write(tmp_path / "a.txt", b"<|end|>one <|end|<|end|>two<|end|><|end|>" + b"three" * 9 + b"<|end|>")
    found = read(path, document_separator="<|end|>")
    assert documents(found) == [b"one <|end|", b"two", b"three" * 9]
    assert documents(read(path)) == [path.read_bytes()]
    (note,) = formats.notes(read(path, document_separator="<|eot|>").tallies, "<|eot|>")
    assert "<|eot|>: not in the text" in note
    write(path, b"<|endoftext|>".join([b"a", b"b", b"<|endoftext", b"c"]))
    assert read(path).tallies[0].separators == 3


def test_text_column(tmp_path, read):
    """Of JSON and parquet; the error for another name lists the names that there are."""
    write(tmp_path / "a.jsonl", '{"content": "one", "text": "no"}\n')
    write(tmp_path / "b.txt", '[{"content": "two"}]')
    parquet(tmp_path / "c.parquet", content=["three"], text=["no"])
    assert documents(read(tmp_path, text_column="content")) == [b"one", b"two", b"three"]
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: .*content, text"):
        read(tmp_path / "a.jsonl", text_column="body")


def test_deep_json_is_a_bad_line(tmp_path, read):
    """Nesting that the parser cannot follow is rejected or counted like any other bad line, and names the line."""
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": ' + "[" * 200_000 + '\n{"text": "two"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: "):
        read(path)
    text = read(path, skip_bad=True)
    assert documents(text) == [b"one", b"two"] and text.tallies[0].records == 1
    with pytest.raises(UserError, match=r"b\.json, line 1: "):
        read(write(tmp_path / "b.json", "[" * 200_000))


def test_linked_folders_are_read_once(tmp_path):
    """Links out of the folder are followed after everything else, those back into it not, whatever leads where."""
    for name in ("in/a.txt", "in/z/b.txt", "out/c.txt", "out/deep/d.txt"):
        write(tmp_path / name, name)
    before = [file.key for file in find_files([str(tmp_path / "in")])]
    for link, target in {
        "in/z/up": "..",
        "in/self": ".",
        "out/back": "../in",
        "in/l1": "../out",
        "in/l2": "../out",
    }.items():
        (tmp_path / link).symlink_to(target)
    found = [file.key for file in find_files([str(tmp_path / "in")])]
    assert before == ["a.txt", "z/b.txt"] and found == ["a.txt", "l1/c.txt", "l1/deep/d.txt", "z/b.txt"]
    (tmp_path / "in/l1").unlink()
    (tmp_path / "in/l2").unlink()
    for pattern, keys in {
        "in/**/*.txt": ["a.txt", "b.txt"],
        "**/z/*.txt": ["b.txt"],
        "in/**/z": ["b.txt", "up/a.txt"],
    }.items():
        assert [file.key for file in find_files([str(tmp_path / pattern)])] == keys


@pytest.mark.parametrize("kind", ["pipe", "socket", "broken link"])
def test_what_is_not_a_file_is_named(tmp_path, kind):
    """In a folder and by name: one line, without waiting for a writer."""
    write(tmp_path / "in/a.txt", "text")
    path = tmp_path / "in/b.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, 0o600 | stat.S_IFSOCK)
    else:
        path.symlink_to("nowhere")
    for item in (path.parent, path):
        with pytest.raises(UserError, match=re.escape(f"{path}")):
            find_files([str(item)])


def test_json_in_folders(tmp_path):
    """Read if there is no other text: next to text it is often about it."""
    write(tmp_path / "c4.json.gz", pack(".gz", jsonl(["text"]).encode()))
    assert [file.key for file in find_files([str(tmp_path)])] == ["c4.json.gz"]
    write(tmp_path / "a.txt", "text")
    assert [file.key for file in find_files([str(tmp_path)])] == ["a.txt"]


def test_documents_are_held_out_by_content_hash(tmp_path, read):
    """If the SHA-256, as a fraction of 2^256, is below min(5%, 2 val_bytes / all bytes): all copies or none."""
    texts = [words(400, seed) for seed in range(300)]
    texts += texts[::-1]
    text = read(write(tmp_path / "a.jsonl", jsonl(texts)))
    for val_bytes, share in ((10**6, 0.05), (1500, 3000 / len("".join(texts).encode()))):
        train, val = split(text, val_bytes)
        held = [t for t in texts if fraction(t) < share]
        assert 2 <= len(held) <= 50
        assert pick(text, val) == "".join(held).encode()
        assert pick(text, train) == "".join(t for t in texts if t not in held).encode()


def test_a_single_document_is_split_into_blocks(tmp_path, read):
    """64 KB blocks are held out by hash; every byte is on exactly one side and no character is cut."""
    content = words(3_000_000).encode()
    text = read(write(tmp_path / "a.txt", content))
    train, val = split(text, 100_000)
    sides = np.zeros(len(content), int)
    for a, b in [*train, *val]:
        sides[a:b] += 1
        text.bytes[a:b].tobytes().decode()
    assert (sides == 1).all()
    held = {a // BLOCK for a, b in val for a in range(a + 8, b, BLOCK)}
    for block in range(len(content) // BLOCK):  # the reference: hash each block by hand
        a, b = block * BLOCK, (block + 1) * BLOCK
        while content[a] & 0xC0 == 0x80:
            a -= 1
        while content[b] & 0xC0 == 0x80:
            b -= 1
        assert (block in held) == (fraction(content[a:b]) < min(0.05, 200_000 / len(content)))


def test_a_large_document_is_split_into_blocks(tmp_path, read):
    """A document of half the text is not held out, even if selected by its hash: blocks of both documents are."""
    texts = [words(50_000, seed) for seed in range(100)]
    two = [next(t for t in texts if (fraction(t) < 0.05) == selected) for selected in (True, False)]
    text = read(write(tmp_path / "a.jsonl", jsonl(two)))
    assert 0 < len(pick(text, split(text, 1 << 20)[1])) <= len(text.bytes) / 4


@pytest.mark.parametrize("size", [40, 1000, 60_000])
def test_small_texts_have_both_sides(tmp_path, size, read):
    """At most a quarter, or one block, is held out. If all blocks are equal, none can be: the error asks for `val`."""
    text = read(write(tmp_path / "a.txt", words(size)))
    train, val = (pick(text, ranges) for ranges in split(text, 1 << 20))
    assert 0 < len(val) <= len(text.bytes) / 4 + 4 and len(val) + len(train) == len(text.bytes)
    with pytest.raises(UserError, match="give `val`"):
        split(read(write(tmp_path / "a.txt", "a" * 20 * BLOCK)), 1 << 20)


def test_thinning_keeps_evenly_spaced_blocks(tmp_path, read):
    """5 blocks of ranges with gaps, from start to end, at equal distances, cut at characters."""
    text = read(write(tmp_path / "a.txt", words(3_000_000)))
    ranges = np.array([[0, 300_000], [400_000, 1_000_000], [1_200_000, 2_300_001]])
    ranges = np.array([[module.char_start(text, a), module.char_start(text, b)] for a, b in ranges])
    kept = thin(text, ranges, 5 * BLOCK)
    assert abs(len(pick(text, kept).decode().encode()) - 5 * BLOCK) <= 3 * 2 * 7
    positions = np.concatenate([np.arange(a, b) for a, b in ranges])  # of the bytes of `ranges`, end to end
    inside = np.isin(positions, np.concatenate([np.arange(a, b) for a, b in kept]))
    assert inside.sum() == len(pick(text, kept))
    starts = np.flatnonzero(np.diff(inside.astype(int), prepend=0) == 1)
    assert len(starts) == 5 and starts[0] == 0 and inside[-1]
    assert np.ptp(np.diff(starts)) <= 8
    assert (thin(text, ranges, 10**9) == ranges).all()


def test_tokens_are_one_array_over_many_files(tmp_path):
    """Slices within, across and beyond files equal those of the concatenated contents."""
    whole = np.arange(1000, dtype=np.uint16)
    paths = [tmp_path / f"{i}" for i in range(5)]
    for path, part in zip(paths, np.split(whole, [1, 1, 400, 403]), strict=True):
        part.astype("<u2").tofile(path)
    tokens = Tokens.map(paths, np.uint16)
    assert len(tokens) == 1000 and tokens[:].dtype == np.uint16
    for a, b in [(0, 1000), (0, 1), (1, 400), (399, 404), (400, 403), (403, 403), (999, 1005), (1000, 1001), (5, 2)]:
        assert tokens[a:b].tolist() == whole[a:b].tolist(), (a, b)


def test_a_stage_keeps_order_and_few_items_in_flight():
    """Results come in the order of the items, which are drawn only as results are consumed."""
    drawn = []
    results = Stage("s").map(lambda i: i * i, (drawn.append(i) or i for i in range(10_000)))
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(drawn) < 3 * (os.cpu_count() + 2)
    assert list(results) == [i * i for i in range(3, 10_000)]


def test_a_stage_that_fails_stops_its_threads():
    """The first error is raised, and the other threads stop at their next report."""
    stage, reports = Stage("s"), []

    def work(i):
        if i == 0:
            raise UserError("first")
        while True:
            reports.append(i)
            time.sleep(0.01)
            stage.add(1)

    with pytest.raises(UserError, match="first"):
        list(stage.map(work, range(5)))
    count = len(reports)
    time.sleep(0.05)
    assert len(reports) == count


def parquet(path: Path, rows: int = 1024, **columns) -> Path:
    """A parquet file written by pyarrow, with row groups of `rows` rows."""
    arrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(columns), path, row_group_size=rows, compression="zstd")
    return path


@pytest.mark.parametrize(("rows", "kind"), [(1, "string"), (7, "large_string"), (5000, "dictionary")])
def test_parquet(tmp_path, rows, kind, read):
    """The same documents as .jsonl lines, whatever the row groups, type of strings and other columns."""
    arrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    texts = [words(200, seed=i) + "\r\n中 🙂\0" for i in range(1500)]
    column = arrow.array(texts).dictionary_encode() if kind == "dictionary" else arrow.array(texts, kind)
    parquet(tmp_path / "p/00.parquet", rows, text=column[:1100], id=list(range(1100)), score=[0.5] * 1100)
    parquet(tmp_path / "p/01.parquet", rows, dump=["x"] * 400, text=column[1100:])
    a, b = read(tmp_path / "p"), read(write(tmp_path / "all.jsonl", jsonl(texts)))
    assert documents(a) == documents(b) and (a.hashes == b.hashes).all() and skipped(a) == skipped(b) == 1500


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl", "a"])
def test_parquet_under_any_name(tmp_path, name, read):
    """Recognised by its content."""
    content = parquet(tmp_path / "b.parquet", text=["one", "two"]).read_bytes()
    assert documents(read(write(tmp_path / name, content))) == [b"one", b"two"]


def test_unreadable_parquet(tmp_path, read):
    """No column `text`, one of numbers, or a file that is not parquet: one line, with the columns that exist."""
    with pytest.raises(UserError, match=r"a\.parquet: .* has content, url"):
        read(parquet(tmp_path / "a.parquet", content=["x"], url=["y"]))
    with pytest.raises(UserError, match=r"b\.parquet: .* int64"):
        read(parquet(tmp_path / "b.parquet", text=[1, 2]))
    whole = parquet(tmp_path / "c.parquet", text=["x" * 1000] * 100).read_bytes()
    for damaged in (b"", whole[:-10], whole[100:]):
        with pytest.raises(UserError, match=r"c\.parquet: corrupted") as error:
            read(write(tmp_path / "c.parquet", damaged))
        assert "\n" not in str(error.value)


def test_null_rows_of_parquet_are_bad(tmp_path, read):
    """A null is named by its row, or counted."""
    path = parquet(tmp_path / "a.parquet", rows=2, text=["a", "b", None, "c", None])
    with pytest.raises(UserError, match=r"a\.parquet, row 3: text is null; `skip_bad`"):
        read(path)
    text = read(path, skip_bad=True)
    assert documents(text) == [b"a", b"b", b"c"] and text.tallies[0].records == 2
