"""What the compiled Triton kernels use: every shipped configuration compiled ahead of time, without a GPU.

    python -m bench.aot            all of bench/aot_cases.py; writes bench/results/kernels_aot_VERSION.md
    python -m bench.aot --gate     the most used configurations; prints a line per violation, exits with code 1

Each version of Triton has its own table, since versions compile the same kernel differently. The gate must pass on the
oldest version that we support and on the pinned one:

    python -m venv /tmp/aot && /tmp/aot/bin/pip install -r requirements.txt && /tmp/aot/bin/pip install triton==3.6.0
    /tmp/aot/bin/python -m bench.aot --gate
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

from bench.aot_cases import Build, builds
from bench.common import RESULTS
from nanochin.base.cli import UserError, opt, parse, run_command
from nanochin.base.console import markdown

# KiB of shared memory a block may use (CUDA programming guide, compute capabilities). sm_80 itself allows 163, but its
# configurations also serve the consumer GPUs sm_86, sm_89 and sm_120.
SHARED_LIMIT = {80: 99, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
UNTUNED = 100  # sm_100 has been compiled for, never tuned; it may spill
REGISTER_MARGIN = 16  # registers per thread; harmless edits have moved fewer than 10
HEADING = """# What the compiled kernels use

`python -m bench.aot`, Triton {version}: every shipped configuration compiled ahead of time and disassembled. Nothing
here was run. Registers are per thread; spills are local loads and stores; shared memory is per block; HGMMA is wgmma,
UTC*MMA is tcgen05.mma, HMMA the older mma; LDGSTS are asynchronous copies.
"""


@dataclass(frozen=True)
class Report:
    """The machine code of one configuration."""

    name: str
    capability: int
    warps: int
    registers: int  # per thread
    spills: int  # local loads and stores
    shared: int  # bytes per block
    mma: str  # tensor-core instructions: HMMA, HGMMA (wgmma), UTC*MMA (tcgen05), or "-"
    wanted: str  # the one that it must have
    copies: int  # LDGSTS (cp.async)
    tma: bool  # tiles are loaded by TMA descriptors
    serialised: bool  # ptxas serialised wgmma


def compile_and_read(build: Build) -> Report:
    """Compile for a target that need not be present."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = {name: build.type_of(name) for name in build.kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(arguments.items())
        if kind.startswith("*") or kind == "i32" and name not in build.odd
    }
    constexprs = {name: value for name, value in build.config.items() if name in arguments}
    source = ASTSource(build.kernel, arguments, constexprs, attributes)
    options = {"num_warps": build.config["num_warps"], "num_stages": build.config.get("num_stages", 3)}
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
        made = triton.compile(source, target=GPUTarget("cuda", build.capability, 32), options=options)
    usage, sass = disassemble(made.asm["cubin"])
    return Report(
        name=build.name,
        capability=build.capability,
        warps=made.metadata.num_warps,
        registers=int(re.search(r"\bREG:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=made.metadata.shared,
        mma=" ".join(sorted(set(re.findall(r"\b(HGMMA|HMMA|UTC\w*MMA)\b", sass)))) or "-",
        wanted=build.wanted_mma,
        copies=len(re.findall(r"\bLDGSTS\b", sass)),
        tma=build.config.get("TMA", False),
        serialised="wgmma" in log.getvalue() and "serialized" in log.getvalue(),
    )


def disassemble(cubin: bytes) -> list[str]:
    """[resource usage, SASS] of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [[cuobjdump(), flag, file.name] for flag in ("--dump-resource-usage", "-sass")]
        return [subprocess.run(command, check=True, capture_output=True, text=True).stdout for command in commands]


def cuobjdump() -> str:
    """Its path in the triton package. Raises UserError if triton or its NVIDIA tools are missing."""
    try:
        from triton import knobs

        return knobs.nvidia.cuobjdump.path
    except (ImportError, RuntimeError) as error:
        raise UserError(f"reading machine code needs triton with its NVIDIA tools: {error}") from None


def read_one(index: int) -> Report:
    """For an element of `builds()`, whose kernels cannot be sent to another process."""
    return compile_and_read(builds()[index])


def violations(reports: list[Report], committed: dict[str, int]) -> list[str]:
    """One line per violation. committed: registers by name; empty if this version of triton has no table."""
    found = []
    for r in reports:
        limit, before = SHARED_LIMIT[r.capability], committed.get(r.name, r.registers)
        rules = {
            f"{r.spills} local loads and stores (registers spill)": r.spills and r.capability != UNTUNED,
            f"{r.shared / 1024:.0f} KiB of shared memory, the limit is {limit}": r.shared > limit * 1024,
            f"no {r.wanted} instruction": r.wanted not in r.mma,
            "ptxas serialises wgmma": r.serialised,
            f"{r.copies} LDGSTS although its tiles are loaded by TMA": r.tma and r.copies,
            f"{r.registers} registers, {before} in the table": abs(r.registers - before) > REGISTER_MARGIN,
        }
        found += [f"{r.name}: {text}" for text, violated in rules.items() if violated]
    return found


def table(reports: list[Report], version: str) -> str:
    """The page in Markdown, which `registers_of` reads."""
    rows = [["configuration", "warps", "registers", "spills", "shared KiB", "MMA", "LDGSTS"]]
    for r in reports:
        cells = (r.name, r.warps, r.registers, r.spills, f"{r.shared / 1024:.1f}", r.mma, r.copies or "")
        rows.append([*map(str, cells)])
    return HEADING.format(version=version) + markdown(rows)


def registers_of(text: str) -> dict[str, int]:
    """Registers by configuration in a table."""
    return {name: int(number) for name, number in re.findall(r"^\| (sm_.*?) \| \d+ \| (\d+) \|", text, re.MULTILINE)}


@dataclass(frozen=True)
class Options:
    gate: bool = opt(False, "only the most used configurations; exit with code 1 on a violation")
    only: str = opt("", "only configurations whose name contains this, such as 'sm_90 attention'; writes no table")


def main() -> int:
    options = parse(Options, prog="python -m bench.aot", description=__doc__)
    cuobjdump()
    import triton

    os.environ.pop("TRITON_INTERPRET", None)
    chosen = [i for i, build in enumerate(builds()) if options.only in build.name and (build.gate or not options.gate)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        reports = list(pool.map(read_one, chosen))
    text, path = table(reports, triton.__version__), RESULTS / f"kernels_aot_{triton.__version__}.md"
    found = violations(reports, registers_of(path.read_text()) if path.exists() else {})
    print(text)
    print("\n".join(found), file=sys.stderr)
    if not (options.gate or options.only):
        path.write_text(text)
    print(f"{len(reports)} configurations, {len(found)} violations")
    return int(bool(found))


if __name__ == "__main__":
    run_command(main, "python -m bench.aot")
