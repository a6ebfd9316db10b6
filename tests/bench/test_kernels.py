"""The kernel bench on tiny shapes."""

import pytest
import torch
from interpreted import CUDA, DEVICE, load_all

pytest.importorskip("triton", reason="triton is not installed (it has no build for this platform)")

import kernels
from bench import kernels as bench_kernels
from bench.gpu_check import ATTENTION, LOSS, NORM
from bench.kernels import Bench, make_case

BENCH = Bench(DEVICE, torch.float32, dry=True)
LIMITS = {"flops": 1e9, "bytes": 1e9}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Our kernels in Python, nothing compiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    load_all()
    with kernels.use("triton"):
        yield


@pytest.mark.parametrize("name", [*ATTENTION, NORM, LOSS])
def test_every_planned_case_is_timed(name):
    """Ours and a peer have a time in every direction, and a share of the ceiling."""
    case = make_case(BENCH, name)
    rows = {(row["direction"], row["who"]): row for row in bench_kernels.time_case(case, BENCH, LIMITS)}
    assert {direction for direction, _ in rows} == set(case.work)
    for direction in case.work:
        timed = [who for by, who in rows if by == direction and "us" in rows[by, who]]
        assert "ours" in timed and len(timed) > 1
        row = rows[direction, "ours"]
        assert row["of_ceiling"] == pytest.approx(case.work[direction] / row["us"] * 1e6 / LIMITS[case.bound])


@pytest.mark.skipif(CUDA, reason="cuDNN runs here")
def test_a_failing_peer_is_a_row():
    """A peer that cannot run leaves its error's text, and the rows after it are there."""
    rows = list(bench_kernels.time_case(make_case(BENCH, "attention D64 T1024"), BENCH, LIMITS))
    assert [row["who"] for row in rows] == 2 * ["ours", "SDPA flash", "SDPA cuDNN"]
    assert rows[2]["error"].startswith("RuntimeError") and "us" in rows[3]


def test_work_by_hand():
    """FLOPs and bytes of tiny shapes: causal attention of 1 sequence of 16 and 1 head of 16, residual and norm of
    8 x 24 numbers of 4 bytes, the output layer of 8 tokens, width 24 and vocabulary 65."""
    assert make_case(BENCH, "attention D64 T1024").work == {"forward": 2 * 16**3, "backward": 5 * 16**3}
    assert make_case(BENCH, NORM).work == {"forward": 4 * 4 * 8 * 24, "backward": 4 * 4 * 8 * 24}
    assert make_case(BENCH, LOSS).work == {"both": 6 * 8 * 24 * 65}
