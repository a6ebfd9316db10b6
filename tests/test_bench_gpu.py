"""The bench of the whole step: its code on tiny shapes with a stand-in for nanoGPT, and what it computes from times."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from bench import gpu, gpu_worker
from bench.common import Worker
from nanochin import flops
from nanochin.config import UserError, make_shape

pytestmark = pytest.mark.usefixtures("one_thread")

# What the bench uses of a nanoGPT checkout's model.py.
NANOGPT = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class Descent:
    def __init__(self, parameters):
        self.parameters = list(parameters)
    @torch.no_grad()
    def step(self):
        for p in self.parameters:
            p -= 0.1 * p.grad
    def zero_grad(self, set_to_none):
        for p in self.parameters:
            p.grad = None

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: few")
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
    def configure_optimizers(self, weight_decay, lr, betas, device_type):
        return Descent(self.parameters())
    def forward(self, x, y):
        logits = self.embed(x) @ self.embed.weight.T
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The sections of `python -m bench.gpu --dry-run --nanogpt ...`: lists of the cells of each row, by heading."""
    checkout = tmp_path_factory.mktemp("nanoGPT")
    (checkout / "model.py").write_text(NANOGPT)
    before = sorted((ROOT / "bench" / "results").iterdir())
    argv = [sys.executable, "-m", "bench.gpu", "--dry-run", "--minutes=60", "--nanogpt", str(checkout)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted((ROOT / "bench" / "results").iterdir()) == before  # nothing written
    assert "these times mean nothing" in done.stdout.splitlines()[0]
    sections, rows = {}, []
    for line in done.stdout.splitlines():
        if line.startswith("## "):
            rows = sections[line[3:].split(",")[0]] = []
        elif line.startswith("| ") and not line.startswith("|---"):
            rows.append([cell.strip() for cell in line.split("|")[1:-1]])
    return sections


def test_every_variant_is_timed(report):
    """Ours in three kinds and nanoGPT's with both kernels for attention have a speed, ours a ratio to the latter."""
    rows = {row[1]: row for row in report["Sizes"][1:]}
    assert list(rows) == ["nanochin graph", "nanochin eager", "nanochin compile", "nanoGPT compile, flash",
                          "nanoGPT compile, cudnn"]  # fmt: skip
    for who, row in rows.items():
        assert float(row[3]) > 0 and row[6] == "2" and float(row[9]) > 0, row
        assert (float(row[10]) > 0) if who.startswith("nanochin") else row[10] == ""


def test_time_is_split(report):
    """Matrix products and attention have a time of their own, beside the floor by the measured ceilings."""
    heading, row = report["Where our step's time goes"]
    split = dict(zip(heading, row, strict=True))
    for part in ("matmul", "attention, rotary", "optimizer"):
        measured, least = split[part].rstrip(")").split(" (")
        assert float(measured) > 0 and float(least) >= 0
    assert float(split["gaps, eager"]) > float("-inf")


# ---------------------------------------------------------------------------------------------------------------------
# The parts


@pytest.mark.parametrize("limit, expected", [(1e9, 64), (740, 64), (739, 32), (230, 8), (50, 1)])
def test_the_micro_batch_fits(monkeypatch, limit, expected):
    """The largest power of two below a limit, from probes of a step that takes 100 bytes and 10 a sequence."""
    probed = []

    def peak(function, device):
        function()
        return 100 + 10 * probed[-1]

    monkeypatch.setattr(gpu_worker, "peak_bytes", peak)
    assert gpu_worker.largest_micro_batch(probed.append, 64, limit, torch.device("cpu")) == expected
    assert max(probed) <= 8  # small ones, while others compile on the same device


def test_probes_leave_no_memory_behind(monkeypatch):
    """What they took is given back before anything is compiled; the others' weights and contexts are left to them."""
    variant, notes = object.__new__(gpu_worker.Variant), []
    variant.device, variant.most, variant.others, variant.params = torch.device("cuda", 0), 64, 4, 10**9
    variant.variant = SimpleNamespace(probe=None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=100e9))
    monkeypatch.setattr(gpu_worker, "largest_micro_batch", lambda *given: notes.append(given) or 16)
    monkeypatch.setattr(gpu_worker, "release", lambda device: notes.append("released"))
    assert variant._fitting() == 16
    assert notes == [(None, 64, 0.85 * 100e9 - 4 * (16e9 + 2**30), variant.device), "released"]


