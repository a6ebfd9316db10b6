"""Rows of a few minutes on a GPU: what is kept when something fails or is cut off, and what the table makes of them."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from bench import gpu_check, gpu_table
from bench.gpu_check import Kept, Row, measure
from nanochin.config import UserError


def names(path) -> list[str]:
    return [json.loads(line)["row"] for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Rows on the disk


def test_the_last_line_of_a_row_counts(tmp_path):
    """A row measured again replaces what was there; a line that a kill cut off is missing, and the next one begins on
    a line of its own."""
    kept = Kept(tmp_path / "first.jsonl", dry=False)
    assert kept.read() == {}
    kept.add("a", {"error": "full"}, 1.0)
    kept.add("a", {"ms": 2}, 1.0)
    with open(kept.path, "a") as file:
        file.write('{"row": "b", "ms"')
    kept.add("c", {"ms": 3}, 1.0)
    rows = kept.read()
    assert list(rows) == ["a", "c"] and rows["a"]["ms"] == 2 and "error" not in rows["a"] and rows["c"]["ms"] == 3


def test_dry_rows_do_not_mix_with_real_ones(tmp_path):
    """One file holds either."""
    Kept(tmp_path / "first.jsonl", dry=True).add("a", {"ms": 2}, 1.0)
    with pytest.raises(UserError, match="dry run; give another --out"):
        Kept(tmp_path / "first.jsonl", dry=False).read()


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


class Stub:
    """Worker processes that answer with what they are asked, hang or fail."""

    made = 0

    def __init__(self, module, spec):
        Stub.made += 1
        self.process = self

    def ask(self, message, timeout):
        if message["do"] == "hang":
            raise TimeoutError("no answer in time")
        if message["do"] == "die":
            raise UserError("its process ended early")
        return {"error": "wrong"} if message["do"] == "fail" else message

    def kill(self):
        pass

    def wait(self):
        pass

    def close(self, patience=None):
        pass


def test_what_fails_costs_itself_alone(tmp_path, monkeypatch):
    """Rows that hang, die or fail are kept with their error, and each takes its process with it; the others are
    measured in order."""
    monkeypatch.setattr(gpu_check, "Worker", Stub)
    monkeypatch.setattr(Stub, "made", 0)
    kept = Kept(tmp_path / "first.jsonl", dry=False)
    rows = [Row(do, do) for do in ("one", "hang", "two", "die", "fail", "three", "four")]
    measure(rows, kept, tmp_path, time.monotonic() + 60)
    assert names(kept.path) == [row.name for row in rows] and Stub.made == 4
    errors = {name: row["error"] for name, row in kept.read().items() if "error" in row}
    assert list(errors) == ["hang", "die", "fail"] and errors["hang"].startswith("TimeoutError")


def test_together_first_and_nothing_after_the_deadline(tmp_path, monkeypatch):
    """Rows that run together come before those that run alone; what is not begun by the deadline is not written, so
    that the next call measures it."""
    monkeypatch.setattr(gpu_check, "Worker", Stub)
    kept = Kept(tmp_path / "first.jsonl", dry=True)
    rows = [Row("alone", "x"), *(Row(f"together {i}", "x", together=True) for i in range(5))]
    measure(rows, kept, tmp_path, time.monotonic() + 60)
    assert sorted(names(kept.path)[:5]) == [f"together {i}" for i in range(5)] and names(kept.path)[5:] == ["alone"]
    late = Kept(tmp_path / "late.jsonl", dry=True)
    measure(rows, late, tmp_path, time.monotonic() + 0.5)
    assert late.read() == {}


@pytest.mark.parametrize("code, error", [
    ("print('fine')", None), ("raise SystemExit(3)", "exit code 3"), ("import time; time.sleep(60)", "cut off"),
])  # fmt: skip
def test_commands(code, error, tmp_path):
    """The end of what a command prints is kept, also if it fails or is cut off, and the newest JSON that it leaves."""
    write = f"print('begun', flush=True); open({str(tmp_path / 'b.json')!r}, 'w').write('[7]')"
    (tmp_path / "a.json").write_text("[6]")
    row = Row("x", command=(sys.executable, "-c", f"{write}\n{code}"), results="*.json")
    got = gpu_check.run_row(row, tmp_path, 2.0)
    assert got["result"] == [7]
    assert "begun" in got["tail"] and (got.get("error") or "").startswith(error or "")
    assert ("error" in got) == (error is not None)
    assert "not installed" in gpu_check.run_row(Row("x", command=("no-such-program",)), tmp_path, 2.0)["error"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_children_do_not_outlive_a_command(tmp_path):
    """At its limit a command is interrupted with all that it has started, so that no process keeps a GPU's memory."""
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    got = gpu_check.run_row(Row("x", command=(sys.executable, "-c", code)), tmp_path, 2.0)
    assert got["error"].startswith("cut off")
    stat, deadline = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat"), time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] != "Z":  # a zombie waits for whoever adopts it
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sizes_that_nobody_timed_failed():
    """bench.gpu ends well with rows that only have errors: neither ours nor nanoGPT's may be without a time."""
    ours, theirs = {"who": "nanochin", "tokens_per_s": 1.0}, {"who": "nanoGPT", "error": "full"}
    assert gpu_check.untimed({"sizes": [ours, {"who": "nanochin", "error": "full"}]}) == ""
    assert gpu_check.untimed({"sizes": [ours, theirs]}) == "nanoGPT: full"
    assert gpu_check.untimed(None) == gpu_check.untimed([7]) == gpu_check.untimed({"loss": 1}) == ""


