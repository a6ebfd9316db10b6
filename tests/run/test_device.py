"""The device of a run: the choice, its record, and memory."""

import platform
from types import SimpleNamespace

import pytest
import torch

import train
from nanochin.base.console import Progress
from nanochin.run.record import describe


@pytest.mark.parametrize("name, index", [("auto", 3), ("cuda:1", 1)])
def test_a_run_on_a_gpu_is_resolved(tiny, monkeypatch, name, index):
    """With a mock torch.cuda, everything decided before the first step: the device has an index (set_device needs it),
    the current one by default; the dtype is bf16 and the step a graph; the record has them."""
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
    precision = {"activations": "bfloat16", "weights": "float32", "float32_matmul": "highest"}
    assert record["precision"] == precision | {"bf16_reduced_precision_reduction": True}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_kept(command):
    """After `keep_freed_memory`, allocating a large tensor again costs almost no page faults, once the heap has a hole
    of its size."""
    code = """
import resource, torch
from nanochin.run.device import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4): torch.ones(2**24)  # 64 MiB: 16384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults(); keep_freed_memory(); print(first, min(faults() for _ in range(6)))
"""
    first, after = map(int, command("-c", code).stdout.split())
    assert first > 10 * after