def bench(**options):
    ceilings = {"flops": 600e12, "bytes": 3e12}
    options = {"nanogpt": None, "minutes": 1.0, "dry_run": False} | options
    return gpu.Bench(gpu.Options(**options), time.monotonic(), gpu.SIZES, ceilings, 989.4e12, "NVIDIA H100 80GB HBM3")


def test_counts_by_hand():
    """MFU of 124M at 500,000 tokens/s by nanoGPT's count: 6 (parameters of GPT-2 without positions and biases) plus
    12 L C T, worked out here; the median and the compile time are of the blocks' seconds."""
    tokens, row = gpu.STEP_TOKENS, {"first_steps_seconds": 30.0}
    second = tokens / 500_000
    gpu.finish_row(bench(), row, [second, 2 * second, 0.5 * second], gpu.SIZES["124M"], tokens)
    params = 50304 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768
    assert row["tokens_per_s"] == pytest.approx(500_000)
    expected = (6 * params + 12 * 12 * 768 * 1024) * 500_000 / 989.4e12
    assert row["mfu_nanogpt_count"] == pytest.approx(expected) and expected == pytest.approx(0.432, rel=1e-3)
    assert row["compile_seconds"] == pytest.approx(30 - 5 * second)
    physical = flops.flops_per_token(make_shape(768, 12, vocab_size=50304, seq_len=1024))
    assert row["mfu_physical"] == pytest.approx(physical * 500_000 / 989.4e12)


def test_floor_by_hand():
    """The floor of the products is their FLOPs at the measured rate; that of Adam 28 bytes a parameter."""
    floor = gpu.floor(bench(), "124M")
    products = 6 * gpu.STEP_TOKENS * (12 * 12 * 768**2 + 50304 * 768)
    params = 50304 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768
    assert floor["matmul"] == pytest.approx(1e3 * products / 600e12, rel=0.02)  # some rows are bound by memory
    assert floor["optimizer"] == pytest.approx(1e3 * 28 * params / 3e12)
    assert all(value > 0 for value in floor.values())


def test_ratios():
    """Speed against the faster of nanoGPT's variants, memory against the one of the same micro-batch."""
    rows = [
        {"who": "nanochin", "kind": "eager", "tokens_per_s": 30.0, "peak_bytes_at_theirs": 4},
        {"who": "nanochin", "kind": "graph", "error": "x"},
        {"who": "nanoGPT", "kind": "compile", "tokens_per_s": 10.0, "micro_batch": 4, "peak_bytes": 10},
        {"who": "nanoGPT", "kind": "compile", "tokens_per_s": 20.0, "micro_batch": 8, "peak_bytes": 18},
    ]
    gpu.compare(rows)
    assert rows[0]["times_nanogpt"] == 1.5 and rows[0]["memory_over_nanogpt"] == 0.4
    assert "times_nanogpt" not in rows[1] and "times_nanogpt" not in rows[2]
    gpu.compare(rows[:2])  # without a peer there is nothing to compare


