"""Rebuild the books that the sweeps books* were trained on from the public source, byte for byte.

    git clone https://github.com/rcdm-uga/Gutenberg_Text
    python sweeps/make_books.py Gutenberg_Text books
    python sweep.py sweeps/books.toml --data books

Writes four training files and a validation file to the folder OUT: xz of JSON lines, one book per line. docs/data.md
has the reasons for each rule. Git reads the source at one commit, whatever is checked out, so that line ends and file
names do not depend on the machine. Takes five minutes on one core and 3 GB of memory; needs git and no library.
"""

import argparse
import hashlib
import json
import lzma
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

COMMIT = "a0b16d35a9851168ce9ac649851c17b7ab08d48e"
SHA256 = {
    "gutenberg-train-00.jsonl.xz": "c30a7a3616c44a73bc4251d0b6c47f08a9378b91e9831b8cc1025d90e3fa23a4",
    "gutenberg-train-01.jsonl.xz": "5c46ee8aff87054da110ac99970223ce7fca22cf405b930296149bdceddd2191",
    "gutenberg-train-02.jsonl.xz": "68931318873e80c04f4d43ef743e23698655ebfd506d0f506ad5248ed643f023",
    "gutenberg-train-03.jsonl.xz": "f07a33f42fba38b8f2cf55d60f37076579efe1888338d0d274dd2b2eff2a18b9",
    "gutenberg-val.jsonl.xz": "447f72e43399bb41d06084ec853a477c845baa75416f651f9824fa567abb99fd",
}
*TRAIN, VAL = SHA256
PRESET = dict.fromkeys(TRAIN[1:], 4)  # of xz; 6 for the other two files, which were made first
SHARD_BYTES = 48_000_000  # of text; a shard ends with the book that reaches it

# Possibly in copyright: two illustrators of magazines of the 1950s and two authors who died in the 1970s.
LATE = ("Emshwiller, Ed/", "Orban, Paul/", "Russell, Bertrand/", "Wodehouse, P. G. (Pelham Grenville)/")
ABSENT = {  # compilations that contain many of the other books
    "Chekhov, Anton Pavlovich/Project Gutenberg Compilation of 233 Short Stories of Chekhov.txt",
    "Shakespeare, William/The Complete Works of William Shakespeare.txt",
}
ENGLISH = {"the", "and", "of", "to", "a", "in", "that"}
ENGLISH_SHARE = 0.09  # minimum share of these words; books kept have at least 0.096, books dropped at most 0.087
MIN_LENGTH = 20_000  # characters of a book
MAX_VAL_BYTES = 1_000_000  # of a book in the validation file
LONG = 100  # characters; shorter paragraphs may repeat
MAX_REPEATED = 0.4  # of the characters in a book's long paragraphs

START = re.compile(r"\*\*\* ?START OF.*?\*\*\*|\*END\*THE SMALL PRINT[^\n]*", re.S | re.I)
END = re.compile(r"\*\*\* ?END OF", re.I)
OLD_END = re.compile(r"End of (the )?Project Gutenberg", re.I)
CREDITS = re.compile(r"(?is)produced by|e-?text prepared|transcribed f|this etext was|.*distributed\s+proofread")
ILLUSTRATION = re.compile(r"\s*\[?illustration[^\]]*\]?\s*", re.I)


