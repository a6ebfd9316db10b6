"""The device of a run: which one, what fits its memory."""

from types import SimpleNamespace

import pytest
import torch

import train
from nanochin.base.cli import RunError
from nanochin.base.console import Progress
from nanochin.run.device import check_memory
from nanochin.run.record import describe


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
    record = describe(job)
    assert record["device"] == f"a GPU cuda:{index}" and record["identity"]["device"] == "cuda"


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
from nanochin.run.device import keep_freed_memory
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
