"""The ahead-of-time gate: what it reads from machine code, what it refuses, and that the shipped kernels pass."""

import dataclasses

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed (it has no build for this platform)")

import triton.language as tl  # noqa: E402

from bench import aot  # noqa: E402
from nanochin.base.cli import UserError  # noqa: E402

try:
    aot.tool()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

CLEAN = aot.Report("attention", "forward bf16 D64 T>64", 90, 8, 128, 0, 65 * 1024, "HGMMA", False, 307, 0, True)


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
def accumulate(x, y, steps, SIZE: tl.constexpr):
    """The sum of x x over `steps` tiles of SIZE x SIZE, whose loads are pipelined."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for i in tl.range(0, steps):
        tile = tl.load(x + i * SIZE * SIZE + at)
        total = tl.dot(tile, tile, total)
    tl.store(y + at, total)


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
    assert report.loop == report.copies == 0


@pytest.mark.parametrize("capability", [80, 90])
def test_it_counts_in_loops(capability):
    """A loop over products has as many instructions as stand between its branch and where that leads; pipelined by
    pointers each thread copies its share of a tile of 8 KiB, 16 bytes at a time: four times with 128 threads."""
    build = aot.Build(
        "test", "accumulate", accumulate, {"x": "*fp16", "y": "*fp32", "steps": "i32"}, {"SIZE": 64}, 4, 3
    )
    report = aot.compile_and_read(build, capability)
    assert report.copies == 4 and 20 < report.loop < 200


def test_loops_of_a_disassembly():
    """Innermost loops only, from the target of the branch back to the branch; a jump ahead is none."""
    sass = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;       /* 0x00000a0000017a02 */
        /*0010*/                   FADD R2, R2, R3 ;
        /*0020*/                   @P0 BRA 0x40 ;
        /*0030*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
        /*0040*/                   @!P1 BRA 0x30 ;
        /*0050*/                   @P2 BRA `(.L_x_1) 0x10 ;
    """
    assert aot.loops_of(sass) == [["HMMA.16816.F32 R4, R8, R2, R4 ", "@!P1 BRA 0x30 "]]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"spills": 1}, "1 local loads and stores"),
        ({"shared": 228 * 1024}, "228 KiB of shared memory, the limit is 227"),
        ({"mma": "HMMA"}, "no HGMMA"),
        ({"serialised": True}, "serialises wgmma"),
        ({"copies": 2}, "2 LDGSTS in its loops"),
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
    card = dataclasses.replace(CLEAN, capability=capability, mma="HMMA", copies=8)
    assert aot.violations([card], {}) == []
    assert len(aot.violations([dataclasses.replace(card, shared=100 * 1024)], {})) == 1
    assert len(aot.violations([dataclasses.replace(card, spills=2)], {})) == 1


def test_spills_on_blackwell_are_only_reported():
    """sm_100 has been compiled for, never tuned."""
    assert aot.violations([dataclasses.replace(CLEAN, capability=100, mma="UTCHMMA", spills=9)], {}) == []


def test_the_table_is_read_back():
    """Registers by configuration."""
    text = aot.table([CLEAN, dataclasses.replace(CLEAN, capability=80, registers=200)], "3.7.1")
    names = {"sm_90 attention forward bf16 D64 T>64": 128, "sm_80 attention forward bf16 D64 T>64": 200}
    assert aot.registers_of(text) == names and aot.registers_of("") == {}


def test_the_committed_tables_have_every_shipped_configuration(command):
    """No more and no fewer rows than there are configurations, for both versions of triton."""
    names = "(f'sm_{c} {b.module} {b.label}' for b in aot.builds() for c in b.capabilities)"
    code = f"from bench import aot; print(*{names}, sep=chr(10))"  # elsewhere: here kernels may be interpreted
    shipped = command("-c", code).stdout.splitlines()
    assert len(set(shipped)) == len(shipped) > 100
    for version in ("3.6.0", "3.7.1"):
        text = aot.table_of(version).read_text()
        assert f"Triton {version}:" in text and set(aot.registers_of(text)) == set(shipped)


def test_the_gate(command):
    """The most used configurations compile and keep what the committed table claims."""
    done = command("-m", "bench.aot", "--gate")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1].split()[0]) >= 60 and done.stdout.endswith(" 0 violations\n")
