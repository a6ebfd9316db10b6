"""The runs of a sweep as jobs of SLURM, submitted by submitit: a scheduler decides what is trained where, on machines
that share a folder. The sweep's process submits and watches; it may be ended and started again on any of them.

    jobs/<n>.json            an array of jobs: its name, and the runs of each job; written before it is submitted
         <name>.cancelled    its jobs must not train, even if they start later
         logs/               of submitit: batch script, output and result of each job

An array is recorded by a link that fails if its number is taken, so of two processes that would submit the same runs
only one does. After one that was killed, the next finds the jobs by their name.
"""

import math
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path

from nanochin.base.cli import RunError, UserError, brief, need
from nanochin.base.files import read_json, to_json, writing
from nanochin.config import Config
from nanochin.sweep.pool import ONE_THREAD, Reply
from nanochin.sweep.store import DEATHS, RunStore, has_ended

ROOT = Path(__file__).resolve().parents[2]
POLL = 10.0  # seconds between two looks at the jobs
LOST = 60.0  # seconds without a job and an outcome (a network disk may show it late), after which a run is lost
SAVING = 60.0  # seconds for a run to be saved, or for the scheduler to end a job that it has told to end


class Job:
    """What submitit runs in a job: a command, which saves its run on SIGTERM, and resumes it when it is repeated."""

    def __init__(self, argv: list[str], cancelled: Path):
        self.argv, self.cancelled, self.folder, self.process = argv, cancelled, os.getcwd(), None

    def __call__(self) -> None:
        """Raises CalledProcessError if the command fails."""
        if self.cancelled.exists():
            return
        print(f"cd {shlex.quote(self.folder)}; {shlex.join(self.argv)}", flush=True)
        # All processes of a job get the signal that comes before a preemption; it is for submitit alone.
        ignore = lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # noqa: E731
        self.process = subprocess.Popen(self.argv, cwd=self.folder, env=os.environ | ONE_THREAD, preexec_fn=ignore)
        while (code := self.process.poll()) is None:  # not `wait`, within which `checkpoint` could not call it
            time.sleep(0.2)
        if code == 128 + signal.SIGTERM and not self.cancelled.exists():
            time.sleep(SAVING)  # the job was told to end: the scheduler decides whether it starts again
        if code:
            raise subprocess.CalledProcessError(code, self.argv)

    def checkpoint(self):
        """Called by submitit on the signal before a preemption or the time limit: save, then start again later."""
        from submitit.helpers import DelayedSubmission

        if self.process:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(SAVING)
        self.process = None
        return None if self.cancelled.exists() else DelayedSubmission(self)


def read_arrays(folder: Path) -> dict[str, list[list[str]]]:
    """{name: runs of each job} of the arrays, in their order. Opened by number, since a network disk may show an old
    list of files."""
    arrays = {}
    while (path := folder / f"{len(arrays) + 1}.json").exists():
        record = read_json(path, {"name": str, "tasks": list})
        arrays[record["name"]] = record["tasks"]
    return arrays


def create(path: Path, content: bytes = b"") -> bool:
    """Write a file in one step -> False if it exists."""
    temp = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with writing(path):
        temp.write_bytes(content)
        try:
            os.link(temp, path)
        except FileExistsError:
            return False
        finally:
            temp.unlink()
    return True


