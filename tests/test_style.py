"""What the project promises of its own code: formatted, short files, light imports, dependencies that point one way."""

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    p for folder in (".", "nanochin", "nanochin/laws", "kernels", "bench") for p in (ROOT / folder).glob("*.py")
)


def imports(path: Path) -> set[str]:
    """The modules that a file imports at its top level, 'from a import b' as both a and a.b."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff(command):
    """ruff finds nothing to say, neither as linter nor as formatter."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command.split(), "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_files_can_be_read_in_one_sitting(path):
    """No source file has over 600 lines; model.py, which people read first, at most 300."""
    assert len(path.read_text().splitlines()) <= (300 if path.name == "model.py" else 600)


PLANNING = {"config", "console", "flops", "ladder", "laws", "text", "tokenizer", "tokenfiles", "hub", "data", "rows",
            "study", "checks", "answers", "trials", "panels", "figures", "report", "grid", "runrow",
            "files"}  # fmt: skip


@pytest.mark.parametrize("module", sorted(PLANNING))
def test_modules_that_plan_do_not_import_torch(module):
    """Options, counts, plans and data can be used without loading torch."""
    code = f"import sys, nanochin.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_dependencies_point_one_way():
    """config knows nobody; the planning modules know no torch module of ours; kernels know nothing of nanochin;
    nobody imports train."""
    for path in SOURCES:
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("nanochin.")}
        if path.parent.name == "nanochin":
            assert "train" not in imports(path), path
            if path.stem == "config":
                assert not ours
            if path.stem in PLANNING:
                assert ours <= PLANNING | {"runs"}, (path, ours)
        if path.parent.name == "laws":
            assert ours <= {"config", "flops", "laws"}, (path, ours)
        if path.parent.name == "kernels":
            assert not ours, path


@pytest.mark.parametrize("gib, marked, processes", [(79.6, "gpu", 4), (24.0, "gpu", 0), (79.6, "not gpu", 8)])
def test_gpu_tests_fit_the_memory(monkeypatch, gib, marked, processes):
    """As many processes as hold 17 GiB each; other tests take one a core."""
    import conftest

    monkeypatch.setattr(conftest, "gpu_gib", lambda: gib)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    config = SimpleNamespace(option=SimpleNamespace(keyword="", markexpr=marked), args=["tests"])
    assert conftest.pytest_xdist_auto_num_workers(config) == processes
