"""nanochin/sweep/launchers.py: what is submitted, watched and submitted again, with a scheduler made up here and with
submitit on this machine. (tests/slurm/real_slurm.py does so on a real SLURM.)"""

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from sweep_files import toml

import sweep
from nanochin.base.cli import RunError, UserError
from nanochin.config import Config
from nanochin.sweep import launchers
from nanochin.sweep.launchers import Job, Slurm
from nanochin.sweep.pool import Reply
from nanochin.sweep.store import RunStore


class Scheduler:
    """Takes jobs, as submitit's executor does, and runs none. live: {name of an array: [whether each job lives]}."""

    folder = Path("logs")

    def __init__(self):
        self.live, self.parameters, self.answers = {}, [], True

    def update_parameters(self, **parameters) -> None:
        self.parameters.append(parameters)

    def submit_array(self, jobs: list[Job]) -> None:
        self.live[self.parameters[-1]["job_name"]] = [True] * len(jobs)

    def jobs_of_runs(self, arrays: dict) -> dict | None:
        pairs = [pair for name in self.live for pair in zip(arrays.get(name, []), self.live[name], strict=False)]
        return {run: ("1", "running") for task, job in pairs if job for run in task} if self.answers else None

    def end_all(self) -> None:
        self.live = {name: [False] * len(jobs) for name, jobs in self.live.items()}


@pytest.fixture
def scheduler(monkeypatch) -> Scheduler:
    made = Scheduler()
    monkeypatch.setattr(launchers, "make_executor", lambda logs, settings: made)
    monkeypatch.setattr(launchers, "jobs_of_runs", made.jobs_of_runs)
    monkeypatch.setattr(launchers, "POLL", 0.01)
    monkeypatch.setattr(launchers, "LOST", 0.05)
    return made


@pytest.fixture
def store(tmp_path) -> RunStore:
    for name in ("runs", "jobs"):
        (tmp_path / "out" / name).mkdir(parents=True)
    return RunStore(tmp_path / "out", tmp_path / "results", {})


def slurm(store: RunStore, runs: str, parallel: int = 64, runs_per_job: int = 1) -> Slurm:
    """A new process that has the `runs` to train."""
    new = Slurm(store, ["train"], (), parallel, runs_per_job)
    for run in runs.split():
        new.submit(Config(name=run))
    return new


def submitted(store: RunStore) -> list[list[list[str]]]:
    return list(launchers.read_arrays(store.folder / "jobs").values())


def saves(store: RunStore, run: str, step: int) -> None:
    (store.folder / "attempts" / run / "1" / run / "checkpoints" / f"step-{step}").mkdir(parents=True)
    (store.folder / "attempts" / run / "1" / ".private").touch()


def replies(watch: Slurm, patience: float = 10) -> list[Reply]:
    deadline = time.monotonic() + patience
    while not (found := watch.wait()):
        assert time.monotonic() < deadline
    return found


def test_dealt_out(store, scheduler):
    """Runs, longest first, are dealt to the jobs of an array in turn; later arrays have the jobs that are left."""
    watch = slurm(store, "a b c d e", parallel=5, runs_per_job=2)
    watch.wait()
    assert submitted(store) == [[["a", "d"], ["b", "e"], ["c"]]]
    watch.submit(Config(name="f"))
    watch.wait()
    assert submitted(store)[1:] == [[["f"]]]
    assert [(p["array_parallelism"]) for p in scheduler.parameters] == [5, 4]


def test_nothing_twice(store, scheduler):
    """Neither a second process nor one that comes after the first submits what is submitted; both see the end."""
    first, second = slurm(store, "a b"), slurm(store, "a b c")
    for watch in (first, second, first, second, slurm(store, "a b c")):
        watch.wait()
    assert submitted(store) == [[["a"], ["b"]], [["c"]]]
    store.run_folder("a").mkdir()
    (store.run_folder("a") / "summary.json").touch()
    assert first.wait() == second.wait() == [Reply("a", "finished")]
    assert submitted(store) == [[["a"], ["b"]], [["c"]]]


def test_one_array_at_a_time(store, scheduler, monkeypatch):
    """Of two processes that submit at the same moment only the first does."""
    first, second = slurm(store, "a"), slurm(store, "a")
    before = launchers.jobs_of_runs

    def in_between(arrays: dict) -> dict:
        monkeypatch.setattr(launchers, "jobs_of_runs", before)
        second.wait()
        return before(arrays)

    monkeypatch.setattr(launchers, "jobs_of_runs", in_between)
    first.wait()
    assert submitted(store) == [[["a"]]] and len(scheduler.live) == 1


