"""nanochin/pack.py: how many workers a GPU, from made-up machines of known speed, and in a real sweep on a CPU."""

import random
import threading
import time
from types import SimpleNamespace

import pytest
from test_sweep import Sweeps

import sweep
from nanochin import pack, schedule
from nanochin.workers import WorkerDied


class Machine:
    """A GPU in made-up time: with n runs at once all of them together do `speed(n)` FLOP/s. A run adds a line to its
    log every 1/200 of it, as train.py does, after `start` seconds in which nothing is known of it."""

    def __init__(self, speed, flops: float = 1e5, start: float = 3.0, noise: float = 0.0, done: float = 0.0):
        self.speed, self.flops, self.start, self.noise, self.done = speed, flops, start, noise, done
        self.now, self.count, self.runs = 0.0, 0, []
        self.draw = random.Random(1)

    def pass_time(self, seconds: float, workers: int) -> None:
        while len(self.runs) < workers:
            self.count += 1
            self.runs.append(SimpleNamespace(name=f"run{self.count}", began=self.now, work=self.done, logged=self.done))
        self.now += seconds
        for run in self.runs:
            if self.now - run.began > self.start:
                run.work += seconds * self.speed(workers) / workers * self.draw.uniform(1 - self.noise, 1 + self.noise)
                run.logged = max(run.logged, int(run.work / self.flops * 200) / 200 * self.flops)
        self.runs = [run for run in self.runs if run.work < self.flops]

    def progress(self) -> dict[str, float]:
        return {run.name: run.logged for run in self.runs}


def ramp(machine: Machine, runs: int = 1000, gpus: int = 1, minutes: float = 60) -> pack.Ramp:
    found = pack.Ramp(gpus)
    while not found.verdict and machine.now < 60 * minutes:
        machine.pass_time(0.5, found.workers * gpus)
        found.look(machine.now, machine.progress(), runs)
    return found


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("best", [1, 3])
def test_saturated(best, noise):
    """Where `best` workers give all that there is, one more is tried and not kept; the rates are the machine's."""
    found = ramp(Machine(lambda n: 100.0 * min(n, best), noise=noise))
    assert found.workers == best and f"{best} worker{'s' * (best > 1)} a GPU: the {best + 1}" in found.verdict
    assert found.rates == pytest.approx([100.0 * min(n, best) for n in range(1, best + 2)], rel=0.03 if noise else 0.02)


def test_slower_together():
    """Where the second worker makes all of them slower it is not kept, and the words say what it did."""
    found = ramp(Machine(lambda n: 100.0 / n))
    assert found.workers == 1 and "the 2nd added -50%" in found.verdict


def test_never_saturated():
    """Where each worker brings as much as the first there is an end all the same, with fewer runs an earlier one."""
    assert ramp(Machine(lambda n: 100.0 * n, flops=2e5)).workers == pack.CEILING
    found = ramp(Machine(lambda n: 100.0 * n), runs=5)
    assert found.workers == 5 and "as many as there are runs" in found.verdict


def test_margin():
    """A worker that brings a little less than the margin does not pay, one that brings a little more does."""
    for gain, workers in ((pack.MARGIN - 0.02, 1), (pack.MARGIN + 0.02, 2)):
        assert ramp(Machine(lambda n, gain=gain: 100.0 * (1 + gain * (n > 1)))).workers == workers


def test_several_gpus():
    """On two GPUs two workers are added at a time, and what counts is the speed of all."""
    found = ramp(Machine(lambda n: 100.0 * min(n, 6)), gpus=2)
    assert found.workers == 3 and found.rates == pytest.approx([200, 400, 600, 600], rel=0.02)
    assert ramp(Machine(lambda n: 100.0 * n), gpus=2, runs=7).workers == 3


@pytest.mark.parametrize("seconds, start", [(15, 2.0), (40, 15.0)])
def test_short_runs(seconds, start):
    """Runs that end within the window, whose successors take long to start, leave the rates as they are: only what is
    done while all workers train counts."""
    found = ramp(Machine(lambda n: 100.0 * min(n, 2), flops=100.0 * seconds, start=start))
    assert found.workers == 2 and found.rates == pytest.approx([100, 200, 200], rel=0.05)


def test_run_that_ends(monkeypatch):
    """By hand: of two runs one ends, and what takes its place counts from its first line on. All together do 30 FLOP/s
    for 2 seconds, and 80 for one; what is between is left out."""
    monkeypatch.setattr(pack, "SECONDS", 3)
    monkeypatch.setattr(pack, "LINES", 1)
    window = pack.Window(2)
    lines = [
        (0, {"a": 0, "b": 0}),
        (1, {"a": 10, "b": 0}),
        (2, {"a": 20, "b": 40}),  # from here on both train
        (3, {"a": 30, "b": 60}),
        (4, {"a": 40, "b": 80}),  # a 10, b 20 a second
        (5, {"a": 50}),
        (6, {"a": 600, "c": 0}),
        (9, {"a": 610, "c": 900}),
    ]  # from here on both train
    for now, done in lines:
        assert window.look(now, done) is None
    assert window.look(10, {"a": 620, "c": 970}) == pytest.approx((2 * 30 + 1 * 80) / 3)


