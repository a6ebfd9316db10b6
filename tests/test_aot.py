"""The ahead-of-time gate: what it reads from machine code, what it refuses, and that the shipped kernels pass."""

import dataclasses

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed (it has no build for this platform)")

import triton.language as tl  # noqa: E402

from bench import aot  # noqa: E402
from nanochin.config import UserError  # noqa: E402

try:
    aot.tool()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

CLEAN = aot.Report("attention", "forward bf16 D64 T>64", 90, 8, 128, 0, 65 * 1024, "HGMMA", False, True)


@triton.jit
def normalise(x, y, SIZE: tl.constexpr):
    """Needs all SIZE numbers at once: SIZE / (32 warps) registers a thread."""
    i = tl.arange(0, SIZE)
    tile = tl.load(x + i)
    tl.store(y + i, tile / tl.sum(tile, 0))


@triton.jit
def multiply(x, y, SIZE: tl.constexpr):
    """y = x x, SIZE x SIZE, on tensor cores."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tile = tl.load(x + at)
    tl.store(y + at, tl.dot(tile, tile).to(tl.float16))


@pytest.mark.parametrize("capability", [80, 90])
def test_it_sees_registers_spill(capability):
    """512 numbers a thread cannot fit 255 registers; 32 can, which are counted."""
    reports = [
        aot.compile_and_read(aot.Build("test", "normalise", normalise, {"x": "*fp32", "y": "*fp32"}, {"SIZE": 16384},
                                       num_warps=warps, num_stages=1), capability)
        for warps in (1, 16)
    ]  # fmt: skip
    assert reports[0].spills > 200
    assert reports[1].spills == 0 and 32 < reports[1].registers < 128
    assert [len(aot.violations([report], {})) for report in reports] == [1, 0]


@pytest.mark.parametrize("capability, mma", [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_it_names_the_matrix_instructions(capability, mma):
    """A product of 128 x 128 is mma on sm_80, wgmma on sm_90 and tcgen05 on sm_100, with operands in shared memory."""
    build = aot.Build("test", "multiply", multiply, {"x": "*fp16", "y": "*fp16"}, {"SIZE": 128}, 4, 1)
    report = aot.compile_and_read(build, capability)
    assert report.mma == mma and 32 * 1024 <= report.shared < 128 * 1024


@pytest.mark.parametrize(
    "change, words",
    [
        ({"spills": 1}, "1 local loads and stores"),
        ({"shared": 228 * 1024}, "228 KiB of shared memory, the limit is 227"),
        ({"mma": "HMMA"}, "no HGMMA"),
        ({"serialised": True}, "serialises wgmma"),
        ({"registers": 145}, "145 registers, 128 in"),
        ({"registers": 111}, "111 registers, 128 in"),
    ],
)
def test_what_it_refuses(change, words):
    """Each violation is one line that names the configuration; what is as committed has none."""
    committed = {CLEAN.name: 128}
    assert aot.violations([CLEAN], committed) == []
    (line,) = aot.violations([CLEAN, dataclasses.replace(CLEAN, **change)], committed)
    assert line.startswith("sm_90 attention forward bf16 D64 T>64: ") and words in line


def test_spills_on_blackwell_are_only_reported():
    """sm_100 has been compiled for, never tuned."""
    assert aot.violations([dataclasses.replace(CLEAN, capability=100, mma="UTCHMMA", spills=9)], {}) == []


def test_the_table_is_read_back():
    """Registers by configuration, for the version of triton that made the table alone."""
    text = aot.table([CLEAN, dataclasses.replace(CLEAN, capability=80, registers=200)], "3.7.1")
    names = {"sm_90 attention forward bf16 D64 T>64": 128, "sm_80 attention forward bf16 D64 T>64": 200}
    assert aot.committed_registers(text, "3.7.1") == names
    assert aot.committed_registers(text, "3.7.10") == aot.committed_registers("", "3.7.1") == {}


def test_the_committed_table_has_every_shipped_configuration(command):
    """No more and no fewer rows than there are configurations."""
    names = "(f'sm_{c} {b.module} {b.label}' for b in aot.builds() for c in b.capabilities)"
    code = f"from bench import aot; print(*{names}, sep=chr(10))"  # elsewhere: here kernels may be interpreted
    shipped = command("-c", code).stdout.splitlines()
    assert len(set(shipped)) == len(shipped) > 100
    rows = [line.split(" | ") for line in aot.TABLE.read_text().splitlines() if line.startswith("| sm_")]
    assert {" ".join(row[:3]).removeprefix("| ") for row in rows} == set(shipped)


def test_the_gate(command):
    """The most used configurations compile and keep what the committed table claims."""
    done = command("-m", "bench.aot", "--gate")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1].split()[0]) >= 24 and done.stdout.endswith(" 0 violations\n")
