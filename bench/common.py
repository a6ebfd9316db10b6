"""What the benches of whole training steps share: workers that take turns, and nanoGPT's step."""

import contextlib
import importlib
import io
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from nanochin.config import Shape, UserError


class Worker:
    """`python -m MODULE --worker SPEC`, which answers each line of JSON that it is told with another one."""

    def __init__(self, module: str, spec: dict, checkout: Path | None = None):
        command = [sys.executable, "-m", module, "--worker", json.dumps(spec)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout)
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def tell(self, message) -> None:
        with contextlib.suppress(OSError, ValueError):  # it has ended, or was made to: `hear` says so
            print(json.dumps(message), file=self.process.stdin, flush=True)

    def hear(self, timeout: float | None = None):
        """Its next answer. Raises UserError if it has ended, TimeoutError."""
        try:
            line = self.lines.get(timeout=timeout and max(timeout, 0.01))
        except queue.Empty:
            raise TimeoutError("no answer in time") from None
        if not line:
            self.lines.put("")  # whoever asks again need not wait for it
            raise UserError(f"its process ended early with exit code {self.process.wait()} (see above)")
        return json.loads(line)

    def ask(self, message, timeout: float | None = None):
        self.tell(message)
        return self.hear(timeout)

    def let_go(self) -> None:
        """There are no more messages: it ends when it has answered the last."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def close(self, patience: float | None = None) -> None:
        """End it, by force if it takes longer than `patience` seconds."""
        self.let_go()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def messages() -> Iterator[tuple[object, Callable[[object], None]]]:
    """In a worker: (message, function that answers it), until there are no more. Whatever else prints to the standard
    output goes to the standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        yield json.loads(line), lambda answer: print(json.dumps(answer), file=answers)


def serve(spec: dict) -> None:
    """In a worker: {"do": NAME, ...} calls a method of what `make(spec)` of the module spec["module"] returns, and is
    answered with its result or {"error": text}. torch is loaded at once, the rest by the first message: until then the
    worker has no context on a GPU, which takes half a GiB of it. spec["environment"] holds for this process."""
    os.environ.update(spec.get("environment", {}))
    import torch  # noqa: F401

    worker = None
    for message, answer in messages():
        try:
            if worker is None:
                worker = importlib.import_module(spec["module"]).make(spec)
            answer(getattr(worker, message.pop("do"))(**message))
        except Exception as error:
            traceback.print_exc()
            answer({"error": error_text(error)})


def error_text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


class NanoGPT:
    """The model and optimizer of a nanoGPT checkout; `step(batch)` trains on (n, T+1) tokens as its train.py does, in
    pieces of `micro_batch` sequences, and returns the loss of the last one, on the device."""

    def __init__(self, checkout: str, shape: Shape, device, dtype, micro_batch: int):
        import torch

        sys.path.insert(0, checkout)
        from model import GPT, GPTConfig  # the checkout's model.py

        config = GPTConfig(
            block_size=shape.seq_len,
            vocab_size=shape.vocab_size,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_embd=shape.width,
            dropout=0.0,
            bias=False,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = GPT(config).to(device)
            self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
        self.forward, self.micro_batch = self.model, micro_batch
        low = dtype == torch.bfloat16
        self.cast = torch.autocast(device.type, torch.bfloat16) if low else contextlib.nullcontext()

    def gradient(self, batch):
        """Adds up the gradient of the batch's mean loss."""
        for piece in batch.split(self.micro_batch):
            with self.cast:
                _, loss = self.forward(piece[:, :-1].contiguous(), piece[:, 1:].contiguous())
            (loss * (len(piece) / len(batch))).backward()
        return loss.detach()

    def step(self, batch):
        import torch

        loss = self.gradient(batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


if __name__ == "__main__":
    serve(json.loads(sys.argv[2]))  # after --worker