def test_killed_while_submitting(store, scheduler, monkeypatch):
    """An array that was recorded and never submitted is given up after a while."""
    monkeypatch.setattr(scheduler, "submit_array", lambda jobs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        slurm(store, "a").wait()
    monkeypatch.undo()
    monkeypatch.setattr(launchers, "make_executor", lambda logs, settings: scheduler)
    monkeypatch.setattr(launchers, "jobs_of_runs", scheduler.jobs_of_runs)
    monkeypatch.setattr(launchers, "LOST", 0.05)
    monkeypatch.setattr(launchers, "POLL", 0.01)
    watch = slurm(store, "a")
    watch.wait()
    assert len(submitted(store)) == 1
    assert replies(watch) == [Reply("a", "died", "see logs")]
    watch.submit(Config(name="a"))
    watch.wait()
    assert submitted(store) == [[["a"]], [["a"]]]


def test_lost_jobs(store, scheduler):
    """A run whose job is gone is submitted again: without a word if it has saved new steps, else as died, and then in a
    job of its own."""
    watch = slurm(store, "a b", runs_per_job=2)
    watch.wait()
    saves(store, "a", 5)
    scheduler.end_all()
    assert replies(watch) == [Reply("b", "died", "see logs")]
    assert submitted(store)[1:] == [[["a"]]]
    scheduler.end_all()
    watch.submit(Config(name="b"))
    assert replies(watch) == [Reply("a", "died", "see logs")]
    watch.submit(Config(name="a"))
    watch.wait()
    assert submitted(store)[2:] == [[["b"]], [["a"]]]


def test_jobs_that_never_train(store, scheduler):
    """If no job gets to the run, such as without Python on the nodes, the sweep stops."""
    watch = slurm(store, "a")
    with pytest.raises(RunError, match="a: 3 jobs ended before they trained it; see logs"):
        for _ in range(3):
            watch.wait()
            scheduler.end_all()
            replies(watch)
            watch.submit(Config(name="a"))


def test_no_answer(store, scheduler):
    """While squeue does not answer, nothing is lost and nothing is submitted."""
    watch = slurm(store, "a")
    watch.wait()
    scheduler.answers = False
    watch.submit(Config(name="b"))
    time.sleep(0.1)
    assert watch.wait() == [] and len(submitted(store)) == 1
    with pytest.raises(UserError, match="squeue"):
        launchers.cancel(store.folder / "jobs")


def test_cancelled(store, scheduler, monkeypatch):
    """After --cancel a process that watches stops; a new one submits the runs again."""
    watch = slurm(store, "a")
    watch.wait()
    called = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: called.append(command))
    assert launchers.cancel(store.folder / "jobs") == 1 and called == [["scancel", "1"]]
    with pytest.raises(RunError, match="the jobs were cancelled"):  # also while they save their runs
        watch.wait()
    again = slurm(store, "a")
    again.wait()
    assert submitted(store) == [[["a"]], [["a"]]]
    scheduler.live.popitem()
    assert replies(again) == [Reply("a", "died", "see logs")]


def test_squeue(tmp_path, monkeypatch):
    """Jobs are those of squeue with our names; an array of one job has a number without an index."""
    script = tmp_path / "squeue"
    script.write_text("#!/bin/sh\necho '7_1 PENDING x-1'; echo '8 RUNNING x-2'; echo '9 RUNNING a name'; exit $CODE")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CODE", "0")
    arrays = {"x-1": [["a"], ["b", "c"]], "x-2": [["d"]]}
    found = {"b": ("7_1", "pending"), "c": ("7_1", "pending"), "d": ("8", "running")}
    assert launchers.jobs_of_runs(arrays) == found
    monkeypatch.setenv("CODE", "1")
    assert launchers.jobs_of_runs(arrays) is None


SAVES = """import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1], 'w').write('saved'), sys.exit(143)))
open(sys.argv[1], 'w').write('started')
time.sleep(60)"""


