"""How a training step runs: eagerly, with the model compiled, or captured once and replayed as one CUDA graph.

    eager     Python launches every operation; on a CPU, threads share the sequences of a batch
    compile   torch.compile for the model's forward and backward; accumulation, clipping and Adam stay eager
    graph     the whole step is one CUDA graph: the host copies a batch and a learning rate, and launches once

What a step computes is `train_step` in train.py, the same in all three. Losses and gradient norms stay on the device,
and nothing in a step waits for it.
"""

import copy
import functools
import gc
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

import kernels
from nanochin.base.cli import RunError, UserError
from nanochin.run import parallel
from nanochin.run.optim import Adam

WARM_UP = 3  # steps before a graph is captured: they compile kernels and fill caches, which a capture cannot
AUTO = {  # by device: kind, and why
    # Compiling takes 20 to 75 s for every shape and batch, and gains 1.0x to 1.3x from width 40 on (LOG.md).
    "cpu": ("eager", "measured: on a CPU compiling takes longer than it saves in a run of minutes"),
    "mps": ("eager", "assumed, not measured: graphs need CUDA"),
    "cuda": ("graph", "assumed, not measured: one launch per step instead of hundreds"),
}


class SequenceTooLarge(RunError):
    """Not even one sequence fits in the memory of the device."""


def pick_step(requested: str, device: torch.device) -> tuple[str, str]:
    """(kind, why). Raises UserError for a kind that this device cannot run."""
    if requested == "graph" and device.type != "cuda":
        raise UserError(f"`step` graph: CUDA graphs need a CUDA device, this is {device.type}; use eager or compile")
    if requested == "compile" and device.type == "cuda" and not kernels.has_triton():
        raise UserError("`step` compile: on a GPU torch.compile needs triton, which is not installed; use graph")
    return AUTO[device.type] if requested == "auto" else (requested, "as requested")


def compiled(model: nn.Module) -> Callable[..., Tensor]:
    if torch.__version__ < (2, 13):
        # Older versions log an unknown operation with its expression tree: 45 s for five layers, 5x per further layer.
        from torch._inductor.lowering import FALLBACK_ALLOW_LIST

        FALLBACK_ALLOW_LIST.add("nanochin::linear_cross_entropy")
    return torch.compile(model, dynamic=False)


# ---------------------------------------------------------------------------------------------------------------------
# CPU threads


