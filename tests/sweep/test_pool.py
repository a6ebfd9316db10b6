"""nanochin/sweep/pool.py with real workers that train nothing. (test_sweep.py kills whole sweeps.)"""

import os
import signal
import time
from pathlib import Path

import pytest

from nanochin.base.cli import RunError, UserError
from nanochin.base.files import DiskError
from nanochin.config import Config
from nanochin.run.folder import BusyError
from nanochin.sweep import pool
from nanochin.sweep.pool import Pool, Reply

PATIENCE = 60  # seconds until a silent worker is an error


def load_behaviour():
    """What a worker does instead of training: a run's `data` says how it ends, its `out` where to write a file."""
    import torch

    from nanochin.run.step import SequenceTooLarge

    errors = {
        "diverge": RunError("the run diverged"),
        "too large": SequenceTooLarge("one sequence does not fit cuda:0"),
        "full": torch.OutOfMemoryError("CUDA out of memory."),
        "bug": ValueError("some\nbug"),
        "busy": BusyError("another process"),
        "disk": DiskError("cannot write"),
        "option": UserError("--lr 0: must be above 0"),
    }

    def train(config: Config) -> None:
        how = config.data[0]
        if how in errors:
            raise errors[how]
        if how == "environment":
            keys = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
            Path(config.out).write_text(" ".join(os.environ.get(key, "-") for key in keys))
        if how == "exit":
            load_death()
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "long":
            try:
                Path(config.out).write_text("started")
                time.sleep(PATIENCE)
            finally:
                Path(config.out).write_text("saved")

    return train


def load_nothing():
    raise UserError("there is no text")


def load_death():
    os._exit(3)


class DeadlyLoad:
    """A `load` that kills its worker while it starts, so many times."""

    def __init__(self, counter: Path, times: int):
        self.counter, self.times = counter, times

    def __reduce__(self):
        return load_or_die, (self.counter, self.times)


def load_or_die(counter: Path, times: int):
    """In the worker, before it has sent anything: load_behaviour, or death."""
    with open(counter, "a") as file:
        file.write(".")
    if counter.stat().st_size <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return load_behaviour


def run(how: str, out: Path | str = "runs") -> Config:
    return Config(name=how, data=(how,), out=str(out))


def replies(workers: Pool, number: int) -> list[Reply]:
    found, deadline = [], time.monotonic() + PATIENCE
    while len(found) < number:
        assert time.monotonic() < deadline
        found += workers.wait(1)
    return found


@pytest.fixture
def started(tmp_path):
    """`started(size)`: a pool on the CPU."""
    pools = []

    def start(size: int = 1) -> Pool:
        pools.append(Pool(load_behaviour, "cpu", tmp_path / "workers.log", workers=size))
        return pools[-1]

    yield start
    for each in pools:
        each.close()
        assert not any(worker.process.is_alive() for worker in each.workers)


def test_ends(started, tmp_path):
    """A run finishes, fails with a one-line reason (with advice if out of memory), or is busy in another process. A
    full disk and an invalid option are raised, with their exit codes. One worker does all."""
    one, advice = started(), "; with fewer workers each has more memory"
    pid = one.workers[0].process.pid
    for expected in [
        Reply("fine", "finished"),
        Reply("busy", "busy"),
        Reply("diverge", "failed", "the run diverged"),
        Reply("too large", "failed", "one sequence does not fit cuda:0" + advice),
        Reply("full", "failed", "OutOfMemoryError: CUDA out of memory." + advice),
        Reply("bug", "failed", "ValueError: some bug"),
    ]:
        one.submit(run(expected.run))
        assert replies(one, 1) == [expected]
    for how, words, code in (("disk", "cannot write", 1), ("option", "--lr 0", 2)):
        one.submit(run(how))
        with pytest.raises(UserError, match=words) as error:
            replies(one, 1)
        assert error.value.code == code
        one.workers[0].run = None
    assert one.workers[0].process.pid == pid and "raise errors[how]" in (tmp_path / "workers.log").read_text()


