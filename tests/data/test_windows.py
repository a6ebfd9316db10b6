"""Windows of tokens: their order in training, and their targets in evaluation."""

from collections import Counter

import numpy as np
import pytest

from nanochin.base.cli import UserError
from nanochin.data.windows import Windows, eval_windows


def starts(w: Windows, start: int, count: int) -> list[int]:
    """First tokens of windows over np.arange: the position of each. Checks that the rest follows, around the ring."""
    rows = w.batch(start, count)
    assert rows.dtype == np.int64 and rows.shape == (count, w.seq_len + 1)
    assert (rows == (rows[:, :1] + np.arange(w.seq_len + 1)) % len(w.tokens)).all()
    return rows[:, 0].tolist()


@pytest.mark.parametrize(("tokens", "T"), [(1001, 10), (1000, 10), (1009, 10), (500, 1), (11, 10), (777, 64)])
def test_each_window_of_an_epoch_is_drawn_once(tokens, T):
    """No token is a target twice, fewer than T+1 are none. Epochs after the first start at an offset."""
    w = Windows(np.arange(tokens), T, seed=3)
    assert w.per_epoch == (tokens - 1) // T
    shifts = set()
    for epoch in range(4):
        firsts = starts(w, epoch * w.per_epoch, w.per_epoch)
        targets = Counter((first + i) % tokens for first in firsts for i in range(1, T + 1))
        assert max(targets.values()) == 1 and len(targets) == w.per_epoch * T > tokens - T - 1
        shifts |= {first % T for first in firsts if first + T < tokens}
        assert epoch > 0 or sorted(firsts) == list(range(0, w.per_epoch * T, T))
    assert len(shifts) > 1 or T == 1 or w.per_epoch == 1


def test_order_depends_only_on_seed_and_epoch():
    """Windows are shuffled, differently for each seed and epoch, whatever the batches."""
    w = Windows(np.arange(10_001), 10, seed=0)
    first, second = starts(w, 0, 1000), starts(w, 1000, 1000)
    assert first != sorted(first) and [a - second[0] for a in first] != [a - second[0] for a in second]
    assert starts(Windows(np.arange(10_001), 10, seed=1), 0, 1000) != first
    for cut in (7, 995, 1000):  # also across epochs
        parts = np.concatenate([w.batch(990, cut), w.batch(990 + cut, 1010 - cut)])
        assert (parts == Windows(np.arange(10_001), 10, seed=0).batch(990, 1010)).all()


def test_order_is_stable_across_numpy_versions():
    """Philox, SeedSequence with seed and epoch as entropy, a permutation of uint32: resuming needs the same."""
    w = Windows(np.arange(101), 10, seed=1234)
    philox = np.random.Generator(np.random.Philox(np.random.SeedSequence([1234, 0])))
    assert [a // 10 for a in starts(w, 0, 10)] == philox.permutation(np.arange(10, dtype=np.uint32)).tolist()
    assert starts(w, 0, 20) == [50, 40, 70, 60, 90, 30, 80, 20, 0, 10, 58, 8, 88, 68, 38, 18, 28, 48, 98, 78]


def test_too_few_tokens_for_one_window():
    """T+1 tokens are one window; with T tokens the error says how many there are."""
    assert Windows(np.arange(9), 8, seed=0).batch(0, 2).tolist()[0] == list(range(9))
    with pytest.raises(UserError, match="`seq_len` 8: .* 8 tokens"):
        Windows(np.arange(8), 8, seed=0)


@pytest.mark.parametrize(("tokens", "rows"), [(101, 10), (102, 11), (100, 10), (2, 1), (11, 1)])
def test_every_token_but_the_first_is_evaluated_once(tokens, rows):
    """Targets are 1, 2, ... in order, each after its input, padded with -1 to whole rows."""
    x, y = eval_windows(np.arange(tokens), 10)
    assert x.shape == y.shape == (rows, 10) and x.dtype == y.dtype == np.int64
    assert y[y >= 0].tolist() == list(range(1, tokens))
    assert (x[y >= 0] == y[y >= 0] - 1).all() and (x >= 0).all()
    assert y.ravel()[tokens - 1 :].tolist() == [-1] * (rows * 10 - tokens + 1)


def test_unique_windows_repeat():
    """With `unique`, every epoch has the same windows in another order, drawn from the whole text, depending on the
    seed; batches may cut across epochs."""
    w = Windows(np.arange(10_001), 10, seed=3, unique=40)
    epochs = [starts(w, 40 * epoch, 40) for epoch in range(4)]
    assert w.per_epoch == 40 == len(set(epochs[0])) and max(epochs[0]) > 8000
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs) and epochs[1] != epochs[2] != epochs[3]
    assert starts(w, 30, 20) == epochs[0][30:] + epochs[1][:10]
    assert set(starts(Windows(np.arange(10_001), 10, seed=4, unique=40), 0, 40)) != set(epochs[0])
    for unique in (0, 1001):
        with pytest.raises(UserError, match="`epochs`: .* 1000 windows"):
            Windows(np.arange(10_001), 10, seed=3, unique=unique)
