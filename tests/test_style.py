"""The code itself: formatted, short files, light imports, one-way dependencies."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for folder in ("*.py", "nanochin/**/*.py", "kernels/*.py", "bench/*.py") for p in ROOT.glob(folder))
TOP = {"train", "sweep", "fit", "bench"}  # nothing below may import these


def imports(path: Path) -> set[str]:
    """The modules that a file imports, also inside functions; 'from a import b' as both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports from a relative path"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def known_of_top(path: Path) -> set[str]:
    """What of TOP a file imports, or names in order to run it: a string such as "train.py", "../fit.py" or "bench.gpu",
    but not a sentence with such a word."""
    tree = ast.parse(path.read_text())
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    run = [re.fullmatch(r"(?:[^\s]*/)?(\w+)\.py|(bench)\.\w+", text) for text in strings]
    return TOP & ({name.split(".")[0] for name in imports(path)} | {match[1] or match[2] for match in run if match})


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff(command):
    """Linter and formatter pass."""
    argv = [sys.executable, "-m", "ruff", *command.split(), "."]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_files_are_short(path):
    """At most 500 lines, model.py 300."""
    assert len(path.read_text().splitlines()) <= (300 if path.name == "model.py" else 500)


# What each package may import besides itself, and which modules load torch.
# base <- config <- options <- {model, data, laws} <- plan <- run <- {sweep, report, interop} <- the commands.
LOW = {"base", "config", "options", "runrow"}
BELOW = {
    "base": set(),
    "kernels": set(),
    "config": {"base"},
    "options": {"base", "config"},
    "model": {"base", "config", "kernels"},
    "data": LOW,
    "laws": LOW,
    "plan": LOW | {"data", "laws"},
    "run": LOW | {"data", "laws", "plan", "model", "kernels"},
    "sweep": LOW | {"data", "laws", "plan", "run"},
    "report": LOW | {"data", "laws", "plan", "run"},
    "interop": LOW | {"data", "model", "run"},
}
TORCH = {
    "model",
    "interop.export",
    "interop.gpt2",
    "interop.initial",
    "run.record",
    "sweep.pool",
    "run.parallel",
    *(
        f"run.{name}"
        for name in ("branch", "checkpoint", "device", "display", "evaluate", "optim", "sample", "step", "tasks")
    ),
}
MODULES = {".".join(p.relative_to(ROOT / "nanochin").with_suffix("").parts): p for p in ROOT.glob("nanochin/**/*.py")}


@pytest.mark.parametrize("module", sorted(name for name in MODULES.keys() - TORCH if "__" not in name))
def test_modules_without_torch(module):
    """Options, counts, plans, laws, data and reports do not load torch."""
    code = f"import sys, nanochin.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def room_of(name: str) -> str:
    """nanochin.run.step -> run, nanochin.config -> config, kernels.ops -> kernels, torch.nn -> torch."""
    parts = name.split(".")
    return parts[1] if parts[0] == "nanochin" and len(parts) > 1 else parts[0]


def test_imports_point_one_way():
    """No package imports one above it, a command or bench; of the commands only sweep.py imports the others."""
    allowed = {"sweep.py": {"sweep", "train", "fit"}, "train.py": {"train"}, "fit.py": {"fit"}}
    for path in SOURCES:
        if path.is_relative_to(ROOT / "bench"):
            continue
        assert known_of_top(path) <= (allowed[path.name] if path.parent == ROOT else set()), path
        if path.parent not in (ROOT, ROOT / "nanochin") or path.name in ("config.py", "options.py", "model.py"):
            where = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            ours = {room_of(name) for name in imports(path) if name.split(".")[0] in ("nanochin", "kernels")}
            assert ours <= BELOW[room_of(where)] | {room_of(where), "nanochin"}, (path, ours)
