"""Token files for tests, by the documented formats of their trainers."""

import struct
from functools import partial
from pathlib import Path

import numpy as np


def nanogpt(path: Path, ids) -> Path:
    """karpathy/nanoGPT data/openwebtext/prepare.py: uint16, nothing else."""
    path.write_bytes(np.asarray(ids).astype("<u2").tobytes())
    return path


def llm_c(path: Path, ids, magic=20240520, version=1, kind="<u2", count=None, size=None) -> Path:
    """karpathy/llm.c dev/data/data_common.py: 256 int32, the first three magic, version, number of tokens. `size`
    truncates the file."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes((header.tobytes() + np.asarray(ids).astype(kind).tobytes())[:size])
    return path


def megatron(path: Path, ids, code: int = 8, modes: bool = False, size=None, **change) -> Path:
    """NVIDIA/Megatron-LM megatron/core/datasets/indexed_dataset.py: the pair .bin, .idx of sequences; `change` corrupts
    a field of the .idx, `size` truncates the .bin."""
    kind = np.dtype({1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8"}.get(code, "<u2"))
    edges = [0, len(ids) // 10, len(ids) // 2, len(ids) * 7 // 10, len(ids)]
    lengths = np.diff(edges).astype("<i4")
    fields = {
        "magic": b"MMIDIDX\0\0",
        "version": struct.pack("<Q", 1),
        "code": struct.pack("<B", code),
        "counts": struct.pack("<QQ", len(lengths), len(lengths) + 1),  # of sequences, of document bounds
        "lengths": lengths.tobytes(),
        "offsets": (np.array(edges[:-1]) * kind.itemsize).astype("<i8").tobytes(),
        "bounds": np.arange(len(lengths) + 1).astype("<i8").tobytes(),
        "modes": bytes(len(lengths)) if modes else b"",
    }
    path.write_bytes(np.asarray(ids).astype(kind).tobytes()[:size])
    path.with_suffix(".idx").write_bytes(b"".join((fields | change).values()))
    return path


WRITERS = {
    "nanoGPT": nanogpt,
    "llm.c": llm_c,
    "Llama 3": partial(llm_c, magic=20240801, version=7, kind="<u4"),
    "Megatron": megatron,
}
