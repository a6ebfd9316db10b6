"""sweeps/make_books.py: cleaning of a book, removal of repeats, the split, and the shards themselves."""

import hashlib
import importlib.util
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, pseudo_english

SCRIPT = ROOT / "sweeps" / "make_books.py"
SHARDS = ROOT.parent / "shared" / "data" / "gutenberg"
spec = importlib.util.spec_from_file_location("make_books", SCRIPT)
make_books = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_books)

PROSE = "It was a long walk to the mill, and the rain had not stopped since noon,\nbut the miller's son did not mind."
JOINED = PROSE.replace("\n", " ")


def ebook(body: str) -> str:
    """A file in Project Gutenberg's layout, with the line ends of the source."""
    text = (
        "The Project Gutenberg EBook of A Tale\n\nTitle: A Tale\n\n"
        f"*** START OF THIS PROJECT GUTENBERG EBOOK A TALE ***\n\n\nProduced by Some Volunteer\n\n\n{body}\n\n\n"
        "End of Project Gutenberg's A Tale, by Nobody\n\n*** END OF THIS PROJECT GUTENBERG EBOOK A TALE ***\n\nEnd\n"
    )
    return text.replace("\n", "\r\n")


def sentences(count: int, seed: int) -> list[str]:
    """Paragraphs of 120 characters each."""
    text = pseudo_english(200 * count, seed).replace("\n", " ")
    return [text[120 * i : 120 * (i + 1)].strip().ljust(120, "x") for i in range(count)]


@pytest.mark.parametrize(
    ("text", "paragraphs"),
    [
        (f"A TALE\n\n\n\n{PROSE}\n\nTHE END", ["A TALE", JOINED, "THE END"]),  # any number of blank lines
        ("  " + PROSE, [JOINED]),  # one indented line: the source has a space after some closing quotation marks
        ("ONE\n\n[Illustration: The miller\nand his son]\n\nTWO", ["ONE", "TWO"]),
        ("ONE\n\nILLUSTRATIONS\n\nTWO", ["ONE", "TWO"]),
        ("ONE\n\nThis text is also at www.gutenberg.org in HTML.\n\nTWO", ["ONE", "TWO"]),
        ("ONE\n\nProduced by the miller.\n\nAn etext.", ["ONE", "Produced by the miller.", "An etext."]),  # no credits
        ("[Illustration] as he said.", ["[Illustration] as he said."]),
        ("Cafe\u0301", ["Caf\u00e9"]),  # Unicode NFC
        ("x" * 50 + "\ny", ["x" * 50 + "\ny"]),  # verse: the lines are short
        ("x" * 51 + "\n y", ["x" * 51 + " y"]),
        ("x" * 60 + "\n  y" * 2, ["x" * 60 + "\n  y" * 2]),  # a table: two lines are indented
    ],
)
def test_paragraphs(text, paragraphs):
    """Header, credits, captions, the name of the source and the licence are removed; lines of prose are joined."""
    assert make_books.paragraphs(ebook(text)) == paragraphs


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (
            "***START OF THE PROJECT GUTENBERG EBOOK A VERY\nLONG TALE***",
            "***END OF THE PROJECT GUTENBERG EBOOK A VERY",
        ),
        ("***START**SMALL PRINT!**\n\nBla.\n\n*END*THE SMALL PRINT! ETEXTS*END*", "End of Project Gutenberg Etext"),
    ],
)
def test_markers(start, end):
    """Each form of the markers; a file without either of them is no book."""
    assert make_books.paragraphs(f"Header\n{start}\n\nONE\n\nTWO\n\n{end}\n\nLicence") == ["ONE", "TWO"]
    assert not make_books.paragraphs(f"{start}\n\nONE\n\nTWO")
    assert not make_books.paragraphs(f"ONE\n\nTWO\n\n{end}")


def test_which_books_are_wanted():
    """A book is long enough, free to redistribute, not by an author in LATE, and English."""
    book = ["the mill and the river, as it was in the days of old " * 10] * 40
    assert make_books.wanted("A/B.txt", "text", book)
    assert not make_books.wanted("A/B.txt", "text", book[:30])
    assert not make_books.wanted("A/B.txt", "This is a COPYRIGHTED Project Gutenberg eBook", book)
    assert not make_books.wanted("Orban, Paul/B.txt", "text", book)
    assert not make_books.wanted("A/B.txt", "text", ["moulin et la riviere " * 100] * 20)


