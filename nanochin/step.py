"""How a training step runs: operation by operation, with the model compiled, or recorded and repeated by one launch.

    eager     every operation is started by Python; on a CPU the sequences of a batch are shared out among threads
    compile   torch.compile takes the model's forward and backward; accumulation, clipping and Adam stay as they are
    graph     the whole step is one CUDA graph: the host copies a batch and a learning rate, and launches once

What a step computes is written in train.py (`optimizer_step`) and is the same in all three. Losses and gradient norms
stay on the device, and nothing in a step waits for it.
"""

import functools
import gc
import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from nanochin.config import RunError, UserError
from nanochin.device import Team, share_out
from nanochin.optim import Adam

KINDS = ("eager", "compile", "graph")
WARM_UP = 3  # steps before a graph is recorded: they compile kernels and fill caches, which a recording cannot


class Choice(NamedTuple):
    """A row of the table that `--step auto` reads: up to so many parameters on such a device, what and why."""

    device: str
    params: float
    kind: str
    why: str


CHOICES = (
    # LOG.md: compiling takes 20 to 75 s for every shape and batch, and is worth 1.0x to 1.3x from width 40 on.
    Choice("cpu", math.inf, "eager", "measured: on a CPU compiling takes longer than it saves in a run of minutes"),
    Choice("mps", math.inf, "eager", "assumed, not measured: graphs need CUDA"),
    Choice("cuda", math.inf, "graph", "assumed, not measured: one launch a step in place of hundreds"),
)


def pick_step(asked: str, device: torch.device, params: int) -> tuple[str, str]:
    """(kind, why). Raises UserError for a kind that this device cannot run."""
    if asked == "graph" and device.type != "cuda":
        raise UserError(f"--step graph: CUDA graphs need a CUDA device, this is {device.type}; use eager or compile")
    if asked == "compile" and device.type == "cuda" and not kernels.has_triton():
        raise UserError("--step compile: on a GPU torch.compile needs triton, which is not installed; use graph")
    if asked != "auto":
        return asked, "as asked"
    row = next(row for row in CHOICES if row.device == device.type and params <= row.params)
    return row.kind, row.why


def compiled(model: torch.nn.Module) -> Callable[..., Tensor]:
    """torch.compile of the model."""
    if torch.__version__ < (2, 13):
        # Older ones write down, for a log that nobody reads, an operation that they do not know with all that went into
        # it: at the end of five layers for three quarters of a minute, and five times as long for each layer more.
        from torch._inductor.lowering import FALLBACK_ALLOW_LIST

        FALLBACK_ALLOW_LIST.add("nanochin::linear_cross_entropy")
    return torch.compile(model, dynamic=False)


class CudaGraph:
    """`function`, which takes no argument and whose tensors stay where they are, called `WARM_UP` times, then recorded
    as a CUDA graph and replayed. It returns the same tensor each time.

    A recording keeps its memory. Where less than `reserve` bytes would be left for all else (an evaluation), the device
    is as good as full: raises torch.OutOfMemoryError.
    """

    def __init__(self, function: Callable[[], Tensor], reserve: int, stream: torch.cuda.Stream):
        """stream: recording needs another one than the default; the warm-up runs on it too, since some of the caches
        that it fills are kept by stream."""
        self.function, self.reserve, self.stream = function, reserve, stream
        self.calls, self.graph, self.output = 0, None, None

    def __call__(self) -> Tensor:
        if self.graph is None and self.calls < WARM_UP:
            self.calls += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                output = self.function()
            torch.cuda.current_stream().wait_stream(self.stream)
            return output
        if self.graph is None:
            self._record()
        self.graph.replay()
        return self.output

    def _record(self) -> None:
        gc.collect()  # an older graph that was freed during the recording would spoil it
        graph = torch.cuda.CUDAGraph()
        # The outer block brings back the usual stream even where a recording is broken off and cannot be ended.
        with torch.cuda.stream(self.stream), torch.cuda.graph(graph, stream=self.stream):
            output = self.function()
        if torch.cuda.mem_get_info()[0] < self.reserve:
            raise torch.OutOfMemoryError(f"less than {self.reserve} bytes left beside the recorded step")
        self.graph, self.output = graph, output