def body(text: str) -> str:
    """The text between the last start marker and the last end marker; empty without both."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n"))
    starts = list(START.finditer(text))
    ends = list(END.finditer(text)) or list(OLD_END.finditer(text))
    return text[starts[-1].end() : ends[-1].start()] if starts and ends else ""


def unwrap(lines: list[str]) -> str:
    """A paragraph on one line if it looks like prose: at most one line is indented, and all but the last are over 50
    characters long on average. Verse, tables and title pages are unchanged."""
    indented = sum(line.startswith(" ") for line in lines)
    if len(lines) > 1 and indented < 2 and sum(map(len, lines[:-1])) > 50 * (len(lines) - 1):
        return " ".join(line.strip() for line in lines)
    return "\n".join(lines)


def paragraphs(text: str) -> list[str]:
    """The cleaned paragraphs of a file; none if it lacks a marker. Removes credits at the start, captions of
    illustrations and every paragraph that names Project Gutenberg, as its terms ask."""
    kept: list[str] = []
    lines = [line.rstrip() for line in body(text).split("\n")]
    for block in re.split(r"\n{2,}", "\n".join(lines).strip("\n")):
        named = "gutenberg" in block.lower() or (not kept and CREDITS.match(block.strip()))
        if block and not named and not ILLUSTRATION.fullmatch(block):
            kept.append(unwrap(block.split("\n")))
    return kept


def wanted(path: str, text: str, book: list[str]) -> bool:
    """Whether a book is long enough, free to redistribute and English."""
    words = re.findall("[a-z]+", "\n".join(book).lower())
    return (
        sum(map(len, book)) >= MIN_LENGTH
        and not path.startswith(LATE)
        and "COPYRIGHTED Project Gutenberg" not in text
        and sum(word in ENGLISH for word in words) >= ENGLISH_SHARE * len(words)
    )


def paragraph_hash(paragraph: str) -> bytes | None:
    """Hash of the letters a to z and digits, which two editions of a long paragraph share; None for a short one.
    Paragraphs without these (Greek, asterisks) all have the same hash."""
    if len(paragraph) < LONG:
        return None
    return hashlib.sha256(re.sub("[^a-z0-9]", "", paragraph.lower()).encode()).digest()[:16]


def without_repeats(books: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Path and text of each book that is mostly new, the longest first, without the long paragraphs of earlier books.
    Within one book they may repeat."""
    seen: set[bytes] = set()
    for path in sorted(books, key=lambda path: (-sum(map(len, books[path])), path)):
        hashed = [(paragraph, paragraph_hash(paragraph)) for paragraph in books[path]]
        long = sum(len(p) for p, h in hashed if h)
        repeated = sum(len(p) for p, h in hashed if h in seen)
        if repeated <= MAX_REPEATED * long:
            yield path, "\n\n".join(p for p, h in hashed if h not in seen).strip() + "\n"
            seen.update(h for _, h in hashed if h)


def split(texts: dict[str, str]) -> dict[str, list[str]]:
    """Paths of each file's books, in the order of the SHA-256 of the path, until the training files are full. One book
    in 16 goes to the validation file: those with 0 as the second-to-last digit of the hash."""
    files: dict[str, list[str]] = {name: [] for name in SHA256}
    shards, size = list(TRAIN), 0
    for path in sorted(texts, key=sha):
        length = len(texts[path].encode())
        if sha(path)[-2] == "0" and length < MAX_VAL_BYTES:
            files[VAL].append(path)
            continue
        files[shards[0]].append(path)
        if (size := size + length) >= SHARD_BYTES:
            size, shards = 0, shards[1:]
        if not shards:
            break
    return files


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def line(path: str, text: str) -> str:
    """A book as a line of JSON. In some file names the line break of the title page is a carriage return."""
    author, title = path.removesuffix(".txt").replace("\r", " ").split("/")
    return json.dumps({"id": sha(path)[:12], "author": author, "title": title, "text": text}, ensure_ascii=False) + "\n"


def source(checkout: str) -> Iterator[tuple[str, str]]:
    """Path and text of each .txt file at COMMIT. Exits with one line if git cannot read them."""
    git = ["git", "-C", checkout]
    listed = subprocess.run([*git, "ls-tree", "-r", "-z", COMMIT], capture_output=True)
    if listed.returncode:
        sys.exit(f"make_books: {checkout}: no clone of rcdm-uga/Gutenberg_Text with commit {COMMIT}")
    with subprocess.Popen([*git, "cat-file", "--batch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        for entry in filter(None, listed.stdout.decode().split("\0")):
            about, path = entry.split("\t", 1)
            if not path.endswith(".txt") or path in ABSENT:
                continue
            reader.stdin.write(about.split()[2].encode() + b"\n")
            reader.stdin.flush()
            answer = reader.stdout.readline().split()
            if len(answer) != 3:
                sys.exit(f"make_books: {checkout}: the clone lacks {path}")
            yield path, reader.stdout.read(int(answer[2]) + 1)[:-1].decode()
        reader.stdin.close()


def make(files: Iterable[tuple[str, str]]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each of the five files, from path and text of the source's files."""
    texts = dict(without_repeats({path: book for path, text in files if wanted(path, text, book := paragraphs(text))}))
    for name, paths in split(texts).items():
        lines = "".join(line(path, texts[path]) for path in paths)
        yield name, lzma.compress(lines.encode(), preset=PRESET.get(name, 6))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"make_books: {message}\n")
    parser.add_argument("checkout", metavar="CHECKOUT", help="clone of github.com/rcdm-uga/Gutenberg_Text")
    parser.add_argument("out", metavar="OUT", help="folder for the five files")
    options = parser.parse_args()
    out, different = Path(options.out), 0
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in make(source(options.checkout)):
            (out / name).write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            different += digest != SHA256[name]
            print(f"{name}  {digest}  {'as' if digest == SHA256[name] else 'NOT as'} in docs/data.md", flush=True)
    except OSError as error:
        sys.exit(f"make_books: {error}")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
