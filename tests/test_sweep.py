"""sweep.py with real processes: killed, two at once, with failing runs; the rows must not change."""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from sweep_files import toml

import sweep
from nanochin.run.curves import CURVES, read_csv_gz
from nanochin.sweep.store import Outcome

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

PATIENCE = 120  # seconds until a process that does nothing is an error
RUNS = 4


@pytest.fixture(scope="module")
def table(text, cache) -> dict:
    """A sweep of four runs of about a second that save often."""
    return {"kind": "isoflop", "data": [str(text)], "val_bytes": 4096, "cache": str(cache), "seq_len": 32,
            "budgets": [4e8, 8e8], "models": ["12x1", "16x1"], "batch_tokens": 64, "device": "cpu",
            "dtype": "float32", "save_every": 0.2}  # fmt: skip


def test_view(monkeypatch):
    """A run in progress counts by its share, also before it is resumed; a failed run does not count. The time left is
    by the FLOPs since the sweep started, the ETA of a run by its progress since it was resumed."""
    cells = [SimpleNamespace(name=name, spent=100.0, is_trunk=False) for name in "abcd"]
    progress, now = {"a": 0.4, "b": 0.0, "d": 0.7}, [0.0]
    found = SimpleNamespace(cells=cells, running={}, is_open=lambda cell: cell.name in "ab")
    found.store = SimpleNamespace(progress=lambda cell: (progress[cell.name], 2.5))
    found.outcomes = {"c": Outcome({"loss": 1.0}), "d": Outcome(reason="it diverged")}
    monkeypatch.setattr(sweep.time, "monotonic", lambda: now[0])
    view = sweep.View(found)
    assert view.spent() == (140.0, 300.0)
    found.running["a"], now[0] = 10.0, 10.0
    view.text()
    progress["a"], now[0] = 0.5, 20.0
    assert all(words in view.text() for words in ("2 of 4", "1 failed", "150 of 300", "5:00 left", "ETA 0:50"))


def test_figures_are_sent_to_loggers(monkeypatch, tmp_path, table):
    """`--loggers`: the folder of a sweep with a law, once for each logger; without a law nothing."""
    (tmp_path / "some.toml").write_text(toml(table))
    monkeypatch.setattr(sys, "argv", ["sweep.py", f"{tmp_path}/some.toml", f"--out={tmp_path}", "--loggers", "wandb"])
    monkeypatch.setattr(sweep, "train_all", lambda *_: None)
    monkeypatch.setattr(sweep.loggers, "check", lambda names: None)
    sent = []
    monkeypatch.setattr(sweep.loggers, "send_sweep", lambda *what: sent.append(what))
    sweep.main()
    assert not sent
    (tmp_path / "some/laws.json").touch()
    sweep.main()
    assert sent == [("wandb", tmp_path / "some")]


