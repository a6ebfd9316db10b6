"""The ahead-of-time gate: what it reads from machine code, what it refuses, and that the shipped kernels pass."""

import dataclasses

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed (it has no build for this platform)")

import triton.language as tl  # noqa: E402

from bench import aot  # noqa: E402
from bench.aot_cases import Build  # noqa: E402
from nanochin.base.cli import UserError  # noqa: E402

try:
    aot.cuobjdump()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

CLEAN = aot.Report(
    name="sm_90 attention forward bf16 D64 T>64",
    capability=90,
    warps=8,
    registers=128,
    spills=0,
    shared=65 * 1024,
    mma="HGMMA",
    wanted="HGMMA",
    copies=0,
    tma=True,
    serialised=False,
)


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


@triton.jit
def accumulate(x, y, M, SIZE: tl.constexpr):
    """The sum of x x over M tiles of SIZE x SIZE, whose loads are pipelined."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for i in tl.range(0, M):
        tile = tl.load(x + i * SIZE * SIZE + at)
        total = tl.dot(tile, tile, total)
    tl.store(y + at, total.to(tl.float16))


def compiled(kernel, capability: int, size: int, warps: int, stages: int = 1, dtype: str = "fp16") -> aot.Report:
    config = {"SIZE": size, "num_warps": warps, "num_stages": stages}
    return aot.compile_and_read(Build(capability, kernel, "of a test", config, dtype=dtype))


@pytest.mark.parametrize("capability", [80, 90])
def test_it_sees_registers_spill(capability):
    """512 numbers a thread cannot fit 255 registers; 32 can, which are counted."""
    reports = [compiled(normalise, capability, 16384, warps, dtype="fp32") for warps in (1, 16)]
    assert reports[0].spills > 200
    assert reports[1].spills == 0 and 32 < reports[1].registers < 128
    assert [len(aot.violations([report], {})) for report in reports] == [1, 0]


@pytest.mark.parametrize("capability, mma", [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_it_names_the_matrix_instructions(capability, mma):
    """A product of 128 x 128 is mma on sm_80, wgmma on sm_90 and tcgen05 on sm_100, with operands in shared memory."""
    report = compiled(multiply, capability, 128, 4)
    assert report.mma == mma and 32 * 1024 <= report.shared < 128 * 1024
    assert report.copies == 0


@pytest.mark.parametrize("capability", [80, 90])
def test_it_counts_copies(capability):
    """Pipelined by pointers each thread copies its share of a tile of 8 KiB, 16 bytes at a time: with 128 threads four
    times before the loop for each of two stages, and four times in it."""
    assert compiled(accumulate, capability, 64, 4, stages=3).copies == 12


@pytest.mark.parametrize(
    "change, words",
    [
        ({"spills": 1}, "1 local loads and stores"),
        ({"shared": 228 * 1024}, "228 KiB of shared memory, the limit is 227"),
        ({"mma": "HMMA"}, "no HGMMA"),
        ({"serialised": True}, "serialises wgmma"),
        ({"copies": 2}, "2 LDGSTS although"),
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


@pytest.mark.parametrize("change", [{"serialised": True}, {"spills": 1}, {"copies": 2}])
def test_what_it_refuses_without_a_table(change):
    """A version of triton that has no table is judged just the same, but for registers."""
    assert aot.violations([dataclasses.replace(CLEAN, registers=999)], {}) == []
    assert len(aot.violations([dataclasses.replace(CLEAN, **change)], {})) == 1


@pytest.mark.parametrize("capability", [80, 86, 89, 120])
def test_consumer_cards(capability):
    """They have 99 KiB of shared memory a block and may not spill; cp.async is how they load."""
    card = dataclasses.replace(CLEAN, capability=capability, mma="HMMA", wanted="HMMA", copies=8, tma=False)
    assert aot.violations([card], {}) == []
    assert len(aot.violations([dataclasses.replace(card, shared=100 * 1024)], {})) == 1
    assert len(aot.violations([dataclasses.replace(card, spills=2)], {})) == 1


def test_spills_on_blackwell_are_only_reported():
    """sm_100 has been compiled for, never tuned."""
    assert aot.violations([dataclasses.replace(CLEAN, capability=100, mma="UTCHMMA", wanted="UTC", spills=9)], {}) == []


def test_the_table_is_read_back():
    """Registers by configuration."""
    text = aot.table([CLEAN, dataclasses.replace(CLEAN, name="sm_80 norms", registers=200)], "3.7.1")
    assert aot.registers_of(text) == {CLEAN.name: 128, "sm_80 norms": 200} and aot.registers_of("") == {}


def test_the_committed_tables_have_every_shipped_configuration(command):
    """No more and no fewer rows than there are configurations, for both versions of triton."""
    code = "from bench.aot import builds; print(*(build.name for build in builds()), sep=chr(10))"
    shipped = command("-c", code).stdout.splitlines()  # in a process of its own: here kernels may be interpreted
    assert len(set(shipped)) == len(shipped) > 100
    for version in ("3.6.0", "3.7.1"):
        text = (aot.RESULTS / f"kernels_aot_{version}.md").read_text()
        assert f"Triton {version}:" in text and set(aot.registers_of(text)) == set(shipped)


def test_the_gate(command):
    """The most used configurations compile and keep what the committed table claims."""
    done = command("-m", "bench.aot", "--gate")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1].split()[0]) >= 60 and done.stdout.endswith(" 0 violations\n")
