"""The three kinds of a training step. Without a GPU, a mock CUDA graph calls the captured function again on the same
buffers and returns the same tensor, as a replay does."""

import dataclasses
import functools
import gc
import itertools
import json
import threading
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels
import train
from nanochin.base.cli import UserError
from nanochin.config import make_shape
from nanochin.model import GPT
from nanochin.run import step
from nanochin.run.device import peak_of
from nanochin.run.folder import read_log
from nanochin.run.optim import Adam
from nanochin.run.step import Shards, TrainingStep, out_of_memory, pick_step, thread_shards

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-3}  # of a loss: rounding after 20 steps


class Replay:
    """A mock CudaGraph."""

    def __init__(self, function, reserve, stream=None):
        self.function, self.output = function, None

    def __call__(self):
        pair = self.function()
        self.output = pair if self.output is None else self.output.copy_(pair)
        return self.output


@pytest.fixture
def kind(monkeypatch):
    """`kind("graph")`: train.py then uses that kind on this CPU; torch.compile generates no code."""

    def choose(name):
        monkeypatch.setattr(train, "pick_step", lambda *_: (name, "as the test says"))
        monkeypatch.setattr(train, "TrainingStep", functools.partial(TrainingStep, capture=Replay))

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    return choose


def losses(config):
    folder = Path(config.out) / train.train(config, quiet=True)["name"]
    return [(row["loss"], row["grad_norm"]) for row in read_log(folder) if "loss" in row]


def made(kind="eager", function=train.train_step, micro_batch=4, device=CPU, say=print, capture=Replay, **options):
    """A step of a model of width 16."""
    model = GPT(make_shape(16, 1, vocab_size=31, seq_len=8, **options)).to(device)
    optimizer = Adam(model, "adamw", 0.01, (0.9, 0.95), 0.1, False)
    return TrainingStep(kind, function, model, optimizer, micro_batch, 1.0, 0, say, capture)


def batches(count, sequences=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(31, (sequences, 9), generator=generator) for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# The same losses


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["graph", "compile"])
def test_kinds_agree(tiny, kind, name, dtype, monkeypatch):
    """Losses and gradient norms of 20 steps with micro-batches of 3 and 1 equal those of eager steps up to rounding. A
    run that fails between two checkpoints and resumes logs the same as an uninterrupted one."""
    usual = {"tokens": 20 * 128.0, "log_every": 1, "micro_batch": 3, "dtype": dtype, "save_steps": (9,)}
    expected = losses(tiny(out=tiny().out + "0", **usual))
    kind(name)
    got = losses(tiny(out=tiny().out + "1", **usual))
    assert len(got) == 20 and expected[-1][0] < expected[0][0] - 0.5
    assert list(itertools.chain(*got)) == pytest.approx(list(itertools.chain(*expected)), rel=TOLERANCE[dtype])
    if dtype == "float32":
        real, calls = train.train_step, itertools.count(1)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(train, "train_step", lambda *args: 1 / 0 if next(calls) == 14 else real(*args))
            losses(tiny(**usual))
        assert losses(tiny(**usual)) == got


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ("eager", "compile", "graph"))
def test_train_on_a_gpu(tiny, name, monkeypatch, capsys):
    """train.py in each kind: with evaluations, a failure, a resume and a sample, the log is that of an uninterrupted
    run, and that of a CPU to 1e-3."""
    monkeypatch.setattr(train, "peak_of", peak_of)
    usual = {"tokens": 20 * 128.0, "log_every": 1, "eval_every": 5, "save_steps": (9,), "micro_batch": 3}
    found = [losses(tiny(out=tiny().out + where, device=where, step=how, **usual))
             for where, how in (("cpu", "eager"), ("cuda", name))]  # fmt: skip
    assert found[1] == [pytest.approx(pair, rel=1e-3) for pair in found[0]]
    real = train.log_row
    monkeypatch.setattr(train, "log_row", lambda setup, n, *rest: real(setup, n, *rest) if n < 14 else 1 / 0)
    config = tiny(device="cuda", step=name, sample_tokens=40, **usual)
    with pytest.raises(ZeroDivisionError):
        train.train(config)
    monkeypatch.setattr(train, "log_row", real)
    assert losses(config) == [pytest.approx(pair, rel=1e-5) for pair in found[1]]
    (folder,) = Path(config.out).iterdir()
    assert json.loads((folder / "config.json").read_text())["step"] == [name, "as requested"]
    assert len([row for row in read_log(folder) if "val_loss" in row]) == 5
    train.train(dataclasses.replace(config, seed=1))
    said = capsys.readouterr().out
    assert "----- a sample -----" in said and "falling back to eager" not in said