class TrainingStep:
    """`step(batch, lr)` trains on batch (n, T+1) of token ids in host memory -> (loss, gradient norm before clipping),
    a tensor on the device, for which the host does not wait.

    `micro_batch` sequences go through the model at once; it is halved when the device's memory runs out. A kind that
    fails for another reason in its first steps gives way to eager, and `say` is told. The result does not depend on
    any of this but for rounding.
    """

    AHEAD = 2  # steps: enough to keep a device busy, few enough for signals to be answered and pinned batches reused
    RESERVE = 2**31  # bytes beside a recorded step: an evaluation takes 16k tokens and up to 1 GiB of logits at a time

    def __init__(self, kind: str, function: Callable[..., Tensor], model: torch.nn.Module, optimizer: Adam,
                 micro_batch: int, clip: float, sequences: int, say: Callable[[str], None] = print,
                 record: Callable[..., Callable[[], Tensor]] = CudaGraph):  # fmt: skip
        """function: train.optimizer_step. sequences: of a batch. record(function, reserve, stream): a CUDA graph, which
        tests replace."""
        self.function, self.model, self.optimizer, self.clip = function, model, optimizer, clip
        self.sequences, self.say, self.record = sequences, say, record
        self.device = optimizer.parameters[0].device
        self.events: deque = deque()  # the ends of the last steps
        # One for all recordings: cuBLAS keeps 32 MiB for every stream that it has seen.
        self.stream = torch.cuda.Stream() if self.device.type == "cuda" else None
        self._begin(kind, micro_batch)

    def _begin(self, kind: str, micro_batch: int) -> None:
        self.kind, self.micro_batch = kind, micro_batch
        self.forward = compiled(self.model) if kind == "compile" else self.model
        self.team = Team()
        if kind == "eager" and self.device.type == "cpu":
            shape = self.model.shape
            self.team = Team(*share_out(torch.get_num_threads(), self.sequences, shape.seq_len, shape.width))
        self.cut(micro_batch)

    def cut(self, micro_batch: int) -> None:
        """From here on that many sequences at once; a recording of other cuts is dropped."""
        self.micro_batch, self.done = micro_batch, 0  # done: steps of this kind and cut
        self.recorded = self.batch = None

    def __call__(self, batch: Tensor, lr: float) -> Tensor:
        while True:
            try:
                pair = self._run(batch, lr)
                break
            except Exception as error:
                full = out_of_memory(error)
                if not full and (self.kind == "eager" or self.done > WARM_UP):
                    raise
                why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            # Outside of the handler: with the error the frames are gone that held the failed step's memory.
            self.optimizer.zero_grad()
            if full:
                self.cut(self._smaller())
            else:
                self.say(f"--step {self.kind} failed, going on with eager: {why}")
                self._begin("eager", self.micro_batch)
        self.done += 1
        self._stay_near()
        return pair

    def _run(self, batch: Tensor, lr: float) -> Tensor:
        if self.device.type == "cuda":
            batch = batch.pin_memory()  # which torch keeps for the batches to come
        if self.kind != "graph":
            self.optimizer.lr = lr
            with self.team:
                return self._bound(batch.to(self.device, non_blocking=True))()
        if self.recorded is None or self.batch.shape != batch.shape:
            self.batch = torch.empty_like(batch, device=self.device)
            self.optimizer.lr = torch.zeros((), device=self.device)
            reserve = self.RESERVE if self.micro_batch > 1 else 0
            self.recorded = self.record(self._bound(self.batch), reserve, self.stream)
        self.batch.copy_(batch, non_blocking=True)
        self.optimizer.lr.fill_(lr)
        return self.recorded().clone()  # the next step overwrites it

    def _bound(self, batch: Tensor) -> Callable[[], Tensor]:
        arguments = self.forward, self.optimizer, batch, self.micro_batch, self.clip, self.team
        return functools.partial(self.function, *arguments)

    def _smaller(self) -> int:
        if self.micro_batch == 1:
            shape = self.model.shape
            raise RunError(
                f"one sequence of {shape.seq_len} tokens through {shape} does not fit {self.device}: "
                "choose a smaller --model or --seq-len"
            )
        return self.micro_batch // 2

    def _stay_near(self) -> None:
        """Wait for the end of the step that began AHEAD steps ago."""
        if self.device.type == "cuda":
            self.events.append(torch.cuda.Event(blocking=True))
            self.events[-1].record()
            if len(self.events) > self.AHEAD:
                self.events.popleft().synchronize()


def out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that it came from, is about the device's memory: a recording that is broken off by it
    may end in another error. What CUDA, cuBLAS and Triton allocate themselves fails with a mere RuntimeError."""
    while error is not None:
        full = any(words in str(error) for words in ("out of memory", "ALLOC_FAILED"))
        if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and full):
            return True
        error = error.__cause__ or error.__context__
    return False
