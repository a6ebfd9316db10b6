"""Many runs from one file, and the law fitted to them: budgets in, laws.json and report.html out.

    python sweep.py sweeps/mini.toml              plan, train what is missing, fit; rerun it to resume
    python sweep.py sweeps/mini.toml --dry-run    the runs and their cost, what is done, and the time of the rest
    python sweep.py sweeps/mini.toml --status     progress of each run

Writes plan.csv, runs.csv, curves.csv.gz, runs/, laws.json, report.html and figures to sweeps-out/<name>/. Kill it at
any moment: the same command completes it, with the same rows. Rows in results/<name>/runs.csv count as done.
"""

from nanochin.base import signals

if __name__ == "__main__":
    signals.end_quietly()  # on Ctrl-C during the imports

import functools
import hashlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path

from filelock import FileLock

from nanochin.base.cli import UserError, did_you_mean, errors_name, no_torchrun, opt, parse, run_command, with_flags
from nanochin.base.console import Progress, clock, format_columns, rich_console, shown
from nanochin.base.files import write_file, writing
from nanochin.config import PARAM_CONVENTIONS, Config
from nanochin.data.corpus import BPE_VOCAB, prepare
from nanochin.data.tokenizer import Tokenizer, model_vocab
from nanochin.interop import loggers
from nanochin.report.kept import keep
from nanochin.run.curves import CURVES, to_csv_gz
from nanochin.runrow import RunRow, csv_of, params_column, to_csv
from nanochin.sweep import attempts, launchers
from nanochin.sweep.cells import Cell, extend_budgets, open_side, plan_cells
from nanochin.sweep.plan import plan_rows, plan_table, seconds
from nanochin.sweep.pool import Pool
from nanochin.sweep.spec import Sweep, read_sweep
from nanochin.sweep.store import Outcome, Queue, RunStore

ROOT = Path(__file__).resolve().parent
SECONDS_BETWEEN_LINES = 15.0  # of the progress view, if not on a terminal


@dataclass(frozen=True)
class SweepOptions:
    sweep: str = opt(None, "the sweep: a TOML file", positional=True)
    dry_run: bool = opt(False, "print the plan, its cost and what is left; train nothing")
    status: bool = opt(False, "print the progress of each run; on a terminal, until all have ended")
    only: tuple[str, ...] = opt((), "runs to train now, such as budget=1e12 or model=48x2 model=64x2")
    loggers: tuple[str, ...] = opt(
        (), "also send the fitted figures and law to these", choices=("wandb", "tensorboard")
    )
    keep: bool = opt(False, "copy rows, curves, laws and report to --results; no checkpoints")
    retry_failed: bool = opt(False, "train failed runs again")
    workers: int | None = opt(None, "concurrent runs; default: one per GPU, else one per CPU core", low=1, high=1000)
    launcher: str = opt("local", "what trains the runs: this machine, or jobs of SLURM", choices=("local", "slurm"))
    slurm: tuple[str, ...] = opt((), "settings of the jobs, such as partition=gpu time=480 gpus_per_task=1")
    max_parallel: int = opt(64, "slurm: jobs that run at the same time", low=1)
    runs_per_job: int = opt(1, "slurm: runs that a job trains, one after the other", low=1)
    cancel: bool = opt(False, "slurm: end the jobs of the sweep, which save their runs")
    train: tuple[str, ...] = opt((), "train these runs of the sweep, as a job of SLURM does")
    data: tuple[str, ...] | None = opt(None, "training text, as for train.py; default: from the sweep file")
    val: tuple[str, ...] | None = opt(None, "validation text; default: from the sweep file")
    out: str = opt("sweeps-out", "folder of all sweeps")
    results: str = opt("results", "folder of kept rows: runs in <results>/<sweep>/runs.csv count as done")


