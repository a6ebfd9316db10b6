"""Windows of tokens, for training and for evaluation. No torch here."""

from functools import lru_cache

import numpy as np

from nanochin.base.cli import UserError
from nanochin.data.text import Tokens


class Windows:
    """Training windows of T+1 tokens, T apart, so that each token is a target at most once per epoch.

    Windows are drawn without replacement, in an order fixed by (seed, epoch). The tokens form a ring; each epoch after
    the first starts at a random offset below T, so that its windows are new. With `unique`, all epochs have the same
    windows instead: that many, drawn at random.
    Raises UserError if there are fewer than T+1 tokens, or fewer windows than `unique`.
    """

    def __init__(self, tokens: Tokens | np.ndarray, seq_len: int, seed: int, unique: int | None = None):
        if len(tokens) < seq_len + 1:
            what = f"the training text has only {len(tokens)} tokens, less than one window"
            raise UserError(f"`seq_len` {seq_len}: {what}; use more text or a shorter length")
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.per_epoch, self.chosen = (len(tokens) - 1) // seq_len, None
        if unique is not None:
            if not 1 <= unique <= self.per_epoch:
                there = f"the text has {self.per_epoch} windows of {seq_len} tokens"
                raise UserError(f"`epochs`: one epoch would have {unique} windows, but {there}")
            self.chosen = _order(seed, 0, self.per_epoch, seq_len)[1][:unique]
            self.per_epoch = unique

    def batch(self, start: int, count: int) -> np.ndarray:
        """(count, T+1) int64: windows start, start+1, ..., numbered from the beginning of the run."""
        T, size = self.seq_len, len(self.tokens)
        out = np.empty((count, T + 1), np.int64)
        for row, number in zip(out, range(start, start + count), strict=True):
            epoch, index = divmod(number, self.per_epoch)
            shift, order = _order(self.seed, epoch, self.per_epoch, T)
            if self.chosen is None:
                first = (shift + int(order[index]) * T) % size
            else:
                first = int(self.chosen[order[index]]) * T
            head = min(T + 1, size - first)
            row[:head] = self.tokens[first : first + head]
            if head <= T:  # wraps around the ring
                row[head:] = self.tokens[: T + 1 - head]
        return out


@lru_cache(maxsize=2)  # a batch may span two epochs
def _order(seed: int, epoch: int, windows: int, seq_len: int) -> tuple[int, np.ndarray]:
    """(offset of the epoch in the ring, order of its windows)."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed % 2**64, epoch])))
    shift = int(random.integers(seq_len)) if epoch else 0
    return shift, random.permutation(np.arange(windows, dtype=np.uint32))


def eval_windows(tokens: Tokens | np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, (n, T) int64 each: every token but the first is a target exactly once, in order. The last row
    is padded with input 0 and target -1, which the loss ignores."""
    n = -(-(len(tokens) - 1) // seq_len)
    x, y = np.zeros(n * seq_len, np.int64), np.full(n * seq_len, -1, np.int64)
    x[: len(tokens) - 1] = tokens[: len(tokens) - 1]
    y[: len(tokens) - 1] = tokens[1 : len(tokens)]
    return x.reshape(n, seq_len), y.reshape(n, seq_len)
