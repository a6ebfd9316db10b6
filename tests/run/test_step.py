"""The three kinds of a training step. Where there is no GPU a stand-in for the CUDA graph calls the recorded function
again on the same buffers and hands out the same tensor, which is all that a replay does."""

import dataclasses
import functools
import gc
import itertools
import json
import math
import threading
import time
import weakref
from contextlib import contextmanager
from pathlib import Path

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
from nanochin.run.step import (
    CHOICES,
    WARM_UP,
    CudaGraph,
    SequenceTooLarge,
    Shards,
    TrainingStep,
    out_of_memory,
    pick_step,
    thread_shards,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
CUDA = torch.cuda.is_available()
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-3}  # of a loss: rounding, as it grows over some tens of steps


class Replay:
    """The stand-in for CudaGraph."""

    def __init__(self, function, reserve, stream=None):
        self.function, self.output = function, None

    def __call__(self):
        pair = self.function()
        self.output = pair if self.output is None else self.output.copy_(pair)
        return self.output


@pytest.fixture
def kind(monkeypatch):
    """`kind("graph")`: train.py steps that way on this CPU from here on; compiling without code generation."""

    def choose(name):
        monkeypatch.setattr(train, "pick_step", lambda *_: (name, "as the test says"))
        monkeypatch.setattr(train, "TrainingStep", functools.partial(TrainingStep, capture=Replay))

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    return choose


def losses(config):
    folder = Path(config.out) / train.train(config, quiet=True)["name"]
    return [(row["loss"], row["grad_norm"]) for row in read_log(folder) if "loss" in row]


def made(kind="eager", function=train.train_step, micro_batch=4, device=CPU, say=print, capture=Replay, **options):
    """(step, model) of width 16."""
    model = GPT(make_shape(16, 1, vocab_size=31, seq_len=8, **options)).to(device)
    optimizer = Adam(model, "adamw", 0.01, (0.9, 0.95), 0.1)
    return TrainingStep(kind, function, model, optimizer, micro_batch, 1.0, 0, say, capture), model


def batches(count, sequences=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(31, (sequences, 9), generator=generator) for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# The same losses


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["graph", "compile"])
def test_kinds_agree(tiny, kind, name, dtype):
    """Losses and gradient norms of 20 steps, four sequences cut into 3 and 1, are those of eager steps to rounding."""
    usual = {"tokens": 20 * 128.0, "log_every": 1, "micro_batch": 3, "dtype": dtype}
    expected = losses(tiny(out=tiny().out + "0", **usual))
    kind(name)
    got = losses(tiny(**usual))
    assert len(got) == 20 and expected[-1][0] < expected[0][0] - 0.5
    assert list(itertools.chain(*got)) == pytest.approx(list(itertools.chain(*expected)), rel=TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["graph", "compile"])
