"""The kernel bench: its whole code on tiny shapes, and what it says where there is nothing to time."""

import json
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from interpreted import CUDA


@pytest.fixture(scope="module")
def table():
    """The rows of `python -m bench.kernels --dry-run`, by (operation, direction, who)."""
    pytest.importorskip("triton")
    before = sorted((ROOT / "bench" / "results").iterdir())
    argv = [sys.executable, "-m", "bench.kernels", "--dry-run"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted((ROOT / "bench" / "results").iterdir()) == before  # nothing written
    assert "these times mean nothing" in done.stdout.splitlines()[0]
    lines = [line for line in done.stdout.splitlines() if "tokens |" in line]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {(operation, direction, who): rest for operation, _, direction, who, *rest in cells}


@pytest.mark.parametrize("operation", ["attention", "rotary attention", "rms_norm", "add_layer_norm", "swiglu"])
def test_ours_is_timed_both_ways(table, operation):
    """Forward and backward of every operation have a time, and a ratio to the best peer."""
    for direction in ("forward", "backward"):
        time, *_, versus_best = table[operation, direction, "ours"]
        assert float(time) > 0 and versus_best


def test_the_loss_has_its_products_for_comparison(table):
    """The output layer's row stands beside its matrix products alone and PyTorch's own ways."""
    whos = {who for operation, _, who in table if operation == "linear_cross_entropy"}
    assert {"ours", "matrix products alone", "eager", "torch.compile"} <= whos
    assert ("F.linear_cross_entropy" in whos) == hasattr(torch.nn.functional, "linear_cross_entropy")


def test_some_cases_into_a_folder(command, tmp_path):
    """--only keeps what contains the text, --out writes its rows and table there; a text that fits nothing is an
    error."""
    pytest.importorskip("triton")
    done = command("-m", "bench.kernels", "--dry-run", "--only", "rms_norm C24", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "kernels_dry.json").read_text())["rows"]
    assert {row["operation"] for row in rows} == {"rms_norm", "add_rms_norm"}
    assert "| rms_norm | C24" in (tmp_path / "kernels_dry.md").read_text()
    done = command("-m", "bench.kernels", "--dry-run", "--only", "no such case")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no such case" in done.stderr


@pytest.mark.skipif(CUDA, reason="cuDNN runs here")
def test_a_failing_peer_is_a_row(table):
    """A peer that cannot run leaves its error's text, and the rows after it are there."""
    assert table["attention", "forward", "SDPA cuDNN"][0].startswith("RuntimeError")
    assert float(table["attention", "backward", "SDPA flash"][0]) > 0


@pytest.mark.skipif(CUDA, reason="there is something to time")
def test_without_a_gpu_there_is_nothing_to_time(command):
    """One line that says so, exit code 2."""
    done = command("-m", "bench.kernels")
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr


def test_a_wrong_result_is_noticed():
    """The check before timing measures errors against float64: an operation that is off by a thousandth fails it."""
    from bench.kernels import check

    x = torch.randn(5, 8, requires_grad=True)
    exact = torch.tanh
    assert check(torch.tanh, torch.tanh, exact, [x]) is None
    assert "output 0" in check(lambda x: torch.tanh(x) * 1.001, torch.tanh, exact, [x])
    assert "output 1" in check(lambda x: torch.tanh(x) + (x - x.detach()) * 1e-3, torch.tanh, exact, [x])


def test_the_deadline_is_kept():
    """What comes after the deadline is not timed, and says so."""
    from bench.kernels import Bench, Case, Contender, run_case

    bench = Bench(torch.device("cpu"), torch.float32, True, deadline=time.monotonic() - 1, cache=0)
    contenders = {"ours": Contender(torch.exp)}
    case = Case("norms", "x", "1", lambda: [torch.ones(2)], contenders, ("forward",), {}, {"forward": 8})
    (row,) = run_case(case, bench, {"bytes": 1.0})
    assert row.us is None and "out of time" in row.error