@pytest.mark.parametrize("name", ["eager", "graph"])
def test_buffers_are_not_shared_with_the_caller(name):
    """The caller may overwrite a batch after the step, and the next step does not change what this one returned."""
    train_on, kept = made(name), made(name)
    want = [kept(batch.clone(), 0.01).tolist() for batch in batches(8)]
    buffer, got = torch.empty(6, 9, dtype=torch.long), []
    for batch in batches(8):
        got.append(train_on(buffer.copy_(batch), 0.01))
        buffer.zero_()
    assert [pair.tolist() for pair in got] == want


def test_captured_step_reads_each_learning_rate():
    """The learning rate of a captured step is a tensor at a fixed address with the rate of the step."""
    seen = []

    def spy(shards, optimizer, *rest):
        seen.append((optimizer.lr.item(), optimizer.lr.data_ptr()))
        return train.train_step(shards, optimizer, *rest)

    train_on, rates = made("graph", spy), (0.5, 0.25, 0.125, 0.0, 1.0)
    for rate, batch in zip(rates, batches(5), strict=True):
        train_on(batch, rate)
    assert seen == [(rate, seen[0][1]) for rate in rates]


# ---------------------------------------------------------------------------------------------------------------------
# CPU threads


SHARDS = [  # threads, sequences, seq_len, width; shards, threads inside each. Times of a step on two cores.
    (2, 4, 128, 24, (1, 1)),  # 12.2 ms; two shards 16.7, two threads inside 32.6
    (2, 5, 256, 96, (2, 1)),  # 52 ms; one thread 84, two threads inside 90
    (2, 1, 1024, 256, (1, 2)),  # one sequence cannot be split
    (8, 2, 512, 256, (2, 1)),  # six threads stay idle
    (64, 2, 1024, 768, (2, 6)),
    (8, 0, 128, 64, (1, 1)),
]


@pytest.mark.parametrize("threads, sequences, seq_len, width, expected", SHARDS)
def test_thread_shards(threads, sequences, seq_len, width, expected):
    """As many shards as there are sequences and work for; threads inside operations only for large ones."""
    assert thread_shards(threads, sequences, seq_len, width) == expected


def test_threads_of_shards(four_threads):
    """Two shards use two threads each in their operations, as the caller does within the block, then four again."""
    shards, seen = Shards(torch.nn.Linear(1, 1), 2, 2), {}
    meet = threading.Barrier(2)  # so that each thread takes one shard

    def threads(model, x):
        meet.wait(10)
        seen[threading.get_ident()] = torch.get_num_threads()
        model(x).backward()
        return torch.zeros(())

    with pytest.raises(ZeroDivisionError), shards:
        shards.run(threads, torch.zeros(2, 1))
        assert list(seen.values()) == [2, 2] and threading.get_ident() not in seen
        assert torch.get_num_threads() == 2
        raise ZeroDivisionError
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("count, sequences", [(4, 5), (3, 1)])  # 5 are split into 2, 2 and 1
def test_shards_add_up(four_threads, count, sequences):
    """Losses and gradients are sums over all sequences, also on a second call and with fewer sequences than shards.
    Replicas see the changed weights, and their errors are raised."""
    model = torch.nn.Linear(3, 1, bias=False).double()
    shards = Shards(model, count)

    def square(replica, x):
        loss = replica(x).square().sum()
        loss.backward()
        return loss.detach()

    for _ in range(2):
        batch, weight = torch.randn(sequences, 3, dtype=torch.float64), model.weight.detach()
        assert shards.run(square, batch).item() == pytest.approx((batch @ weight.T).square().sum().item())
        assert torch.allclose(model.weight.grad, 2 * (batch @ weight.T).T @ batch)
        model.zero_grad()
        with torch.no_grad():
            model.weight.add_(1.0)
    with pytest.raises(ZeroDivisionError):
        shards.run(lambda *_: 1 / 0, batch)


# ---------------------------------------------------------------------------------------------------------------------
# Failures


