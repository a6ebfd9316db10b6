"""The processes of bench.gpu: one variant of a training step each, or the ablation, or the sizes of a sweep.

What a message asks for is a method of `Variant`, `Ablation` or `Ladder`; the dictionary that it returns is the answer.
What takes turns lets go of the device's memory after each, so that whoever is next can fill it.
"""

import functools
import gc
import random
import statistics
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
import train
from bench.common import NanoGPT, error_text
from bench.kernel_cases import tables, torch_rotary
from kernels import fallback, ops
from nanochin.config import Shape, make_shape
from nanochin.model import GPT
from nanochin.optim import Adam
from nanochin.step import WARM_UP, TrainingStep, out_of_memory

GIB = 2**30
SHARE = 0.85  # of the device's memory is what a micro-batch may take together with whatever else is there
LOAD = WARM_UP + 2  # steps until one is like any other: a graph's warm-up, its recording, a replay
SHRINKING = 30.0  # seconds of trying ever smaller micro-batches, once waiting for the others' memory was in vain


def make(spec: dict) -> "Variant | Ablation | Ladder":
    torch.manual_seed(0)
    if spec["dry"]:
        torch.set_num_threads(1)
        torch.compile = lambda function=None, **_: function or (lambda decorated: decorated)  # it takes seconds
    else:
        torch.cuda.set_device(0)
        compile_backward_first()
    return {"variant": Variant, "ablation": Ablation, "ladder": Ladder}[spec["role"]](spec)


def compile_backward_first() -> None:
    """Have torch.compile make the backward together with the forward. Else it does so when the first backward begins,
    and this worker would hold its activations for the half minute that takes, while others look for memory."""
    from torch._functorch import config

    if hasattr(config, "force_non_lazy_backward_lowering"):
        config.force_non_lazy_backward_lowering = True


# ---------------------------------------------------------------------------------------------------------------------
# The device


def device_of(spec: dict) -> torch.device:
    return torch.device("cpu") if spec["dry"] else torch.device("cuda", 0)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Most memory allocated while `function` runs, all that was there before included; 0 on a CPU."""
    if device.type != "cuda":
        function()
        return 0
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def time_steps(step: Callable[[], object], device: torch.device, budget: float) -> list[float]:
    """Seconds a step, of a few blocks of steps that take `budget` seconds in all."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    each = max(time.perf_counter() - start, 1e-5)
    number = max(1, int(budget / 3 / each))
    blocks = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(number):
            step()
        synchronize(device)
        blocks.append((time.perf_counter() - start) / number)
    return blocks


class Replay:
    """On a CPU, for the dry run: what stands for a CUDA graph."""

    def __init__(self, function, reserve, stream):
        self.function = function

    def __call__(self):
        return self.function()


# ---------------------------------------------------------------------------------------------------------------------
# A step of ours or of nanoGPT's, made alike: `step()`, `cut(micro_batch)`, `probe(sequences)`


class Fixed(TrainingStep):
    """Of one kind and one micro-batch: what does not fit, or cannot be recorded, is an error here."""

    def _smaller(self) -> int:
        raise torch.OutOfMemoryError(f"{self.micro_batch} sequences at once do not fit")

    @staticmethod
    def refuse(message: str) -> None:
        raise RuntimeError(message.partition("eager: ")[2])


class Ours:
    """train.py's step on random weights: `step()` takes a batch from the host and trains on it."""

    def __init__(self, kind: str, shape: Shape, sequences: int, micro_batch: int, device: torch.device, dtype):
        self.model = GPT(shape, dtype=dtype).to(device)
        self.batch = torch.randint(shape.vocab_size, (sequences, shape.seq_len + 1))
        optimizer = Adam(self.model, "adamw", 1e-3, (0.9, 0.95), 0.1)
        record = {} if device.type == "cuda" else {"record": Replay}
        self.train_on = Fixed(
            kind, train.optimizer_step, self.model, optimizer, micro_batch, 1.0, 0, Fixed.refuse, **record
        )
        self.parameters = optimizer.parameters

    @property
    def micro_batch(self) -> int:
        return self.train_on.micro_batch

    def cut(self, micro_batch: int) -> None:
        self.train_on.cut(micro_batch)

    def step(self) -> Tensor:
        return self.train_on(self.batch, 1e-3)

    def probe(self, sequences: int) -> None:
        """Forward and backward, eager."""
        piece = self.batch[:sequences].to(self.parameters[0].device)
        torch.autograd.grad(self.model(piece[:, :-1], piece[:, 1:]), self.parameters)


