"""Multiple-choice tasks made from any text, without a download, and how often a model chooses the truth.

- cloze: a passage of a document, then its true continuation or one from elsewhere in the same document. Chance is 1/2.
- last-word: a passage that ends in a word that it already had, so that the context helps (as in LAMBADA, Paperno et al.
  2016), or in one of four other words. Chance is 1/5.

Candidates of one item have the same length in bytes, so their log-probabilities need no normalisation. Items depend
only on the text and a seed: models with different tokenizers see the same ones.
"""

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from operator import gt, ne

import numpy as np
import torch

from nanochin.base.cli import UserError
from nanochin.data.tokenizer import Tokenizer
from nanochin.laws.law import Z, wilson
from nanochin.model import GPT

LENGTHS = (8, 16, 32, 64)  # bytes of a continuation, in turn
GROUP = 8  # words of like frequency
LOGITS_AT_ONCE = 1 << 24  # per forward pass
WORD = re.compile(r"[^\W\d_]+")
LAST = re.compile(r"(?<= )[^\W\d_]{4,}(?=[.,;:!?]\s)")  # at the end of a clause


@dataclass(frozen=True)
class Item:
    context: bytes
    candidates: tuple[bytes, ...]  # the truth first


# ---------------------------------------------------------------------------------------------------------------------
# Items


