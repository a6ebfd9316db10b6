"""The device of a run: the choice, and what fits in its memory."""

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
    """With a mock torch.cuda, everything decided before the first step: the device has an index (set_device needs it),
    the current one by default; the dtype is bf16 and the step a graph; the record names the GPU."""
    chosen, zeros = [], torch.zeros
    mock = {
        "is_available": lambda: True, "current_device": lambda: 3, "get_device_capability": lambda _=None: (9, 0),
        "is_bf16_supported": lambda **_: True, "get_device_name": lambda device: f"a GPU {device}",
        "get_device_properties": lambda _: SimpleNamespace(total_memory=80e9),
    }  # fmt: skip
    for key, value in mock.items():
        monkeypatch.setattr(torch.cuda, key, value)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **more: zeros(*size, **more))
    setup = train.resolve(tiny(device=name, dtype="auto"), Progress(quiet=True))
    assert setup.device == torch.device("cuda", index) and chosen == [index]
    assert (setup.dtype, setup.step) == (torch.bfloat16, "graph")
    record = describe(setup)
    assert record["device"] == f"a GPU cuda:{index}" and record["identity"]["device"] == "cuda"


def test_model_too_large():
    """A trillion parameters need 16 TB: RunError, which ends this run and not a sweep; a million fit."""
    with pytest.raises(RunError, match="1T parameters needs 16TB") as error:
        check_memory(10**12, torch.device("cpu"))
    assert error.value.code == 1
    check_memory(10**6, torch.device("cpu"))


def test_freed_memory_is_kept(command):
    """After `keep_freed_memory`, allocating a large tensor again costs almost no page faults (Linux with glibc), once
    the heap has a hole of its size."""
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