def main() -> int:
    options = parse(SweepOptions, prog="sweep.py", description=__doc__)
    no_torchrun("start sweep.py by python: it has workers of its own (`workers`, or `launcher` slurm)")
    loggers.check(options.loggers)
    if options.slurm and options.launcher == "local":
        raise UserError("`slurm`: these are settings of jobs; give `launcher` slurm")
    sweep = read_sweep(options.sweep, data=options.data, val=options.val)
    fingerprints = {"data_sha": None, "val_sha": None}
    if options.dry_run and sweep.spec.corpus_tokens:  # without reading the text
        vocab, tokens = expected_vocab(sweep), sweep.spec.corpus_tokens
    else:
        if sweep.base.data is None:
            raise UserError(f'{sweep.path}: data is missing; set the text, such as data = ["books/"], or give `data`')
        with Progress() as progress:  # tokenise once, before the workers start
            corpus = prepare(sweep.base, progress)
        for note in corpus.notes:
            print(f"note: {with_flags(note)}")
        vocab, tokens = vocab_for(sweep, corpus.tokenizer), len(corpus.train)
        fingerprints = {"data_sha": corpus.data_sha, "val_sha": corpus.val_sha}
    cells = plan_cells(sweep, vocab, tokens)
    folder = Path(options.out) / sweep.name
    store = RunStore(folder, Path(options.results) / sweep.name, fingerprints)
    if options.dry_run:
        queue = stored(sweep, cells, vocab, store)
        if options.retry_failed:
            queue.outcomes = {name: outcome for name, outcome in queue.outcomes.items() if not outcome.reason}
        print(plan_table(sweep, queue, only(queue.cells, options), tokens, options.workers or 1))
        return 0
    if options.status:
        return follow(sweep, cells, vocab, store)
    if options.cancel:
        print(f"{launchers.cancel(folder / 'jobs')} jobs cancelled; their runs are saved")
        return 0

    with writing(folder):
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        if options.launcher == "slurm":
            (folder / "jobs").mkdir(exist_ok=True)
        (folder / "workers.log").touch()
    if options.train:
        chosen = [cell for cell in stored(sweep, cells, vocab, store).cells if cell.name in options.train]
        if len(chosen) < len(set(options.train)):
            raise UserError(f"`train` {' '.join(options.train)}: not all are runs of {sweep.path}; see plan.csv")
        attempts.train_runs(load_train(sweep.base), store, chosen)
        return 0
    train_all(sweep, only(cells, options), vocab, store, options, tokens)
    code = finish(sweep, cells, vocab, store)
    for name in options.loggers if (folder / "laws.json").exists() else ():
        loggers.send_sweep(name, folder)
    if options.keep:
        given = {"--data": options.data, "--val": options.val}
        text = [word for flag, paths in given.items() if paths for word in (flag, *paths)]
        keep(folder, store.results, shlex.join(["python", "sweep.py", options.sweep, *text]))
    return code


def expected_vocab(sweep: Sweep) -> int:
    """The vocabulary size that can be expected without reading the text."""
    if sweep.base.tokenizer == "bpe":
        return sweep.base.vocab_size or BPE_VOCAB
    return vocab_for(sweep, Tokenizer.load(sweep.base.tokenizer or "bytes"))


def vocab_for(sweep: Sweep, tokenizer: Tokenizer) -> int:
    """The vocabulary size of the sweep's models."""
    with errors_name(sweep.path):
        return model_vocab(tokenizer, sweep.base.vocab_size)


def only(cells: list[Cell], options: SweepOptions) -> list[Cell]:
    """The cells that `--only` selects, and the trunks that they need. A key given twice means either value."""
    wanted: dict[str, list[str]] = {}
    known = [f.name for f in fields(Config)]
    for item in options.only:
        key, equals, value = item.partition("=")
        if not equals or key not in known:
            near = did_you_mean(key, known, "=") if equals else ""
            raise UserError(f"--only {item}: expected an option of the runs, such as budget=1e12 or model=48x2{near}")
        wanted.setdefault(key, []).append(value)

    def value_of(cell: Cell, key: str):
        return cell.budget if key == "budget" else getattr(cell.config, key)

    def matches(cell: Cell) -> bool:
        return all(any(_equal(value_of(cell, key), text) for text in texts) for key, texts in wanted.items())

    chosen = [cell for cell in cells if matches(cell)]
    if not chosen:
        found = {key: list(dict.fromkeys(value_of(cell, key) for cell in cells))[:9] for key in wanted}
        texts = {key: (f"{v:g}" if isinstance(v, float) else str(v) for v in values) for key, values in found.items()}
        there = "; ".join(f"{key} is {', '.join(values)}" for key, values in texts.items())
        raise UserError(f"--only {' '.join(options.only)}: no such run; of the runs {there}")
    needed = {cell.name for cell in chosen} | {cell.trunk for cell in chosen}
    return [cell for cell in cells if cell.name in needed]