def documents_of(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The documents in `tokens`, which end-of-text separates. Raises UserError if the tokenizer has no text."""
    if tokenizer.numbers:
        raise UserError(f"the tokenizer {tokenizer.name} has no text, which `tasks` and `json` need")
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))
    return [text for part in parts if (text := tokenizer.decode_bytes(part).decode("utf-8", "ignore"))]


def sha_of(documents: list[str]) -> str:
    """SHA-256 of the text; of a run's validation text, its val_sha."""
    return hashlib.sha256("".join(documents).encode()).hexdigest()


def cloze(documents: list[str], count: int, passage: int, seed: int) -> list[Item]:
    """At most `count` items. Both continuations begin with the space before a word, have 8, 16, 32 or 64 bytes in turn,
    and start at least `passage` bytes apart; context and continuation have `passage` bytes together."""
    random = np.random.default_rng([seed, 0])
    text = b"\0" + "\0".join(documents).encode() + b"\0"  # text has no NUL
    flat = np.frombuffer(text, np.uint8)
    edges = np.flatnonzero(flat == 0)
    starts = 1 + np.flatnonzero((flat[:-2] > 32) & (flat[1:-1] == 32) & (flat[2:] > 32))  # between two words
    after = np.searchsorted(edges, starts)
    starts = starts[(starts - edges[after - 1] > passage) & (starts + max(LENGTHS) <= edges[after])]
    items = []
    for start in random.permutation(starts).tolist():
        length = LENGTHS[len(items) % len(LENGTHS)]
        edge = np.searchsorted(edges, start)
        first, near, far, last = np.searchsorted(
            starts, [edges[edge - 1], start - passage + 1, start + passage, edges[edge]]
        ).tolist()
        if (others := near - first + last - far) == 0:
            continue
        pick = first + int(random.integers(others))
        other = int(starts[pick if pick < near else pick - near + far])
        truth, wrong = text[start : start + length], text[other : other + length]
        if truth != wrong and (truth, wrong) == (_whole(truth), _whole(wrong)):
            items.append(Item(_whole(text[start + length - passage : start]), (truth, wrong)))
        if len(items) == count:
            break
    return items


def last_word(documents: list[str], count: int, passage: int, seed: int) -> list[Item]:
    """At most `count` items. The last word has four letters or more and ends a clause; every candidate is a space, the
    word and the mark that follows it in the text, so that no candidate is the beginning of another word.

    Words that occur at least twice in the text, with the same length in bytes and the same case of the first letter,
    form groups of eight in order of frequency. The four wrong words are drawn from the group of the true one, without
    those in the passage, so that frequency alone tells little."""
    random = np.random.default_rng([seed, 1])
    kinds = defaultdict(list)
    counts = Counter(word for text in documents for word in WORD.findall(text))
    for word, times in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        if times > 1:
            kinds[len(word.encode()), word[0].isupper()].append(word)
    group = {word: words[i - i % GROUP :][:GROUP] for words in kinds.values() for i, word in enumerate(words)}
    ends = [(number, *found.span()) for number, text in enumerate(documents) for found in LAST.finditer(text)]
    items = []
    for i in random.permutation(len(ends)).tolist():
        number, start, stop = ends[i]
        text, word = documents[number], documents[number][start:stop]
        candidate = f" {word}{text[stop]}".encode()
        context = _whole(text[max(0, start - passage) : start - 1].encode()[len(candidate) - passage :])
        before = WORD.findall(context.decode())
        wrong = [other for other in group.get(word, ()) if other not in before]
        if word in before[1:] and len(wrong) >= 4:  # the first may be cut
            drawn = [wrong[k] for k in random.choice(len(wrong), 4, replace=False)]
            items.append(Item(context, (candidate, *(f" {other}{text[stop]}".encode() for other in drawn))))
        if len(items) == count:
            break
    return items


TASKS: dict[str, Callable[[list[str], int, int, int], list[Item]]] = {"cloze": cloze, "last-word": last_word}


def _whole(text: bytes) -> bytes:
    """The text without the parts of characters at its ends."""
    return text.decode("utf-8", "ignore").encode()


# ---------------------------------------------------------------------------------------------------------------------
# Scores


@torch.no_grad()
def log_probabilities(model: GPT, tokenizer: Tokenizer, items: list[Item]) -> np.ndarray:
    """(items, candidates): nats of each candidate, summed over its tokens, after as much of the context as fits.

    Context and candidate are tokenised apart. Raises UserError if a candidate has more than seq_len tokens."""
    T, rows = model.shape.seq_len, []
    for item in items:
        context = tokenizer.encode(item.context)
        for candidate in item.candidates:
            ids = tokenizer.encode(candidate)
            if len(ids) > T:
                raise UserError(f"a context of {T} tokens is too short for `tasks`, which need {len(ids)} here")
            rows.append((np.concatenate((context, ids))[-T - 1 :].astype(np.int64), len(ids)))
    nats, device = np.empty(len(rows)), next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    at_once = max(1, LOGITS_AT_ONCE // (T * model.shape.vocab_size))
    for start in range(0, len(rows), at_once):
        batch = order[start : start + at_once]
        width = len(rows[batch[-1]][0]) - 1
        x, y = torch.zeros(len(batch), width, dtype=torch.int64), torch.full((len(batch), width), -1)
        for k, (ids, length) in enumerate(rows[i] for i in batch):  # padded on the right, which nothing sees
            x[k, : len(ids) - 1] = torch.from_numpy(ids[:-1])
            y[k, len(ids) - 1 - length : len(ids) - 1] = torch.from_numpy(ids[-length:])
        at = y >= 0  # (B, T)
        chosen = model(x.to(device)).cpu()[at].double().log_softmax(-1).gather(-1, y[at][:, None])[:, 0]
        nats[batch] = torch.zeros(len(batch)).double().index_add(0, at.nonzero()[:, 0], chosen).numpy()
    return nats.reshape(len(items), -1)


def margins_of(nats: np.ndarray) -> np.ndarray:
    """(items,): nats of the truth less those of the best wrong candidate. The model is right above 0, not in a tie."""
    return nats[:, 0] - nats[:, 1:].max(axis=1)


def summarise(margins: np.ndarray) -> dict:
    """Accuracy and mean margin with 95% intervals over the items, of which there are at least two."""
    n, right = len(margins), int((margins > 0).sum())
    mean, error = margins.mean(), Z * margins.std(ddof=1) / math.sqrt(n)
    return {
        "items": n,
        "accuracy": right / n,
        "accuracy_ci": wilson(right, n),
        "margin": mean.item(),
        "margin_ci": ((mean - error).item(), (mean + error).item()),
    }


def better(ours: list[float], theirs: list[float]) -> tuple[int, int]:
    """(k, n): of the n items on which the margins of two models differ, the first has the larger one on k."""
    return sum(map(gt, ours, theirs)), sum(map(ne, ours, theirs))