def test_gaps_and_memory(monkeypatch):
    """A gap is the time of a step in which no kernel runs; our memory is taken at nanoGPT's smallest micro-batch."""
    split = {"matmul": 20.0, "other": 4.0}
    answers = {"profile": {"wall_ms": 60.0, "split_ms": split}, "memory_at": {"peak_bytes": 7}}
    asked = []
    monkeypatch.setattr(gpu, "ask", lambda worker, _, do, **more: asked.append((worker, do, more)) or answers[do])
    rows = [
        {"who": "nanochin", "kind": "graph", "ms": 30.0},
        {"who": "nanochin", "kind": "eager", "ms": 60.0},
        {"who": "nanoGPT", "kind": "compile", "micro_batch": 32},
        {"who": "nanoGPT", "kind": "compile", "error": "x"},
    ]
    found = gpu.more_of_ours(bench(), "124M", rows, ["first", "second", "third", "fourth"])
    assert asked == [("second", "memory_at", {"micro_batch": 32}), ("second", "profile", {})]
    assert rows[1]["peak_bytes_at_theirs"] == 7 and found["split_ms"] == split
    assert found["gap_eager_ms"] == 36.0 and found["gap_graph_ms"] == 6.0
    answers["profile"] = {"error": "no profiler"}
    assert gpu.more_of_ours(bench(), "124M", rows, 4 * ["any"]) == {"size": "124M", "error": "no profiler"}


def test_out_of_time():
    """After the deadline nothing is asked of the workers, and every row says so."""
    late = bench(minutes=1e-6)
    rows = [{"size": "124M", "who": "nanochin", "kind": kind} for kind in ("graph", "eager")]
    assert gpu.run_size(late, "124M", rows, [None, None], time.monotonic()) == {}
    for row in rows:
        assert row["error"] == "not timed: out of time"
    assert gpu.targets(rows) == []


def test_every_size_has_its_time():
    """What is left is shared out by layers; what one size does not use goes to those after it, none of another's."""
    some, names = bench(minutes=10), list(gpu.SIZES)
    times = [gpu.time_for(some, names[i:]) for i in range(len(names))]
    whole = 600
    assert times[0] == pytest.approx(whole * (18 + 12) / (4 * 18 + 12 + 8 + 6 + 24), rel=1e-3)
    assert times[-1] == pytest.approx(whole, rel=1e-3) and times == sorted(times)


class Stub:
    """A worker that notes what it is told, and has failed when it is asked."""

    def __init__(self, kind, notes):
        self.kind, self.notes = kind, notes

    def tell(self, message):
        self.notes.append(f"tell {self.kind}")

    def hear(self, timeout):
        self.notes.append(f"hear {self.kind}")
        raise TimeoutError("no answer")

    def let_go(self):
        self.notes.append(f"let {self.kind} go")

    def close(self, patience):
        self.notes.append(f"close {self.kind}")


def test_recordings_are_made_one_after_the_other():
    """What compiles begins; the others take their first steps alone, so that none is short of memory; then it is
    heard. All are told to end before the first is waited for."""
    notes, kinds = [], ["graph", "eager", "compile", "compile"]
    workers = [Stub(kind, notes) for kind in kinds]
    rows = [{"size": "124M", "who": "nanochin", "kind": kind} for kind in kinds]
    gpu.run_size(bench(), "124M", rows, workers, time.monotonic() + 100)
    assert [note for note in notes if not note.startswith("close")] == [
        "tell compile", "tell compile", "tell graph", "hear graph", "tell eager", "hear eager", "hear compile",
        "hear compile"]  # fmt: skip
    assert all("no answer" in row["error"] for row in rows)
    notes.clear()
    gpu.close(workers[:2])
    assert notes == ["let graph go", "let eager go", "close graph", "close eager"]


@pytest.fixture
def waiting(monkeypatch):
    """A variant of 8 sequences at once whose first steps fail as `waiting.fails(sequences, second)` says."""
    clock = [0.0]
    fake = SimpleNamespace(monotonic=lambda: clock[0], perf_counter=lambda: clock[0],
                           sleep=lambda _: clock.__setitem__(0, clock[0] + 1))  # fmt: skip
    monkeypatch.setattr(gpu_worker, "time", fake)
    variant, tried = object.__new__(gpu_worker.Variant), []
    variant.variant = SimpleNamespace(cut=lambda n: None)
    variant.wanted, variant.told, variant.tried = None, 0.0, tried
    variant.let_go, variant._fitting = lambda: None, lambda: 8

    def load():
        tried.append((clock[0], variant.wanted))
        if error := variant.fails(variant.wanted, clock[0]):
            raise error

    variant._load = load
    return variant


