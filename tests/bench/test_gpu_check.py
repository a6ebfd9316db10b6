"""Rows of a few minutes on a GPU: what is kept when something fails or is cut off, and what the table makes of them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from bench import gpu_check, gpu_table
from bench.gpu_check import Kept, Place, Row, measure
from nanochin.base.cli import UserError
from nanochin.config import make_shape
from nanochin.plan import flops


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
        gpu_check.missing([], Kept(tmp_path / "first.jsonl", dry=False))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


class Stub:
    """Worker processes that answer with what they are asked, hang or fail."""

    notes: list

    def __init__(self, module, spec, environment):
        self.notes.append("new")

    def ask(self, message, timeout):
        self.notes.append(message["do"])
        if message["do"] == "hang":
            raise TimeoutError("no answer in time")
        if message["do"] == "die":
            raise UserError("its process ended early")
        return {"error": "wrong"} if message["do"] == "fail" else message

    def close(self, patience):
        self.notes.append("killed" if patience == 0 else "closed")


@pytest.fixture
def notes(monkeypatch):
    monkeypatch.setattr(gpu_check, "Worker", Stub)
    monkeypatch.setattr(Stub, "notes", [], raising=False)
    return Stub.notes


def test_what_fails_costs_itself_alone(tmp_path, notes):
    """Rows that hang, die or fail are kept with their error, and each takes its process with it; the others are
    measured in order."""
    kept = Kept(tmp_path / "first.jsonl", dry=False)
    rows = [Row(do, do) for do in ("one", "hang", "two", "die", "fail", "three", "four")]
    measure(rows, kept, tmp_path, time.monotonic() + 60)
    assert names(kept.path) == [row.name for row in rows]
    assert " ".join(notes) == ("new one hang killed new two die killed new fail killed new three four closed")
    errors = {name: row["error"] for name, row in kept.read().items() if "error" in row}
    assert list(errors) == ["hang", "die", "fail"] and errors["hang"].startswith("TimeoutError")


def test_steps_and_commands_have_the_device_to_themselves(tmp_path, notes):
    """The worker before them has ended, and that of a step serves no other row."""
    kept = Kept(tmp_path / "first.jsonl", dry=False)
    command = Row("command", command=(sys.executable, "-c", "pass"))
    rows = [Row("a", "one"), Row("b", "step"), Row("c", "step"), Row("d", "two"), command, Row("e", "three")]
    measure(rows, kept, tmp_path, time.monotonic() + 60)
    assert names(kept.path) == ["a", "b", "c", "d", "command", "e"]
    assert " ".join(notes) == ("new one closed new step closed new step closed new two closed new three closed")


def test_together_first_and_nothing_after_the_deadline(tmp_path, notes):
    """Rows that run together come before those that run alone; what is not begun by the deadline is not written, so
    that the next call measures it."""
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
    """The end of what a command prints is kept, also if it fails or is cut off, and the files that it leaves."""
    write = f"print('begun', flush=True); open({str(tmp_path / 'out.json')!r}, 'w').write(open(sys.argv[1]).read())"
    command = (sys.executable, "-c", f"import sys; {write}\n{code}", str(tmp_path / "in.json"))
    got = gpu_check.run_row(Row("x", command=command, inputs={"in.json": "[7]"}, files=("o*.json",)), tmp_path, 2.0)
    assert got["files"] == {"out.json": "[7]"}
    assert "begun" in got["tail"] and (got.get("error") or "").startswith(error or "")
    assert ("error" in got) == (error is not None)


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
    """Checks are those of bench.kernels, test files are there, and rows have names of their own."""
    pytest.importorskip("triton")
    from bench import kernels as bench_kernels

    dry = bench_kernels.Bench(torch.device("cpu"), torch.float32, True)
    assert set(bench_kernels.checks(dry)) == set(gpu_check.CHECKS)
    assert all((ROOT / path).exists() for path in gpu_check.TESTED)
    for plan in gpu_check.PARTS.values():
        for nanogpt in (None, "nanoGPT"):
            planned = [row.name for row in plan(Place(ROOT / "build", 4.0, nanogpt))]
            assert len(set(planned)) == len(planned) >= 1
            assert any("nanoGPT" in name for name in planned) == (
                nanogpt is not None and plan in (gpu_check.plan_second, gpu_check.plan_sizes)
            )


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
    assert len(before) >= 3 and after[: len(before)] == before and len(set(after)) == len(after) == 24
    results = sorted((ROOT / "bench" / "results").iterdir())
    page = command("-m", "bench.gpu_table", str(tmp_path)).stdout
    assert "these numbers mean nothing" in page and "10 of 10" in page and "first 124M graph" not in page
    assert sorted((ROOT / "bench" / "results").iterdir()) == results


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_figures_beside_their_goals():
    """Speed over a peer is its time over ours; ahead at the goal, behind by the share that is reached."""
    rows = {
        f"first {gpu_check.ATTENTION[0]}": {
            "rows": [
                {"direction": "forward", "who": "ours", "us": 100.0},
                {"direction": "forward", "who": "SDPA cuDNN", "us": 80.0},
                {"direction": "forward", "who": "SDPA flash", "error": "full"},
                {"direction": "backward", "who": "ours", "us": 100.0},
                {"direction": "backward", "who": "SDPA flash", "us": 150.0},
            ]
        },
        "first 124M graph": {"tokens_per_s": 440_000.0},
    }
    found = {line.what: line for line in gpu_table.lines(rows)}
    forward = found["attention D64 T1024, forward, speed over SDPA cuDNN"]
    backward = found["attention D64 T1024, backward, speed over SDPA flash"]
    assert (forward.value, forward.reached) == (0.8, 0.8) and forward.cells()[-1] == "behind: 0.80 of the goal"
    assert (backward.value, backward.reached) == (1.5, 1.25) and backward.cells()[-1] == "ahead"
    assert found["attention D64 T1024, forward, speed over SDPA flash"].value is None
    assert found["124M"].reached == pytest.approx(0.8)
    assert found["124M, speed over nanoGPT compiled"].cells()[1] == "not measured"


def test_upper_bounds():
    """Time over the matrix products', and memory over PyTorch's, are to stay below their goals."""
    loss = [
        {"direction": "both", "who": "ours", "us": 230.0, "peak_mib": 20.0},
        {"direction": "both", "who": "matrix products alone", "us": 100.0, "peak_mib": 50.0},
        {"direction": "both", "who": "eager", "us": 300.0, "peak_mib": 100.0},
    ]
    found = {line.what: line for line in gpu_table.lines({f"first {gpu_check.LOSS}": {"rows": loss}})}
    assert found["output layer and loss, time over that of their matrix products"].reached == pytest.approx(0.5)
    assert found["output layer and loss, memory over eager"].reached == pytest.approx(1.25)


def test_beside_nanogpt():
    """Speed of our fastest kind over the faster of theirs, memory at the sequences at once of the leaner of theirs;
    what part second measured replaces part first."""
    rows = {
        "first 350M graph": {"tokens_per_s": 99.0},
        "second 350M graph": {"tokens_per_s": 30.0},
        "first 350M eager": {"tokens_per_s": 20.0, "peak_bytes_at": {"8": 7, "4": 4}},
        "second 350M nanoGPT flash": {"tokens_per_s": 10.0, "micro_batch": 4, "peak_bytes": 10},
        "second 350M nanoGPT cudnn": {"tokens_per_s": 20.0, "micro_batch": 8, "peak_bytes": 18},
    }
    lines = gpu_table.size_lines("350M", gpu_table.steps_of(rows, "350M"), "unknown")
    found = {line.what: line.value for line in lines}
    assert found["350M, speed over nanoGPT compiled"] == 1.5 and found["350M, memory over nanoGPT's"] == 0.4
    assert found["350M, MFU by nanoGPT's count"] is None


def test_mfu_by_hand():
    """124M at 500,000 tokens/s on an H100: 6 (parameters of GPT-2 without positions and biases) plus 12 L C T."""
    params = 50304 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768
    by_count, physical = gpu_table.mfu("124M", 500_000, "NVIDIA H100 80GB HBM3")
    expected = (6 * params + 12 * 12 * 768 * 1024) * 500_000 / 989.4e12
    assert by_count == pytest.approx(expected) and expected == pytest.approx(0.432, rel=1e-3)
    flops_a_token = flops.flops_per_token(make_shape(768, 12, vocab_size=50304, seq_len=1024))
    assert physical == pytest.approx(flops_a_token * 500_000 / 989.4e12)
    assert gpu_table.mfu("124M", 500_000, "a CPU") == (None, None)


def test_floor_by_hand():
    """The floor of the products is their FLOPs at the measured rate; that of Adam 28 bytes a parameter."""
    floor = gpu_table.floor("124M", {"flops": 600e12, "bytes": 3e12}, "NVIDIA H100 80GB HBM3")
    products = 6 * 65_536 * (12 * 12 * 768**2 + 50304 * 768)
    params = 50304 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768
    assert floor["matmul"] == pytest.approx(1e3 * products / 600e12, rel=0.02)  # some rows are bound by memory
    assert floor["optimizer"] == pytest.approx(1e3 * 28 * params / 3e12)
    assert all(value > 0 for value in floor.values())


def test_gaps():
    """A gap is the time of a step in which no kernel runs; a split without ceilings has no floors."""
    step = {"tokens_per_s": 1.0, "micro_batch": 8, "peak_bytes": 2**30, "first_steps_seconds": 9, "losses": [3.0]}
    eager = step | {"ms": 60.0, "split_ms": {"matmul": 20.0, "other": 4.0}}
    rows = {"first 124M graph": step | {"ms": 30.0}, "first 124M eager": eager}
    assert gpu_table.training_steps(rows)[-1] == "| 124M | 20.00 (0.00) | 4.00 (0.00) | 36.00 | 6.00 |"


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
    assert "| first check rotary | wrong: output 0 |" in page and "| first ceilings | not measured |" in page
