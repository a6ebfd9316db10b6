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


def compiled(kernel, capability: int, size: int, warps: int, dtype: str = "fp16") -> aot.Report:
    config = {"SIZE": size, "num_warps": warps}
    return aot.compile_and_read(Build(capability, kernel, "of a test", config, dtype=dtype))


@pytest.mark.parametrize("capability", [80, 90])
def test_it_sees_registers_spill(capability):
    """256 numbers a thread cannot fit 255 registers; 32 can, which are counted."""
    reports = [compiled(normalise, capability, 8192, warps, dtype="fp32") for warps in (1, 8)]
    assert reports[0].spills > 0 and reports[0].registers == 255
    assert reports[1].spills == 0 and 32 < reports[1].registers < 128
    assert [len(aot.violations([report], {})) for report in reports] == [1, 0]


@pytest.mark.parametrize("capability, mma", [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_it_names_the_matrix_instructions(capability, mma):
    """A product of 128 x 128 is mma on sm_80, wgmma on sm_90 and tcgen05 on sm_100, with operands in shared memory."""
    report = compiled(multiply, capability, 128, 4)
    assert report.mma == mma and 32 * 1024 <= report.shared < 128 * 1024
    assert report.copies == 0


CARD = {"mma": "HMMA", "wanted": "HMMA", "copies": 8, "tma": False}  # cp.async is how these load


@pytest.mark.parametrize(
    "change, words",
    [
        ({"spills": 1}, "1 local loads and stores"),
        ({"shared": 228 * 1024}, "228 KiB of shared memory, the limit is 227"),
        ({"mma": "HMMA"}, "no HGMMA"),
        ({"serialised": True}, "serialises wgmma"),
        ({"copies": 2}, "2 LDGSTS"),
        ({"registers": 145}, "145 registers, 128 in"),
        ({"registers": 111}, "111 registers, 128 in"),
        ({"registers": 144}, None),
        ({"name": "not in the table", "registers": 999}, None),
        ({"capability": 100, "mma": "UTCHMMA", "wanted": "UTC", "spills": 9}, None),  # never tuned
        (CARD | {"capability": 80}, None),
        *((CARD | {"capability": consumer, "shared": 100 * 1024}, "limit is 99") for consumer in (80, 86, 89, 120)),
        (CARD | {"capability": 120, "spills": 2}, "2 local"),
    ],
    ids=str,
)
def test_what_it_refuses(change, words):
    """Each violation is one line that names the configuration; what is as committed has none."""
    report, committed = dataclasses.replace(CLEAN, **change), aot.registers_of(aot.table([CLEAN], "3.7.1"))
    assert committed == {CLEAN.name: 128} and aot.violations([CLEAN], committed) == []
    found = aot.violations([CLEAN, report], committed)
    assert len(found) == (words is not None)
    assert all(line.startswith(f"{CLEAN.name}: ") and words in line for line in found)


def test_the_committed_tables_have_every_shipped_configuration(command):
    """No more and no fewer rows than there are configurations, for both versions of triton."""
    code = "from bench.aot import builds; print(*(build.name for build in builds()), sep=chr(10))"
    shipped = command("-c", code).stdout.splitlines()  # in a process of its own: here kernels may be interpreted
    assert len(set(shipped)) == len(shipped) > 100
    for version in ("3.6.0", "3.7.1"):
        text = (aot.RESULTS / f"kernels_aot_{version}.md").read_text()
        assert f"Triton {version}:" in text and set(aot.registers_of(text)) == set(shipped)


@pytest.mark.parametrize("only, least", [("sm_90", 10), pytest.param("", 60, marks=pytest.mark.slow)])
def test_the_gate(command, only, least):
    """The most used configurations compile and keep what the committed table claims."""
    done = command("-m", "bench.aot", "--gate", f"--only={only}")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1].split()[0]) >= least and done.stdout.endswith(" 0 violations\n")
