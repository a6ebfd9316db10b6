"""How many runs at once: a worker a core on a CPU, and as many as pay on a GPU, which one tiny model leaves idle.

Nobody knows beforehand what pays: it depends on the models, the GPU, and the cores that feed it. So a sweep starts with
one worker a GPU and adds one at a time, as long as the FLOP/s of all together rise by MARGIN; the first that does not
pay ends after its run. That takes some minutes of training, none of which is lost.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

from nanochin.schedule import Schedule

MEASURED = ("cuda",)  # kinds of device that may hold several workers
MARGIN = 0.05  # of all FLOP/s that one more worker a GPU must add; less is hardly above the noise of a window
CEILING = 16  # workers a GPU
SECONDS = 30.0  # of training that each worker is watched, at least
LINES = 5  # that each run adds to its log meanwhile, at least


@dataclass
class Watched:
    """A run while we look: its last log line, and what lies between those of its lines that count."""

    when: float  # the last line was seen
    flops: float  # that it told
    lines: int = 0  # since it began
    spans: int = 0  # from line to line
    work: float = 0.0  # FLOPs in them
    time: float = 0.0  # seconds of them
    present: float = 0.0  # seconds in which it trained as one of all


class Window:
    """Measures the FLOP/s of `workers` runs together.

    A log tells how far a run is only when a line is added, so the speed of a run is that from line to line, and only
    while every worker trains: neither start-up, nor a run's end, nor a log that a resumed run cuts, is work or time.
    The speed of all is the mean over runs that came and went, by the time that each was there, times `workers`.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self.runs: dict[str, Watched] = {}
        self.since = math.inf  # every worker trains
        self.last = 0.0  # look

    def look(self, now: float, done: dict[str, float]) -> float | None:
        """`done`: FLOPs of each run in progress, by its log. The FLOP/s of all, once that is known well enough."""
        for name, flops in done.items():
            run = self.runs.setdefault(name, Watched(now, flops))
            if flops > run.flops:
                run.lines += 1
                if run.when >= self.since:
                    run.spans += 1
                    run.work += flops - run.flops
                    run.time += now - run.when
            elif flops < run.flops:
                run.lines = 0
            if flops != run.flops:
                run.when, run.flops = now, flops
        for name in self.runs.keys() - done.keys():
            self.runs[name].lines = 0

        running = [self.runs[name] for name in done]
        if len(running) < self.workers or not all(run.lines for run in running):
            self.since = math.inf
        elif self.since == math.inf:
            self.since = now
        else:
            for run in running:
                run.present += now - self.last
        self.last = now

        known = [run for run in self.runs.values() if run.spans]
        there = sum(run.present for run in known)
        if there < SECONDS * self.workers or any(run.spans < LINES for run in running):
            return None
        return self.workers * sum(run.present * run.work / run.time for run in known) / there


class Ramp:
    """How many workers a GPU should have: one more as long as the last one paid.

    Runs differ in size, so a gain is that of the worker and of what it happened to train; MARGIN is wide for that."""

    def __init__(self, gpus: int = 1):
        self.gpus = gpus
        self.workers = 1  # a GPU, as they should be now
        self.rates: list[float] = []  # FLOP/s with 1, 2, ... workers a GPU
        self.verdict = ""  # what was found in the end, in words
        self.window = Window(gpus)

    def look(self, now: float, done: dict[str, float], runs: int) -> None:
        """Called again and again, until there is a verdict. `done` as in Window; `runs` are still to be ended."""
        rate = self.window.look(now, done)
        if self.verdict or rate is None:
            return
        self.rates.append(rate)
        n = len(self.rates)
        gain = rate / self.rates[-2] - 1 if n > 1 else math.inf
        if gain < MARGIN:
            self._settle(n - 1, f"the {_ordinal(n)} added {gain:.0%}")
        elif n == CEILING:
            self._settle(n, "the most that are tried")
        elif (n + 1) * self.gpus > runs:
            self._settle(n, "as many as there are runs")
        else:
            self.workers, self.window = n + 1, Window((n + 1) * self.gpus)

    def full(self) -> None:
        """The memory of a GPU did not suffice for all."""
        if not self.verdict:
            self._settle(max(1, self.workers - 1), f"the memory did not suffice for {self.workers}")

    def _settle(self, workers: int, why: str) -> None:
        rates = ", ".join(f"{rate:.3g}" for rate in self.rates)
        measured = f" ({rates} FLOP/s with 1{f' to {len(self.rates)}' if len(self.rates) > 1 else ''})" if rates else ""
        self.workers, self.verdict = workers, f"{workers} worker{'s' * (workers > 1)} a GPU: {why}{measured}"


class Crew:
    """The workers of a sweep, each in a slot of its schedule."""

    def __init__(self, schedule: Schedule, device: str, workers: int | None, say: Callable[[str], None]):
        """device: as the option of train.py. workers: at once; None: as suits the device. say: shows a line."""
        self.schedule, self.device, self.say, self.slots = schedule, device, say, 0
        say("starting workers")
        first = schedule.first_worker(device)
        kind = first.hello["device"]
        gpus = first.hello["gpus"] if kind == "cuda" and ":" not in device else 1  # cuda:1 is one
        self.gpus = gpus if gpus > 1 else 0  # among which workers are to be shared out
        self.ramp = Ramp(gpus) if kind in MEASURED and workers is None else None
        number = workers or (gpus if self.ramp else {"mps": 1, "cpu": cores()}[kind])
        number = max(1, min(number, self.runs() + 2))  # an extension may come
        more = ", more as long as they pay" if self.ramp else ""
        say(f"{number} workers on {f'{gpus} GPUs' if self.gpus else kind}{more}")
        if self.gpus:  # it has not been told which GPU is its own
            first.close()
        self._open(number, None if self.gpus else first)

    def look(self, now: float) -> None:
        """Measure, and add a worker a GPU if the last one paid; called now and then."""
        if self.ramp is None:
            return
        if self.schedule.slots < self.slots or self.schedule.lonely:
            self.ramp.full()
        else:
            self.ramp.look(now, self.schedule.done_by_running(), self.runs())
        wanted = self.ramp.workers * max(1, self.gpus)
        if wanted > self.slots:
            self._open(wanted - self.slots)
        if self.ramp.verdict:
            self.say(self.ramp.verdict)
            self.schedule.most, self.ramp = wanted, None

    def runs(self) -> int:
        return sum(map(self.schedule.is_open, self.schedule.cells))

    def _open(self, number: int, first=None) -> None:
        for _ in range(number):
            self.schedule.open_slot(self.slots, self.device, self.gpus, first if self.slots == 0 else None)
            self.slots += 1


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ordinal(n: int) -> str:
    return {2: "2nd", 3: "3rd"}.get(n, f"{n}th")
