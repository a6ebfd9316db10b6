"""The training steps that are timed: train.py's, and nanoGPT's with the same interface."""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from nanochin.base.cli import UserError, brief
from nanochin.config import Shape
from nanochin.run.step import TrainingStep, out_of_memory


def our_step(kind: str, shape: Shape, sequences: int, device: torch.device, dtype: torch.dtype, **more) -> TrainingStep:
    """train.py's step on random weights, all `sequences` at once while they fit; `more` goes to TrainingStep."""
    from nanochin.model import GPT
    from nanochin.run.optim import Adam
    from train import train_step

    model = GPT(shape, dtype=dtype).to(device)
    optimizer = Adam(model, "adamw", 1e-3, (0.9, 0.95), 0.1, False)
    return TrainingStep(kind, train_step, model, optimizer, sequences, 1.0, sequences, **more)


class NanoGPT:
    """`step(batch, lr)` trains on (n, T+1) tokens as nanoGPT's train.py does, in pieces of `micro_batch` sequences;
    returns (loss of the last piece, gradient norm) on the device."""

    def __init__(
        self,
        checkout: str,
        shape: Shape,
        sequences: int,
        device: torch.device,
        dtype: torch.dtype,
        betas: tuple[float, float] = (0.9, 0.95),
    ):
        """checkout: of karpathy/nanoGPT. Raises UserError if it has no model.py, or another one."""
        theirs = import_file(Path(checkout) / "model.py")
        sizes = {"n_layer": shape.layers, "n_head": shape.heads, "n_embd": shape.width, "block_size": shape.seq_len}
        with contextlib.redirect_stdout(io.StringIO()):
            config = theirs.GPTConfig(vocab_size=shape.vocab_size, dropout=0.0, bias=shape.bias, **sizes)
            self.model = theirs.GPT(config).to(device)
            self.optimizer = self.model.configure_optimizers(0.1, 1e-3, betas, device.type)
        self.forward, self.micro_batch, self.device = self.model, sequences, device
        self.cast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

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
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack((loss, norm))


def import_file(path: Path) -> ModuleType:
    """nanoGPT's model.py as the module "model". Raises UserError if it cannot be imported or has no GPT."""
    spec = importlib.util.spec_from_file_location("model", path)
    module = sys.modules["model"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        module.GPT, module.GPTConfig  # noqa: B018
    except Exception as error:
        raise UserError(f"`nanogpt` {path}: {brief(error)}; name a checkout of karpathy/nanoGPT") from None
    return module


def time_blocks(step: Callable[[], object], budget: float) -> list[float]:
    """Seconds a step, of three blocks of steps that take about `budget` seconds in all, or of one step each if these
    are longer; two more steps warm up before each."""
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())  # waits for a GPU
    number = max(1, int(budget / 3 / timer.timeit(1).mean))
    return [timer.timeit(number).mean for _ in range(3)]


def profile(function: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds of the device by the operation that launched its kernels: the 15 longest, and "other"."""
    from torch.autograd import DeviceType
    from torch.profiler import profile as torch_profile

    with torch_profile() as profiler:  # waits for the device at its end
        function()
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
    times = sorted(((getattr(event, time_of) / 1e3, event.key) for event in events), reverse=True)
    return {name: ms for ms, name in times[:15]} | {"other": sum(ms for ms, _ in times[15:])}
