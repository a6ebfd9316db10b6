"""The training steps that benches time, train.py's and nanoGPT's with the same interface, and where their time goes."""

import contextlib
import importlib
import io
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.common import nanogpt_folder
from nanochin.config import Shape
from nanochin.run.step import TrainingStep, out_of_memory


def our_step(kind: str, shape: Shape, sequences: int, device: torch.device, dtype: torch.dtype, **more) -> TrainingStep:
    """train.py's step on random weights, all `sequences` at once while they fit; `more` goes to TrainingStep."""
    from nanochin.model import GPT
    from nanochin.run.optim import Adam
    from train import train_step

    model = GPT(shape, dtype=dtype).to(device)
    optimizer = Adam(model, "adamw", 1e-3, (0.9, 0.95), 0.1)
    return TrainingStep(kind, train_step, model, optimizer, sequences, 1.0, sequences, **more)


def nanogpt_model(checkout: str, shape: Shape) -> torch.nn.Module:
    """A nanoGPT checkout's model of this shape. Raises UserError without a model.py there."""
    sys.path.insert(0, nanogpt_folder(checkout))
    theirs = importlib.import_module("model")
    sizes = {"n_layer": shape.layers, "n_head": shape.heads, "n_embd": shape.width}
    config = theirs.GPTConfig(block_size=shape.seq_len, vocab_size=shape.vocab_size, dropout=0.0, bias=False, **sizes)
    with contextlib.redirect_stdout(io.StringIO()):
        return theirs.GPT(config)


class NanoGPT:
    """`step(batch, lr)` trains on (n, T+1) tokens as nanoGPT's train.py does, in pieces of `micro_batch` sequences;
    returns (loss of the last piece, gradient norm) on the device. The learning rate is fixed."""

    def __init__(self, checkout: str, shape: Shape, sequences: int, device: torch.device, dtype: torch.dtype):
        self.model = nanogpt_model(checkout, shape).to(device)
        with contextlib.redirect_stdout(io.StringIO()):
            self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
        self.forward, self.micro_batch, self.device = self.model, sequences, device
        low = dtype == torch.bfloat16
        self.cast = torch.autocast(device.type, torch.bfloat16) if low else contextlib.nullcontext()

    def compile(self, batch: Tensor) -> None:
        """Compile for the largest micro-batch, halved from all of `batch`, whose gradient fits uncompiled."""
        while True:
            try:
                self.gradient(batch[: self.micro_batch].to(self.device))
                break
            except RuntimeError as error:
                if not out_of_memory(error) or self.micro_batch == 1:
                    raise
            # Outside of the handler, which holds the memory of what failed.
            self.set_micro_batch(self.micro_batch // 2)
        self.set_micro_batch(self.micro_batch)
        self.forward = torch.compile(self.model, dynamic=False)

    def set_micro_batch(self, micro_batch: int) -> None:
        self.micro_batch = micro_batch
        self.optimizer.zero_grad(set_to_none=True)

    def gradient(self, batch: Tensor) -> Tensor:
        """Add up the gradient of the batch's mean loss."""
        for piece in batch.split(self.micro_batch):
            with self.cast:
                _, loss = self.forward(piece[:, :-1].contiguous(), piece[:, 1:].contiguous())
            (loss * (len(piece) / len(batch))).backward()
        return loss.detach()

    def __call__(self, batch: Tensor, lr: float) -> Tensor:
        loss = self.gradient(batch.to(self.device))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack((loss, norm))


# ---------------------------------------------------------------------------------------------------------------------
# Time


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_blocks(step: Callable[[], object], device: torch.device, budget: float) -> list[float]:
    """Seconds a step, of three blocks of steps that take `budget` seconds in all."""

    def block(number: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(number):
            step()
        synchronize(device)
        return (time.perf_counter() - start) / number

    number = max(1, int(budget / 3 / max(block(1), 1e-5)))
    return [block(number) for _ in range(3)]


# aten::sum adds up what the norms' backward leaves of dweight (and 64k losses, which is nothing beside it); aten::mul
# scales the loss's gradients.
CATEGORIES = {
    "matmul": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention, rotary": (
        "nanochin::attention",
        "nanochin::rotary",
        "aten::_scaled_dot_product",
        "aten::_flash_attention",
    ),
    "norm, activation": ("nanochin::norm", "nanochin::activation", "aten::gelu", "aten::sum"),
    "loss": ("nanochin::linear_cross_entropy", "aten::_softmax", "aten::_log_softmax", "aten::nll_loss", "aten::mul"),
    "optimizer": ("aten::_fused_adam", "aten::_foreach", "aten::linalg_vector_norm"),
    "embedding, casts": ("aten::embedding", "aten::index_select", "aten::copy_"),
}


def profile(function: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds of the device by category, going by the operation that launched each kernel. The head's products
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
    return {name: us / 1e3 for name, us in split.items()}