def _equal(value, text: str) -> bool:
    try:
        return float(value) == float(text)
    except (TypeError, ValueError):
        return str(value) == text


# ---------------------------------------------------------------------------------------------------------------------
# The training


def load_train(base: Config) -> Callable[[Config], dict]:
    """In a worker: the function that trains a run, with the sweep's text opened once."""
    import train

    return functools.partial(train.train, quiet=True, corpus=prepare(base, Progress(quiet=True)))


def start_pool(sweep: Sweep, store: RunStore, options: SweepOptions, most: int) -> Pool | launchers.Slurm:
    """What trains the runs: at most `most` worker processes, or SLURM. Raises UserError as they do."""
    if options.launcher == "slurm":
        command = [sys.executable, *sys.argv, "--train"]
        return launchers.Slurm(store, command, options.slurm, options.max_parallel, options.runs_per_job)
    if launchers.states(store.folder / "jobs"):
        raise UserError(f"{store.folder}: jobs of SLURM train its runs; give `launcher` slurm, or `cancel` first")
    load = functools.partial(load_train, sweep.base)
    return Pool(load, sweep.base.device, store.folder / "workers.log", options.workers, most)


def exclusive(folder: Path) -> AbstractContextManager:
    """Keeps other sweeps of this machine from writing tables at the same time. On a cluster, whose disk may not keep a
    lock, all sweeps of the folder would write the same."""
    return nullcontext() if (folder / "jobs").exists() else FileLock(folder / ".lock")


def train_all(
    sweep: Sweep, cells: list[Cell], vocab: int, store: RunStore, options: SweepOptions, corpus_tokens: float
) -> None:
    """Train the runs without an outcome, and the sizes that `extend` adds. Raises UserError if the sweep must stop."""
    folder, queue = store.folder, Queue(store, cells, options.retry_failed)
    view, pool = View(queue), None
    duration = functools.partial(seconds, sweep, cells=queue.cells)
    try:
        while True:
            if not options.only:
                if missing := [cell.name for cell in extend(sweep, queue, vocab) if queue.is_open(cell)]:
                    view.say(f"no inner minimum yet: adding {', '.join(missing)}")
                with exclusive(folder):
                    write_file(folder / "plan.csv", csv_of(plan_rows(sweep, queue.cells, corpus_tokens)))
            if queue.done:
                break
            if pool is None:
                view.say("starting workers" if options.launcher == "local" else "submitting jobs")
                pool = start_pool(sweep, store, options, sum(map(queue.is_open, queue.cells)) + 2)  # to be extended
                view.say(str(pool))
            before = len(queue.outcomes)
            while len(queue.outcomes) == before and not queue.done:
                while len(queue.running) < pool.size and (cell := queue.take(duration)):
                    pool.submit(replace(cell.config, out=str(folder / "runs"), threads=1))
                for reply in pool.wait(0.5):
                    queue.put(reply)
                view.show()
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM, SIGHUP
        local = "stopping and saving the runs in progress; rerun the same command to resume"
        view.say(local if options.launcher == "local" else "the jobs continue; rerun the same command to watch them")
        raise
    finally:
        view.close()
        if pool:
            pool.close()