def jobs_of_runs(arrays: dict[str, list[list[str]]]) -> dict[str, tuple[str, str]] | None:
    """{run: (number, state) of its job} of the jobs that have not ended; None if SLURM does not answer."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i %T %j"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    jobs = {}
    for number, state, name in (line.split(maxsplit=2) for line in lines):
        if name in arrays:  # 12_3 is the fourth job of an array; an array of one job is 12
            jobs |= dict.fromkeys(arrays[name][int(number.partition("_")[2] or 0)], (number, state.lower()))
    return jobs


def states(folder: Path) -> dict[str, str]:
    """{run: its job, as "12_3 running"}, as far as this machine knows."""
    arrays = read_arrays(folder)
    return {run: " ".join(job) for run, job in (arrays and jobs_of_runs(arrays) or {}).items()}


def cancel(folder: Path) -> int:
    """End all jobs of the sweep, which save their runs -> how many. Raises UserError if SLURM does not answer."""
    arrays = read_arrays(folder)
    for name in arrays:
        create(folder / f"{name}.cancelled")
    if (jobs := jobs_of_runs(arrays)) is None:
        raise UserError("`cancel`: squeue gives no answer; call it on a node of the cluster")
    if numbers := {number for number, _ in jobs.values()}:
        subprocess.run(["scancel", *numbers], check=False)
    return len(numbers)


def make_executor(logs: Path, settings: tuple[str, ...]):
    """submitit's, for jobs with settings such as "partition=gpu". Raises UserError if it is missing, there is no SLURM,
    or a setting is unknown."""
    submitit = need("submitit", "`launcher` slurm")
    given = {key: int(value) if value.isdigit() else value for key, _, value in (s.partition("=") for s in settings)}
    given["setup"] = [f"export PYTHONPATH={shlex.quote(str(ROOT))}", *([given["setup"]] if "setup" in given else [])]
    try:
        executor = submitit.SlurmExecutor(logs, max_num_timeout=10**6)
        executor.update_parameters(**{"time": 60} | given)
    except (RuntimeError, ValueError) as error:  # no srun; an unknown setting
        raise UserError(f"`launcher` slurm, `slurm` {' '.join(settings)}: {str(error).splitlines()[0]}") from None
    return executor


class Slurm:
    """Jobs, used as the worker pool is: `submit` runs, `wait` for replies. It takes all runs that can start."""

    size = sys.maxsize

    def __init__(
        self, store: RunStore, command: list[str], settings: tuple[str, ...], parallel: int, runs_per_job: int
    ):
        """command: trains the runs whose names are appended. Raises UserError as `make_executor` does."""
        self.store, self.folder, self.command = store, store.folder / "jobs", command
        self.parallel, self.runs_per_job = parallel, runs_per_job
        self.executor = make_executor(self.folder / "logs", settings)
        self.runs: list[str] = []  # submitted to this object, and without a reply
        self.known: set[str] = set()  # arrays that were seen
        self.alive: dict[str, float] = {}  # run -> when its job was seen last
        self.saved: dict[str, int] = {}  # run -> step of its last checkpoint when it was lost
        self.deaths: Counter[str] = Counter()  # of jobs in which a run made no progress

    def __str__(self) -> str:
        return f"jobs of SLURM: {self.folder}"

    def close(self) -> None:
        """The jobs continue."""

    def submit(self, config: Config) -> None:
        self.runs.append(config.name)

    def wait(self, seconds: float | None = None) -> list[Reply]:
        """Look at the jobs, and submit the runs that have none -> runs that have ended; without any, after POLL
        seconds. Raises UserError if the sweep should stop."""
        arrays = read_arrays(self.folder)  # before the jobs: an array that comes in between has a number that is taken
        cancelled = {name for name in arrays if (self.folder / f"{name}.cancelled").exists()}
        jobs = jobs_of_runs({name: tasks for name, tasks in arrays.items() if name not in cancelled})
        os.listdir(self.store.folder / "runs")  # makes a network disk look again
        replies = [Reply(run, "finished") for run in self.runs if has_ended(self.store.run_folder(run))]  # or failed
        if jobs is not None:
            now = time.monotonic()
            last = {run: name for name, tasks in arrays.items() for task in tasks for run in task}
            for run, name in last.items():
                if run in jobs or name not in self.known | cancelled:  # being submitted, for all that is known
                    self.alive[run] = now
            self.known |= arrays.keys()
            jobless = [run for run in self.runs if Reply(run, "finished") not in replies and run not in jobs]
            if any(run in self.alive and last.get(run) in cancelled for run in jobless):
                raise RunError(f"{self.folder}: the jobs were cancelled; rerun the same command to submit them again")
            idle = [run for run in jobless if now - self.alive.get(run, -LOST) >= LOST]
            died = [run for run in idle if run in self.alive and self._died(run)]
            replies += [Reply(run, "died", f"see {self.executor.folder}") for run in died]
            if new := [run for run in idle if run not in died]:
                self._submit(new, len(arrays) + 1, max(1, self.parallel - len(set(jobs.values()))))
        self.runs = [run for run in self.runs if run not in {reply.run for reply in replies}]
        if not replies:
            time.sleep(POLL)
        return replies

    def _died(self, run: str) -> bool:
        """Whether a run whose job is gone has saved no new step since its last job was."""
        del self.alive[run]
        before, self.saved[run] = self.saved.get(run, 0), self.store.saved_step(run)
        self.deaths[run] += self.saved[run] <= before
        if self.deaths[run] == DEATHS and not self.store.attempts(run):
            raise RunError(f"{run}: {DEATHS} jobs ended before they trained it; see {self.executor.folder}")
        return self.saved[run] <= before

    def _submit(self, runs: list[str], n: int, parallel: int) -> None:
        """Submit the runs as array `n`, of which at most `parallel` jobs run at the same time, unless another process
        was first. A run that ended its job has one of its own; the others are dealt out, a long one to each job."""
        others = [run for run in runs if not self.deaths[run]]
        jobs = math.ceil(len(others) / self.runs_per_job)
        tasks = [[run] for run in runs if self.deaths[run]] + [others[i::jobs] for i in range(jobs)]
        name = f"{self.store.folder.name}-{uuid.uuid4().hex[:8]}"
        if create(self.folder / f"{n}.json", to_json({"name": name, "tasks": tasks})):
            cancelled = self.folder.absolute() / f"{name}.cancelled"
            self.executor.update_parameters(job_name=name, array_parallelism=parallel)
            self.alive |= dict.fromkeys(runs, time.monotonic())
            try:
                self.executor.submit_array([Job([*self.command, *task], cancelled) for task in tasks])
            except Exception as error:  # of sbatch, in submitit's words
                create(cancelled)
                raise RunError(f"sbatch: {brief(error)}") from None
