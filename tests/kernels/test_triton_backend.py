"""The whole model on Triton kernels (interpreted without a GPU), and the choice of the implementation."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from interpreted import DEVICE, MARKS, load_all, skip_if_it_cannot_interpret

import kernels
from kernels import ops
from nanochin.config import make_shape
from nanochin.model import GPT

pytestmark = MARKS
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
every_implementation = pytest.mark.parametrize("implementation", ["fallback", "triton"])


def use(implementation):
    if implementation == "triton":
        load_all()
    return kernels.use(implementation)


def batch(shape, sequences, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shape.vocab_size, (sequences, shape.seq_len + 1), generator=generator).to(DEVICE)


def train(implementation, shape, steps):
    """Losses of `steps` steps on one sequence. Plain gradient descent: Adam would take full steps along gradients that
    are only rounding error, such as the key biases'."""
    model, tokens = GPT(shape, z_loss=1e-4).to(DEVICE), batch(shape, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with use(implementation):
        for _ in range(steps):
            loss = model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


GPT2_SWIGLU = {"norm": "layernorm", "positions": "learned", "activation": "swiglu", "bias": True, "tied": False}


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, GPT2_SWIGLU], ids=["default", "qk_norm", "gpt2 swiglu"])
def test_training_gives_the_same_losses(options):
    """12 steps on Triton kernels and on PyTorch operations: relative differences of the losses are at most 1e-5, from
    the order of float32 sums, and far below the drop in loss."""
    shape = make_shape(24, 1, vocab_size=101, seq_len=20, head_size=12, **options)
    ours, theirs = train("triton", shape, 12), train("fallback", shape, 12)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours != theirs and theirs[-1] < theirs[0] - 0.5


@every_implementation
def test_repeated_passes_are_bit_identical(implementation):
    """Loss and gradients; on Triton kernels also under torch.compile, without a graph break in the whole model."""
    shape = make_shape(24, 1, vocab_size=77, seq_len=20, head_size=12, qk_norm=True)
    model, tokens = GPT(shape).to(DEVICE), batch(shape, 1)
    passes, compiled = [], torch.compile(model, backend="aot_eager", fullgraph=True)
    with use(implementation):
        for run in (model, model, *[compiled] * (implementation == "triton")):
            loss = run(tokens[:, :-1], tokens[:, 1:])
            passes.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for other in passes[1:]:
        assert all(map(torch.equal, passes[0], other))


def test_backend_and_its_reason(monkeypatch):
    """No CUDA, a supported GPU, an old one, an AMD GPU, interpreting, no triton."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def check(device, name, reason):
        chosen, why = kernels.backend(device)
        assert chosen == name and reason in why

    check(CPU, "fallback", "cpu")
    for capability, name, reason in (((9, 0), "triton", "sm_90"), ((7, 5), "fallback", "sm_75")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        check(GPU, name, reason)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    check(GPU, "fallback", "AMD")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check(GPU, "interpreter", "TRITON_INTERPRET")
    monkeypatch.setattr(ops, "has_triton", lambda: False)
    check(GPU, "fallback", "triton is not installed")


def python(code, **environment):
    env = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_cpu_does_not_import_triton():
    """Without a GPU, neither the choice nor the computation imports triton."""
    code = "import sys, torch, kernels; x = torch.ones(4); kernels.ops.rms_norm(x, x); print('triton' in sys.modules)"
    assert python(code) == ["False"]


def test_without_triton():
    """If triton cannot be imported, everything works on PyTorch operations, also with TRITON_INTERPRET=1."""
    code = """
import sys
sys.modules["triton"] = None  # it is not found, and importing it fails
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
def by_triton(y):
    print("nanochin" in type(y.grad_fn).__name__)
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    by_triton(ops.rms_norm(torch.ones(2, 4, dtype=dtype, requires_grad=True), torch.ones(4)))
for head_size in (128, 130):
    by_triton(ops.attention(torch.ones(1, 2, 3 * head_size, requires_grad=True), 1, 100.0))
"""
    assert python(code, TRITON_INTERPRET="1") == ["True", "False", "False", "True", "False"]
