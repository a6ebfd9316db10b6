"""Rows of a few minutes on a GPU: what is kept when something fails or is killed, and the table of them."""

import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from bench import gpu_check, gpu_table
from bench.gpu_check import Row, add_row, measure, missing, read_rows, run
from nanochin.base.cli import UserError


def row(name: str, code: str, seconds: float = 30.0, together: bool = False) -> Row:
    return Row(name, (sys.executable, "-c", code), seconds, together)


# ---------------------------------------------------------------------------------------------------------------------
# Rows on the disk


def test_the_last_line_of_a_row_counts(tmp_path):
    """A row measured again replaces the earlier one; a truncated line counts as missing, and the next row starts on a
    new line."""
    path = tmp_path / "first.jsonl"
    assert read_rows(path) == {}
    add_row(path, {"row": "a", "error": "full"})
    add_row(path, {"row": "a", "ms": 2})
    with open(path, "a") as file:
        file.write('\n{"row": "b", "ms"')
    add_row(path, {"row": "c", "ms": 3})
    assert read_rows(path) == {"a": {"row": "a", "ms": 2}, "c": {"row": "c", "ms": 3}}


def test_missing_rows(tmp_path):
    """Rows that failed or were not measured; real rows do not mix with those of a dry run."""
    path = tmp_path / "first.jsonl"
    add_row(path, {"row": "a", "dry": True, "ms": 2})
    add_row(path, {"row": "b", "dry": True, "error": "full"})
    rows = [row(name, "") for name in ("a", "b", "c")]
    assert [left.name for left in missing(rows, path, dry=True)] == ["b", "c"]
    with pytest.raises(UserError, match="dry run; give another --out"):
        missing(rows, path, dry=False)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def test_a_failure_costs_only_its_row(tmp_path):
    """Rows that crash or hang are kept with their error; the others are measured in order."""
    path, hang = tmp_path / "first.jsonl", "import time; time.sleep(60)"
    rows = [row("one", ""), row("hangs", hang, 1.0), row("dies", "import os; os.abort()"), row("two", "")]
    measure(rows, path, False, time.monotonic() + 60)
    found = read_rows(path)
    assert list(found) == ["one", "hangs", "dies", "two"]
    assert [name for name, got in found.items() if "error" in got] == ["hangs", "dies"]
    assert found["hangs"]["error"] == "cut off after 1 s" and found["hangs"]["seconds"] < 10


def test_together_first_and_nothing_after_the_deadline(tmp_path):
    """Rows that run at the same time come first; rows that do not start before the deadline are not written, so that
    the next call measures them."""
    path = tmp_path / "first.jsonl"
    rows = [row("alone", ""), *(row(f"together {i}", "", together=True) for i in range(5))]
    measure(rows, path, True, time.monotonic() + 60)
    assert sorted(list(read_rows(path))[:5]) == [f"together {i}" for i in range(5)]
    assert list(read_rows(path))[5:] == ["alone"]
    measure(rows, tmp_path / "late.jsonl", True, time.monotonic() + 0.5)
    assert not (tmp_path / "late.jsonl").exists()