class View:
    """Progress, losses and time left: live on a terminal, else a line every SECONDS_BETWEEN_LINES."""

    def __init__(self, queue: Queue):
        self.queue, self.began, self.last = queue, time.monotonic(), time.monotonic()
        self.at_first, self.shares = self.spent()[0], {}  # shares: of runs in progress, when first seen
        self.live = None
        if sys.stdout.isatty():
            from rich.live import Live

            self.live = Live(console=rich_console(), refresh_per_second=4)
            self.live.start()

    def spent(self) -> tuple[float, float]:
        """(FLOPs spent, FLOPs in all) of the runs that have not failed; a run in progress counts by its share."""
        total = spent = 0.0
        for cell in self.queue.cells:
            outcome = self.queue.outcomes.get(cell.name)
            if outcome and outcome.reason:
                continue
            total += cell.spent
            spent += cell.spent * (self.queue.store.progress(cell)[0] if self.queue.is_open(cell) else 1.0)
        return spent, total

    def say(self, text: str) -> None:
        if self.live:
            self.live.console.print(shown(text))
        else:
            print(text, flush=True)

    def text(self) -> str:
        queue = self.queue
        spent, total = self.spent()
        elapsed = time.monotonic() - self.began
        rate = (spent - self.at_first) / elapsed if elapsed > 0 else 0.0
        left = f"{clock((total - spent) / rate)} left" if rate > 0 else "time left not known yet"
        runs = [cell for cell in queue.cells if not cell.is_trunk]
        failed = sum(bool(outcome.reason) for outcome in queue.outcomes.values())
        lines = [
            f"{sum(cell.name in queue.outcomes for cell in runs)} of {len(runs)} runs done"
            + (f" ({failed} failed)" if failed else "")
            + f", {spent:.3g} of {total:.3g} FLOPs, {clock(elapsed)}, {left}"
        ]
        for cell in queue.cells:
            if since := queue.running.get(cell.name):
                done, loss = queue.store.progress(cell)
                if loss is None:  # starts, or waits in a queue with many others
                    continue
                new = done - self.shares.setdefault(cell.name, done)  # since this sweep started or resumed the run
                eta = f"ETA {clock((time.monotonic() - since) * (1 - done) / new)}" if new > 0 else ""
                lines.append(f"  {cell.name} {done:4.0%} loss {loss:.3f} {eta}".rstrip())
        return "\n".join(lines)

    def show(self) -> None:
        if self.live:
            from rich.text import Text  # plain: no colours in the middle of names

            self.live.update(Text(shown(self.text())))
        elif time.monotonic() - self.last > SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            print(self.text().replace("\n ", ";"), flush=True)

    def close(self) -> None:
        if self.live:
            self.live.update("")
            self.live.stop()


def extend(sweep: Sweep, queue: Queue, vocab: int) -> list[Cell]:
    """Add sizes to the budgets whose minimum is at an edge, by the losses so far -> the new cells."""
    before = len(queue.cells)
    while more := extend_budgets(sweep, queue.cells, queue.losses, vocab):
        queue.add(more)
    return queue.cells[before:]


def stored(sweep: Sweep, cells: list[Cell], vocab: int, store: RunStore) -> Queue:
    """All cells, with those that `extend` added, and their outcomes on disk."""
    queue = Queue(store, cells)
    extend(sweep, queue, vocab)
    return queue


def follow(sweep: Sweep, cells: list[Cell], vocab: int, store: RunStore) -> int:
    """`--status`: a line per run, from the disk alone; on a terminal, updated until all have an outcome."""

    def look() -> tuple[str, bool]:
        found, jobs = stored(sweep, cells, vocab, store), launchers.states(store.folder / "jobs")
        running, waiting, ended = [], [], []  # in this order, in case the terminal is short
        for cell in found.cells:
            if outcome := found.outcomes.get(cell.name):
                status, loss = ("failed", outcome.reason) if outcome.reason else ("finished", f"{outcome.loss:.4f}")
                ended.append([cell.name, status, loss])
            elif (progress := store.progress(cell))[1]:
                running.append([cell.name, f"{progress[0]:.0%}", f"{progress[1]:.3f}"])
            else:
                waiting.append([cell.name, jobs.get(cell.name, "waiting"), ""])
        lines = format_columns([["run", "", "loss"], *running, *waiting, *ended])
        runs = [cell for cell in found.cells if not cell.is_trunk]
        done = sum(cell.name in found.outcomes for cell in runs)
        return shown(f"{done} of {len(runs)} runs done\n\n{lines}"), done == len(runs)

    text, done = look()
    if not sys.stdout.isatty():
        print(text)
        return 0
    from rich.live import Live
    from rich.text import Text

    with Live(Text(text, no_wrap=True, overflow="ellipsis"), console=rich_console(), refresh_per_second=1) as live:
        while not done:
            time.sleep(2)
            text, done = look()
            live.update(Text(text, no_wrap=True, overflow="ellipsis"))
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The results


