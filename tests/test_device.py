"""Who computes: the device of a run, and the team that shares out a batch."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

import train
from nanochin.config import RunError
from nanochin.console import Progress
from nanochin.device import Team, check_memory, share_out


@pytest.mark.parametrize("name, index", [("auto", 3), ("cuda", 3), ("cuda:1", 1)])
def test_a_run_on_a_gpu_is_resolved(tiny, monkeypatch, name, index):
    """With torch.cuda pretended, all that is decided before the first step: the GPU has its number, which
    torch.cuda.set_device insists on, and is the current one by default; bf16, by graph, and named in the record."""
    chosen, zeros = [], torch.zeros
    pretended = {
        "is_available": lambda: True, "current_device": lambda: 3, "get_device_capability": lambda _=None: (9, 0),
        "is_bf16_supported": lambda **_: True, "get_device_name": lambda device: f"a GPU {device}",
        "get_device_properties": lambda _: SimpleNamespace(total_memory=80e9),
    }  # fmt: skip
    for key, value in pretended.items():
        monkeypatch.setattr(torch.cuda, key, value)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **more: zeros(*size, **more))
    job = train.resolve(tiny(device=name, dtype="auto"), Progress(quiet=True))
    assert job.device == torch.device("cuda", index) and chosen == [index]
    assert (job.dtype, job.step) == (torch.bfloat16, "graph")
    record = train.describe(job)
    assert record["device"] == f"a GPU cuda:{index}" and record["identity"]["device"] == "cuda"


SHARES = [
    # threads, sequences, seq_len, width: members, threads of each
    (
        2,
        4,
        128,
        24,
        (1, 1),
    ),  # measured on two cores: 12.2 ms a step, with two members 16.7, with two threads inside 32.6
    (2, 4, 128, 64, (2, 1)),  # 17.4 ms; with one thread 20.7
    (2, 5, 256, 96, (2, 1)),  # 52 ms; with one thread 84, with two inside 90
    (2, 1, 1024, 256, (1, 2)),  # one sequence cannot be shared out
    (8, 2, 512, 256, (2, 1)),  # six threads too many
    (8, 16, 2048, 768, (8, 1)),
    (64, 2, 1024, 768, (2, 6)),
    (8, 0, 128, 64, (1, 1)),
]


@pytest.mark.parametrize("threads, sequences, seq_len, width, expected", SHARES)
def test_threads_are_used_where_they_pay(threads, sequences, seq_len, width, expected):
    """A share for as many threads as there are sequences and work for; inside operations only where these are large."""
    assert share_out(threads, sequences, seq_len, width) == expected


def test_members_have_threads_of_their_own(four_threads):
    """Two members use two threads each in their operations, as ours does within the block; then it has four again."""
    team = Team(2, 2)
    meet = threading.Barrier(2)  # each member takes one

    def threads(_):
        meet.wait(10)
        return threading.get_ident(), torch.get_num_threads()

    assert torch.get_num_threads() == 4
    with team:
        seen = dict(team.map(threads, range(2)))
        assert list(seen.values()) == [2, 2] and threading.get_ident() not in seen
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 4
    assert set(dict(team.map(threads, range(2))).values()) == {2}


def test_threads_stay_as_they_are_where_nothing_is_said(four_threads):
    """A team of one, as on a GPU, computes on our own thread with as many threads as it had."""
    with Team(), pytest.raises(ZeroDivisionError):
        assert list(Team().map(lambda _: (threading.get_ident(), torch.get_num_threads()), [0])) == [
            (threading.get_ident(), 4)
        ]
        raise ZeroDivisionError
    assert torch.get_num_threads() == 4


def test_results_come_in_order(four_threads):
    """The results are in the order of the shares, whoever is ready first, and an error is raised here."""
    team = Team(4)
    assert list(team.map(lambda i: time.sleep(0.05 * (3 - i)) or i, range(4))) == [0, 1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        list(team.map(lambda i: 1 / (2 - i), range(4)))


def test_a_model_that_cannot_fit():
    """A trillion parameters need 16 TB: refused as something that ends this run, not a sweep; a million fit."""
    with pytest.raises(RunError, match="1T parameters needs 16TB .* choose a smaller") as error:
        check_memory(10**12, torch.device("cpu"))
    assert error.value.code == 1
    check_memory(10**6, torch.device("cpu"))


def test_kept_memory_is_not_faulted_in_again(command):
    """After `keep_freed_memory` a large tensor that is made again soon costs (almost) no page fault, on Linux with
    glibc: once the heap has a hole of its size, whose place is left to chance."""
    pytest.importorskip("resource", reason="this platform does not count page faults")
    code = """
import ctypes, resource, sys, torch
from nanochin.device import keep_freed_memory
if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"): sys.exit(77)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4): torch.ones(2**24)  # 64 MiB: 16384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults(); keep_freed_memory(); print(first, min(faults() for _ in range(6)))
"""
    done = command("-c", code)
    if done.returncode == 77:
        pytest.skip("this is not glibc")
    first, after = map(int, done.stdout.split())
    assert first > 10 * after