class Theirs:
    """nanoGPT's, compiled."""

    def __init__(self, spec: dict, shape: Shape, sequences: int, micro_batch: int, device: torch.device, dtype):
        if device.type == "cuda":
            for backend in ("flash", "cudnn", "mem_efficient", "math"):
                getattr(torch.backends.cuda, f"enable_{backend}_sdp")(backend == spec["sdpa"])
            torch.backends.cuda.matmul.allow_tf32 = True  # as its train.py has it
            torch.backends.cudnn.allow_tf32 = True
        self.nanogpt = NanoGPT(spec["nanogpt"], shape, device, dtype, micro_batch)
        self.nanogpt.forward = torch.compile(self.nanogpt.model, dynamic=False)
        self.batch = torch.randint(shape.vocab_size, (sequences, shape.seq_len + 1)).to(device)

    @property
    def micro_batch(self) -> int:
        return self.nanogpt.micro_batch

    def cut(self, micro_batch: int) -> None:
        self.nanogpt.micro_batch = micro_batch
        self.nanogpt.optimizer.zero_grad(set_to_none=True)  # of a step that was broken off

    def step(self) -> Tensor:
        return self.nanogpt.step(self.batch)

    def probe(self, sequences: int) -> None:
        compiled, self.nanogpt.forward = self.nanogpt.forward, self.nanogpt.model
        try:
            self.nanogpt.gradient(self.batch[:sequences])
        finally:
            self.nanogpt.forward = compiled
            self.cut(self.micro_batch)