@pytest.mark.parametrize("broken_off", [False, True])
def test_out_of_memory_halves_the_micro_batch(broken_off):
    """Out-of-memory, also if the capture then fails with another error: half the micro-batch, captured again, and the
    losses of an eager run. All captures are on one stream: cuBLAS keeps a workspace for each."""
    calls, sizes, captures = itertools.count(1), [], []

    def short(shards, optimizer, batch, micro_batch, *rest):
        sizes.append(micro_batch)
        if next(calls) in (5, 6):
            shards.models[0](batch[:1, :-1], batch[:1, 1:]).backward()  # leaves a gradient
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                if broken_off:
                    raise RuntimeError("the capture was invalidated")
        return train.train_step(shards, optimizer, batch, micro_batch, *rest)

    def capture(function, reserve, stream):
        captures.append((reserve, stream))
        return Replay(function, reserve)

    train_on, kept = made("graph", short, capture=capture), made("eager")
    train_on.stream = object()
    got, want = [[one(batch, 0.01)[0].item() for batch in batches(8)] for one in (train_on, kept)]
    assert sizes == [4, 4, 4, 4, 4, 2, 1, 1, 1, 1]
    reserve = step.TrainingStep.RESERVE  # 0 with one sequence at a time
    assert captures == [(size, train_on.stream) for size in (reserve, reserve, 0)]
    assert train_on.kind == "graph" and got == pytest.approx(want, rel=1e-5)


def test_one_sequence_that_does_not_fit():
    """Raises SequenceTooLarge, which names the shape, if not even one sequence fits."""

    def short(*_):
        raise torch.OutOfMemoryError

    with pytest.raises(step.SequenceTooLarge, match="8 tokens through 16x1"):
        made("graph", short)(batches(1)[0], 0.01)


@pytest.mark.parametrize("name, call", [("graph", 1), ("graph", step.WARM_UP + 1), ("compile", 1)])
def test_fall_back_to_eager(name, call, kind):
    """A kind that fails in its first steps reports it once and falls back to eager, which repeats that step."""
    said, calls = [], itertools.count(1)

    def broken(*args):
        if next(calls) == call:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return train.train_step(*args)

    train_on, kept = made(name, broken, say=said.append), made("eager")
    got, want = [[one(batch, 0.01)[0].item() for batch in batches(6)] for one in (train_on, kept)]
    assert train_on.kind == "eager" and got == pytest.approx(want, rel=1e-5)
    (line,) = said
    assert name in line and "permitted when stream is capturing" in line


@pytest.mark.parametrize("name, inside", [("eager", 1), ("graph", 4)])
def test_small_eager_step_leaves_threads_idle(four_threads, name, inside):
    """An eager step too small for four threads uses one; other kinds, and everything outside the step, use four."""
    seen = []
    made(name, lambda *_: seen.append(torch.get_num_threads()) or torch.zeros(2))(batches(1)[0], 0.01)
    assert set(seen) == {inside} and torch.get_num_threads() == 4


@pytest.mark.parametrize("name", ["eager", "graph"])
def test_later_errors_are_not_hidden(name):
    """An error after the first steps, or in an eager step, is raised unchanged."""
    calls, said = itertools.count(1), []
    last = 1 if name == "eager" else step.WARM_UP + 2
    train_on = made(name, lambda *args: 1 / (last - next(calls)) and train.train_step(*args), say=said.append)
    with pytest.raises(ZeroDivisionError):
        for batch in batches(9):
            train_on(batch, 0.01)
    assert said == [] and next(calls) == last + 1


def test_memory_of_a_failed_attempt_is_free_before_the_next():
    """Memory allocated by a step that ran out of memory is freed before the smaller one starts."""
    leftovers = []

    def short(shards, optimizer, batch, micro_batch, *rest):
        assert all(tensor() is None for tensor in leftovers)
        if micro_batch > 1:
            activations = torch.zeros(10)
            leftovers.append(weakref.ref(activations))
            raise torch.OutOfMemoryError(activations.shape)
        return train.train_step(shards, optimizer, batch, micro_batch, *rest)

    gc.disable()
    try:
        made("graph", short)(batches(1)[0], 0.01)
    finally:
        gc.enable()
    assert len(leftovers) == 2


# ---------------------------------------------------------------------------------------------------------------------
# No synchronisation: tensors on the meta device have no values, so reading one fails


