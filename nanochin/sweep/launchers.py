"""The runs of a sweep as jobs of SLURM, submitted by submitit: a scheduler decides what is trained where, on machines
that share a folder. The sweep's process submits and watches; it may be ended and started again on any of them.

    jobs/<n>.json         an array of jobs: its name, and the runs of each job; written before it is submitted
         <n>.ids.json     the numbers of its jobs, as soon as they are known
         <n>.cancelled    its jobs must not train, even if the scheduler starts them later
         logs/            of submitit: batch script, output and result of each job

Each file is written once, by a link that fails if it exists. So of two processes that would submit the same runs only
one does, and after one that was killed while it submitted, the next finds out by the name what became of the array.
"""

import itertools
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from nanochin.base.cli import RunError, UserError, brief, did_you_mean, need
from nanochin.base.files import read_json, to_json, writing
from nanochin.config import Config
from nanochin.sweep.attempts import STOP, adopt
from nanochin.sweep.pool import ONE_THREAD, Reply
from nanochin.sweep.store import DEATHS, RunStore, has_ended

ROOT = Path(__file__).resolve().parents[2]
POLL = 10.0  # seconds between two looks at the jobs
LOST = 60.0  # seconds after which an array that was not submitted, as far as anyone knows, is cancelled
SAVING = 60.0  # seconds for a run to be saved, or for the scheduler to end a job that it has told to end


# ---------------------------------------------------------------------------------------------------------------------
# In a job


class Job:
    """What submitit runs in a job: a command, which saves its run on SIGTERM, and resumes it when it is repeated."""

    def __init__(self, argv: list[str], cancelled: Path):
        self.argv, self.cancelled, self.folder, self.process = argv, cancelled, os.getcwd(), None

    def __call__(self) -> None:
        """Raises CalledProcessError if the command fails."""
        if self.cancelled.exists():
            return print("this job was cancelled before it started")
        print(f"cd {shlex.quote(self.folder)}; {shlex.join(self.argv)}", flush=True)
        options = {"cwd": self.folder, "env": os.environ | ONE_THREAD, "preexec_fn": _ignore_signal_to_requeue}
        self.process = subprocess.Popen(self.argv, **options)
        while (code := self.process.poll()) is None:  # not `wait`, which `checkpoint` could not call within it
            time.sleep(0.2)
        if code == 128 + signal.SIGTERM and not self.cancelled.exists():
            time.sleep(SAVING)  # all processes of the job were told to end: leave it to the scheduler to requeue it
        if code:
            raise subprocess.CalledProcessError(code, self.argv)

    def checkpoint(self):
        """Called by submitit on the signal that comes before a preemption or the time limit: save, then requeue."""
        from submitit.helpers import DelayedSubmission

        if self.process:
            self.process.terminate()
            try:
                self.process.wait(SAVING)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process = None
        return None if self.cancelled.exists() else DelayedSubmission(self)


def _ignore_signal_to_requeue() -> None:
    """In the command's process, which gets all signals that the job gets: this one is for submitit alone."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------------------
# The scheduler


class Scheduler:
    """SLURM. `settings`: of its jobs, such as "partition=gpu", as submitit names them."""

    def __init__(self, logs: Path, settings: tuple[str, ...] = ()):
        self.logs, self.settings = logs, settings

    @cached_property
    def executor(self):
        """submitit's. Raises UserError if it is missing, there is no SLURM, or a setting is unknown."""
        submitit = need("submitit", "`launcher` slurm")
        try:
            executor = submitit.SlurmExecutor(self.logs, max_num_timeout=10**6)
        except RuntimeError:
            raise UserError("`launcher` slurm: no srun here; start the sweep on a node of the cluster") from None
        parameters = {"time": 60, "setup": [f"export PYTHONPATH={shlex.quote(str(ROOT))}"]}
        known = sorted(executor._valid_parameters())
        for setting in self.settings:
            key, equals, value = setting.partition("=")
            if not equals or key not in known:
                near = did_you_mean(key, known, "=")
                raise UserError(f"`slurm` {setting}: expected a setting of submitit, such as partition=gpu{near}")
            parameters[key] = int(value) if value.isdigit() else value
            if key == "setup":
                parameters[key] = [parameters["setup"][0], value]
        executor.update_parameters(**parameters)
        return executor

    def submit(self, name: str, jobs: list[Job], parallel: int) -> list[str]:
        """Submit an array of jobs, of which at most `parallel` run at the same time -> their numbers."""
        self.executor.update_parameters(job_name=name, array_parallelism=parallel)
        try:
            return [job.job_id for job in self.executor.submit_array(jobs)]
        except Exception as error:  # of sbatch, in submitit's words
            raise RunError(f"sbatch: {brief(error)}") from None

    def live(self) -> dict[str, tuple[str, str]] | None:
        """{number: (name, state)} of this user's jobs that have not ended; None if there is no answer."""
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i %T %j"]
        try:
            lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
        except (OSError, subprocess.SubprocessError):
            return None
        words = (line.split(maxsplit=2) for line in lines)
        return {number: (name, state.lower()) for number, state, name in words}

    def cancel(self, numbers: list[str]) -> None:
        subprocess.run(["scancel", *numbers], check=False)