@pytest.mark.parametrize(
    "code, error",
    [("pass", None), ("raise SystemExit(3)", "exit code 3"), ("import time; time.sleep(60)", "cut off after 2 s")],
)
def test_output_is_kept(code, error):
    """The end of the output is kept, also if the command fails or is killed; a line of JSON at the end gives fields."""
    got = run(row("x", f"print('begun', flush=True)\n{code}"), 2.0)
    assert got["tail"] == "begun\n" and got.get("error", "").startswith(error or "") and ("error" in got) == bool(error)
    fields = run(row("x", f"import json; print('some'); print(json.dumps(dict(ms=2)), flush=True)\n{code}"), 2.0)
    assert fields["ms"] == 2 and "tail" not in fields and ("error" in fields) == bool(error)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_children_do_not_outlive_a_command(tmp_path):
    """At its limit a command is killed with all its processes, so that none keeps memory of the GPU."""
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    assert run(row("x", code), 2.0)["error"].startswith("cut off")
    stat, deadline = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat"), time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] != "Z":  # a zombie waits for its new parent
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_errors(command, tmp_path):
    """Without a GPU nothing is measured or written; a folder without rows has no table."""
    done = command("-m", "bench.gpu_check", "--out", tmp_path / "out", env={"PATH": "/nowhere"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no NVIDIA GPU" in done.stderr
    assert not (tmp_path / "out").exists()
    done = command("-m", "bench.gpu_table", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no rows" in done.stderr


def test_every_planned_row_exists():
    """Checks are those of bench.kernels, test files exist, names are unique; nanoGPT only where it is given."""
    pytest.importorskip("triton")
    from bench import kernels as bench_kernels

    dry = bench_kernels.Bench(torch.device("cpu"), torch.float32, True)
    assert set(bench_kernels.checks(dry)) == set(gpu_check.CHECKS)
    assert all((ROOT / path).exists() for path in gpu_check.TESTED)
    for part, plan in gpu_check.PARTS.items():
        for nanogpt in (None, "nanoGPT"):
            planned = [row.name for row in plan(nanogpt, dry=False)]
            assert len(set(planned)) == len(planned)
            assert any("nanoGPT" in name for name in planned) == (nanogpt is not None and part == "second")


def test_in_miniature(tmp_path, command):
    """Part first on a CPU, with most rows measured by an earlier call: the others are added; the table says that its
    numbers mean nothing, and writes no result."""
    pytest.importorskip("triton")
    from interpreted import skip_if_it_cannot_interpret

    skip_if_it_cannot_interpret()
    path, planned = tmp_path / "first.jsonl", [row.name for row in gpu_check.plan_first(None, dry=True)]
    left = ["device", "check rms_norm", "124M graph", "124M eager", "norm, loss"]
    for name in planned:
        if name not in left:
            add_row(path, {"row": name, "dry": True})
    done = command("-m", "bench.gpu_check", "--part", "first", "--minutes", "20", "--out", tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(path)
    assert sorted(rows) == sorted(planned) and sorted(list(rows)[-len(left) :]) == sorted(left)
    results = sorted((ROOT / "bench" / "results").iterdir())
    page = command("-m", "bench.gpu_table", str(tmp_path)).stdout
    assert "these numbers mean nothing" in page and "7 of 7" in page and "failed or are missing" not in page
    assert sorted((ROOT / "bench" / "results").iterdir()) == results


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_figures_beside_their_goals():
    """Speed over a peer is its time over ours; ahead at the goal, else behind by the share that is reached."""
    times = {
        ("forward", "ours"): 100.0,
        ("forward", "SDPA cuDNN"): 80.0,
        ("backward", "ours"): 100.0,
        ("backward", "SDPA flash"): 150.0,
    }
    cases = [{"case": "attention D64 T1024", "direction": d, "who": who, "us": us} for (d, who), us in times.items()]
    cases.append({"case": "attention D64 T1024", "direction": "forward", "who": "SDPA flash", "error": "full"})
    rows = {"first attention": {"rows": cases}, "first 124M graph": {"tokens_per_s": 440_000.0}}
    found = {line.what: line for line in gpu_table.lines(rows)}
    forward = found["attention D64 T1024, forward, speed over SDPA cuDNN"]
    backward = found["attention D64 T1024, backward, speed over SDPA flash"]
    assert forward.value == 0.8 and forward.cells().endswith("| behind: 0.80 of the goal")
    assert backward.value == 1.5 and backward.cells().endswith("| ahead")
    assert found["attention D64 T1024, forward, speed over SDPA flash"].value is None
    assert found["124M, tokens/s"].cells().endswith("| behind: 0.80 of the goal")
    assert "| not measured |" in found["124M, speed over nanoGPT compiled"].cells()


def test_upper_bounds():
    """Time over the matrix products and memory over PyTorch's have a goal that they must not exceed."""
    figures = {"ours": (230.0, 20.0), "matrix products alone": (100.0, 50.0), "eager": (300.0, 100.0)}
    cases = [
        {"case": gpu_check.LOSS, "direction": "both", "who": who, "us": us, "peak_mib": mib}
        for who, (us, mib) in figures.items()
    ]
    found = {line.what: line for line in gpu_table.lines({"first norm, loss": {"rows": cases}})}
    time, memory = "output layer and loss, time over its matrix products", "output layer and loss, memory over eager"
    assert found[time].value == 2.3 and found[time].cells().endswith("| behind: 0.50 of the goal")
    assert found[memory].value == 0.2 and found[memory].cells().endswith("| ahead")


def test_beside_nanogpt():
    """Speed of our fastest kind over the faster of theirs, memory at the micro-batch of the leaner of theirs; part
    second replaces part first."""
    rows = {
        "first 124M graph": {"tokens_per_s": 99.0},
        "second 124M graph": {"tokens_per_s": 30.0},
        "first 124M eager": {"tokens_per_s": 20.0, "peak_bytes_at": {"8": 7, "4": 4}},
        "second 124M nanoGPT flash": {"tokens_per_s": 10.0, "micro_batch": 4, "peak_bytes": 10},
        "second 124M nanoGPT cudnn": {"tokens_per_s": 20.0, "micro_batch": 8, "peak_bytes": 18},
    }
    lines = gpu_table.size_lines("124M", gpu_table.steps_of(rows, "124M"), "unknown")
    found = {line.what: line.value for line in lines}
    assert found["124M, speed over nanoGPT compiled"] == 1.5 and found["124M, memory over nanoGPT's"] == 0.4
    assert found["124M, MFU by nanoGPT's count"] is None


def test_mfu_by_hand():
    """124M at 500,000 tokens/s on an H100: 6 (parameters of GPT-2 without positions and biases) plus 12 L C T."""
    params = 50304 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768
    expected = (6 * params + 12 * 12 * 768 * 1024) * 500_000 / 989.4e12
    assert gpu_table.mfu("124M", 500_000, "NVIDIA H100 80GB HBM3") == pytest.approx(expected)
    assert expected == pytest.approx(0.432, rel=1e-3)
    assert gpu_table.mfu("124M", 500_000, "a CPU") is None


def test_the_page_names_what_is_missing():
    """Rows that failed with their error, rows that are not there; the device and the versions."""
    rows = {
        "first device": {"device": "GPU 9", "versions": {"torch": "2.11", "triton": "3.6", "git": "abc"}},
        "first check rotary": {"error": "wrong: output 0"},
    }
    page = gpu_table.markdown(rows, ["first device", "first check rotary", "first attention"], dry=False)
    assert page.startswith("# Measured on GPU 9") and "torch 2.11, triton 3.6" in page and "mean nothing" not in page
    assert "0 of 1." in page
    assert "| first check rotary | wrong: output 0 |" in page and "| first attention | not measured |" in page