@pytest.mark.parametrize("implementation", ["fallback", "triton"])
@pytest.mark.parametrize("name", ["eager", "graph"])
@pytest.mark.parametrize("options", [
    {"qk_norm": True},
    {"norm": "layernorm", "positions": "learned", "activation": "swiglu", "bias": True, "tied": False},
])  # fmt: skip
def test_step_does_not_synchronise(implementation, name, options, monkeypatch):
    """No operation of a step, in PyTorch or (by their declarations) in our kernels, reads a value on the host."""
    if implementation == "triton":
        pytest.importorskip("triton")
        from interpreted import load_all

        load_all()
    adam, updates = torch._fused_adamw_, []
    if name == "graph":  # torch's Adam with the rate as a tensor has no meta implementation

        def adam(*_, lr, **__):
            assert lr.device.type == "meta"

    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, **kw: updates.append(1) or adam(*args, **kw))
    train_on = made(name, device="meta", **options)
    with kernels.use(implementation):
        pairs = [train_on(batch, 0.01) for batch in batches(5)]
    assert len(updates) >= 5 and all(pair.shape == (2,) and pair.device.type == "meta" for pair in pairs)


def test_pick_step(monkeypatch):
    """`auto` is eager on a CPU and graph on a GPU. A graph needs CUDA, and compiling for CUDA needs triton."""
    gpu = torch.device("cuda", 0)
    assert pick_step("auto", CPU)[0] == "eager" and pick_step("auto", gpu)[0] == "graph"
    assert pick_step("compile", CPU) == ("compile", "as requested")
    with pytest.raises(UserError, match="`step` graph: "):
        pick_step("graph", CPU)
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    with pytest.raises(UserError, match="`step` compile: "):
        pick_step("compile", gpu)


# ---------------------------------------------------------------------------------------------------------------------
# CudaGraph's calls of torch.cuda


@pytest.fixture
def cuda(monkeypatch):
    """A mock torch.cuda: its calls, the stack of streams, the free memory."""
    mock = SimpleNamespace(calls=[], here=["main"], free=100)

    def stream_named(name):
        return SimpleNamespace(name=name, wait_stream=lambda other: mock.calls.append(f"{name} waits for {other.name}"))

    @contextmanager
    def on_stream(stream):
        mock.here.append(stream.name)
        yield
        mock.here.pop()

    @contextmanager
    def capture(_, stream):
        mock.calls.append(f"capture on {stream.name}")
        yield

    functions = {
        "Stream": lambda: stream_named("side"),
        "current_stream": lambda: stream_named(mock.here[-1]),
        "stream": on_stream,
        "graph": capture,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: mock.calls.append(f"replay on {mock.here[-1]}")),
        "mem_get_info": lambda: (mock.free, 200),
    }
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return mock


def test_warm_up_capture_replay(cuda):
    """Three steps on a side stream, synchronised with the main one, one capture, then replays on the main stream."""

    def function():
        cuda.calls.append(f"step on {cuda.here[-1]}")
        return len(cuda.calls)

    graph = step.CudaGraph(function, 50, torch.cuda.Stream())
    outputs = [graph() for _ in range(5)]
    warm = ["side waits for main", "step on side", "main waits for side"]
    assert cuda.calls == [*3 * warm, "capture on side", "step on side", "replay on main", "replay on main"]
    assert outputs[3] == outputs[4] and len(set(outputs)) == 4


def test_capture_leaves_the_reserve(cuda):
    """A capture that leaves less than the reserve raises out-of-memory before it is replayed."""
    graph = step.CudaGraph(lambda: 0, 50, torch.cuda.Stream())
    for _ in range(3):
        graph()
    cuda.free = 49
    with pytest.raises(torch.OutOfMemoryError):
        graph()
    assert not any("replay" in call for call in cuda.calls) and cuda.here == ["main"]


def test_out_of_memory():
    """Recognised behind an error that followed it, and in a RuntimeError of the driver, Triton or cuBLAS."""
    memory, other = torch.OutOfMemoryError("full"), RuntimeError("other")
    assert out_of_memory(memory) and not out_of_memory(other)
    other.__context__ = memory
    assert out_of_memory(other)
    for text in ("CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"):
        assert out_of_memory(RuntimeError(text)) and not out_of_memory(OSError(text))
