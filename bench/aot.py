"""The shipped Triton configurations, compiled ahead of time without a GPU, and what their machine code says.

    python -m bench.aot            all of them; writes bench/results/kernels_aot_VERSION.md, VERSION of Triton
    python -m bench.aot --gate     the most used; exit 1 with one line for each violation

Versions of Triton compile the same kernel differently, so each has its own table. The gate must pass on the oldest
version that we support and on the pinned one. For the one that is not installed:

    python -m venv /tmp/aot && /tmp/aot/bin/pip install -r requirements.txt && /tmp/aot/bin/pip install triton==3.6.0
    /tmp/aot/bin/python -m bench.aot --gate

The configurations are in bench/aot_cases.py.
"""

import contextlib
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.aot_cases import Build, builds
from bench.common import RESULTS
from nanochin.base.cli import UserError, opt, parse, run_command

# KiB of shared memory a block may have (CUDA programming guide, compute capabilities). sm_80 itself allows 163, but its
# configurations serve the consumer cards sm_86, sm_89 and sm_120 as well.
SHARED_LIMIT = {80: 99, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
GATED = (80, 86, 89, 90, 120)  # no spills there; sm_100 has been compiled for, never tuned
REGISTER_MARGIN = 16  # registers a thread; what a harmless edit moves in our experience is under 10


@dataclass(frozen=True)
class Report:
    """What the machine code of one configuration says."""

    module: str
    label: str
    capability: int
    warps: int
    registers: int  # a thread
    spills: int  # local loads and stores in the SASS
    shared: int  # bytes a block
    mma: str  # the matrix instructions in use: HMMA, HGMMA (wgmma), UTCHMMA (tcgen05), or "-"
    serialised: bool  # ptxas made wgmma wait for one another
    loop: int  # instructions in the shortest loop with matrix products: attention's without a mask; 0 if there is none
    copies: int  # LDGSTS (cp.async) in innermost loops
    gate: bool

    @property
    def name(self) -> str:
        return f"sm_{self.capability} {self.module} {self.label}"


# ---------------------------------------------------------------------------------------------------------------------
# Compiling and reading


def compile_and_read(build: Build, capability: int) -> Report:
    """Compile for a target that need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = {name: build.signature.get(name, "constexpr") for name in build.kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(arguments.items())
        if kind.startswith("*") or kind == "i32" and name not in build.odd
    }
    source = ASTSource(build.kernel, arguments, build.constexprs, attributes)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, sass = disassemble(made.asm["cubin"])
    loops = loops_of(sass)
    return Report(
        module=build.module,
        label=build.label,
        capability=capability,
        warps=made.metadata.num_warps,
        registers=registers,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=made.metadata.shared,
        mma=matrix_instructions(sass),
        serialised="wgmma" in log.getvalue() and "serialized" in log.getvalue(),
        loop=min((len(loop) for loop in loops if matrix_instructions("\n".join(loop)) != "-"), default=0),
        copies=sum("LDGSTS" in line for loop in loops for line in loop),
        gate=build.gate,
    )


def disassemble(cubin: bytes) -> tuple[int, str]:
    """(registers a thread, SASS) of the one kernel in a cubin, by the tools within the triton package."""
    cuobjdump = tool()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([cuobjdump, flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    return int(re.search(r"\bREG:(\d+)", usage)[1]), sass


def tool() -> str:
    """The path of cuobjdump; UserError where triton comes without it."""
    try:
        from triton import knobs

        return knobs.nvidia.cuobjdump.path
    except (ImportError, RuntimeError) as error:
        raise UserError(f"reading machine code needs triton with its NVIDIA tools: {error}") from None


def matrix_instructions(sass: str) -> str:
    """Tensor-core instructions of a disassembly: HGMMA is wgmma, UTC*MMA is tcgen05.mma, HMMA the older mma."""
    found = sorted(set(re.findall(r"\b(HGMMA|HMMA|UTC\w*MMA)\b", sass)))
    return " ".join(found) or "-"


def loops_of(sass: str) -> list[list[str]]:
    """The instructions of each innermost loop of a disassembly: from where a branch jumps back to, to the branch."""
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    places = {at: i for i, (at, _) in enumerate(code)}
    spans = []
    for i, (at, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            spans.append((places[int(target[1], 16)], i))
    inner = [(a, b) for a, b in spans if not any(a <= c and d < b for c, d in spans)]
    return [[text for _, text in code[a : b + 1]] for a, b in inner]


def read_all(jobs: list[tuple[int, int]], processes: int) -> list[Report]:
    """The reports of (place in `builds()`, capability) pairs, in their order."""
    os.environ.pop("TRITON_INTERPRET", None)
    spawn = multiprocessing.get_context("spawn")  # compiling wants a process where no kernel has been interpreted
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        return list(pool.map(_read_one, jobs))


def _read_one(job: tuple[int, int]) -> Report:
    place, capability = job
    return compile_and_read(builds()[place], capability)


# ---------------------------------------------------------------------------------------------------------------------
# Judging


def violations(reports: list[Report], committed: dict[str, int]) -> list[str]:
    """One line for everything that must not be; `committed` has registers by name, empty where this triton has no
    table."""
    found = []
    for r in reports:
        limit, wanted, before = SHARED_LIMIT[r.capability], wanted_mma(r), committed.get(r.name, r.registers)
        moved = abs(r.registers - before) > REGISTER_MARGIN
        wrong = {
            f"{r.spills} local loads and stores (registers spill)": r.spills and r.capability in GATED,
            f"{r.shared / 1024:.0f} KiB of shared memory, the limit is {limit}": r.shared > limit * 1024,
            f"no {wanted} instruction": wanted not in r.mma,
            "ptxas serialises wgmma": r.gate and r.serialised,
            # These tiles come by TMA descriptors.
            f"{r.copies} LDGSTS in its loops": r.gate and r.copies and wanted == "HGMMA",
            f"{r.registers} registers, {before} in the table (margin {REGISTER_MARGIN})": moved,
        }
        found += [f"{r.name}: {text}" for text, is_so in wrong.items() if is_so]
    return found


def wanted_mma(report: Report) -> str:
    """What attention must use on tensor cores of its target; "" where there is no claim."""
    if report.module != "attention" or "fp32" in report.label:
        return ""
    return {90: "HGMMA", 100: "UTC"}.get(report.capability, "HMMA")


def table(reports: list[Report], version: str) -> str:
    """Markdown, read back by `committed_registers`."""
    lines = [
        "# What the compiled kernels use",
        "",
        f"`python -m bench.aot`, Triton {version}: every shipped configuration compiled ahead of time, disassembled.",
        "Nothing here was run. Registers are a thread's; spills are local loads and stores in the machine code; shared",
        "memory is a block's; HGMMA is wgmma, UTC*MMA is tcgen05.mma, HMMA the older mma. Loop: instructions in the",
        "shortest loop with matrix products (attention's without a mask). LDGSTS: asynchronous copies in loops.",
        "",
        "| target | kernel | configuration | warps | registers | spills | shared KiB | MMA | loop | LDGSTS |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in reports:
        mma = r.mma + " (serialised)" * r.serialised
        lines.append(
            f"| sm_{r.capability} | {r.module} | {r.label} | {r.warps} | {r.registers} | {r.spills} | "
            f"{r.shared / 1024:.1f} | {mma} | {r.loop or ''} | {r.copies or ''} |"
        )
    return "\n".join(lines) + "\n"


def table_of(version: str) -> Path:
    """Where the table of a version of triton is."""
    return RESULTS / f"kernels_aot_{version}.md"


def registers_of(text: str) -> dict[str, int]:
    """Registers by report name in a table."""
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| sm_")]
    return {" ".join(row[1:4]): int(row[5]) for row in rows}


@dataclass(frozen=True)
class Options:
    gate: bool = opt(False, "only the most used configurations; exit 1 with a line for each violation")
    only: str = opt("", "only those whose name contains this, such as 'sm_90 attention'; writes no table")
    processes: int = opt(2, "compile so many at a time", low=1)


def main() -> int:
    options = parse(Options, prog="bench.aot", description="What the shipped Triton kernels use, without a GPU.")
    tool()
    import triton

    jobs = [
        (place, capability)
        for place, build in enumerate(builds())
        for capability in build.capabilities
        if options.only in f"sm_{capability} {build.module} {build.label}"
        and (not options.gate or build.gate and capability in GATED)
    ]
    if not jobs:
        raise UserError(f"--only {options.only}: no configuration has this in its name")
    reports = read_all(jobs, options.processes)
    text, path = table(reports, triton.__version__), table_of(triton.__version__)
    found = violations(reports, registers_of(path.read_text()) if path.exists() else {})
    print(text)
    print("\n".join(found), file=sys.stderr)
    if not options.gate and not options.only:
        path.write_text(text)
    print(f"{len(reports)} configurations, {len(found)} violations")
    return int(bool(found))


if __name__ == "__main__":
    run_command(main, "bench.aot")
