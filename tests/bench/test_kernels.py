"""The kernel bench on tiny shapes: times, checks and tiles."""

import time

import pytest
import torch
from interpreted import CUDA, DEVICE, load_all

pytest.importorskip("triton", reason="triton is not installed (it has no build for this platform)")

import kernels
from bench import kernels as bench_kernels
from bench.gpu_check import CASES, MORE_CASES, TUNED, of_case
from bench.kernel_cases import Bench, Case, make_case

BENCH = Bench(DEVICE, torch.float32, dry=True)
LIMITS = {"flops": 1e9, "bytes": 1e9}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Our kernels in Python, nothing compiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    load_all()
    with kernels.use("triton"):
        yield


@pytest.mark.parametrize("name", sorted({*CASES, *MORE_CASES, *TUNED}))
def test_every_planned_case_is_timed(name):
    """Ours and a peer have a time in every direction, and a share of the ceiling; what fails is a row with its
    error."""
    arguments = of_case(name, "case", 60).arguments
    case = make_case(BENCH, **arguments)
    rows = {(row["direction"], row["who"]): row for row in bench_kernels.time_case(case, BENCH, LIMITS)}
    assert {direction for direction, _ in rows} == set(case.work)
    for direction in case.work:
        timed = [who for by, who in rows if by == direction and "us" in rows[by, who]]
        assert "ours" in timed and len(timed) > 1
        row = rows[direction, "ours"]
        assert row["of_ceiling"] == pytest.approx(case.work[direction] / row["us"] * 1e6 / LIMITS[case.ceiling])


@pytest.mark.skipif(CUDA, reason="cuDNN runs here")
def test_a_failing_peer_is_a_row():
    """A peer that cannot run leaves its error's text, and the rows after it are there."""
    case = make_case(BENCH, "attention", {"D": 64, "T": 1024})
    rows = list(bench_kernels.time_case(case, BENCH, LIMITS))
    assert [row["who"] for row in rows] == 2 * ["ours", "SDPA flash", "SDPA cuDNN"]
    assert rows[2]["error"].startswith("RuntimeError") and "us" in rows[3]


def test_the_deadline_is_kept():
    """What comes after the deadline is not timed, and says so."""
    late = Bench(DEVICE, torch.float32, dry=True, deadline=time.monotonic() - 1)
    case = Case({"ours": (torch.exp, [torch.ones(2)])}, {"forward": 8}, "bytes")
    (row,) = bench_kernels.time_case(case, late, LIMITS)
    assert "us" not in row and "out of time" in row["error"]


def test_work_by_hand():
    """FLOPs and bytes of tiny shapes: causal attention of 1 sequence of 16 and 1 head of 16, residual and norm of
    16 x 24 numbers of 4 bytes, the output layer of 8 tokens, width 24 and vocabulary 65."""
    work = {name: make_case(BENCH, **of_case(name, "case", 60).arguments).work for name in CASES}
    assert work["attention D64 T1024"] == {"forward": 2 * 16**3, "backward": 5 * 16**3}
    assert work["add_rms_norm C768"] == {"forward": 4 * 4 * 16 * 24, "backward": 4 * 4 * 16 * 24}
    assert work["gelu F3072"] == {"forward": 2 * 4 * 16 * 40, "backward": 3 * 4 * 16 * 40}
    assert work["linear_cross_entropy C768 V50257 M16384"] == {"both": 6 * 8 * 24 * 65}


def test_a_wrong_result_is_noticed():
    """The check measures errors against float64: an operation that is off by a thousandth fails it."""
    check, exact, x = bench_kernels.check, torch.tanh, torch.randn(5, 8, requires_grad=True)
    assert check(torch.tanh, torch.tanh, exact, [x]) is None
    assert "output 0" in check(lambda x: torch.tanh(x) * 1.001, torch.tanh, exact, [x])
    assert "output 1" in check(lambda x: torch.tanh(x) + (x - x.detach()) * 1e-3, torch.tanh, exact, [x])


def test_tiles_with_other_results_do_not_win(monkeypatch):
    """A neighbour that is faster but wrong, or that fails, has no time; what is shipped stays as it was."""
    from kernels import norms

    class Module:
        @staticmethod
        def config(C):
            return {"ROWS": 4, "num_warps": 2}

    def norm(x):
        config = Module.config(x.shape[-1])
        if config["ROWS"] == 8:
            raise RuntimeError("too much shared memory")
        return x * (2 if config["num_warps"] == 1 else 1)

    before = Module.config, norms._forward_config
    case = Case({"ours": (norm, [torch.ones(3, 4)])}, {"forward": 1}, "bytes")
    arguments = case, "forward", Module, "config", None, ("ROWS", "num_warps"), BENCH
    us = dict(bench_kernels.neighbours(*arguments))
    assert {name for name in us if us[name]} == {"as shipped", "ROWS=2", "num_warps=4"}
    assert us["ROWS=8"] is us["num_warps=1"] is None
    assert (Module.config, norms._forward_config) == before
