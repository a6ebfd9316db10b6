"""Tokenizers: bytes, any tiktoken encoding by name, our own byte-level BPE, or plain ids without text.

tiktoken encodes all but `bytes` and `ids-N`. rustbpe trains our BPE, which is saved as a file of tiktoken ranks (per
line: base64 of the token, space, rank), so that a run's folder is self-contained. No torch here.
"""

import base64
import difflib
import hashlib
import re
import threading
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

from nanochin.base.cli import UserError
from nanochin.base.files import write_file

RANKS_FILE = "tokenizer.tiktoken"
END_OF_TEXT = "<|endoftext|>"
BPE_VOCAB = 4096  # default vocabulary of our BPE
NUMBERS = re.compile(r"ids-[1-9]\d{0,9}")
DOWNLOAD_SECONDS = 60  # tiktoken's own downloads have no timeout

# Pre-tokenisation of our BPE: a word, up to three digits or punctuation, each with one leading space, or a run of
# white space; English contractions as in GPT-2. Without GPT-2's look-ahead tiktoken encodes about twice as fast, at
# the same bytes per token. Do not change it: the rank files of existing runs depend on it and do not contain it.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"


class Tokenizer:
    """One vocabulary. `eot` is the id of end-of-text, which precedes and follows every document.

    `bytes` has exactly 256 ids: id = byte, and end-of-text is byte 0, which text.py removes from all text. `ids-N` is
    for token files with an unknown tokenizer and a vocabulary of N: its text is the ids as numbers, such as "464 3290",
    and its end-of-text is 0.
    """

    def __init__(self, name: str, encoding: tiktoken.Encoding | None = None):
        self.name, self.encoding = name, encoding
        self.numbers = bool(NUMBERS.fullmatch(name))
        self.vocab_size = encoding.n_vocab if encoding else int(name[4:]) if self.numbers else 256
        self.eot = encoding.eot_token if encoding else 0
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @classmethod
    def load(cls, name: str, folder: str | Path | None = None, sha: str | None = None) -> "Tokenizer":
        """`bytes`, `ids-N`, a tiktoken name, or `bpe` from the ranks in `folder`, whose SHA-256 is `sha` if given.
        Raises UserError for an unknown name, missing or corrupted ranks, or an encoding that is not in tiktoken's cache
        and cannot be downloaded."""
        if name == "bytes" or NUMBERS.fullmatch(name):
            return cls(name)
        if name == "bpe":
            return bpe_of(_read_ranks(Path(folder) / RANKS_FILE, sha))
        return cls(name, _named_encoding(name))

    def save(self, folder: str | Path) -> None:
        """Write the ranks of our BPE into `folder`. The other tokenizers need only their name."""
        if self.name == "bpe":
            write_file(Path(folder) / RANKS_FILE, self.rank_lines())

    @property
    def sha(self) -> str | None:
        """SHA-256 of the file that `save` writes, if any."""
        return hashlib.sha256(self.rank_lines()).hexdigest() if self.name == "bpe" else None

    def rank_lines(self) -> bytes:
        """The content of a file of tiktoken ranks."""
        ranks = self.encoding._mergeable_ranks
        return b"".join(b"%s %d\n" % (base64.b64encode(token), ranks[token]) for token in sorted(ranks, key=ranks.get))

    def encode(self, text: bytes) -> np.ndarray:
        """Ids of `text` (valid UTF-8), without end-of-text. Names of special tokens are encoded as plain text. With
        `ids-N`, raises UserError for text that is not numbers below N."""
        if self.numbers:
            wrong = next((word for word in text.split() if not word.isdigit() or int(word) >= self.vocab_size), None)
            if wrong is not None:
                what = f"{wrong.decode()!r} is not a token id below {self.vocab_size}"
                raise UserError(f"{what}: this model's tokenizer is unknown, so text must be token ids")
            return np.array([int(word) for word in text.split()], self.dtype)
        if self.encoding is None:
            return np.frombuffer(text, np.uint8).astype(self.dtype)
        return self.encoding.encode_to_numpy(text.decode(), disallowed_special=()).astype(self.dtype)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`; end-of-text and ids outside the vocabulary have none."""
        if self.numbers:
            return b" ".join(b"%d" % i for i in ids)
        table = self._token_bytes
        return b"".join(table[i] for i in map(int, ids) if i < len(table))

    def decode(self, ids: Iterable[int]) -> str:
        """`decode_bytes` as text; an incomplete character becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        if self.encoding is None:
            table = [bytes([i]) for i in range(256)]
        else:
            table = [b""] * self.vocab_size  # some named vocabularies have unused ids
            for token, rank in self.encoding._mergeable_ranks.items():
                table[rank] = token
        table[self.eot] = b""
        return table


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` ids: 256 bytes, merges learned from `texts`, end-of-text last. Raises
    UserError if the text has too few distinct pairs for that."""
    import rustbpe  # only needed for training

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < vocab_size - 1:
        raise UserError(f"`vocab_size` {vocab_size}: the text gives only {len(ranks) + 1}; use that or less")
    return bpe_of(ranks)


def model_vocab(tokenizer: Tokenizer, vocab_size: int | None) -> int:
    """Rows V of the model's token matrix: the tokenizer's vocabulary, or `vocab_size` to pad it. Raises UserError if
    that is smaller."""
    if vocab_size is None:
        return tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        needed = f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids"
        raise UserError(f"`vocab_size` {vocab_size}: {needed}; leave the option out or increase it")
    return vocab_size


def check(name: str, vocab_size: int | None = None) -> None:
    """Raises UserError for an unknown tokenizer, with the nearest names, or a `vocab_size` too small for bpe."""
    known = ["bytes", "bpe", *tiktoken.list_encoding_names()]
    if name not in known and not NUMBERS.fullmatch(name):
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
        raise UserError(f"`tokenizer` {name}: unknown; did you mean {' or '.join(close)}?")
    if name == "bpe" and vocab_size is not None and vocab_size < 257:
        raise UserError(f"`vocab_size` {vocab_size}: bpe needs at least 257 (256 bytes and end-of-text)")


def bpe_of(ranks: dict[bytes, int]) -> Tokenizer:
    """Our BPE with these tokens and their ids; end-of-text comes after them."""
    special = {END_OF_TEXT: len(ranks)}
    return Tokenizer("bpe", tiktoken.Encoding("bpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special))


def _read_ranks(path: Path, sha: str | None) -> dict[bytes, int]:
    try:
        content = path.read_bytes()
        if sha and hashlib.sha256(content).hexdigest() != sha:
            raise ValueError
        pairs = [line.split() for line in content.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        if sorted(ranks.values()) != list(range(len(pairs))) or len(pairs) < 256:
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"{path}: missing; it has the ranks of the run's BPE") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it") from None
    except ValueError:
        raise UserError(f"{path}: corrupted; not the tiktoken ranks of the run's BPE") from None
    return ranks


def _named_encoding(name: str) -> tiktoken.Encoding:
    """tiktoken's encoding `name`, from its cache or downloaded within DOWNLOAD_SECONDS."""
    check(name)
    result: list = []

    def get():
        try:
            result.append(tiktoken.get_encoding(name))
        except Exception as error:  # from its HTTP library (no network, proxy, status), or a wrong hash
            result.append(error)

    worker = threading.Thread(target=get, daemon=True)  # daemon: a stuck download does not keep the program alive
    worker.start()
    worker.join(DOWNLOAD_SECONDS)
    if result and isinstance(result[0], tiktoken.Encoding):
        return result[0]
    reason = type(result[0]).__name__ if result else f"no answer in {DOWNLOAD_SECONDS} s"
    remedy = "set TIKTOKEN_CACHE_DIR to a folder with them, or use `tokenizer` bytes or bpe"
    raise UserError(f"`tokenizer` {name}: tiktoken cannot download its ranks ({reason}); {remedy}")