def test_job_before_preemption(tmp_path):
    """The signal before a preemption goes to all processes of a job: the command ignores it, is then saved by SIGTERM,
    and the same job is to be repeated, unless it was cancelled."""
    pytest.importorskip("submitit")
    saved, cancelled = tmp_path / "saved", tmp_path / "cancelled"
    job = Job([sys.executable, "-c", SAVES, str(saved)], cancelled)
    again = []

    def preempt(*_) -> None:
        if saved.exists() and saved.read_text():
            job.process.send_signal(signal.SIGUSR2)
            time.sleep(0.3)
            assert job.process.poll() is None
            again.append(job.checkpoint())
            raise SystemExit
        signal.setitimer(signal.ITIMER_REAL, 0.1)

    before = signal.signal(signal.SIGALRM, preempt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(SystemExit):
            job()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert saved.read_text() == "saved" and again[0].function.argv == job.argv
    cancelled.touch()
    assert job.checkpoint() is None and job() is None


def test_job_fails(tmp_path):
    """A command that fails is a job that fails."""
    with pytest.raises(subprocess.CalledProcessError):
        Job([sys.executable, "-c", "import sys; sys.exit(3)"], tmp_path / "cancelled")()


def test_without_submitit(tmp_path, monkeypatch):
    """One line says what to install, that there is no SLURM, or which setting is unknown."""
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="pip install submitit"):
        launchers.make_executor(tmp_path, ())
    monkeypatch.undo()
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="srun"):
        launchers.make_executor(tmp_path, ())
    (tmp_path / "srun").touch(mode=0o755)
    with pytest.raises(UserError, match="partitio=gpu.*Unavailable parameter"):
        launchers.make_executor(tmp_path, ("partitio=gpu",))
    parameters = launchers.make_executor(tmp_path, ("partition=gpu", "time=480", "setup=module load cuda")).parameters
    assert (parameters["partition"], parameters["time"], parameters["setup"][1]) == ("gpu", 480, "module load cuda")


@pytest.fixture
def by_submitit(text, cache, tmp_path, monkeypatch):
    """`run(table, out, *options)` -> (rows, curves) of that sweep, with submitit's executor for one machine in place of
    SLURM's; `run.jobs`: {name of an array: its jobs}."""
    submitit = pytest.importorskip("submitit")
    jobs: dict[str, list] = {}

    class Executor(submitit.LocalExecutor):
        def submit_array(self, commands):
            jobs[self.parameters["job_name"]] = super().submit_array(commands)

    def jobs_of_runs(arrays: dict) -> dict:
        pairs = [pair for name in arrays for pair in zip(arrays[name], jobs[name], strict=True)]
        return {run: (job.job_id, "running") for task, job in pairs if not job.done() for run in task}

    monkeypatch.setattr(launchers, "make_executor", lambda logs, settings: Executor(logs))
    monkeypatch.setattr(launchers, "jobs_of_runs", jobs_of_runs)
    monkeypatch.setattr(launchers, "POLL", 0.2)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    usual = {"data": [str(text)], "val_bytes": 4096, "cache": str(cache), "seq_len": 32, "models": ["12x1"],
             "batch_tokens": 64, "device": "cpu", "dtype": "float32"}  # fmt: skip

    def run(table: dict, out: str, *argv: str) -> tuple[list, bytes]:
        file = tmp_path / "some.toml"
        file.write_text(toml(usual | table))
        argv = [str(ROOT / "sweep.py"), str(file), f"--out={tmp_path / out}", f"--results={tmp_path}/none", *argv]
        monkeypatch.setattr(sys, "argv", argv)
        assert sweep.main() == 0
        with open(tmp_path / out / "some" / "runs.csv", newline="") as rows:
            rows = [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(rows)]
        return rows, (tmp_path / out / "some" / "curves.csv.gz").read_bytes()

    run.jobs = jobs
    return run


def test_sweep_by_submitit(by_submitit):
    """A whole sweep: the rows and curves are those of the local launcher, a run that diverges included, and a second
    call submits nothing."""
    table = {"kind": "grid", "budgets": [1e8], "lr": [0.01, 9e5]}
    by_jobs = by_submitit(table, "a", "--launcher=slurm", "--runs-per-job=2")
    assert [row["status"] for row in by_jobs[0]] == ["finished", "failed"] and len(by_submitit.jobs) == 1
    assert by_jobs == by_submitit(table, "b", "--workers=1")
    assert by_jobs == by_submitit(table, "a", "--launcher=slurm") and len(by_submitit.jobs) == 1


def test_trunk_by_submitit(by_submitit, tmp_path):
    """Cooldowns are submitted when their trunk has ended, and find it: the rows and curves of the local launcher."""
    table = {"kind": "trunk", "budgets": [4e8], "centre": [5e3], "horizons": 2, "span": 4}
    by_jobs = by_submitit(table, "a", "--launcher=slurm", "--runs-per-job=2")
    assert [row["trunk"] for row in by_jobs[0]] == ["trunk-12x1-s0"] * 2 and len(by_submitit.jobs) == 2
    assert by_jobs == by_submitit(table, "b", "--workers=1")
    assert not list((tmp_path / "a" / "some" / "attempts").iterdir())
