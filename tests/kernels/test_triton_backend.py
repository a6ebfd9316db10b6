"""The whole model on Triton kernels (interpreted without a GPU), and the choice of the implementation."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from interpreted import CUDA, DEVICE, MARKS, flop_formulas, load_all, skip_if_it_cannot_interpret
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import ops
from nanochin.config import make_shape
from nanochin.model import GPT
from nanochin.plan.flops import count_flops

pytestmark = MARKS
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def batch(shape, sequences, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shape.vocab_size, (sequences, shape.seq_len + 1), generator=generator).to(DEVICE)


def train(implementation, shape, steps):
    """Losses of `steps` steps on one sequence. Plain gradient descent: Adam would take full steps along gradients that
    are only rounding error, such as those of the key biases."""
    model, tokens = GPT(shape, z_loss=1e-4).to(DEVICE), batch(shape, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with kernels.use(implementation):
        for _ in range(steps):
            loss = model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("options", [
    {},
    {"qk_norm": True},
    {"norm": "layernorm", "positions": "learned", "activation": "swiglu", "bias": True, "tied": False},
])  # fmt: skip
def test_training_gives_the_same_losses(options):
    """20 steps on Triton kernels and on PyTorch operations: relative differences of the losses are at most 1e-5, from
    the order of float32 sums, and far below the drop in loss."""
    load_all()
    shape = make_shape(24, 1, vocab_size=101, seq_len=20, head_size=12, **options)
    ours, theirs = train("triton", shape, 20), train("fallback", shape, 20)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours != theirs and theirs[-1] < theirs[0] - 0.5


@pytest.mark.parametrize("options", [{}, {"activation": "swiglu", "tied": False, "qk_norm": True, "norm": "layernorm"}])
def test_flops(options):
    """FlopCounterMode counts exactly the `physical` FLOPs on Triton kernels: forward and backward in
    training, only forward in evaluation."""
    load_all()
    shape = make_shape(24, 2, vocab_size=77, seq_len=20, head_size=12, **options)
    model, tokens = GPT(shape).to(DEVICE), batch(shape, 2)
    physical = count_flops(shape, 2 * 20)["physical"]
    with kernels.use("triton"):
        with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as training:
            model(tokens[:, :-1], tokens[:, 1:]).backward()
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=flop_formulas()) as evaluation:
            model(tokens[:, :-1], tokens[:, 1:])
    assert training.get_total_flops() == physical
    assert evaluation.get_total_flops() == physical / 3


def test_the_model_compiles_to_one_graph():
    """torch.compile has no graph break in the whole model; loss and gradients are bit-identical."""
    load_all()
    shape = make_shape(24, 1, vocab_size=77, seq_len=20, head_size=12, qk_norm=True)
    model, tokens = GPT(shape).to(DEVICE), batch(shape, 1)
    passes = []
    with kernels.use("triton"):
        for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            loss = run(tokens[:, :-1], tokens[:, 1:])
            passes.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*passes, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_cuda_graph():
    """A captured forward and backward pass replays to the loss and gradients of an eager one."""
    shape = make_shape(256, 2, vocab_size=1000, seq_len=100)
    model, tokens = GPT(shape, dtype=torch.bfloat16).to(DEVICE), batch(shape, 4)
    parameters = list(model.parameters())

    def step():
        loss = model(tokens[:, :-1], tokens[:, 1:])
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and fills caches
        want = [x.clone() for x in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.testing.assert_close(list(captured), want)


def test_use_triton_restores():
    """In the block it is Triton on any device; afterwards the previous implementation."""
    load_all()
    x, weight = torch.ones(2, 4, device=DEVICE), torch.ones(4, device=DEVICE, requires_grad=True)

    def by_triton() -> bool:
        return "nanochin" in type(ops.rms_norm(x, weight).grad_fn).__name__

    with kernels.use("triton"):
        assert by_triton()
    assert by_triton() == CUDA


def test_backend_says_why(monkeypatch):
    """Every choice with its reason: no CUDA, no triton, interpreting, an old GPU, an AMD GPU, a supported one."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    name, why = kernels.backend(CPU)
    assert name == "fallback" and "this is cpu" in why

    def capability(*version):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: version)

    capability(9, 0)
    name, why = kernels.backend(GPU)
    assert name == "triton" and why.startswith("Triton 3.") and why.endswith("sm_90")
    capability(7, 5)
    name, why = kernels.backend(GPU)
    assert name == "fallback" and "this is sm_75" in why
    monkeypatch.setattr(torch.version, "hip", "6.4")
    name, why = kernels.backend(GPU)
    assert name == "fallback" and "AMD" in why
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.backend(CPU)[0] == kernels.backend(GPU)[0] == "interpreter"
    monkeypatch.setattr(ops, "has_triton", lambda: False)
    name, why = kernels.backend(GPU)
    assert name == "fallback" and "triton is not installed" in why


def python(code, **environment):
    env = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_cpu_does_not_import_triton():
    """Without a GPU, neither the choice nor the computation imports triton."""
    code = """
import sys, torch
from kernels import ops
ops.rms_norm(torch.ones(2, 4), torch.ones(4))
print("triton" in sys.modules)
"""
    assert python(code) == ["False"]


def test_without_triton():
    """If triton cannot be imported, everything works on PyTorch operations, also with TRITON_INTERPRET=1."""
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
sys.modules["triton"] = None  # importing it fails
import kernels, torch
print(kernels.backend(torch.device("cpu"))[0], kernels.ops.rms_norm(torch.ones(2, 4), torch.ones(4)).sum().item())
"""
    name, total = python(code, TRITON_INTERPRET="1")
    assert name == "fallback" and float(total) == pytest.approx(8.0, rel=1e-5)


def test_interpreting_on_request():
    """TRITON_INTERPRET=1 runs the model on interpreted kernels, except float64, bf16 and heads above 128, which fall
    back to PyTorch operations."""
    pytest.importorskip("triton")
    skip_if_it_cannot_interpret()
    code = """
import torch
from kernels import ops
ran = []
from torch.utils._python_dispatch import TorchDispatchMode
class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        ran.append(str(op).split(".")[0] == "nanochin")
        return op(*args, **(kwargs or {}))
def computed_by_triton(function, *args):
    ran.clear()
    with Watch():
        function(*args)
    print(any(ran))
computed_by_triton(ops.rms_norm, torch.ones(2, 4), torch.ones(4))
computed_by_triton(ops.rms_norm, torch.ones(2, 4).double(), torch.ones(4))
computed_by_triton(ops.rms_norm, torch.ones(2, 4).bfloat16(), torch.ones(4))
computed_by_triton(ops.attention, torch.ones(1, 2, 3 * 128), 1)
computed_by_triton(ops.attention, torch.ones(1, 2, 3 * 130), 1)
computed_by_triton(ops.attention, torch.ones(1, 2, 3 * 130), 1, 100.0)
"""
    assert python(code, TRITON_INTERPRET="1") == ["True", "False", "False", "True", "False", "False"]