def test_resume_in_the_middle(tiny, kind, name, monkeypatch):
    """A run that dies between two checkpoints and goes on logs what an undisturbed one of its kind logs."""
    kind(name)
    usual = {"tokens": 20 * 128.0, "log_every": 1, "save_steps": (9,)}
    expected = losses(tiny(out=tiny().out + "0", **usual))
    real, calls = train.train_step, itertools.count(1)
    monkeypatch.setattr(train, "train_step", lambda *args: 1 / 0 if next(calls) == 14 else real(*args))
    with pytest.raises(ZeroDivisionError):
        losses(tiny(**usual))
    monkeypatch.setattr(train, "train_step", real)
    assert losses(tiny(**usual)) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kinds_agree_on_a_gpu(dtype):
    """Twenty steps, recorded by CUDA and compiled by torch, have the losses of eager ones to rounding."""
    shape = make_shape(128, 2, vocab_size=1000, seq_len=64)
    data = [torch.randint(1000, (6, 65), generator=torch.Generator().manual_seed(i % 4)) for i in range(20)]
    found = {}
    for name in step.KINDS:
        model = GPT(shape, dtype=dtype).to("cuda")
        optimizer = Adam(model, "adamw", 0.01, (0.9, 0.95), 0.1)
        said = []
        train_on = TrainingStep(name, train.train_step, model, optimizer, 4, 1.0, 0, said.append)
        found[name] = [train_on(batch, 0.003)[0] for batch in data]
        assert said == [] and train_on.kind == name
    for name in ("compile", "graph"):
        got, want = (torch.stack(found[key]).tolist() for key in (name, "eager"))
        assert got == pytest.approx(want, rel=1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("name", step.KINDS)
def test_train_on_a_gpu(tiny, name, monkeypatch, capsys):
    """train.py itself, in each kind: evaluations between the steps, a death, going on from a checkpoint and a sample at
    the end give the log of an undisturbed run, and nearly that of a CPU."""
    monkeypatch.setattr(train, "peak_of", peak_of)
    usual = {"tokens": 20 * 128.0, "log_every": 1, "eval_every": 5, "save_steps": (9,), "micro_batch": 3}
    found = [losses(tiny(out=tiny().out + where, device=where, step=how, **usual))
             for where, how in (("cpu", "eager"), ("cuda", name))]  # fmt: skip
    assert found[1] == [pytest.approx(pair, rel=1e-3) for pair in found[0]]
    real = train.log_row
    monkeypatch.setattr(train, "log_row", lambda job, number, *rest: real(job, number, *rest) if number < 14 else 1 / 0)
    config = tiny(device="cuda", step=name, sample_tokens=40, **usual)
    with pytest.raises(ZeroDivisionError):
        train.train(config)
    monkeypatch.setattr(train, "log_row", real)
    assert losses(config) == [pytest.approx(pair, rel=1e-5) for pair in found[1]]
    (folder,) = Path(config.out).iterdir()
    assert json.loads((folder / "config.json").read_text())["step"] == [name, "as asked"]
    assert len([row for row in read_log(folder) if "val_loss" in row]) == 4
    train.train(dataclasses.replace(config, seed=1))
    said = capsys.readouterr().out
    assert "----- a sample -----" in said and "falling back to eager" not in said


# ---------------------------------------------------------------------------------------------------------------------
# Buffers and rates


@pytest.mark.parametrize("name", ["eager", "graph"])
def test_nothing_is_shared_with_the_caller(name):
    """A batch may be overwritten once the step has it, and what a step returned is not changed by the next."""
    train_on, _ = made(name)
    kept, _ = made(name)
    want = [kept(batch.clone(), 0.01).tolist() for batch in batches(8)]
    buffer, got = torch.empty(6, 9, dtype=torch.long), []
    for batch in batches(8):
        got.append(train_on(buffer.copy_(batch), 0.01))
        buffer.zero_()
    assert [pair.tolist() for pair in got] == want


def test_a_recorded_step_sees_each_rate():
    """The rate that a recorded step reads is a tensor that stays in its place and holds the rate of the step."""
    rates, places = [], set()

    def spy(shards, optimizer, *rest):
        rates.append(optimizer.lr.item())
        places.add(optimizer.lr.data_ptr())
        return train.train_step(shards, optimizer, *rest)

    train_on, _ = made("graph", spy)
    for rate, batch in zip((0.5, 0.25, 0.125, 0.0, 1.0), batches(5), strict=True):
        train_on(batch, rate)
    assert rates == [0.5, 0.25, 0.125, 0.0, 1.0] and len(places) == 1


def test_a_batch_of_another_size_is_recorded_anew():
    """A recording is of one shape; a smaller batch is neither broadcast into its buffer nor refused."""
    train_on, model = made("graph")
    kept, same = made("eager")
    for batch in (*batches(3), *batches(2, sequences=1)):
        pair, want = train_on(batch, 0.01), kept(batch, 0.01)
        assert pair.tolist() == pytest.approx(want.tolist(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# CPU threads


SHARES = [
    # threads, sequences, seq_len, width: members, threads of each
    (
        2,
        4,
        128,
        24,
        (1, 1),
    ),  # measured on two cores: 12.2 ms a step, with two members 16.7, with two threads inside 32.6
    (2, 4, 128, 64, (2, 1)),  # 17.4 ms; with one thread 20.7
    (2, 5, 256, 96, (2, 1)),  # 52 ms; with one thread 84, with two inside 90
    (2, 1, 1024, 256, (1, 2)),  # one sequence cannot be shared out
    (8, 2, 512, 256, (2, 1)),  # six threads too many
    (8, 16, 2048, 768, (8, 1)),
    (64, 2, 1024, 768, (2, 6)),
    (8, 0, 128, 64, (1, 1)),
]


@pytest.mark.parametrize("threads, sequences, seq_len, width, expected", SHARES)
def test_threads_are_used_where_they_pay(threads, sequences, seq_len, width, expected):
    """A share for as many threads as there are sequences and work for; inside operations only where these are large."""
    assert thread_shards(threads, sequences, seq_len, width) == expected


def test_members_have_threads_of_their_own(four_threads):
    """Two members use two threads each in their operations, as ours does within the block; then it has four again."""
    shards, seen = Shards(torch.nn.Linear(1, 1), 2, 2), {}
    meet = threading.Barrier(2)  # each member takes one

    def threads(model, x):
        meet.wait(10)
        seen[threading.get_ident()] = torch.get_num_threads()
        model(x).backward()
        return torch.zeros(())

    assert torch.get_num_threads() == 4
    with shards:
        shards.run(threads, torch.zeros(2, 1))
        assert list(seen.values()) == [2, 2] and threading.get_ident() not in seen
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 4


def test_threads_stay_as_they_are_where_nothing_is_said(four_threads):
    """One member, as on a GPU, computes on our own thread with as many threads as it had."""
    shards, here = Shards(torch.nn.Linear(1, 1)), (threading.get_ident(), 4)
    with pytest.raises(ZeroDivisionError), shards:
        assert shards.run(lambda *_: (threading.get_ident(), torch.get_num_threads()), torch.zeros(2)) == here
        raise ZeroDivisionError
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("members, sequences", [(2, 2), (4, 6), (4, 5), (3, 1)])  # 5 make three shares of 2, 2 and 1
def test_shards_add_up(four_threads, members, sequences):
    """Losses and gradients are the sums over all sequences, also on a second call and with fewer shares than members;
    the replicas see weights that change, and an error of one of them is raised here."""
    model = torch.nn.Linear(3, 1, bias=False).double()
    shards = Shards(model, members)

    def square(replica, x):
        loss = replica(x).square().sum()
        loss.backward()
        time.sleep(0.02 * (x[0, 0].item() > 0))
        return loss.detach()

    for _ in range(2):
        batch, weight = torch.randn(sequences, 3, dtype=torch.float64), model.weight.detach()
        loss = shards.run(square, batch)
        assert loss.item() == pytest.approx((batch @ weight.T).square().sum().item())
        assert torch.allclose(model.weight.grad, 2 * (batch @ weight.T).T @ batch)
        model.zero_grad()
        with torch.no_grad():
            model.weight.add_(1.0)
    with pytest.raises(ZeroDivisionError):
        shards.run(lambda *_: 1 / 0, batch)


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize("broken_off", [False, True])
def test_out_of_memory_captures_smaller_pieces(broken_off):
    """Out of memory, also where a capture broken off by it ends in another error: half the micro-batch, captured
    anew, and the losses of the undisturbed run."""
    calls, sizes, captures = itertools.count(1), [], []

    def short(shards, optimizer, batch, micro_batch, *rest):
        sizes.append(micro_batch)
        if next(calls) in (5, 6):
            shards.models[0](batch[:1, :-1], batch[:1, 1:]).backward()  # it had begun
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                if broken_off:
                    raise RuntimeError("the capture was invalidated")
        return train.train_step(shards, optimizer, batch, micro_batch, *rest)

    def capture(function, reserve, stream):
        captures.append(reserve)
        return Replay(function, reserve)

    train_on, _ = made("graph", short, capture=capture)
    kept, _ = made("eager")
    got, want = [[one(batch, 0.01)[0].item() for batch in batches(8)] for one in (train_on, kept)]
    assert sizes == [4, 4, 4, 4, 4, 2, 1, 1, 1, 1] and len(captures) == 3
    assert captures[0] > 0 and captures[2] == 0  # one sequence at a time may fill the device
    assert train_on.kind == "graph" and got == pytest.approx(want, rel=1e-5)


def test_one_sequence_that_does_not_fit():
    """Not even one sequence: a SequenceTooLarge that names the shape."""

    def short(*_):
        raise torch.OutOfMemoryError

    with pytest.raises(SequenceTooLarge, match="one sequence of 8 tokens through 16x1 does not fit cpu"):
        made("graph", short)[0](batches(1)[0], 0.01)


@pytest.mark.parametrize("name, call", [("graph", 1), ("graph", WARM_UP + 1), ("compile", 1)])
def test_what_cannot_be_recorded_runs_eager(name, call, kind):
    """A kind that fails in its first steps says so once and gives way to eager, which repeats that step."""
    said, calls = [], itertools.count(1)

    def broken(*args):
        if next(calls) == call:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return train.train_step(*args)

    train_on, _ = made(name, broken, say=said.append)
    kept, _ = made("eager")
    got, want = [[one(batch, 0.01)[0].item() for batch in batches(6)] for one in (train_on, kept)]
    assert train_on.kind == "eager" and got == pytest.approx(want, rel=1e-5)
    assert said == [f"step {name} failed, falling back to eager: RuntimeError: operation not permitted when stream is "
                    "capturing"]  # fmt: skip


def test_an_eager_step_on_a_cpu_leaves_threads_idle(four_threads):
    """A step too small for four threads computes on one; all else, and what is compiled, has the four."""
    seen = []

    def function(*_):
        seen.append(torch.get_num_threads())
        return torch.zeros(2)

    for name in ("eager", "graph"):
        train_on, _ = made(name, function)
        train_on(batches(1)[0], 0.01)
        assert torch.get_num_threads() == 4
    assert seen[0] == 1 and set(seen[1:]) == {4}


@pytest.mark.parametrize("name", ["eager", "graph"])
def test_later_errors_are_not_hidden(name):
    """An error after the first steps, or of an eager step, is raised as it is."""
    calls, said = itertools.count(1), []
    last = 1 if name == "eager" else WARM_UP + 2
    train_on, _ = made(name, lambda *args: 1 / (last - next(calls)) and train.train_step(*args), say=said.append)
    with pytest.raises(ZeroDivisionError):
        for batch in batches(9):
            train_on(batch, 0.01)
    assert said == [] and next(calls) == last + 1


def test_memory_of_a_failed_attempt_is_free_before_the_next():
    """What a step had allocated when it ran out of memory is gone when the smaller one begins."""
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
        made("graph", short)[0](batches(1)[0], 0.01)
    finally:
        gc.enable()
    assert len(leftovers) == 2


# ---------------------------------------------------------------------------------------------------------------------
# No waiting: tensors on the meta device have no values, so that whatever would read one fails


@pytest.mark.parametrize("implementation", ["fallback", "triton"])
@pytest.mark.parametrize("name", ["eager", "graph"])
@pytest.mark.parametrize("options", [
    {"qk_norm": True},
    {"norm": "layernorm", "positions": "learned", "activation": "swiglu", "bias": True, "tied": False},
])  # fmt: skip
def test_a_step_does_not_wait(implementation, name, options, monkeypatch):
    """No operation of a step needs a value on the host, be it PyTorch's or, by their declarations, our kernels'."""
    if implementation == "triton":
        pytest.importorskip("triton")
        from interpreted import load_all

        load_all()
    adam, updates = torch._fused_adamw_, []
    if name == "graph":  # of the two Adams in torch this one has no declaration for meta tensors

        def adam(*_, lr, **__):
            assert lr.device.type == "meta"

    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, **kw: updates.append(1) or adam(*args, **kw))
    train_on, _ = made(name, device="meta", **options)
    with kernels.use(implementation):
        pairs = [train_on(batch, 0.01) for batch in batches(5)]
    assert len(updates) >= 5 and all(pair.shape == (2,) and pair.device.type == "meta" for pair in pairs)


@pytest.mark.parametrize("wait", ["item", "cpu", "nonzero"])
def test_waiting_is_noticed(wait):
    """The same check fails for a step that reads its loss."""

    def waits(*args):
        pair = train.train_step(*args)
        getattr(pair, wait)() if wait != "item" else pair[0].item()
        return pair

    with pytest.raises((RuntimeError, NotImplementedError)):
        made("eager", waits, device="meta")[0](batches(1)[0], 0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Which kind


def test_choices():
    """A CPU steps eagerly, a GPU by graph, and each row of the table says whether that was measured."""
    assert pick_step("auto", CPU, 10**6)[0] == "eager"
    assert pick_step("auto", torch.device("cuda", 0), 10**9)[0] == "graph"
    assert all(row.why.startswith(("measured", "assumed, not measured")) for row in CHOICES)
    for device in ("cpu", "mps", "cuda"):  # every device has rows up to any size, in order
        rows = [row for row in CHOICES if row.device == device]
        assert rows[-1].params == math.inf and rows == sorted(rows, key=lambda row: row.params)
        assert all(row.kind in step.KINDS for row in rows)
    assert pick_step("compile", CPU, 1) == ("compile", "as asked")


def test_impossible_choices(monkeypatch, refusal, tiny):
    """A graph needs CUDA and compiling for CUDA needs triton: one line that says what to do."""
    said = refusal("--step=graph", "--device=cpu", f"--data={tiny().data[0]}", f"--cache={tiny().cache}")
    assert "--step graph: CUDA graphs need a CUDA device, this is cpu; use eager or compile" in said
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    with pytest.raises(UserError, match="needs triton, which is not installed; use graph"):
        pick_step("compile", torch.device("cuda", 0), 1)


@pytest.mark.parametrize("version, known", [("2.11.0", True), ("2.13.0+cpu", False)])
def test_older_compilers_are_told_of_the_loss(monkeypatch, version, known):
    """Or they would take minutes to write it down; from 2.13 on they do not."""
    lowering = pytest.importorskip("torch._inductor.lowering")
    monkeypatch.setattr(lowering, "FALLBACK_ALLOW_LIST", set())
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    model = torch.nn.Linear(1, 1)
    assert step.compiled(model)._orig_mod is model
    assert lowering.FALLBACK_ALLOW_LIST == ({"nanochin::linear_cross_entropy"} if known else set())


def test_the_record_names_it(tiny, capsys):
    """config.json and the plan on the screen say how steps run and how numbers are multiplied; the run is the same."""
    config = tiny(step="eager")
    folder = Path(config.out) / train.train(config)["name"]
    record = json.loads((folder / "config.json").read_text())
    assert record["step"] == ["eager", "as asked"] and "step" not in record["identity"]
    assert record["precision"] == {"activations": "float32", "weights": "float32", "float32_matmul": "highest",
                                   "bf16_reduced_precision_reduction": True}  # fmt: skip
    assert any(line.split()[:2] == ["step", "eager"] for line in capsys.readouterr().out.splitlines())


# ---------------------------------------------------------------------------------------------------------------------
# CudaGraph's calls of torch.cuda


@pytest.fixture
def cuda_calls(monkeypatch):
    """What is asked of torch.cuda, in order; the free memory is calls.free."""

    class Calls(list):
        free = 100

    calls, here = Calls(), ["main"]

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def stream(side):
        here.append(side.name)
        try:
            yield
        finally:
            here.pop()

    class Graph:
        def replay(self):
            calls.append(f"replay on {here[-1]}")

    @contextmanager
    def graph(_, stream):
        calls.append(f"record on {stream.name}")
        yield

    current, memory = lambda: Stream(here[-1]), lambda: (calls.free, 200)
    for name, value in (("Stream", Stream), ("stream", stream), ("CUDAGraph", Graph), ("graph", graph),
                        ("current_stream", current), ("mem_get_info", memory)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    calls.here = here
    return calls


def test_warm_up_record_replay(cuda_calls):
    """Three real steps on a stream that waits for ours and ours for it, one recording, then replays on our stream."""

    def function():
        cuda_calls.append(f"step on {cuda_calls.here[-1]}")
        return len(cuda_calls)

    graph = CudaGraph(function, 50, torch.cuda.Stream())
    outputs = [graph() for _ in range(5)]
    warm = ["side waits for main", "step on side", "main waits for side"]
    assert cuda_calls == [*3 * warm, "record on side", "step on side", "replay on main", "replay on main"]
    assert outputs[3] == outputs[4] and len(set(outputs)) == 4


def test_a_recording_leaves_room(cuda_calls):
    """A recording that leaves less than the reserve counts as out of memory, before it has trained anything."""
    graph = CudaGraph(lambda: 0, 50, torch.cuda.Stream())
    for _ in range(3):
        graph()
    cuda_calls.free = 49
    with pytest.raises(torch.OutOfMemoryError):
        graph()
    assert not any("replay" in call for call in cuda_calls) and cuda_calls.here == ["main"]


def test_out_of_memory_behind_another_error():
    """Found behind errors that followed it or were made of it, and nowhere else."""
    memory, other = torch.OutOfMemoryError("full"), RuntimeError("other")
    assert out_of_memory(memory) and not out_of_memory(other) and not out_of_memory(None)
    other.__context__ = memory
    assert out_of_memory(other)


@pytest.mark.parametrize("text", [
    "CUDA error: out of memory", "Triton Error [CUDA]: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
])  # fmt: skip
def test_others_that_run_out_of_memory(text):
    """The driver, Triton and cuBLAS say it in a RuntimeError; a file that says it is none of the device's."""
    assert out_of_memory(RuntimeError(text)) and not out_of_memory(OSError(text))


def test_recordings_share_a_stream(cuda_calls):
    """cuBLAS keeps a workspace for every stream: however often a step is recorded anew, it is on the same one."""
    train_on, _ = made("graph")
    streams, train_on.stream = [], torch.cuda.Stream()
    train_on.capture = lambda function, reserve, stream: streams.append(stream) or Replay(function, reserve)
    for batch in batches(3):
        train_on(batch, 0.01)
        train_on.cut(2)
    assert streams == 3 * [train_on.stream]