def test_workers_that_die(started, tmp_path):
    """A dead worker's run is reported with its exit code, the other run continues, and a new worker takes the next run.
    A worker that dies without a run is replaced silently."""
    two = started(2)
    two.submit(run("long", tmp_path / "long"))
    for how, fate in (("exit", "exit code 3"), ("kill", "signal 9")):
        two.submit(run(how))
        assert replies(two, 1) == [Reply(how, "died", fate)]
    two.submit(run("fine"))
    assert replies(two, 1) == [Reply("fine", "finished")]
    os.kill(two.workers[1].process.pid, signal.SIGKILL)
    two.workers[1].process.join()
    assert two.wait(1) == [] and two.size == 2
    two.submit(run("fine"))
    assert replies(two, 1) == [Reply("fine", "finished")]
    assert (tmp_path / "long").read_text() == "started"
    two.close()
    assert (tmp_path / "long").read_text() == "saved"


@pytest.mark.parametrize(
    "load, device, words",
    [
        (load_behaviour, "cuda:99", "`device` cuda:99"),
        (load_nothing, "cpu", "there is no text"),
        (load_death, "cpu", "exit code 3.*workers.log"),
    ],
)
def test_worker_that_cannot_start(tmp_path, load, device, words):
    """A worker without its device or text reports that error; for one that exits, the error names the log."""
    with pytest.raises(UserError, match=words) as error:
        replies(Pool(load, device, tmp_path / "workers.log", workers=1), 1)
    assert error.type is (RunError if load is load_death else UserError)


@pytest.mark.parametrize("times, expected", [(3, ["finished"]), (4, ["failed", "finished"])])
def test_worker_killed_while_it_starts(tmp_path, times, expected):
    """It is started again, three times at most, with its run; then the run fails with the reason, and the next worker
    takes the next run."""
    counter, one = tmp_path / "starts", Pool.__new__(Pool)
    one.load, one.device, one.log = DeadlyLoad(counter, times), "cpu", tmp_path / "workers.log"
    one.devices = pool.Devices("cpu", 1)
    one.workers = [one._start(0)]
    for status in expected:
        one.submit(run("fine"))
        (reply,) = replies(one, 1)
        assert (reply.run, reply.status) == ("fine", status)
        assert status != "failed" or ("killed 4 times" in reply.reason and "signal 9" in reply.reason)
    assert counter.read_text() == "." * (times + 1)
    one.close()


def test_first_worker_killed_while_it_starts(tmp_path):
    """Without a run that could fail, the error names the signal and the log."""
    with pytest.raises(RunError, match=r"signal 9.*workers.log"):
        Pool(DeadlyLoad(tmp_path / "starts", 99), "cpu", tmp_path / "workers.log")
    assert (tmp_path / "starts").read_text() == "...."


def test_environment(started, tmp_path, monkeypatch):
    """A worker has one thread, however many the sweep has; if the first finds several GPUs, the others see one each.
    The sweep's environment and Ctrl-C handler are unchanged."""
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,6")
    before, on_interrupt = dict(os.environ), signal.getsignal(signal.SIGINT)
    some = started()
    some.devices = pool.Devices("cuda", 2)
    some.workers.append(some._start(1))
    for number in range(2):
        some.submit(run("environment", tmp_path / str(number)))
    replies(some, 2)
    assert [(tmp_path / str(number)).read_text() for number in range(2)] == ["1 1 GPU-a,6", "1 1 6"]
    assert os.environ == before and signal.getsignal(signal.SIGINT) is on_interrupt
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [pool.one_gpu(number, 2) for number in range(3)] == ["0", "1", "0"]


@pytest.mark.parametrize(
    "device, gpus, asked, most, size",
    [
        ("cpu", 1, None, 1000, pool.cores()),
        ("mps", 1, None, 9, 1),
        ("cuda", 4, None, 9, 4),
        ("cuda", 4, None, 3, 3),
        ("cuda", 2, 5, 9, 5),
    ],
)
def test_size(tmp_path, monkeypatch, device, gpus, asked, most, size):
    """One worker per CPU core, one on mps, one per GPU, or as many as asked for; not more than there are runs."""
    monkeypatch.setattr(Pool, "_start", lambda self, number: number)
    monkeypatch.setattr(Pool, "wait", lambda self: setattr(self, "devices", pool.Devices(device, gpus)))
    found = Pool(None, "auto", tmp_path, asked, most)
    assert found.workers == list(range(size))
    assert str(found) == f"{size} workers on {f'{gpus} GPUs' if gpus > 1 else device}"