class Sweeps:
    """A folder with a sweep file, and the command on it."""

    def __init__(self, folder: Path, table: dict, name: str = "some"):
        folder.mkdir(exist_ok=True)
        self.folder, self.file, self.out = folder, folder / f"{name}.toml", folder / "out" / name
        self.write(table)

    def write(self, table: dict) -> None:
        self.file.write_text(toml(table))

    def start(self, *argv: str, before=(), **options) -> subprocess.Popen:
        command = [sys.executable, *before, ROOT / "sweep.py", self.file, "--out=out", "--results=results", *argv]
        usual = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": heed_ctrl_c}
        return subprocess.Popen(command, cwd=self.folder, **usual | options)

    def run(self, *argv: str, code: int = 0, workers: int = 1, **options) -> str:
        """Run the command to its end -> stdout; stderr if it fails. A second worker loads longer than it trains."""
        out, err = self.end(self.start(f"--workers={workers}", *argv, **options), code)
        return err if code else out

    def torn(self, nth: int) -> subprocess.Popen:
        """The command with two workers, killed at its nth file operation, 0: never; `count/operations` has the number
        of them."""
        count = self.folder / "count"
        count.mkdir()
        return self.start("--workers=2", before=(ROOT / "tests" / "torn.py", f"{nth}", self.out, count))

    def end(self, process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
        """(stdout, stderr) of a command that must end with `code`."""
        try:
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        assert process.returncode == code, (out, err, self.log())
        return out, err

    def log(self) -> str:
        path = self.out / "workers.log"
        return path.read_text() if path.exists() else ""

    def trained(self) -> list[str]:
        """The runs that a worker trained: a run that was finished already takes no CPU."""
        words = [line.split() for line in self.log().splitlines() if line.startswith("worker ")]
        return [word[2] for word in words if word[3] == "finished," and float(word[4]) > 0.1]

    def rows(self, table: str = "runs.csv") -> list[dict]:
        with open(self.out / table, newline="") as file:
            return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]

    def started(self, lines: int, process: subprocess.Popen | None = None) -> subprocess.Popen:
        """A sweep of two workers, when the logs of its runs have so many lines."""
        process, deadline = process or self.start("--workers=2"), time.monotonic() + PATIENCE
        while sum(path.read_text().count("\n") for path in self.out.glob("runs/*/log.jsonl")) <= lines:
            assert process.poll() is None, (process.communicate(), self.log())
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return process

    def start_and_kill(self, lines: int) -> None:
        """kill -9 of a sweep and its workers at once."""
        process = self.started(lines)
        victims = [process.pid, *children(process.pid)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        wait_until_gone(victims, 5)


def heed_ctrl_c() -> None:
    """In a child process: SIGINT is not ignored, though it is in a background job of a script."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def sweeps(tmp_path, table) -> Sweeps:
    return Sweeps(tmp_path / "sweep", table)


@pytest.fixture(scope="module")
def whole(table, tmp_path_factory) -> Sweeps:
    """The same sweep, undisturbed."""
    sweeps = Sweeps(tmp_path_factory.mktemp("whole") / "sweep", table)
    sweeps.end(sweeps.torn(0))
    return sweeps


def children(pid: int) -> list[int]:
    """The workers of a sweep: its child processes (Linux), without Python's resource tracker."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    if not found.exists():
        pytest.skip("child processes are listed on Linux only")
    pids = [int(word) for word in found.read_text().split()]
    return [pid for pid in pids if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until_gone(pids: list[int], patience: float) -> None:
    deadline = time.monotonic() + patience
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline, f"still there: {[pid for pid in pids if not gone(pid)]}"
        time.sleep(0.02)


def same(sweeps: Sweeps, whole: Sweeps, rerun: bool = True) -> None:
    """The same command completes a sweep, with the same rows."""
    if rerun:
        sweeps.run()
    assert sweeps.rows() == whole.rows()
    assert (sweeps.out / CURVES).read_bytes() == (whole.out / CURVES).read_bytes()
    assert not list(sweeps.out.rglob("*.tmp"))


def test_rows(whole):
    """One row per run, in the order of the plan, with its budget spent and the numbers of its summary. On a finished
    sweep the command starts no worker and leaves the rows as they are."""
    rows = whole.rows()
    assert [row["run"] for row in rows] == ["4e8-12x1-s0", "4e8-16x1-s0", "8e8-12x1-s0", "8e8-16x1-s0"]
    for row in rows:
        summary = json.loads((whole.out / "runs" / row["run"] / "summary.json").read_text())
        assert (row["status"], row["kind"], row["trunk"]) == ("finished", "isoflop", "")
        assert float(row["loss"]) == summary["loss"] and float(row["flops"]) == summary["flops"]
        assert float(row["flops"]) / float(row["budget"]) == pytest.approx(1, abs=0.01)
        assert float(row["flops_spent"]) == float(row["flops"])
    for planned, row in zip(whole.rows("plan.csv"), rows, strict=True):
        assert all(planned[key] == row[key] for key in ("run", "params", "tokens", "lr", "seed"))
    before, log = (whole.out / "runs.csv").read_bytes(), whole.log()
    assert sorted(whole.trained()) == sorted(row["run"] for row in rows)
    assert "starting workers" not in whole.run()
    assert (whole.out / "runs.csv").read_bytes() == before and whole.log() == log


def test_same_as_train(whole, table, command, tmp_path):
    """A run of the sweep is bit-identical to train.py's with the same options."""
    row = whole.rows()[0]
    done = command("train.py", "--data", *table["data"], f"--cache={table['cache']}", "--val-bytes=4096",
                   "--seq-len=32", f"--model={row['width']}x{row['layers']}", f"--tokens={row['tokens']}",
                   "--batch-tokens=64", "--threads=1", "--device=cpu", "--dtype=float32", f"--out={tmp_path}",
                   "--name=alone", "--sample-tokens=0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone = json.loads((tmp_path / "alone" / "summary.json").read_text())
    assert all(str(alone[key]) == row[key] for key in ("loss", "val_bpb", "lr", "flops", "beta2"))


def test_dry_run_without_torch(sweeps, command):
    """--dry-run prints the plan without importing torch, and writes nothing."""
    code = "import sys, sweep; sys.argv.append('--dry-run'); sys.exit(sweep.main() or 'torch' in sys.modules)"
    done = command("-c", code, sweeps.file)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("4e8-12x1-s0", "epochs", "D/N", f"{RUNS} to train"))
    assert not sweeps.out.exists()


def test_only(whole, sweeps):
    """--only trains the selected runs; without it the rest follows, and the rows are the same."""
    said = sweeps.run("--only", "budget=8e8", "model=16x1")
    assert [row["run"] for row in sweeps.rows()] == ["8e8-16x1-s0"] and f"1 of {RUNS} runs done" in said
    status = sweeps.run("--status").splitlines()
    assert status[0] == f"1 of {RUNS} runs done" and status[-1].split()[:2] == ["8e8-16x1-s0", "finished"]
    either = sweeps.run("--only", "budget=8e8", "model=16x1", "model=12x1", "--dry-run")
    assert "8e8-16x1-s0" in either and "8e8-12x1-s0" in either and either.count("\n8e8-") == 2
    for text, words in {"budget=7": "4e+08, 8e+08", "modle=16x1": "model=?", "8e8": "--only 8e8: "}.items():
        assert words in sweeps.run("--only", text, "--dry-run", code=2)
    same(sweeps, whole)


def test_sweep_killed(whole, sweeps):
    """kill -9 of the sweep alone: its workers save and exit within seconds; the same command completes it."""
    process = sweeps.started(20)
    workers = children(process.pid)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    wait_until_gone(workers, 15)
    assert not (sweeps.out / "runs.csv").exists()
    same(sweeps, whole)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_sweep_killed_at_file_operations(whole, tmp_path, table, kills):
    """kill -9 of the sweep at file operations of its own, spread evenly, each time from nothing; then the same rows."""
    every = int((whole.folder / "count" / "operations").read_text())
    for i in range(kills):
        sweeps = Sweeps(tmp_path / f"{i + 1}", table)
        sweeps.end(sweeps.torn(1 + (2 * i + 1) * every // (2 * kills)), -signal.SIGKILL)
        same(sweeps, whole)


def test_worker_killed(whole, sweeps):
    """kill -9 of both workers, one after the other: the sweep replaces them and ends with the same rows."""
    process = sweeps.start("--workers=2")
    for lines in (20, 150):
        os.kill(children(sweeps.started(lines, process).pid)[0], signal.SIGKILL)
    sweeps.end(process)
    same(sweeps, whole, rerun=False)


@pytest.mark.parametrize("number, code", [
    (signal.SIGTERM, 143), *(pytest.param(getattr(signal, name), code, marks=pytest.mark.slow)
                             for name, code in (("SIGINT", 130), ("SIGHUP", 129))),
])  # fmt: skip
def test_signalled(whole, sweeps, number, code):
    """SIGTERM, SIGINT and SIGHUP save the runs in progress and end all processes; the same command resumes them."""
    process = sweeps.started(20)
    workers = children(process.pid)
    process.send_signal(number)
    out, err = sweeps.end(process, code)
    assert "Traceback" not in err and "rerun the same command to resume" in out
    assert all(map(gone, workers))
    same(sweeps, whole)


@pytest.mark.slow
def test_full_standard_output(whole, sweeps):
    """A sweep whose standard output takes nothing has the same rows, and says once that it is full."""
    with open("/dev/full", "w") as full:
        _, err = sweeps.end(sweeps.start("--workers=2", stdout=full))
    assert err.count("standard output: No space left") == 1 and "Traceback" not in err
    same(sweeps, whole, rerun=False)


def test_two_sweeps(whole, sweeps):
    """Two sweeps on one folder share the runs: both succeed, and each run is trained once."""
    processes = [sweeps.start("--workers", "1") for _ in range(2)]
    for process in processes:
        sweeps.end(process)
    assert sorted(sweeps.trained()) == sorted(row["run"] for row in whole.rows())
    same(sweeps, whole, rerun=False)


def test_failed_runs(sweeps, table):
    """A run that diverges is recorded with its reason, the others continue; it is retried with --retry-failed only."""
    keys = {"kind": "grid", "budgets": [4e8], "models": ["12x1"], "lr": [0.01, 9e5, 0.02], "save_every": 0.0}
    sweeps.write(table | keys)
    said = sweeps.run()
    rows = sweeps.rows()
    assert [row["status"] for row in rows] == ["finished", "failed", "finished"]
    assert "the run diverged" in rows[1]["reason"] and rows[1]["loss"] == "" and "failed: 4e8-12x1-lr=900000" in said
    assert list(read_csv_gz(sweeps.out / CURVES)) == [rows[0]["run"], rows[2]["run"]]
    log = sweeps.log()
    assert "--retry-failed" in sweeps.run() and sweeps.log() == log
    sweeps.run("--retry-failed")
    assert sweeps.log().count(" failed, ") == log.count(" failed, ") + 1 and sweeps.rows() == rows


def test_full_disk(whole, sweeps):
    """A full disk stops the sweep in one line with exit code 1; no run counts as failed, and with free space the same
    command completes it."""
    line = sweeps.run(code=1, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384)))
    assert "cannot write" in line and line.count("\n") == 1
    assert not list(sweeps.out.rglob("failed.json"))
    same(sweeps, whole)


@pytest.mark.parametrize("failed", ["plan.csv", CURVES, "runs.csv"])
def test_full_disk_after_training(whole, disk, table, failed):
    """A disk that fills up at the last files of a sweep: one line with the file; then the same command writes them."""
    sweeps = Sweeps(disk.folder / "sweep", table)
    logs = shutil.ignore_patterns(
        "checkpoints", "plan.csv", "runs.csv", CURVES, "laws.json", "*.html", "*.svg", "*.png"
    )
    shutil.copytree(whole.out, sweeps.out, ignore=logs)
    names = ["plan.csv", CURVES, "runs.csv"]
    before = names[: names.index(failed)]
    disk.fill(leave=sum(4096 * -(-(whole.out / name).stat().st_size // 4096) for name in before))
    line = sweeps.run(code=1)
    assert (
        line == f"sweep.py: {sweeps.out.relative_to(sweeps.folder) / failed}: cannot write: No space left on device\n"
    )
    assert sorted(path.name for path in sweeps.out.glob("*.csv*")) == sorted(before)
    disk.filler.unlink()
    same(sweeps, whole)


def test_kept_results(whole, table, tmp_path):
    """Rows in results/ count as done: no worker is started, and rows and curves are the same to the byte."""
    sweeps = Sweeps(tmp_path / "sweep", table)
    kept = tmp_path / "sweep" / "results" / "some"
    whole.run("--keep")
    shutil.move(whole.folder / "results", sweeps.folder / "results")
    assert sorted(path.name for path in kept.rglob("*")) == ["README.md", CURVES, "plan.csv", "runs.csv"]
    assert f"python sweep.py {whole.file}\npython fit.py" in (kept / "README.md").read_text()
    assert sweeps.run("--status").count("finished") == RUNS and not sweeps.out.exists()
    assert "starting workers" not in sweeps.run()
    for name in ("runs.csv", CURVES):
        assert (sweeps.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_trunk(table, sweeps):
    """Cooldowns from a trunk, all processes killed twice: rows name their trunk, spend their own part only, and are
    bit-identical to the run from scratch."""
    sweeps.write(table | {"kind": "trunk", "centre": [5e3, 7e3], "models": ["12x1"], "horizons": 3, "span": 4})
    for lines in (5, 100):
        sweeps.start_and_kill(lines)
    sweeps.run()
    rows = sweeps.rows()
    assert [(row["trunk"], row["kind"], row["schedule"]) for row in rows] == [("trunk-12x1-s0", "trunk", "wsd")] * 3
    assert all(0.15 < float(row["flops_spent"]) / float(row["flops"]) < 0.25 for row in rows)
    assert sweeps.trained().count("trunk-12x1-s0") == 1
    assert list(read_csv_gz(sweeps.out / CURVES)) == [*(row["run"] for row in rows), "trunk-12x1-s0"]

    scratch = Sweeps(sweeps.folder / "scratch", table | {
        "kind": "grid", "budgets": [float(rows[0]["flops"])], "models": ["12x1"], "schedule": "wsd",
        "batch_tokens": int(rows[0]["batch_tokens"]), "warmup_tokens": float(rows[0]["warmup_tokens"])})  # fmt: skip
    scratch.run()
    assert scratch.rows()[0]["loss"] == rows[0]["loss"] and scratch.rows()[0]["tokens"] == rows[0]["tokens"]


def test_smoke(tmp_path):
    """sweeps/smoke.toml, killed and rerun: every budget, perhaps with sizes added, and then the fit."""
    sweeps = Sweeps(tmp_path / "sweep", {}, "smoke")
    shutil.copyfile(ROOT / "sweeps" / "smoke.toml", sweeps.file)
    sweeps.start_and_kill(700)  # when some have finished
    said = sweeps.run(workers=2)
    rows = sweeps.rows()
    assert len(rows) >= 12 and {row["status"] for row in rows} == {"finished"}
    assert len(sweeps.trained()) <= len(rows)  # those finished are not trained again
    laws = json.loads((sweeps.out / "laws.json").read_text())
    assert laws["meta"]["n_runs"] == len(rows) and "laws.json, report.html" in said
    again = sweeps.run()
    assert "laws.json, report.html" not in again and "adding" not in again
    assert sweep.fitted(sweeps.out, (sweeps.out / "runs.csv").read_bytes())  # and of other rows it is not
    assert not sweep.fitted(sweeps.out, b"other rows")