def test_unlike_runs():
    """Two runs of different speed, one of which seldom adds a line, do what both do."""
    window, rate, now = pack.Window(2), None, 0.0
    while rate is None:
        now += 0.5
        rate = window.look(now, {"slow": 20.0 * (now // 20 * 20), "fast": 500.0 * now})
    assert rate == pytest.approx(520) and now < 200


def test_not_yet_training():
    """Nothing counts before every worker's run has added a line of its own: not the part that an earlier sweep had done
    of a run, nor a log that is cut back to a checkpoint."""
    assert ramp(Machine(lambda n: 100.0 * min(n, 2), done=5e4)).rates == pytest.approx([100, 200, 200], rel=0.02)
    window = pack.Window(2)
    for now in range(1000):
        assert window.look(now, {"a": now, "b": 50.0 - (now > 500)}) is None
    assert not any(run.spans for run in window.runs.values())
    assert window.look(1000, {"a": 1000, "b": 50.0}) is None and window.since == 1000


def test_long_lines():
    """Where a run adds a line a minute the window waits for some of each, so that its rate is right."""
    found = ramp(Machine(lambda n: 100.0 * min(n, 2), flops=200 * 6e3), minutes=60)
    assert found.workers == 2 and found.rates == pytest.approx([100, 200, 200], rel=0.02)


def test_memory():
    """Where memory ends the ramp, the last worker is taken back, and the verdict says why."""
    found = pack.Ramp()
    found.workers = 4
    found.full()
    assert found.workers == 3 and found.verdict == "3 workers a GPU: the memory did not suffice for 4"
    found = pack.Ramp()
    found.full()
    assert found.workers == 1


# ---------------------------------------------------------------------------------------------------------------------
# The crew


class Slots:
    """A schedule that notes which slots are opened, with a first worker that says what it runs on."""

    def __init__(self, kind: str, gpus: int):
        self.opened, self.closed, self.cells, self.slots, self.lonely = [], 0, range(40), 0, set()
        self.first = SimpleNamespace(hello={"device": kind, "gpus": gpus}, close=self.close)
        self.first_worker, self.is_open = lambda device: self.first, lambda cell: True

    def close(self) -> None:
        self.closed += 1

    def open_slot(self, *of) -> None:
        self.slots += 1
        self.opened.append(of)


@pytest.mark.parametrize("device, gpus, asked, visible", [
    ("auto", 1, 4, [0, 0, 0, 0]), ("cuda", 2, 4, [0, 1, 0, 1]), ("cuda:1", 2, 4, [0, 0, 0, 0]),
    ("auto", 1, None, [0]), ("cuda", 2, None, [0, 1]), ("cuda:1", 2, None, [0]),
])  # fmt: skip
def test_workers_of_gpus(device, gpus, asked, visible):
    """As many workers as asked for, or one a GPU to begin with. Several GPUs are given out in turn, to workers of their
    own; where there is but one, or one was named, the first worker is used too and sees what the sweep sees."""
    slots = Slots("cuda", gpus)
    crew = pack.Crew(slots, device, asked, lambda _: None)
    shared = max(visible) > 0
    assert [number % of_gpus if of_gpus else 0 for number, _, of_gpus, _ in slots.opened] == visible
    assert [worker is slots.first for *_, worker in slots.opened] == [not shared, *(len(visible) - 1) * [False]]
    assert slots.closed == shared and (crew.ramp is None) == bool(asked)


@pytest.mark.parametrize("kind, number", [("cpu", pack.cores()), ("mps", 1)])
def test_workers_elsewhere(kind, number):
    """A worker a core on a CPU, one on mps, without any measurement."""
    slots = Slots(kind, 0)
    crew = pack.Crew(slots, "auto", None, lambda _: None)
    crew.look(0.0)
    assert len(slots.opened) == number and crew.ramp is None


def test_memory_ends_the_ramp():
    """A worker that could not begin, or a run that lacked memory, ends the adding of workers; slots beyond are told."""
    for trouble in ("slot", "run"):
        slots, said = Slots("cuda", 1), []
        crew = pack.Crew(slots, "cuda", None, said.append)
        crew.ramp.workers, slots.done_by_running = 2, dict
        crew.look(0.0)
        assert len(slots.opened) == 2 and crew.ramp
        if trouble == "slot":
            slots.slots -= 1
        else:
            slots.lonely.add("a")
        crew.look(1.0)
        assert crew.ramp is None and slots.most == 1 and "the memory did not suffice for 2" in said[-1]


# ---------------------------------------------------------------------------------------------------------------------
# The schedule, with workers that only answer


class Book:
    """Ends of runs as they are told; there are no trunks."""

    folder = None

    def __init__(self):
        self.finished = set()

    def look(self, cell, facts):
        return schedule.End(row={"loss": 1.0}) if cell.name in self.finished else None

    def strand(self, cells, ends):
        pass

    def failed(self, cell, reason):
        return schedule.End(reason=reason)


@pytest.fixture
def answers(monkeypatch):
    """`answers(size, memory)`: a schedule of runs that need so much memory each, on a GPU with so much; what each does
    beside the others, and which of them ran when."""
    monkeypatch.setattr(schedule, "job", lambda cell, folder: cell)

    def begin(sizes: dict[str, int], memory: int, starts: int = 100):
        used, lock, order, workers, book = {}, threading.Lock(), [], [], Book()

        class Fake:
            def __init__(self, number, *_):
                self.number = number
                workers.append(self)

            def greet(self):
                if len(workers) > starts:
                    raise WorkerDied(2)

            def do(self, cell):
                with lock:
                    fits = sum(used.values()) + cell.size <= memory
                    used[cell.name] = cell.size if fits else 0
                    order.append((cell.name, [name for name in used if name != cell.name]))
                time.sleep(0.1)
                with lock:
                    del used[cell.name]
                    book.finished |= {cell.name} if fits else set()
                return {"end": "finished"} if fits else {"end": "full", "reason": "out of memory"}

            def close(self):
                pass

            wait = close

        monkeypatch.setattr(schedule, "Worker", Fake)
        log = SimpleNamespace(name="workers.log")
        found = schedule.Schedule(book, {}, lambda cell: -ord(cell.name), log)
        found.add([SimpleNamespace(name=name, size=size, trunk=None, is_trunk=False) for name, size in sizes.items()])
        for number in range(3):
            found.open_slot(number, "cuda", 0)
        for thread in found.threads:
            while thread.is_alive() and not found.done and not found.error:
                time.sleep(0.01)
        found.stop()
        return found, order

    return begin


def test_no_run_is_lost_for_memory(answers):
    """A run that finds the GPU full is tried again by itself, after the others, and fails only if it does not fit then
    either."""
    found, order = answers({"a": 5, "b": 3, "c": 9, "d": 3, "e": 11}, memory=10)
    assert not found.error and {name for name, end in found.ends.items() if end.reason} == {"e"}
    assert found.ends["e"].reason == "out of memory"
    alone = [(name, beside) for name, beside in order if name in ("c", "e")][-2:]
    assert sorted(alone) == [("c", []), ("e", [])]


def test_no_room_for_a_worker(answers):
    """A worker that cannot begin beside others is done without, its run goes to another; if none can, that is said."""
    found, _ = answers({"a": 1, "b": 1, "c": 1, "d": 1}, memory=10, starts=1)
    assert not found.error and len(found.ends) == 4 and not any(end.reason for end in found.ends.values())
    assert found.slots == 1
    found, _ = answers({"a": 1, "b": 1}, memory=10, starts=0)
    assert "a worker ended before it began" in str(found.error)


# ---------------------------------------------------------------------------------------------------------------------
# In a sweep


def test_a_sweep_measures(text, cache, tmp_path, monkeypatch, capsys):
    """The real sweep with its real workers on a CPU, made to measure: it starts with one, adds one, and says what it
    found; all runs are there, the same as without."""
    monkeypatch.setattr(pack, "MEASURED", ("cpu",))
    monkeypatch.setattr(pack, "SECONDS", 0.3)
    monkeypatch.setattr(pack, "LINES", 1)
    monkeypatch.setattr(pack, "CEILING", 2)
    table = {"kind": "grid", "data": [str(text)], "val_bytes": 4096, "cache": str(cache), "seq_len": 32,
             # long enough that the second run is still there when a second worker has started
             "budgets": [6e9, 6.1e9, 6.2e9], "models": ["16x1"], "batch_tokens": 64, "device": "cpu",
             "dtype": "float32"}  # fmt: skip
    sweeps = Sweeps(tmp_path / "sweep", table)
    options = sweep.SweepOptions(str(sweeps.file), out=str(tmp_path / "sweep" / "out"), results="none")
    assert sweep.run(options) == 0
    said = capsys.readouterr().out
    assert "1 workers on cpu, more as long as they pay" in said and " a GPU: the " in said
    assert len({line.split(":")[0] for line in sweeps.log().splitlines() if line.startswith("worker ")}) == 2
    assert [row["status"] for row in sweeps.rows()] == 3 * ["finished"]