# ---------------------------------------------------------------------------------------------------------------------
# What is submitted


@dataclass(frozen=True)
class Array:
    """Submitted jobs: the runs of each, and their numbers, None if not known yet."""

    path: Path
    name: str
    tasks: list[list[str]]
    numbers: list[str] | None

    @property
    def cancelled(self) -> Path:
        return self.path.with_suffix(".cancelled")

    def found(self, live: dict) -> "Array":
        """The array with its numbers, if one of its jobs is in `live`."""
        mine = next((number for number, (name, _) in live.items() if name == self.name), None)
        if self.numbers or not mine:
            return self
        first = mine.split("_")[0]
        return replace(self, numbers=[f"{first}_{i}" for i in range(len(self.tasks))] if "_" in mine else [first])

    def record_numbers(self) -> None:
        create(self.path.with_suffix(".ids.json"), to_json({"ids": self.numbers}))


def read_arrays(folder: Path) -> list[Array]:
    """The arrays that were submitted, in their order. Opened by name, since a listing may be old on a network disk."""
    arrays = []
    for n in itertools.count(1):
        path = folder / f"{n}.json"
        if not path.exists():
            return arrays
        ids, array = path.with_suffix(".ids.json"), read_json(path, {"name": str, "tasks": list})
        numbers = read_json(ids, {"ids": list})["ids"] if ids.exists() else None
        arrays.append(Array(path, array["name"], array["tasks"], numbers))


def create(path: Path, content: bytes = b"") -> bool:
    """Write a file in one step -> False if it exists."""
    temp = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with writing(path):
        temp.write_bytes(content)
        try:
            os.link(temp, path)
        except FileExistsError:
            return temp.stat().st_nlink == 2  # the answer to the first try was lost
        finally:
            temp.unlink()
    return True