def test_output_that_must_be_there(tmp_path):
    """A command that ends well without what it is run for has failed: no test passed."""
    command = (sys.executable, "-c", "print('3 skipped')")
    assert "passed" in gpu_check.run_row(Row("x", command=command, expect=r"\d+ passed"), tmp_path, 5.0)["error"]
    assert "error" not in gpu_check.run_row(Row("x", command=command, expect=r"\d+ skipped"), tmp_path, 5.0)


def test_what_it_refuses(command, tmp_path):
    """Without a GPU nothing is measured and nothing written; a folder without rows makes no table."""
    env = {"PATH": "/nowhere"}
    done = command("-m", "bench.gpu_check", "--out", tmp_path / "out", env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no NVIDIA GPU" in done.stderr
    assert not (tmp_path / "out").exists()
    done = command("-m", "bench.gpu_table", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no rows" in done.stderr


def test_every_planned_row_exists():
    """Checks and cases are those of bench.kernels, rows have names of their own, and the parts' limits leave room."""
    pytest.importorskip("triton")
    from bench import kernels as kernel_bench

    bench = kernel_bench.Bench(torch.device("cpu"), torch.float32, False, math.inf, 0)
    cases = {(case.operation, case.shape) for case in kernel_bench.all_cases(bench)}
    assert {*gpu_check.CASES, *gpu_check.TUNED} <= cases
    dry = kernel_bench.Bench(torch.device("cpu"), torch.float32, True, math.inf, 0)
    assert set(kernel_bench.check_all(dry)) == set(gpu_check.CHECKS)
    for part in gpu_check.PARTS:
        planned = [row.name for row in gpu_check.plan(part, gpu_check.Place(ROOT / "build", 4.0))]
        assert len(set(planned)) == len(planned) >= 1


def test_in_miniature_killed_and_resumed(tmp_path, command):
    """Part first on a CPU, killed after its first rows: the next call keeps them and measures the rest; the table says
    that its numbers mean nothing, and writes no result."""
    pytest.importorskip("triton")
    from interpreted import skip_if_it_cannot_interpret

    skip_if_it_cannot_interpret()
    argv = ["-m", "bench.gpu_check", "--part", "first", "--minutes", "20", "--out", str(tmp_path), "--dry-run"]
    first = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for _ in range(3):
        first.stdout.readline()
    first.send_signal(signal.SIGKILL)
    first.wait()
    path = tmp_path / "first.jsonl"
    before = names(path)
    done = command(*argv)
    assert done.returncode == 0, done.stdout + done.stderr
    after = names(path)
    assert len(before) >= 3 and after[: len(before)] == before and len(set(after)) == len(after) == 27
    results = sorted((ROOT / "bench" / "results").iterdir())
    page = command("-m", "bench.gpu_table", str(tmp_path)).stdout
    assert "these numbers mean nothing" in page and "10 of 10" in page and "first 124M graph" not in page
    assert sorted((ROOT / "bench" / "results").iterdir()) == results


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_figures_beside_their_goals():
    """Speed over a peer is its time over ours; ahead at the goal, behind by the share that is reached."""
    shape = gpu_check.ATTENTION[0]
    rows = {f"first attention {shape}": {"rows": [
        {"direction": "forward", "who": "ours", "us": 100.0}, {"direction": "forward", "who": "SDPA cuDNN", "us": 80.0},
        {"direction": "backward", "who": "ours", "us": 100.0},
        {"direction": "backward", "who": "SDPA flash", "us": 150.0},
    ]}, "first 124M graph": {"tokens_per_s": 440_000.0}}  # fmt: skip
    found = {line.what: line for line in gpu_table.lines(rows)}
    forward, backward = (found[f"attention {name}"] for name in (
        "forward D64 T1024, speed over SDPA cuDNN", "backward D64 T1024, speed over SDPA flash"))  # fmt: skip
    assert (forward.value, forward.reached) == (0.8, 0.8) and forward.cells()[-1] == "behind: 0.80 of the goal"
    assert (backward.value, backward.reached) == (1.5, 1.25) and backward.cells()[-1] == "ahead"
    assert found["124M"].reached == pytest.approx(0.8)
    assert found["124M, speed over nanoGPT compiled"].cells()[1] == "not measured"


def test_an_upper_bound():
    """Time over the matrix products', and memory, are to stay below their goals."""
    loss = {"rows": [{"direction": "both", "who": "ours", "us": 230.0},
                     {"direction": "both", "who": "matrix products alone", "us": 100.0}]}  # fmt: skip
    beside = {"result": {"sizes": [{"who": "nanochin", "memory_over_nanogpt": 0.4, "times_nanogpt": 1.4},
                                   {"who": "nanoGPT"}]}}  # fmt: skip
    rows = {"first linear_cross_entropy C768 V50257 16384 tokens": loss, "second 124M": beside}
    found = {line.what: line for line in gpu_table.lines(rows)}
    assert found["output layer and loss, time over that of their matrix products"].reached == pytest.approx(0.5)
    assert found["124M, memory over nanoGPT's"].reached == pytest.approx(1.25)
    assert found["124M, speed over nanoGPT compiled"].cells()[-1] == "ahead"


def test_a_time_that_includes_products():
    """3 ms of loss beside 10 ms of products are 1.3 of them; at 1.15 the loss would take 1.5 ms, half of its time."""
    line = gpu_table.Line("loss", 1.3, 1.15, most=True, part="loss")
    ((gain, _),) = gpu_table.to_change_first([line], {"loss": 3.0, "matmul": 27.0})
    assert gain == pytest.approx(1.5 / 30)


def test_what_to_change_first():
    """A part's share of the step times how far its worst figure is from the goal: 20% at half its goal before 50% at
    nine tenths; what is ahead or not measured is not named."""
    line = gpu_table.Line
    found = [line("a", 0.9, 1.0, part="attention, rotary"), line("b", 0.95, 1.0, part="attention, rotary"),
             line("c", 0.5, 1.0, part="loss"), line("d", 2.0, 1.0, part="norm, activation"),
             line("e", None, 1.0, part="norm, activation")]  # fmt: skip
    split = {"attention, rotary": 50.0, "loss": 20.0, "norm, activation": 10.0, "matmul": 20.0}
    first = gpu_table.to_change_first(found, split)
    assert [what for _, what in first] == ["c", "a"] and [gain for gain, _ in first] == pytest.approx([0.1, 0.05])


def test_the_page_names_what_is_missing():
    """Rows that failed with their error, rows that are not there, and of which device and versions all is."""
    rows = {"first device": {"device": "GPU 9", "versions": {"torch": "2.11", "triton": "3.6", "git": "abc"}},
            "first check rotary": {"error": "wrong: output 0"}}  # fmt: skip
    page = gpu_table.markdown(rows, ["first device", "first check rotary", "first ceilings"], dry=False)
    assert page.startswith("# Measured on GPU 9") and "torch 2.11, Triton 3.6" in page and "mean nothing" not in page
    assert "0 of 1." in page
    assert "- first check rotary: wrong: output 0" in page and "- first ceilings: not measured" in page