def largest_micro_batch(probe: Callable[[int], None], most: int, limit: float, device: torch.device) -> int:
    """The largest power of two of sequences, `most` at most, whose memory stays below `limit` bytes, going by what a
    probe of few sequences and one of twice as many take."""
    few = max(1, most // 16)
    probe(1)  # makes what stays: gradients, workspaces, caches
    first, second = (peak_bytes(functools.partial(probe, n), device) for n in (few, 2 * few))
    slope, fixed = (second - first) / few, 2 * first - second
    n = most
    while n > 1 and fixed + slope * n > limit:
        n //= 2
    return n


# ---------------------------------------------------------------------------------------------------------------------
# Variants of one size, which take turns


class Variant:
    """spec: size as in bench.gpu, who (nanochin, nanoGPT), kind, sequences a step, most sequences at once, others."""

    def __init__(self, spec: dict):
        self.told, self.device = time.perf_counter(), device_of(spec)
        dtype = getattr(torch, spec["dtype"])
        shape = shape_of(spec["shape"])
        arguments = shape, spec["sequences"], spec["most"], self.device, dtype
        ours = spec["who"] == "nanochin"
        self.variant = Ours(spec["kind"], *arguments) if ours else Theirs(spec, *arguments)
        self.params = sum(p.numel() for p in (self.variant.model if ours else self.variant.nanogpt.model).parameters())
        self.most, self.others = spec["most"], spec["others"]
        self.loaded, self.wanted = False, None

    def warm(self, patience: float) -> dict:
        """The first steps, in which everything is compiled. Others do theirs meanwhile, so memory may be short: after
        `patience` seconds smaller micro-batches are tried."""
        told = time.monotonic()
        while (waited := time.monotonic() - told) < patience + SHRINKING:
            try:
                self.let_go()
                start = time.perf_counter()
                if self.wanted is None:
                    self.wanted = self._fitting()
                elif waited > patience:
                    self.wanted = max(1, self.wanted // 2)
                self.variant.cut(self.wanted)
                self._load()
                break
            except RuntimeError as error:
                if not out_of_memory(error) and not broken_off(error):
                    raise
            time.sleep(random.uniform(0.5, 2.0))
        else:
            raise RuntimeError("no memory for a step")
        now = time.perf_counter()
        self.let_go()
        return {"micro_batch": self.wanted, "first_steps_seconds": now - start, "ready_seconds": now - self.told}

    def _fitting(self) -> int:
        if self.device.type != "cuda":
            return self.most
        total = torch.cuda.get_device_properties(self.device).total_memory
        limit = SHARE * total - self.others * (16 * self.params + GIB)
        found = largest_micro_batch(self.variant.probe, self.most, limit, self.device)
        release(self.device)  # compiling is next, and takes long
        return found

    def _load(self) -> None:
        """Steps until a step is like any other."""
        if not self.loaded:
            for _ in range(LOAD):
                self.variant.step()
            synchronize(self.device)
            self.loaded = True

    def let_go(self) -> None:
        self.loaded = False
        self.variant.cut(self.variant.micro_batch)
        release(self.device)

    def turn(self, seconds: float) -> dict:
        peak = peak_bytes(self._load, self.device)
        times = time_steps(self.variant.step, self.device, seconds)
        reserved = torch.cuda.memory_reserved() if self.device.type == "cuda" else 0
        self.let_go()
        return {"seconds": times, "peak_bytes": peak, "reserved_bytes": reserved}

    def memory_at(self, micro_batch: int) -> dict:
        """Peak with that many sequences at once."""
        self.variant.cut(micro_batch)
        peak = peak_bytes(self._load, self.device)
        self.variant.cut(self.wanted)
        self.let_go()
        return {"peak_bytes": peak}

    def profile(self, steps: int = 2) -> dict:
        """Milliseconds a step that the device spends by category, and those of a step by the clock."""
        self._load()
        wall = statistics.median(time_steps(self.variant.step, self.device, 0.5))
        split = profile(lambda: [self.variant.step() for _ in range(steps)], self.device)
        self.let_go()
        return {"wall_ms": 1e3 * wall, "split_ms": {name: us / steps / 1e3 for name, us in split.items()}}


def broken_off(error: RuntimeError) -> bool:
    """Whether a recording was, as a full device does it. Not torch's word that one is still under way: before 2.12 its
    allocator can believe so for good after the first that failed, and no other attempt of this process succeeds."""
    return "captur" in str(error) and "INTERNAL ASSERT" not in str(error)


def shape_of(size: list[int]) -> Shape:
    width, layers, head, vocab, T = size
    return make_shape(width, layers, vocab_size=vocab, seq_len=T, head_size=head)


# aten::sum adds up what the norms' backward leaves of dweight (and 64k losses, which is nothing beside it); aten::mul
# scales the loss's gradients.
CATEGORIES = {
    "matmul": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention, rotary": ("nanochin::attention", "aten::_scaled_dot_product", "aten::_flash_attention"),
    "norm, activation": ("nanochin::norm", "nanochin::activation", "aten::gelu", "aten::sum"),
    "loss": ("nanochin::linear_cross_entropy", "aten::_softmax", "aten::_log_softmax", "aten::nll_loss", "aten::mul"),
    "optimizer": ("aten::_fused_adam", "aten::_foreach", "aten::linalg_vector_norm"),
    "embedding, casts": ("aten::embedding", "aten::index_select", "aten::copy_"),
}


def profile(function: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Microseconds of the device by category, going by the operation that launched each kernel. The head's products
    count as matmul. On a CPU, where a kernel is its operation, the time of the operation itself."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch_profile(activities=activities) as profiler:
        function()
        synchronize(device)
    split, total = dict.fromkeys([*CATEGORIES, "other"], 0.0), 0.0
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:
            category = next((name for name, starts in CATEGORIES.items() if event.key.startswith(starts)), "other")
            split[category] += event.self_device_time_total if cuda else event.self_cpu_time_total
        elif not getattr(event, "is_user_annotation", False):
            total += event.self_device_time_total
    split["other"] += max(0.0, total - sum(split.values()))  # of kernels that no operation is known to have launched
    return split


# ---------------------------------------------------------------------------------------------------------------------
# Ablation: our step with one kernel after the other given to torch


class Ablation:
    def __init__(self, spec: dict):
        self.device = device_of(spec)
        self.most, dtype = spec["most"], getattr(torch, spec["dtype"])
        self.ours = Ours("graph", shape_of(spec["shape"]), spec["sequences"], self.most, self.device, dtype)

    def run(self, seconds: float, until: float) -> dict:
        """Rows {"by_torch": name, "seconds": ...}; "nothing" is our own step, first and last. until: on time.time()."""
        rows = []
        for name, instead in replacements().items():
            row = {"by_torch": name}
            try:
                if time.time() > until:
                    raise TimeoutError("not timed: out of time")
                with kernels.use("auto", **instead):
                    self.ours.cut(self.most)
                    release(self.device)
                    row["peak_bytes"] = peak_bytes(lambda: [self.ours.step() for _ in range(LOAD)], self.device)
                    row["seconds"] = time_steps(self.ours.step, self.device, seconds)
            except Exception as error:
                traceback.print_exc()
                row["error"] = error_text(error)
            rows.append(row)
        return {"rows": rows}


def replacements() -> dict[str, dict[str, Callable]]:
    """Operations by name, each by the best way in torch that we know of."""
    compiled = functools.partial(torch.compile, dynamic=False)

    def attention(backend, qkv, n_heads, theta=None, qk_norm=False):
        with sdpa_kernel(backend):
            return fallback.attention(rotary(qkv, n_heads, theta, qk_norm), n_heads)

    @compiled
    def rms_norm(x, weight, eps=1e-6):
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)

    @compiled
    def add_rms_norm(x, residual, weight, eps=1e-6):
        total = x + residual
        return F.rms_norm(total, total.shape[-1:], weight.to(x.dtype), eps), total

    rotate = compiled(torch_rotary)

    def rotary(qkv, n_heads, theta, qk_norm=False):
        return rotate(qkv, *tables(qkv, n_heads), qk_norm)

    our_attention = ops.TRITON.get("attention", fallback.attention)

    def rotary_apart(qkv, n_heads, theta=None, qk_norm=False):
        return our_attention(rotary(qkv, n_heads, theta, qk_norm), n_heads)

    @compiled
    def gelu(x):
        return F.gelu(x)

    @compiled
    def linear_cross_entropy(h, weight, targets, ignore_index=-1, z_loss=0.0):
        return F.cross_entropy(F.linear(h, weight.to(h.dtype)).float(), targets, ignore_index=ignore_index)

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    by_torch = {name: {"attention": functools.partial(attention, backend)} for name, backend in backends.items()}
    norms = {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm}
    activation = {"activation_linear": lambda x, weight, bias, kind: F.linear(gelu(x), weight, bias)}
    rest = norms | activation | {"linear_cross_entropy": linear_cross_entropy}
    return {
        "nothing": {},
        "loss": {"linear_cross_entropy": linear_cross_entropy},
        "attention, flash": by_torch["flash"],
        "attention, cuDNN": by_torch["cuDNN"],
        "norms": norms,
        "rotary": {"attention": rotary_apart},
        "activation": activation,
        "all, flash": rest | by_torch["flash"],
        "all, cuDNN": rest | by_torch["cuDNN"],
        "nothing again": {},
    }


# ---------------------------------------------------------------------------------------------------------------------
# The ladder's sizes, alone and with others on the same device


class Ladder:
    def __init__(self, spec: dict):
        self.spec, self.device, self.steps = spec, device_of(spec), []

    def prepare(self, shape: list[int], kind: str, runs: int) -> dict:
        """`runs` models side by side in this process, each on a stream of its own."""
        dtype, sequences = getattr(torch, self.spec["dtype"]), self.spec["sequences"]
        for _ in range(runs):
            ours = Ours(kind, shape_of(shape), sequences, sequences, self.device, dtype)
            stream = torch.cuda.Stream() if self.device.type == "cuda" and runs > 1 else None
            self.steps.append((ours, stream))
        synchronize(self.device)
        for _ in range(LOAD):
            self._step_all()
        synchronize(self.device)
        return {}

    def clear(self) -> dict:
        self.steps.clear()
        release(self.device)
        return {}

    def _step_all(self) -> None:
        for ours, stream in self.steps:
            with torch.cuda.stream(stream) if stream else nullcontext():
                ours.step()

    def run(self, at: float, seconds: float) -> dict:
        """Steps from `at`, on time.time(), for so long: tokens, and the seconds that they took."""
        time.sleep(max(0.0, at - time.time()))
        start, number = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            self._step_all()
            number += 1
        synchronize(self.device)
        took = time.perf_counter() - start
        tokens = sum(ours.batch[:, 1:].numel() for ours, _ in self.steps)
        return {"tokens": number * tokens, "seconds": took}