def jobs_of_runs(arrays: list[Array], live: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """{run: (number, state) of its job} for runs whose jobs have not ended, and for those of arrays that are being
    submitted, with number "". live: from the scheduler."""
    jobs = {}
    for array in (array.found(live) for array in arrays if not array.cancelled.exists()):
        for task, number in zip(array.tasks, array.numbers or [""] * len(array.tasks), strict=True):
            if number in live or not number:
                jobs |= dict.fromkeys(task, (number, live[number][1] if number else "being submitted"))
    return jobs


def states(folder: Path) -> dict[str, str]:
    """{run: its job, as "12_3 running"}, as far as this machine can tell."""
    arrays = read_arrays(folder)
    live = (arrays and Scheduler(folder).live()) or {}
    return {run: " ".join(job).strip() for run, job in jobs_of_runs(arrays, live).items()}


def is_open(store: RunStore) -> bool:
    """Whether jobs that were not cancelled may still train runs."""
    arrays = [array for array in read_arrays(store.folder / "jobs") if not array.cancelled.exists()]
    runs = {run for array in arrays for task in array.tasks for run in task}
    return not all(has_ended(store.run_folder(run)) for run in runs)


def cancel(folder: Path) -> list[str]:
    """End all jobs of the sweep, which save their runs -> their numbers. Raises UserError if there is no SLURM."""
    scheduler, numbers = Scheduler(folder), []
    if (live := scheduler.live()) is None:
        raise UserError("`cancel`: squeue gives no answer here; run it on a node of the cluster")
    for array in read_arrays(folder):
        create(array.cancelled)  # also of those that were cancelled before, whose jobs came late
        numbers += [number for number in array.found(live).numbers or () if number in live]
    if numbers:
        scheduler.cancel(numbers)
    return numbers


class Slurm:
    """Jobs, used as the worker pool is: `submit` runs, `wait` for replies. It takes all runs that can start."""

    size = sys.maxsize

    def __init__(
        self, store: RunStore, command: list[str], settings: tuple[str, ...], parallel: int, runs_per_job: int
    ):
        """command: trains the runs whose names are appended. Raises UserError as `Scheduler.executor` does."""
        self.store, self.folder, self.command = store, store.folder / "jobs", command
        self.parallel, self.runs_per_job = parallel, runs_per_job
        self.scheduler = Scheduler(self.folder / "logs", settings)
        self.new: list[str] = []  # runs to be submitted, unless another process has done so
        self.watched: dict[str, str] = {}  # run -> number of its job
        self.gone: set[str] = set()  # runs whose jobs were not there at the last look
        self.deaths: Counter[str] = Counter()  # of jobs in which a run made no progress
        self.saved: dict[str, int] = {}  # run -> step of its last checkpoint when its job was gone
        self.unknown: dict[Path, float] = {}  # arrays without numbers: since when
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        self.scheduler.executor  # noqa: B018 (raises)

    def __str__(self) -> str:
        return f"jobs of SLURM: {self.folder}"

    def close(self) -> None:
        """The jobs continue."""

    def submit(self, config: Config) -> None:
        self.new.append(config.name)

    def wait(self, seconds: float | None = None) -> list[Reply]:
        """Submit new runs, look at the jobs -> runs that have ended; without any, after POLL seconds. Raises UserError
        if the sweep should stop."""
        replies, arrays = [], read_arrays(self.folder)  # before the jobs: what is submitted in between has its number
        if (live := self.scheduler.live()) is not None:
            self._settle(arrays, live)
            jobs = jobs_of_runs(arrays, live)
            replies = self._ended(jobs, {run: array for array in arrays for task in array.tasks for run in task})
            self.watched |= {run: jobs[run][0] for run in [*self.new, *self.watched] if run in jobs}
            self.new = [run for run in self.new if run not in jobs]
            free = self.parallel - len({number for number, _ in jobs.values()})
            if self.new and self._submit(self.new, len(arrays) + 1, max(1, free)):
                self.new = []
        if not replies:
            time.sleep(POLL)
        return replies

    def _settle(self, arrays: list[Array], live: dict) -> None:
        """Arrays whose process was killed while it submitted them: find their numbers, or cancel them."""
        unknown = {array.path: array for array in arrays if not array.numbers and not array.cancelled.exists()}
        self.unknown = {path: self.unknown.get(path, time.monotonic()) for path in unknown}
        for path, array in unknown.items():
            if (found := array.found(live)).numbers:
                found.record_numbers()
            elif time.monotonic() - self.unknown[path] > LOST:
                create(array.cancelled)

    def _ended(self, jobs: dict, arrays: dict[str, Array]) -> list[Reply]:
        """Runs that have an outcome, or whose jobs were gone at two looks: on a network disk, an outcome may be seen
        late. arrays: the last of each run."""
        os.listdir(self.store.folder / "runs")  # makes a network disk look again
        ended = [run for run in [*self.watched, *self.new] if has_ended(self.store.run_folder(run))]
        self.new = [run for run in self.new if run not in ended]
        before, self.gone = self.gone, {run for run in self.watched if run not in jobs and run not in ended}
        replies = [Reply(run, "finished") for run in ended]  # or failed: the store knows
        for run in self.gone & before:
            number = self.watched[run]
            if number and arrays[run].cancelled.exists():
                raise RunError(f"{self.folder}: the jobs were cancelled; rerun the same command to submit them again")
            if number and not self._progressed(run):
                replies.append(self._died(run, f"job {number}; see {self.scheduler.logs / number}_0_log.err"))
            else:  # submit it again
                self.new.append(run)
        for run in {*ended, *(self.gone & before)}:
            self.watched.pop(run, None)
        return replies

    def _progressed(self, run: str) -> bool:
        """Whether the run has a newer checkpoint than when its job was gone before."""
        last = self.saved.get(run, 0)
        self.saved[run] = self.store.saved_step(run)
        return self.saved[run] > last

    def _died(self, run: str, reason: str) -> Reply:
        """Raises RunError for an error that stops the sweep, or if no job gets to the run."""
        attempts = self.store.attempts(run)
        if attempts and (stop := attempts[-1] / STOP).exists():
            stopped = RunError(read_json(stop, {"reason": str})["reason"])
            stop.unlink()
            raise stopped
        self.deaths[run] += 1
        if not attempts and self.deaths[run] == DEATHS:
            raise RunError(f"{run}: {DEATHS} jobs ended before they trained it ({reason})")
        return Reply(run, "died", reason)

    def _submit(self, runs: list[str], n: int, parallel: int) -> bool:
        """Submit the runs as array `n` -> False if another process was first with its array `n`. A run that killed its
        job has a job of its own. Runs are dealt to the jobs in turn, so that each job has a long one."""
        tasks = [[run] for run in runs if self.deaths[run]]
        others = [run for run in runs if not self.deaths[run]]
        jobs = math.ceil(len(others) / self.runs_per_job)
        tasks += [others[i::jobs] for i in range(jobs)]
        array = Array(self.folder / f"{n}.json", f"{self.store.folder.name}-{uuid.uuid4().hex[:8]}", tasks, None)
        if not create(array.path, to_json({"name": array.name, "tasks": tasks})):
            return False
        try:
            for run in runs:
                adopt(self.store, run)
            commands = [Job([*self.command, *task], array.cancelled.absolute()) for task in tasks]
            array = replace(array, numbers=self.scheduler.submit(array.name, commands, parallel))
        except UserError:
            create(array.cancelled)  # nothing was submitted, or it will not train
            raise
        array.record_numbers()
        for task, number in zip(tasks, array.numbers, strict=True):
            self.watched |= dict.fromkeys(task, number)
        return True
