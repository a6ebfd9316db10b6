"""Who computes: the team that shares out a batch."""

import threading
import time

import pytest
import torch

from nanochin.device import Team

CPU = torch.device("cpu")


@pytest.mark.parametrize("tokens, size", [(0, 1), (511, 1), (1023, 1), (1024, 2), (1536, 3), (2047, 3), (10**6, 4)])
def test_a_share_is_at_least_512_tokens(tokens, size, four_threads):
    """As many members as the batch has shares for, and no more than there are threads."""
    assert Team(CPU, tokens).size == size
    assert Team(torch.device("cuda"), tokens).size == 1


def test_members_divide_the_threads(four_threads):
    """Two members of four threads use two each in their operations; ours keep all four."""
    team = Team(CPU, 1024)
    meet = threading.Barrier(2)  # each member takes one

    def threads(_):
        meet.wait(10)
        return threading.get_ident(), torch.get_num_threads()

    seen = dict(team.map(threads, range(2)))
    assert list(seen.values()) == [2, 2] and threading.get_ident() not in seen
    assert torch.get_num_threads() == 4


def test_results_come_in_order(four_threads):
    """The results are in the order of the shares, whoever is ready first, and an error is raised here."""
    team = Team(CPU, 4096)
    assert list(team.map(lambda i: time.sleep(0.05 * (3 - i)) or i, range(4))) == [0, 1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        list(team.map(lambda i: 1 / (2 - i), range(4)))


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
