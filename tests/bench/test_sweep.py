"""The estimate of bench.sweep: what a loop over all runs would take, by the few that were timed."""

import pytest

from bench.sweep import estimate_loop
from nanochin.runrow import RunRow


def test_a_loop_is_estimated_by_time_and_not_by_flops():
    """Two runs of four, which had a fifth of the sweep's training seconds but half of its FLOPs, took 50 s, 40 of them
    in training: all four take 40 / 0.2 + 2 x 10 s; four of four take what they took."""
    rows = [RunRow(seconds=seconds, flops=1e12) for seconds in (5, 15, 30, 50)]
    assert estimate_loop(50.0, 40.0, rows[:2], rows) == pytest.approx(220.0)
    assert estimate_loop(50.0, 40.0, rows, rows) == pytest.approx(50.0)