def finish(sweep: Sweep, cells: list[Cell], vocab: int, store: RunStore) -> int:
    """Write runs.csv from the disk, then fit. Another sweep on the same folder may do so at the same time."""
    queue = stored(sweep, cells, vocab, store)
    folder, outcomes = store.folder, queue.outcomes
    ordered = [cell for cell in queue.cells if not cell.is_trunk]
    rows = [row_of(cell, outcomes[cell.name]) for cell in ordered if cell.name in outcomes]
    for cell in ordered:
        if cell.name in outcomes and outcomes[cell.name].reason:
            print(f"failed: {cell.name}: {outcomes[cell.name].reason}  (--retry-failed tries again)")
    for line in edges(sweep, ordered, queue.losses):
        print(line)
    if len(rows) < len(ordered):
        print(f"{len(rows)} of {len(ordered)} runs done; without --only the same command does the rest")
    with exclusive(folder):
        write_file(folder / CURVES, to_csv_gz(store.curves(rows)))
        table = to_csv(rows)
        write_file(folder / "runs.csv", table)
        print(f"{folder / 'runs.csv'}: {len(rows)} runs")
        if sweep.spec.kind == "grid":
            print(best_of_grid(ordered, outcomes))
        elif len(rows) == len(ordered) and not fitted(folder, table):
            argv = [str(ROOT / "fit.py"), str(folder), "--out", str(folder), f"--bootstrap={sweep.spec.bootstrap}"]
            code = subprocess.run([sys.executable, *argv]).returncode
            return 0 if code == UserError.code else code  # fit.py has said why these runs give no law
        elif (folder / "report.html").exists():
            print(f"{folder}/report.html")
    return 0


def row_of(cell: Cell, outcome: Outcome) -> RunRow:
    """The row of runs.csv; for a failed run, what the plan says."""
    if outcome.row:
        return outcome.row
    plan, names = cell.plan, {"run": cell.name, "name": cell.name, "status": "failed", "reason": outcome.reason}
    counts = {params_column(convention): getattr(plan.params, convention) for convention in PARAM_CONVENTIONS}
    planned = {key: getattr(plan, key) for key in ("tokens", "lr", "batch_tokens")}
    shape = {"width": plan.shape.width, "layers": plan.shape.layers, "seed": cell.config.seed}
    place = {"budget": cell.budget, "kind": cell.kind, "trunk": cell.trunk}
    return RunRow(**names, **counts, **planned, **shape, **place, flops=plan.flops["physical"])


def edges(sweep: Sweep, cells: list[Cell], losses: dict[str, float | None]) -> list[str]:
    """A line for each budget whose lowest loss is at an edge of its sizes."""
    lines = []
    for budget, varied in dict.fromkeys((cell.budget, cell.varied) for cell in cells if sweep.spec.kind == "isoflop"):
        group = [cell for cell in cells if (cell.budget, cell.varied) == (budget, varied)]
        if len({cell.plan.shape for cell in group}) > 1 and (side := open_side(group, losses)):
            size = "largest" if side > 0 else "smallest"
            lines.append(f"{budget:g} FLOPs{varied}: the lowest loss is at the {size} size; it has no inner minimum")
    return lines


def best_of_grid(cells: list[Cell], outcomes: dict[str, Outcome]) -> str:
    """The runs of each model and budget, lowest loss first."""
    lines = [["run", "loss", "above best"]]
    for group in dict.fromkeys((cell.plan.shape, cell.budget) for cell in cells):
        found = [
            (outcomes[cell.name].loss, cell.name)
            for cell in cells
            if (cell.plan.shape, cell.budget) == group and cell.name in outcomes and outcomes[cell.name].row
        ]
        lines += [[name, f"{loss:.4f}", f"{loss - min(found)[0]:.4f}"] for loss, name in sorted(found)]
    return "\n" + format_columns(lines)


def fitted(folder: Path, table: bytes) -> bool:
    """Whether laws.json, the last file that fit.py writes, was fitted to exactly these rows."""
    try:
        return json.loads((folder / "laws.json").read_text())["meta"]["sha256"] == hashlib.sha256(table).hexdigest()
    except (OSError, ValueError, KeyError, TypeError):  # missing, or not ours
        return False


if __name__ == "__main__":
    run_command(main, "sweep.py")