def test_repeated_paragraphs_are_kept_in_the_longest_book():
    """Same letters, other punctuation: kept once, in the longest book. Short ones may repeat everywhere."""
    a, b = sentences(10, seed=1), sentences(6, seed=2)
    again = a[3].upper() + "!"
    texts = dict(make_books.without_repeats({"b": ["THE END", *b, again], "a": [*a, a[0], "THE END"]}))
    assert texts == {"a": "\n\n".join([*a, a[0], "THE END"]) + "\n", "b": "\n\n".join(["THE END", *b]) + "\n"}


def test_a_book_that_mostly_repeats_is_dropped():
    """40% of the characters in long paragraphs may repeat; paragraphs of a dropped book are not repeats later."""
    a, b, c = sentences(10, seed=1), sentences(3, seed=2), sentences(2, seed=3)
    books = {"a": a, "b": [*b, *a[:2]], "c": [*c, *a[:2]], "d": c}
    assert list(dict(make_books.without_repeats(books))) == ["a", "b", "d"]


def test_split(monkeypatch):
    """In the order of the hash, until all training files are full; a hash digit selects the validation books."""
    monkeypatch.setattr(make_books, "SHARD_BYTES", 1000)
    texts = {f"Author/{i}.txt": "é" * (20 + i % 7) for i in range(400)}
    files = make_books.split(texts)
    order = sorted(texts, key=lambda path: hashlib.sha256(path.encode()).digest())
    chosen = [path for path in order if path in sum(files.values(), [])]
    assert chosen == order[: len(chosen)] and len(chosen) < 400
    for name in make_books.TRAIN:
        sizes = [len(texts[path].encode()) for path in files[name]]
        assert sum(sizes) >= 1000 > sum(sizes[:-1]) and files[name] == [p for p in order if p in files[name]]
    digits = {path: hashlib.sha256(path.encode()).hexdigest()[62] for path in chosen}
    assert files[make_books.VAL] == [path for path in chosen if digits[path] == "0"] != []


def test_lines():
    """A line of JSON as nanochin reads it; a carriage return in the name becomes a space, as in the shards."""
    path = "Zola, Émile/Truth\rA Novel.txt"
    digest = hashlib.sha256(path.encode()).hexdigest()
    author_and_title = '"author": "Zola, Émile", "title": "Truth A Novel"'
    assert make_books.line(path, "Où?\n") == f'{{"id": "{digest[:12]}", {author_and_title}, "text": "Où?\\n"}}\n'


def test_files_depend_only_on_the_source(monkeypatch):
    """The same books in another order give the same bytes: xz of JSON lines."""
    for name, value in {"SHARD_BYTES": 50_000, "MIN_LENGTH": 1000, "ENGLISH_SHARE": 0}.items():
        monkeypatch.setattr(make_books, name, value)
    books = [(f"A/{i}.txt", ebook("\n\n".join(sentences(40, seed=i)))) for i in range(60)]
    once = dict(make_books.make(books))
    assert once == dict(make_books.make(reversed(books))) and list(once) == list(make_books.SHA256)
    records = [json.loads(line) for data in once.values() for line in lzma.decompress(data).decode().splitlines()]
    assert len({record["id"] for record in records}) == len(records) > 40
    assert all(record["text"].count("\n\n") == 39 for record in records)


def test_command(tmp_path):
    """Help and a wrong folder, from any working directory; errors are one line."""
    for argv, code, words in ((["--help"], 0, "CHECKOUT"), (["nowhere", "out"], 1, "nowhere"), ([], 2, "required")):
        done = subprocess.run([sys.executable, SCRIPT, *argv], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code and words in done.stdout + done.stderr
        assert code == 0 or len(done.stderr.splitlines()) == 1


def test_documented_checksums():
    """docs/data.md has the script's commit and checksums."""
    text = (ROOT / "docs" / "data.md").read_text()
    assert dict(re.findall(r"\| (gutenberg-[\w-]+\.jsonl\.xz) \|.*\| ([0-9a-f]{64}) \|", text)) == make_books.SHA256
    assert make_books.COMMIT in text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_shards_are_made_byte_for_byte(tmp_path):
    """All five files, from the public repository and on this machine, have the documented SHA-256."""
    checkout = os.environ.get("NANOCHIN_GUTENBERG")
    if not checkout:
        pytest.skip("needs a clone of github.com/rcdm-uga/Gutenberg_Text: set NANOCHIN_GUTENBERG to its folder")
    done = subprocess.run([sys.executable, SCRIPT, checkout, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for folder in (tmp_path, SHARDS) if SHARDS.is_dir() else (tmp_path,):
        sums = {name: hashlib.sha256(Path(folder, name).read_bytes()).hexdigest() for name in make_books.SHA256}
        assert sums == make_books.SHA256