def test_memory_is_waited_for(waiting):
    """As long as others may hold it the micro-batch stays; only after that are smaller ones tried."""
    waiting.fails = lambda n, second: torch.OutOfMemoryError() if second < 9 else None
    assert waiting.warm(10.0)["micro_batch"] == 8
    waiting.tried.clear()
    waiting.wanted = None
    waiting.fails = lambda n, _: RuntimeError("CUDA error: out of memory") if n > 2 else None
    assert waiting.warm(10.0)["micro_batch"] == 2
    assert [n for second, n in waiting.tried] == [*11 * [8], 4, 2]
    waiting.fails = lambda *_: RuntimeError("operation would make a capture invalid")
    with pytest.raises(RuntimeError, match="no memory for a step"):
        waiting.warm(10.0)


def test_what_waiting_cannot_mend(waiting):
    """An error of another kind, and torch's belief that a recording is still under way, are raised at once."""
    for text in ("other", "captures_underway.empty() INTERNAL ASSERT FAILED"):
        waiting.fails = lambda *_, text=text: RuntimeError(text)
        with pytest.raises(RuntimeError, match=text[:5]):
            waiting.warm(10.0)
    assert len(waiting.tried) == 2


def test_the_backward_is_compiled_with_the_forward():
    """Of a compiled function, where this torch can be told so, the backward is there before the forward has run."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch import config

    if not hasattr(config, "force_non_lazy_backward_lowering"):
        pytest.skip("this torch cannot be told")
    seen = []
    backend = aot_autograd(fw_compiler=lambda module, _: seen.append("forward") or module,
                           bw_compiler=lambda module, _: seen.append("backward") or module)  # fmt: skip
    with config.patch(force_non_lazy_backward_lowering=False):  # torch's own patch: pytest's leaves it hidden
        for told in (False, True):
            if told:
                gpu_worker.compile_backward_first()
            torch._dynamo.reset()
            seen.clear()
            torch.compile(lambda x: x.sin() * x, backend=backend)(torch.ones(3, requires_grad=True))
            assert seen == ["forward", "backward"][: 1 + told]


def test_a_worker_that_dies_or_hangs_is_an_error(tmp_path, monkeypatch):
    """Its row gets the text, and the process is gone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dies.py").write_text("import sys; sys.exit(3)")
    (tmp_path / "hangs.py").write_text("import time; time.sleep(60)")
    dies, hangs = Worker("dies", {}), Worker("hangs", {})
    for _ in range(2):
        assert "ended early with exit code 3" in gpu.hear(dies, 20)["error"]
    assert "TimeoutError" in gpu.ask(hangs, 0.05, "turn")["error"] and hangs.process.poll() is not None
    assert "error" in gpu.ask(hangs, 5, "turn")  # asked again, it is still an error


def test_the_table_of_failures():
    """A report of nothing but errors is a report."""
    record = {"about": {"device": "x", "command": "c", "date": "d", "dtype": "bfloat16", "peak": None,
                        "ceilings": {"flops": 1.0, "bytes": 1.0}, "versions": {"torch": "", "triton": "", "git": ""}},
              "sizes": [{"size": "124M", "who": "nanochin", "kind": "graph", "error": "a | b"}],
              "splits": [{"size": "124M", "error": "e"}]}  # fmt: skip
    text = gpu.markdown(json.loads(json.dumps(record)))
    assert "a / b" in text and "where its time goes: e" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to time")
def test_without_a_gpu_there_is_nothing_to_time(monkeypatch):
    """One line that says so."""
    monkeypatch.setattr(sys, "argv", ["gpu", "--sizes", "10M"])
    with pytest.raises(UserError, match="no CUDA device here"):
        gpu.main()
    monkeypatch.setattr(sys, "argv", ["gpu", "--sizes", "10M", "moon"])
    with pytest.raises(UserError, match="--sizes moon: choose from 124M, 50M"):
        gpu.main()
    monkeypatch.setattr(sys, "argv", ["gpu", "--nanogpt", "/nowhere"])
    with pytest.raises(UserError, match="no model.py there"):
        gpu.main()
