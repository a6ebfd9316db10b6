"""The device of a run: its compute dtype, its peak FLOP/s, and whether a model fits in its memory."""

import ctypes
import functools
import os
import sys
import time

import torch

from nanochin.base.cli import RunError, UserError
from nanochin.base.console import count
from nanochin.config import Shape
from nanochin.plan import devices


def pick_device(name: str) -> torch.device:
    """`auto` is the first available of cuda, mps, cpu. Raises UserError for a device that is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"`device` {name}: not available here ({str(error).splitlines()[0]})") from None
    if device.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"`device` {name}: choose from cuda, mps, cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # set_device needs an index
    return device


def keep_freed_memory() -> None:
    """Make glibc (Linux) keep freed memory instead of returning it to the system: PyTorch frees all activations of a
    step, and faulting in and zeroing new pages costs 5% to 25% of the time on a CPU (LOG.md)."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "gnu_get_libc_version"):
        m_trim_threshold, m_mmap_threshold = -1, -3  # from malloc.h
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def pick_dtype(name: str, device: torch.device, shape: Shape) -> tuple[torch.dtype, str]:
    """(compute dtype, why)."""
    if name != "auto":
        return getattr(torch, name), "as requested"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bf16 tensor cores; weights and sums stay float32"
        return torch.float32, "this GPU has no bf16"
    # Without AMX or AVX512-bf16 a CPU emulates bf16, about 200x slower than float32 (LOG.md).
    if device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        # From width 384 bf16 was 2.1x as fast as float32 with AMX, at 128 between 1.0x and 1.3x (LOG.md).
        if shape.width >= 384:
            return torch.bfloat16, "the CPU has AMX or AVX512-bf16 and the model is at least 384 wide"
        return torch.float32, "bf16 is faster on this CPU only from width 384"
    return torch.float32, f"no fast bf16 on this {device.type.upper()}"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def peak_of(device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """(peak FLOP/s or None, source). GPUs: the table in plan/devices.py. CPU: measured with a short matrix product."""
    if device.type == "cpu":
        own = torch.Generator().manual_seed(0)  # the global one is saved with each checkpoint
        a = torch.randn(768, 768, generator=own).to(dtype)
        seconds = []
        while sum(seconds) < 0.2:  # the fastest of several: other programs only slow them down
            start = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - start)
        peak = 2 * 768**3 / min(seconds)
        return peak, f"MFU is against {count(peak)}FLOP/s, a matrix product measured just now"
    name = device_name(device)
    peak = devices.peak_flops(name, str(dtype).split(".")[1])
    return peak, f"MFU is against {count(peak)}FLOP/s, dense" if peak else f"no MFU: the peak of {name} is not known"


def check_memory(params: int, device: torch.device) -> None:
    """Raises RunError (which a sweep records as a failed run) if weights, gradients and two moments in float32, 16
    bytes per parameter, cannot fit."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return  # unknown on this system
    if 16 * params > memory:
        raise RunError(
            f"a model of {count(params)} parameters needs {count(16 * params)}B with its optimizer, "
            f"{device} has {count(memory)}B: choose a smaller `model` or `budget`"
        )
