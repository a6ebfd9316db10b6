"""Rows of a few minutes on a GPU: what is kept when something fails or is killed, and the table of them."""

import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from bench import gpu_check, gpu_table
from bench.gpu_check import Row, add_row, measure, missing, read_rows, run
from nanochin.base.cli import UserError

HANG = "import time; time.sleep(60)"
STEP = {"tokens_per_s": 1e4, "ms": 3.2, "micro_batch": 2, "peak_bytes": 0, "first_steps_seconds": 1.0, "losses": [4.0]}


def row(name: str, code: str, seconds: float = 30.0) -> Row:
    return Row(name, (sys.executable, "-c", code), seconds)


def test_the_last_line_of_a_row_counts(tmp_path):
    """A row measured again replaces the earlier one; a truncated line counts as missing, and the next row starts on a
    new line. Failed rows are missing. Real rows do not mix with those of a dry run."""
    path = tmp_path / "first.jsonl"
    assert read_rows(path) == {}
    a, b, c = ({"row": name, "dry": True} for name in "abc")
    add_row(path, a | {"error": "full"})
    add_row(path, a)
    with open(path, "a") as file:
        file.write('\n{"row": "d", "ms"')
    add_row(path, b | {"error": "full"})
    assert read_rows(path) == {"a": a, "b": b | {"error": "full"}}
    assert [left.name for left in missing([row(name, "") for name in "abcd"], path, dry=True)] == ["b", "c", "d"]
    with pytest.raises(UserError, match="--out"):
        missing([], path, dry=False)


def test_a_failure_costs_only_its_row(tmp_path):
    """Rows that crash or hang are kept with their error, and the others are measured, in order. Rows that do not start
    before the deadline are not written, so that the next call measures them."""
    path, late = tmp_path / "first.jsonl", tmp_path / "late.jsonl"
    rows = [row("one", ""), row("hangs", HANG, 1.0), row("dies", "import os; os.abort()"), row("two", "")]
    measure(rows, path, False, time.monotonic() + 60)
    found = read_rows(path)
    assert list(found) == ["one", "hangs", "dies", "two"]
    assert [name for name, got in found.items() if "error" in got] == ["hangs", "dies"]
    assert found["hangs"]["error"] == "cut off after 1 s" and found["hangs"]["seconds"] < 10
    measure(rows, late, True, time.monotonic() + 0.5)
    assert not late.exists()