def thread_shards(threads: int, sequences: int, seq_len: int, width: int) -> tuple[int, int]:
    """(shards of the batch, each on its own thread; threads inside the operations of each) for a batch of `sequences`
    on a CPU with `threads`. Threads left over stay idle, which is faster than waiting for them (LOG.md)."""
    work = sequences * seq_len * width  # numbers in one layer's activations
    # 1. A shard below 2^14 is not worth a thread: most of its time is Python, which holds the interpreter lock.
    count = max(1, min(threads, sequences, work // 2**14))
    # 2. An operation on fewer than 2^17 per thread takes no longer than waking a sleeping thread.
    return count, max(1, min(threads // count, work // count // 2**17))


class Shards:
    """Runs the forward and backward passes of a step: on the current thread, or, on a CPU, each shard of the batch on
    its own thread with a replica of the model that shares the weights and has its own gradients.

    Two threads with half of the batch each synchronise once per step. Two threads inside every operation synchronise
    hundreds of times: as fast only if they spin while waiting, and very slow when another program runs (LOG.md).
    """

    def __init__(
        self, model: nn.Module, count: int = 1, threads: int | None = None, average: parallel.Average | None = None
    ):
        """threads: inside the operations of each shard, and of the caller in `with shards:`. None: unchanged. average:
        over the ranks, if there are several."""
        self.threads, self.average = threads, average
        self.models = [model]
        for _ in range(count - 1):
            shared = {id(p): nn.Parameter(p.detach()) for p in model.parameters()}
            self.models.append(copy.deepcopy(model, memo=shared))
        if count > 1:
            self.pool = thread_pool(count, threads or torch.get_num_threads())

    def run(self, function: Callable[[nn.Module, Tensor], Tensor], batch: Tensor) -> Tensor:
        """The sum of function(model, shard) over the shards of the batch. The replicas' gradients are added to the
        model's in the order of the sequences. With several ranks, both are then averaged over them."""
        if self.average:
            return self.average(self._run(function, batch) if len(batch) else 0.0, len(batch))
        return self._run(function, batch)

    def _run(self, function: Callable[[nn.Module, Tensor], Tensor], batch: Tensor) -> Tensor:
        if len(self.models) == 1:
            return function(self.models[0], batch)
        for model in self.models[1:]:
            model.zero_grad()
        total, *others = self.pool.map(function, self.models, batch.chunk(len(self.models)))
        for model, loss in zip(self.models[1:], others, strict=False):  # chunk may return fewer shards
            total = total + loss
            ours, theirs = ([p.grad for p in each.parameters()] for each in (self.models[0], model))
            torch._foreach_add_(ours, theirs)
        return total

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.threads or self.before)

    def __exit__(self, *_) -> None:
        torch.set_num_threads(self.before)


def thread_pool(count: int, threads: int) -> ThreadPoolExecutor:
    """`count` threads, each with `threads` inside its operations. The current thread keeps its number."""
    before, started = torch.get_num_threads(), threading.Barrier(count)
    pool = ThreadPoolExecutor(count, "shard", _set_own_threads, (threads,))
    list(pool.map(lambda _: started.wait(), range(count)))
    torch.set_num_threads(before)
    return pool


def _set_own_threads(count: int) -> None:
    """Set the threads inside operations called from the current thread; torch keeps this number per thread."""
    torch.set_num_threads(count)
    torch.get_num_threads()  # the first call adopts the process-wide setting, so make it now


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs


class CudaGraph:
    """Calls `function` (no arguments, static tensors) `WARM_UP` times, then captures it as a CUDA graph and replays
    that. Replays return the same tensor each time.

    A captured graph keeps its memory. Raises torch.OutOfMemoryError if that leaves less than `reserve` bytes for
    everything else, such as an evaluation.
    """

    def __init__(
        self,
        function: Callable[[], Tensor],
        reserve: int,
        stream: torch.cuda.Stream,
        confirm: Callable[[], None] = lambda: None,
    ):
        """stream: the default one cannot be captured. The warm-up runs on it too: some caches are per stream. confirm:
        raises an error if another rank has not captured."""
        self.function, self.reserve, self.stream, self.confirm = function, reserve, stream, confirm
        self.calls, self.graph, self.output = 0, None, None

    def __call__(self) -> Tensor:
        if self.calls < WARM_UP:
            self.calls += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                output = self.function()
            torch.cuda.current_stream().wait_stream(self.stream)
            return output
        if self.graph is None:
            gc.collect()  # freeing an older graph during the capture would invalidate it
            graph = torch.cuda.CUDAGraph()
            # The outer block restores the usual stream even if the capture fails and cannot be ended.
            with torch.cuda.stream(self.stream), torch.cuda.graph(graph, stream=self.stream):
                output = self.function()
            if torch.cuda.mem_get_info()[0] < self.reserve:
                raise torch.OutOfMemoryError(f"less than {self.reserve} bytes left after capturing the step")
            self.confirm()
            self.graph, self.output = graph, output
        self.graph.replay()
        return self.output


# ---------------------------------------------------------------------------------------------------------------------
# The step


class TrainingStep:
    """`step(batch, lr)` trains on batch (n, T+1) of token ids in host memory -> (loss, gradient norm before clipping),
    a tensor on the device; the host does not wait for it.

    `micro_batch` sequences go through the model at once; it is halved on out-of-memory. A kind that fails for another
    reason in its first steps falls back to eager and reports it through `say`. The result is the same up to rounding.
    Of several ranks, each gets its share of a batch, and all halve or fall back together.
    """

    AHEAD = 2  # steps in flight: keep the device busy, yet respond to signals and reuse pinned batches
    RESERVE = 2**31  # bytes to leave for evaluation: 16k tokens and up to 1 GiB of logits at a time

    def __init__(
        self,
        kind: str,
        function: Callable[[Shards, Adam, Tensor, int, float], Tensor],
        model: nn.Module,
        optimizer: Adam,
        micro_batch: int,
        clip: float,
        sequences: int,
        say: Callable[[str], None] = print,
        capture: Callable[..., Callable[[], Tensor]] = CudaGraph,
    ):
        """function: train.train_step. sequences: per batch, of all ranks. capture(function, reserve, stream): replaced
        by tests."""
        self.function, self.model, self.optimizer, self.clip = function, model, optimizer, clip
        self.sequences, self.say, self.capture = sequences, say, capture
        self.device = optimizer.parameters[0].device
        self.average = parallel.Average(optimizer.parameters, sequences) if parallel.size() > 1 else None
        if self.average:
            self.capture = functools.partial(capture, confirm=self.average.confirm)
        self.events: deque = deque()  # one at the end of each step in flight
        # One stream for all captures: cuBLAS keeps 32 MiB for every stream that it has seen.
        self.stream = torch.cuda.Stream() if self.device.type == "cuda" else None
        self._begin(kind, micro_batch)

    def _begin(self, kind: str, micro_batch: int) -> None:
        self.kind = kind
        model, split = compiled(self.model) if kind == "compile" else self.model, (1, None)
        if kind == "eager" and self.device.type == "cpu":
            shape, ours = self.model.shape, len(parallel.share(self.sequences))
            split = thread_shards(torch.get_num_threads(), ours, shape.seq_len, shape.width)
        self.shards = Shards(model, *split, self.average)
        self.set_micro_batch(micro_batch)

    def set_micro_batch(self, micro_batch: int) -> None:
        """Change the micro-batch; drops a captured graph."""
        self.micro_batch, self.done = micro_batch, 0  # done: steps of this kind with this micro-batch
        self.graph = self.batch = None

    def __call__(self, batch: Tensor, lr: float) -> Tensor:
        if self.device.type == "cuda":
            batch = batch.pin_memory()  # torch reuses it for later batches
        while True:
            if self.average:
                self.average.joined = False
            try:
                pair = self._replay(batch, lr) if self.kind == "graph" else self._run(batch, lr)
                break
            except parallel.LostRank:
                raise
            except Exception as error:
                full = out_of_memory(error)
                if not full and (self.kind == "eager" or self.done > WARM_UP):
                    raise
                why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            # Outside of the handler, where the error's frames no longer hold the failed step's memory.
            self.optimizer.zero_grad()
            if self.average:
                full = self.average.agree(full)
            if not full:
                self.say(f"step {self.kind} failed, falling back to eager: {why}")
                self._begin("eager", self.micro_batch)
            elif self.micro_batch > 1:
                self.set_micro_batch(self.micro_batch // 2)
            else:
                raise SequenceTooLarge(
                    f"one sequence of {self.model.shape.seq_len} tokens through {self.model.shape} does not fit "
                    f"{self.device}: choose a smaller `model` or `seq_len`"
                )
        self.done += 1
        if self.device.type == "cuda":
            self.events.append(torch.cuda.Event(blocking=True))
            self.events[-1].record()
            if len(self.events) > self.AHEAD:
                self.events.popleft().synchronize()
        return pair

    def stop(self, caught: bool) -> bool:
        """Whether to stop after this step, since a signal was `caught` here, or on another rank."""
        return self.average.stop(caught) if self.average else caught

    def _run(self, batch: Tensor, lr: float | Tensor) -> Tensor:
        self.optimizer.lr = lr
        batch = batch.to(self.device, non_blocking=True)
        with self.shards:
            return self.function(self.shards, self.optimizer, batch, self.micro_batch, self.clip)

    def _replay(self, batch: Tensor, lr: float) -> Tensor:
        if self.graph is None:
            self.batch = torch.empty_like(batch, device=self.device)
            self.lr = torch.zeros((), device=self.device)
            reserve = self.RESERVE if self.micro_batch > 1 else 0
            self.graph = self.capture(functools.partial(self._run, self.batch, self.lr), reserve, self.stream)
        self.batch.copy_(batch, non_blocking=True)
        self.lr.fill_(lr)
        return self.graph().clone()  # the next step overwrites it


def out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that caused it, is out-of-memory: a capture that runs out of memory may raise another
    error. CUDA, cuBLAS and Triton raise a plain RuntimeError."""
    while error is not None:
        full = any(words in str(error) for words in ("out of memory", "ALLOC_FAILED"))
        if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and full):
            return True
        error = error.__cause__ or error.__context__
    return False
