"""One model on several devices: one process, or rank, for each, started by torchrun.

Every rank has the whole model and trains on its share of each batch. One all-reduce a step adds up gradients, loss and
flags, so that all ranks take the same step, stop after the same step and halve the micro-batch together. Only rank 0
writes and prints. Without torchrun there is one rank and no process group.
"""

import gc
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nanochin.base import signals
from nanochin.base.cli import RunError, UserError
from nanochin.base.files import cores
from nanochin.run import folder
from nanochin.run.optim import Adam


class LostRank(RunError):
    """Another process of the run has ended."""


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def size() -> int:
    """The number of processes that train the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(count: int) -> range:
    """This rank's part of `count` things: consecutive, and as many as every other rank has, or one more or less."""
    return range(count * rank() // size(), count * (rank() + 1) // size())


# ---------------------------------------------------------------------------------------------------------------------
# Start and end


@contextmanager
def started() -> Iterator[None]:
    """In the block, the processes that torchrun started are one group. Ranks other than 0 print nothing, and of the
    errors of all ranks only the first is raised; a later UserError ends its process silently.

    Raises UserError if the environment has WORLD_SIZE but not all of torchrun's other variables."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    store = _connect()
    with open(os.devnull, "w") as nowhere:
        try:
            if rank():
                with redirect_stdout(nowhere), redirect_stderr(nowhere):
                    yield
            else:
                yield
        except BaseException as error:
            with signals.handled(lambda _: None):  # torchrun ends the others as soon as one has ended
                first = _is_first(store, error)
            if isinstance(error, UserError) and not first:
                sys.exit(error.code)
            raise
    gc.collect()  # NCCL waits for captured graphs that use it to be freed
    dist.destroy_process_group()


def _connect() -> dist.Store:
    try:
        local = int(os.environ["LOCAL_RANK"])
        store, number, count = next(dist.rendezvous("env://"))
    except (KeyError, ValueError) as error:
        raise UserError(f"WORLD_SIZE is set, but torchrun's other variables are not: {error}; start with it") from None
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", count))))  # torchrun says 1
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _connected():
        dist.init_process_group(backend, store=store, rank=number, world_size=count)
    return store


def _is_first(store: dist.Store, error: BaseException) -> bool:
    """Whether no other rank has met an error before; names the rank in it. The same error on all ranks is rank 0's."""
    if rank() and not (isinstance(error, SystemExit) and not error.code):
        time.sleep(1)
    first = rank() == 0
    with suppress(RuntimeError):  # the store has ended; without torchrun it is rank 0's, which has told its error
        first = store.add("errors", 1) == 1
    if rank():
        error.args = (f"rank {rank()}: {error}", *error.args[1:]) if isinstance(error, UserError) else error.args
    return first


@contextmanager
def _connected() -> Iterator[None]:
    """Turns the error of a collective on the CPU, which a process that has ended causes, into a LostRank."""
    try:
        yield
    except RuntimeError:
        raise LostRank("a process of this run has ended or is out of reach; rerun the same command to resume") from None


@contextmanager
def saved_if_lost(save: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    except LostRank:
        save()
        raise


# ---------------------------------------------------------------------------------------------------------------------
# The run and its state


@dataclass(frozen=True)
class Reader(folder.Run):
    """The run of a rank that writes nothing."""

    finished: dict | None = None
    summary = property(lambda self: self.finished)

    def log(self, row: dict) -> None: ...
    def cut_log(self, step: int, note: Callable | None = None) -> None: ...
    def finish(self, summary: dict) -> None: ...


@contextmanager
def open_run(out: str, name: str, record: dict, device: torch.device) -> Iterator[folder.Run]:
    """`folder.open_run` on rank 0; the other ranks wait for it, and write nothing. Raises UserError, besides, if two
    ranks have the same GPU, or a rank has other options or another text."""
    if size() > 1:
        mine, all_ranks = (socket.gethostname(), str(device), record["identity"]), [None] * size()
        with _connected():
            dist.all_gather_object(all_ranks, mine)
        for number, (host, theirs, identity) in enumerate(all_ranks):
            if device.type == "cuda" and (host, theirs) in [other[:2] for other in all_ranks[:number]]:
                raise UserError(f"`device` {theirs}: of two processes on {host}; start one process per GPU")
            if key := folder.first_difference(all_ranks[0][2], identity):
                raise UserError(f"rank {number} has {key} = {identity.get(key)}, rank 0 {all_ranks[0][2].get(key)}")
    if rank() == 0:
        with folder.open_run(out, name, record) as run:
            from_rank_0((run.folder, run.began, run.summary))
            yield run
    else:
        where, began, summary = from_rank_0()
        yield Reader(where, began=began, finished=summary)


def from_rank_0(value: object = None, optimizer: Adam | None = None) -> object:
    """Rank 0's `value`, on every rank; the weights and moments of `optimizer` are set to rank 0's."""
    if size() > 1:
        box = [value]
        with _connected():
            dist.broadcast_object_list(box, device=torch.device("cpu"))
            for p in optimizer.parameters if optimizer else ():
                for tensor in (p.detach(), *optimizer.state[p].values()):
                    dist.broadcast(tensor, 0)
        value = box[0]
    return value


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Adds up a tensor on the CPU, in place. On its own rank 0 waits here for the others."""
    if size() > 1:
        with _connected():
            dist.all_reduce(tensor)
    return tensor


# ---------------------------------------------------------------------------------------------------------------------
# The step


class Average:
    """Averages loss and gradients over the sequences of all ranks, in one all-reduce that also carries three flags:
    a rank ran out of memory, failed otherwise, or caught a signal. A captured step contains it."""

    LAG = 3  # steps until a GPU's flag is read, when it has arrived: more than TrainingStep.AHEAD

    def __init__(self, parameters: list[Tensor], sequences: int):
        """sequences: per batch, of all ranks."""
        self.parameters, self.sequences = parameters, sequences
        sizes, like = [p.numel() for p in parameters], parameters[0]
        self.flat = torch.zeros(sum(sizes) + 4, dtype=like.dtype, device=like.device)
        *gradients, self.loss, self.full, self.failed, self.stopped = self.flat.split([*sizes, 1, 1, 1, 1])
        self.gradients = [flat.view_as(p) for flat, p in zip(gradients, parameters, strict=True)]
        self.caught = torch.zeros_like(self.stopped)
        self.flags: deque[Tensor] = deque()  # on their way to the host
        self.joined = False  # whether this rank has taken part in the all-reduce of the current attempt at a step

    def __call__(self, loss: Tensor | float, sequences: int) -> Tensor:
        """Set the gradients to those of the whole batch -> its loss; `loss` is the mean of this rank's `sequences`.
        Raises an error, of out-of-memory if that was it, if another rank failed in this step."""
        self.flat.zero_()
        ours = [(flat, p.grad) for flat, p in zip(self.gradients, self.parameters, strict=True) if p.grad is not None]
        for flat, gradient in ours:
            flat.copy_(gradient)
        self.loss.add_(loss)
        self.flat.mul_(sequences / self.sequences)
        self.stopped.copy_(self.caught)
        self._reduce()
        for flat, p in zip(self.gradients, self.parameters, strict=True):
            p.grad = flat
        return self.loss[0]

    def _reduce(self) -> None:
        if self.flat.is_cuda:
            dist.all_reduce(self.flat)
            if torch.cuda.is_current_stream_capturing():
                return
        else:
            sum_over_ranks(self.flat)
        self.joined = True
        if self.full.item():
            raise torch.OutOfMemoryError("a process is out of memory")
        if self.failed.item():
            raise RuntimeError("another process failed")

    def confirm(self) -> None:
        """After a capture: raises an error if another rank could not capture."""
        self.flat.zero_()
        self._reduce()

    def agree(self, full: bool) -> bool:
        """After a failed attempt: whether any rank is out of memory. The others wait for this rank, if it failed first.

        Raises RunError if the others have taken this step: the weights of the ranks would differ."""
        if not self.joined:
            self.flat.zero_()
            (self.full if full else self.failed).fill_(1)
            with suppress(RuntimeError):  # that of this rank
                self._reduce()
        elif not (self.full.item() or self.failed.item()):
            raise RunError("out of memory in the optimizer" if full else "failed after the gradients were averaged")
        return self.full.item() > 0

    def stop(self, caught: bool) -> bool:
        """Whether a rank has caught a signal, known to all after the same step; called after each. The flag travels
        with the next step's gradients."""
        if caught:
            self.caught.fill_(1)
        flag = torch.empty(1, pin_memory=self.flat.is_cuda)
        self.flags.append(flag.copy_(self.stopped, non_blocking=True))
        return len(self.flags) > self.LAG * self.flat.is_cuda and self.flags.popleft().item() > 0