@pytest.mark.parametrize("code, error", [("", ""), ("raise SystemExit(3)", "exit code 3"), (HANG, "cut off")])
def test_output_is_kept(code, error):
    """The end of the output is kept, also if the command fails or is killed; a line of JSON at the end gives fields."""
    got = run(row("x", f"print('begun', flush=True)\n{code}"), 2.0)
    assert got["tail"] == "begun\n" and got.get("error", "").startswith(error) and ("error" in got) == bool(error)
    fields = run(row("x", f"import json; print('some'); print(json.dumps(dict(ms=2)), flush=True)\n{code}"), 2.0)
    assert fields["ms"] == 2 and "tail" not in fields and ("error" in fields) == bool(error)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_children_do_not_outlive_a_command(tmp_path):
    """At its limit a command is killed with all its processes, so that none keeps memory of the GPU."""
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {HANG!r}])
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
    for module, *argv in (("bench.gpu_check", "--out", tmp_path / "out"), ("bench.gpu_table", tmp_path)):
        done = command("-m", module, *argv, env={"PATH": "/nowhere"})
        assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_planned_row_exists():
    """Test files exist, names are unique; nanoGPT only where it is given."""
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
    left = ["device", "124M eager", "norm, loss"]
    for name in planned:
        if name not in left:
            add_row(path, {"row": name, "dry": True} | (STEP if name == "124M graph" else {}))
    done = command("-m", "bench.gpu_check", "--part", "first", "--minutes", "20", "--out", tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(path)
    assert sorted(rows) == sorted(planned) and list(rows)[-len(left) :] == left
    results = sorted((ROOT / "bench" / "results").iterdir())
    page = command("-m", "bench.gpu_table", str(tmp_path)).stdout
    assert "these numbers mean nothing" in page and "failed or are missing" not in page
    assert sorted((ROOT / "bench" / "results").iterdir()) == results


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_figures_beside_their_goals():
    """Speed over a peer is its time over ours, that of our fastest kind over the faster of nanoGPT's; memory is at the
    micro-batch of the leaner of nanoGPT's. Part second replaces part first. Some goals are upper bounds."""
    times = [("forward", "ours", 100.0), ("forward", "SDPA cuDNN", 80.0), ("backward", "ours", 100.0)]
    times += [("backward", "SDPA flash", 150.0)]
    cases = [{"case": "attention D64 T1024", "direction": d, "who": who, "us": us} for d, who, us in times]
    cases.append({"case": "attention D64 T1024", "direction": "forward", "who": "SDPA flash", "error": "full"})
    for who, us, mib in (("ours", 230.0, 20.0), ("matrix products alone", 100.0, 50.0), ("eager", 300.0, 100.0)):
        cases.append({"case": gpu_check.LOSS, "direction": "both", "who": who, "us": us, "peak_mib": mib})
    rows = {
        "first cases": {"rows": cases},
        "first 124M graph": {"tokens_per_s": 990_000.0},
        "second 124M graph": {"tokens_per_s": 440_000.0},
        "first 124M eager": {"tokens_per_s": 20.0, "peak_bytes_at": {"8": 7, "4": 4}},
        "second 124M nanoGPT flash": {"tokens_per_s": 10.0, "micro_batch": 4, "peak_bytes": 10},
        "second 124M nanoGPT cudnn": {"tokens_per_s": 220_000.0, "micro_batch": 8, "peak_bytes": 18},
    }
    expected = {
        "attention D64 T1024, forward, speed over SDPA cuDNN": (0.8, "behind: 0.80 of the goal"),
        "attention D64 T1024, backward, speed over SDPA flash": (1.5, "ahead"),
        "attention D64 T1024, forward, speed over SDPA flash": (None, "not measured | at least 1.2 | "),
        "output layer and loss, time over its matrix products": (2.3, "behind: 0.50 of the goal"),
        "output layer and loss, memory over eager": (0.2, "ahead"),
        "124M, tokens/s": (440_000.0, "behind: 0.80 of the goal"),
        "124M, speed over nanoGPT compiled": (2.0, "ahead"),
        "124M, memory over nanoGPT's": (0.4, "ahead"),
        "124M, MFU by nanoGPT's count": (None, "not measured | at least 0.47 | "),
    }
    found = {line.what: line for line in gpu_table.lines(rows)}
    assert {what: found[what].value for what in expected} == {what: value for what, (value, _) in expected.items()}
    assert all(" | ".join(found[what].cells()).endswith(f"| {verdict}") for what, (_, verdict) in expected.items())


def test_mfu_by_hand():
    """124M at 500,000 tokens/s on an H100: 6 (parameters of GPT-2 without positions and biases) plus 12 L C T."""
    params = 50304 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768
    expected = (6 * params + 12 * 12 * 768 * 1024) * 500_000 / 989.4e12
    assert gpu_table.mfu("124M", 500_000, "NVIDIA H100 80GB HBM3") == pytest.approx(expected)
    assert expected == pytest.approx(0.432, rel=1e-3)


def test_the_page_names_what_is_missing():
    """Rows that failed with their error, rows that are not there; the device and the versions."""
    rows = {
        "first device": {"device": "GPU 9", "versions": {"torch": "2.11", "git": "abc"}},
        "first GPU tests": {"error": "exit code 1"},
    }
    page = gpu_table.page(rows, ["first device", "first GPU tests", "first attention"], dry=False)
    assert page.startswith("# Measured on GPU 9") and "torch 2.11" in page and "mean nothing" not in page
    assert "| first GPU tests | exit code 1 |" in page and "| first attention | not measured |" in page
