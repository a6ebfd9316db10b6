"""What tests share: text from a seeded generator, a run of a second, the commands, made-up sweeps."""

import collections
import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nanochin.base.cli import run_command
from nanochin.config import Config

ROOT = Path(__file__).resolve().parents[1]
if "PYTEST_XDIST_WORKER" in os.environ:  # there are as many processes as cores: torch, not yet imported, has one each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config) -> int:
    """`-n auto`: a process per core for the whole suite, none if files or -k are given; on a GPU as many as fit in its
    memory."""
    few = config.option.keyword or any(".py" in arg for arg in config.args)
    cores = min(os.cpu_count() or 1, 10)
    if config.option.markexpr == "gpu":
        few, cores = False, min(cores, int(gpu_gib() // 17) or 1)  # the largest kernel tests take up to 16 GiB
    return 0 if few or cores == 1 else cores


def gpu_gib() -> float:
    """Memory of the first GPU; 0 without one."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) / 1024
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        return 0.0


def pseudo_english(size: int, seed: int = 0) -> str:
    """About `size` characters of sentences over 600 made-up words, the k-th with a frequency near 1/k. Uses only
    `random()`, whose sequence Python never changes."""
    draw = random.Random(seed).random
    letters = "eeeeetttaaaoooiiinnnssshhrrddlluucmfwygpbvk"
    words = ["".join(letters[int(draw() * len(letters))] for _ in range(1 + int(draw() * 8))) for _ in range(600)]
    text, length = [], 0
    while length < size:
        sentence = " ".join(words[int(600 ** draw()) - 1] for _ in range(3 + int(draw() * 12))).capitalize() + "."
        text.append(sentence + ("\n\n" if draw() < 0.1 else " "))
        length += len(text[-1])
    return "".join(text)


def words(size: int, seed: int = 0) -> str:
    """About `size` bytes of text that does not repeat, with characters of 1 to 4 bytes."""
    draw = np.random.default_rng(seed).integers(0, 1000, size // 5).tolist()
    return " ".join("é中🙂"[n % 3] * (n < 20) + f"w{n:03d}" for n in draw)


def tiny_config(text: Path, cache: Path, out: Path, /, **options) -> Config:
    """100 steps of 128 tokens of a model of width 16: less than a second."""
    usual = {
        "data": (str(text),), "val_bytes": 4096, "cache": str(cache), "out": str(out), "model": "16x1", "seq_len": 32,
        "tokens": 12_800.0, "batch_tokens": 128, "lr": 0.01, "log_every": 10, "save_every": 0.0, "sample_tokens": 0,
        "device": "cpu", "dtype": "float32", "threads": 1,
    }  # fmt: skip
    return Config(**usual | options)


def prepare(*data, cache: Path, val: Path | None = None, progress=None, **options):
    """The corpus of the files `data`, with these options of a run."""
    from nanochin.data import corpus

    val = (str(val),) if val else None
    return corpus.prepare(Config(data=tuple(map(str, data)), val=val, cache=str(cache), **options), progress)


def arguments(config: Config) -> list[str]:
    """The command line for `config`."""
    argv = []
    for f in dataclasses.fields(config):
        value, flag = getattr(config, f.name), "--" + f.name.replace("_", "-")
        if value != f.default:
            argv += [flag, *map(str, value)] if isinstance(value, tuple) else [f"{flag}={value}"]
    return argv


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """200 KB of pseudo-English in a file."""
    path = tmp_path_factory.mktemp("text") / "made-up.txt"
    path.write_text(pseudo_english(200_000))
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """One folder of tokenised shards for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiktoken_ranks(monkeypatch) -> None:
    """The ranks of gpt2 and cl100k_base, from the shared folder or the user's cache; skips the test without them."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", str(ROOT.parent / "shared/data/tiktoken_cache"))
    if not Path(folder).is_dir():
        pytest.skip("needs the ranks of gpt2: shared/data/tiktoken_cache or TIKTOKEN_CACHE_DIR")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", folder)


@pytest.fixture(autouse=True)
def give_back_gpu_memory(request):
    """Several processes share a GPU, and the largest kernel tests take up to 16 GiB."""
    yield
    if request.node.get_closest_marker("gpu"):
        import torch

        torch.cuda.empty_cache()


@contextlib.contextmanager
def threads(count: int):
    import torch  # not in tests without it

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """torch on one thread: faster for tiny runs, and bits depend on the number."""
    with threads(1):
        yield


@pytest.fixture
def four_threads():
    """torch on four threads, whatever this machine has."""
    with threads(4):
        yield


@pytest.fixture
def tiny(text, cache, tmp_path, one_thread, monkeypatch):
    """`tiny(seed=1, ...)`: `tiny_config` on `text`, with its own folder of runs; the CPU's peak is not measured."""
    monkeypatch.setattr("train.peak_of", lambda *_: (1e11, "as the test says"))
    return functools.partial(tiny_config, text, cache, tmp_path / "runs")


class SmallDisk:
    """A mounted file system of 1 MB."""

    def __init__(self, folder: Path):
        self.folder, self.filler = folder, folder / "filler"

    def fill(self, leave: int = 0) -> None:
        """Take all free bytes but `leave`."""
        self.filler.write_bytes(bytes(shutil.disk_usage(self.folder).free - leave))


@pytest.fixture
def disk(tmp_path):
    """A SmallDisk; skips the test if this user cannot mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if sys.platform != "linux" or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root and mount")
    yield SmallDisk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def call(main, *argv) -> tuple[int, str, str]:
    """A command in this process -> (exit code, stdout, stderr). Other exceptions than those of a command are raised."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["command", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            run_command(main, "command")
    out.flush()
    err.flush()
    return end.value.code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


@pytest.fixture(params=[100, pytest.param(3000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def for_all(request):
    """`for_all(check, x=strategy)`: call check(x=...) for 100 random values, the same in every run; 3,000 if slow. What
    `check` returns is counted and printed."""
    from hypothesis import HealthCheck, given, settings

    def run(check, **strategies) -> None:
        outcomes = collections.Counter()
        few = settings(max_examples=request.param, database=None, deadline=None, derandomize=True,
                       suppress_health_check=list(HealthCheck))  # fmt: skip
        few(given(**strategies)(lambda **values: outcomes.update([check(**values)])))()
        print(f"\nOUTCOMES {dict(outcomes)}")

    return run


@pytest.fixture
def main(monkeypatch):
    """`main("--seed=1", ...)`: train.py in this process -> exit code."""
    import train

    def run(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        with pytest.raises(SystemExit) as end:
            run_command(train.main, "train.py")
        return end.value.code

    return run


@pytest.fixture
def refusal(main, capsys):
    """`refusal("--lr=0", ...)`: train.py's error, one line on stderr, with exit code `code`."""

    def run(*argv: str, code: int = 2) -> str:
        capsys.readouterr()
        assert main(*argv) == code
        err = capsys.readouterr().err
        assert err.startswith("train.py: ") and err.count("\n") == 1, err
        return err

    return run


@pytest.fixture
def command():
    """`command("train.py", "--seed=1", ...)`: run a Python command of the project -> CompletedProcess."""

    def run(*argv, **options) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, **options)

    return run


# ---------------------------------------------------------------------------------------------------------------------
# fit.py

QUICK = ("--bootstrap=100", "--figures=none")
CHECKED = {}
MARKUP = '<script>"&evil</script>'  # the name of a run
CONTROL, SHOWN = "red\x1b[31m\x00\x9b\u202e\udcff", r"red\x1b[31m\x00\x9b\u202e\udcff"  # another, and how it is shown


def unchecked(analysis, progress=None):
    """`nanochin.report.checks.run_checks` without those that refit."""
    from nanochin.report.checks import CHECKS
    from nanochin.report.findings import CheckResult

    return {check.name: CheckResult("not checked") if check.refits else check(analysis) for check in CHECKS}


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(path, "--drop=5", code=0)`: fit.py in this process -> its output, or its error if `code`. Checks run once
    for the same rows and settings; with `checks=False` those that refit, some fifty fits, do not run."""
    import fit
    from nanochin.report import checks as of_checks
    from nanochin.report import sensitivity

    def once(analysis, progress=None):
        key = (analysis.rows.sha256, len(analysis.N), analysis.settings, analysis.curves is None)
        if key not in CHECKED:
            CHECKED[key] = of_checks.run_checks(analysis)
        return CHECKED[key]

    for module in (of_checks, sensitivity):
        monkeypatch.setattr(module, "SENSITIVITY", 20)  # tested with the laws

    def command(*argv, code: int = 0, checks: bool = True) -> str:
        monkeypatch.setattr(fit, "run_checks", once if checks else unchecked)
        monkeypatch.setattr(sys, "argv", ["fit.py", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_command(fit.main, "fit.py")
        out, err = capsys.readouterr()
        assert end.value.code == code, err
        assert code in (0, 130) or (err.count("\n") == 1 and err.startswith("fit.py: ")), err  # 130: Ctrl-C
        return err if code else out

    return command


@pytest.fixture(scope="session")
def made_up(tmp_path_factory) -> Path:
    """A sweep with noise, curves and FLOPs that are not 6ND."""
    from made_up_sweep import sweep, write_sweep

    return write_sweep(tmp_path_factory.mktemp("sweep") / "made-up", sweep(physical=0.5))


def read_laws(folder: Path) -> dict:
    return json.loads((folder / "laws.json").read_text())


@pytest.fixture(scope="session")
def checked(tmp_path_factory):
    """(analysis, results of its checks) of a sweep with curves, whose first runs have markup and control characters as
    their names."""
    from made_up_sweep import sweep, write_sweep

    from nanochin.report.analysis import Settings, analyse
    from nanochin.report.checks import run_checks
    from nanochin.report.curves import curves_of_runs
    from nanochin.report.table import Labels, read_rows

    folder = write_sweep(tmp_path_factory.mktemp("report") / 'a<b>&"c', sweep(physical=0.5))
    rows = read_rows(folder)
    curves = curves_of_runs(folder, rows)
    names = rows.labels["run"]
    rows.labels["run"] = Labels(names.codes, (MARKUP, CONTROL, *names.values[2:]))
    analysis = analyse(rows, curves, Settings(bootstrap=200))
    return analysis, run_checks(analysis)
