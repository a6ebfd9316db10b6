"""Data sets of the Hugging Face hub: hf:OWNER/NAME[:CONFIG], streamed once into a .jsonl file in the cache.

After that they are like any other corpus and need no network. The optional `datasets` library reads them; since version
4 it does not run a data set's code. No torch here.
"""

import hashlib
import importlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from nanochin.base.cli import UserError, brief, need
from nanochin.base.console import Progress
from nanochin.base.files import replacing
from nanochin.config import Config
from nanochin.data.text import Stage
from nanochin.data.tokenizer import BPE_VOCAB, Tokenizer, train_bpe

PREFIX = "hf:"
SAMPLE = 1 << 22  # bytes to train a temporary BPE on, which counts tokens before the real BPE exists
AT_ONCE = 256  # documents that a thread counts at a time


@dataclass(frozen=True)
class Source:
    """A data set: whole documents of its split `train`, up to `max_tokens` of that tokenizer."""

    what: str  # option and value, for errors
    dataset: str
    config: str | None
    max_tokens: float
    tokenizer: str
    vocab_size: int | None
    column: str

    @property
    def place(self) -> str:
        """Path of the .jsonl file in the cache: 0b1c2d3e4f5a/fineweb-edu-sample-10BT.jsonl"""
        name = re.sub(r"[^\w-]+", "-", "-".join(filter(None, [Path(self.dataset).name, self.config])))
        options = [self.dataset, self.config, self.max_tokens, self.tokenizer, self.vocab_size]
        options += [self.column] * (self.column != Config.text_column)
        return f"{hashlib.sha256(json.dumps(options).encode()).hexdigest()[:12]}/{name}.jsonl"


def parse(item: str, option: str, options: Config) -> Source:
    """Raises UserError for an item that is not hf:OWNER/NAME[:CONFIG], and without `max_tokens`."""
    dataset, _, config = item.removeprefix(PREFIX).partition(":")
    if not re.fullmatch(r"[^\s:]*[^\s:/]", dataset):
        raise UserError(f"`{option}` {item}: expected hf:OWNER/NAME or hf:OWNER/NAME:CONFIG")
    if options.max_tokens is None:
        raise UserError(f"`{option}` {item}: needs `max_tokens`, the tokens to read, such as 1e8")
    how = options.max_tokens, options.tokenizer or "bytes", options.vocab_size, options.text_column
    return Source(f"`{option}` {item}", dataset, config or None, *how)


def stream(source: Source, path: Path, progress: Progress | None) -> None:
    """Write the documents of `source` to `path` atomically, one {column: text} per line; null for a row without a
    string, which the .jsonl reader rejects or skips. Raises UserError if the library is missing, or the data set cannot
    be loaded or lacks the column."""
    tokenizer, texts = _counter(source, _texts(source))
    stage = Stage("streaming", int(source.max_tokens), progress)
    total = 1  # end-of-text at the start

    def count(documents: list[str | None]) -> list[tuple[str | None, int]]:
        return [(text, len(tokenizer.encode((text or "").encode("utf-8", "ignore"))) + 1) for text in documents]

    with replacing(path) as file:
        batches = iter(lambda: list(islice(texts, AT_ONCE)), [])
        for text, tokens in chain.from_iterable(stage.map(count, batches)):
            total += tokens
            if total > source.max_tokens:
                break
            file.write((json.dumps({source.column: text}) + "\n").encode())
            stage.add(tokens)
        if not file.tell():
            raise UserError(f"{source.what}: the first document alone exceeds `max_tokens` {source.max_tokens:g}")


def _texts(source: Source) -> Iterator[str | None]:
    """The documents, downloaded lazily."""
    datasets = need("datasets", source.what, least=4)
    importlib.import_module("huggingface_hub").logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported once, below
    try:
        for row in datasets.load_dataset(source.dataset, source.config, split="train", streaming=True):
            if source.column not in row:
                raise UserError(f"{source.what}: no column '{source.column}' (`text_column`); it has {', '.join(row)}")
            yield row[source.column] if isinstance(row[source.column], str) else None
    except UserError:
        raise
    except Exception as error:  # network, hub, format: each library below has its own
        raise UserError(f"{source.what}: {brief(error)}") from error


def _counter(source: Source, texts: Iterator[str | None]) -> tuple[Tokenizer, Iterator[str | None]]:
    """(tokenizer to count with, the same texts). Our BPE can only be trained on all of the text; until then one trained
    on the first 4 MB counts, so the number of tokens is approximate."""
    if source.tokenizer != "bpe":
        return Tokenizer.load(source.tokenizer), texts
    sample, size = [], 0
    for text in texts:
        sample.append(text)
        size += len(text or "")
        if size >= SAMPLE:
            break
    return train_bpe(filter(None, sample), source.vocab_size or BPE_VOCAB), chain(sample, texts)
