"""Train one model: a FLOP budget and text go in, a compute-optimal GPT comes out.

    python train.py                                    a run that fits this machine, on text it already has
    python train.py --budget 1e15 --data books/        the law chooses the model and its tokens
    python train.py --model 256x4 --tokens 2e8         you choose both
    python train.py config.toml --seed 1               options from a file; the command line overrides them
    torchrun --nproc-per-node=8 train.py ...           the same run on the 8 GPUs of this machine

Rerun the same command to resume a killed run; the result is bit-identical to an uninterrupted run. The file reads top
to bottom: `resolve` decides what is trained and on what, `train` is the training loop, `train_step` is one step.
"""

from nanochin.base import signals

if __name__ == "__main__":
    signals.end_quietly()  # on Ctrl-C during the imports

import os

from nanochin.base.cli import RunError, parse, run_command, validate
from nanochin.base.console import Progress, lasting_output
from nanochin.config import Config, parse_model, shape_maker

if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    with lasting_output("train.py"):
        parse(Config, prog="train.py", description=__doc__, file=True)  # --help and mistakes need no torch

import dataclasses
import math
import signal
import time
from contextlib import contextmanager
from pathlib import Path

# OpenMP threads must sleep while they wait, which is set before torch loads OpenMP: spinning threads make a run many
# times slower as soon as another program needs a core (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor, nn

import kernels
from nanochin import laws
from nanochin.data.corpus import Corpus, prepare
from nanochin.data.text import Tokens
from nanochin.data.tokenizer import model_vocab
from nanochin.data.windows import Windows
from nanochin.interop import loggers
from nanochin.interop.initial import find_initial, initial_options
from nanochin.model import GPT
from nanochin.plan import ladder
from nanochin.run import checkpoint, parallel
from nanochin.run.branch import find_branch, trunk_options
from nanochin.run.device import check_memory, keep_freed_memory, peak_of, pick_device, pick_dtype
from nanochin.run.display import closing_loss, progress_note, show_plan, show_result
from nanochin.run.evaluate import beginning, evaluate
from nanochin.run.folder import Run, check_name, moved, read_log, run_name
from nanochin.run.optim import FINAL_LR, Adam, learning_rate
from nanochin.run.record import Setup, describe, summarise
from nanochin.run.step import Shards, TrainingStep, pick_step

# Defaults by device type, never by a timing, so that the same command is the same run: the largest 1-2-5 budget that
# takes about 3 minutes on 2 CPU cores or a minute on a data-centre GPU, on at most one epoch of text on this machine.
# A forward pass has at most `tokens_at_once`, which fit the cache of a CPU; it is halved on out-of-memory.
DEFAULTS = {
    "cpu": {"budget": 1e13, "seq_len": 256, "data": ("python",), "tokens_at_once": 4096},
    "mps": {"budget": 1e14, "seq_len": 512, "data": ("python-all",), "tokens_at_once": 65536},
    "cuda": {"budget": 1e15, "seq_len": 1024, "data": ("python-all",), "tokens_at_once": 65536},
}


def resolve(config: Config, progress: Progress, corpus: Corpus | None = None) -> Setup:
    """Fill in the options that were not given: device, text, shape, tokens, batch, learning rate, dtype."""
    validate(config)
    if config.name is not None:
        check_name(config.name)
    loggers.check(config.loggers)
    initial = bpe = None
    if config.branch_from:
        config, bpe = trunk_options(config)
    if config.init_from:
        initial = find_initial(config)
        config = initial_options(config, initial)
        bpe = initial.tokenizer if config.tokenizer == "bpe" else None
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches its kernels there
        torch.set_float32_matmul_precision("highest")  # float32 means float32: no TF32
    if config.threads:
        torch.set_num_threads(config.threads)
    if device.type == "cpu":
        keep_freed_memory()
    defaults = DEFAULTS[device.type]
    seq_len = config.seq_len or defaults["seq_len"]
    budget = config.budget or (None if config.model or config.tokens else defaults["budget"])

    if corpus is None:
        with progress:
            corpus = prepare(dataclasses.replace(config, data=config.data or defaults["data"]), progress, bpe)

    # Shape, tokens, batch and learning rate: rules and sources in nanochin/plan/.
    law = laws.load_law(config.law, config.law_approach) if config.law else laws.BESIROGLU
    make = shape_maker(config, model_vocab(corpus.tokenizer, config.vocab_size), seq_len)
    model = config.model and parse_model(config.model)
    given = {name: getattr(config, name) for name in ("tokens", "batch_tokens", "lr", "warmup_tokens", "beta2")}
    plan = ladder.plan(make, budget=budget, model=model, law=law, convention=config.flops, **given)
    shape = plan.shape
    check_memory(plan.params.total, device)
    dtype, why_dtype = pick_dtype(config.dtype, device, shape)
    config = dataclasses.replace(
        config, budget=budget, model=str(shape), tokens=float(plan.tokens), seq_len=seq_len,
        tokenizer=corpus.tokenizer.name, vocab_size=shape.vocab_size, head_size=shape.head_size, ffn=shape.ffn,
        batch_tokens=plan.batch_tokens, lr=plan.lr, warmup_tokens=float(plan.warmup_tokens), beta2=plan.beta2,
        dtype=str(dtype).split(".")[1],
        final_lr=FINAL_LR[config.schedule] if config.final_lr is None else config.final_lr,
        log_every=config.log_every or max(1, plan.steps // 200))  # fmt: skip
    learning_rate(config, 0)  # raises if the warm-up is longer than the schedule
    unique = config.epochs and max(1, round(plan.tokens / config.epochs / seq_len))
    windows = Windows(corpus.train, seq_len, config.seed, unique)
    step = pick_step(config.step, device)
    start = (initial.sha(), initial.load) if initial else (None, None)
    return Setup(config, plan, law, corpus, windows, device, dtype, why_dtype, *step, *start)


def train(config: Config, quiet: bool = False, corpus: Corpus | None = None) -> dict:
    """Train the run that `config` describes, resume it, or report it if it is finished. Returns its summary, a row of
    runs.csv. `corpus` is its tokenised text, if already read.

    Raises UserError for what the user can fix and RunError for what fails during the run (full disk, NaN loss, a
    signal). Checkpoints are kept in both cases, and the same call resumes from the newest.
    """
    quiet = quiet or parallel.rank() > 0
    progress = Progress(quiet)
    setup = resolve(config, progress, corpus)
    config, plan, corpus, device = setup.config, setup.plan, setup.corpus, setup.device
    record = describe(setup)
    name = config.name or run_name(corpus.name, record["identity"])
    if config.branch_from and not (Path(config.out) / name).exists():
        find_branch(config, record)  # an error here must not leave a folder, which a corrected command would not match

    with progress, parallel.open_run(config.out, name, record, device) as run, kernels.use(config.kernels):
        if run.summary is not None:
            progress.say(f"{run.folder} is finished: loss {run.summary['loss']:.4f}")
            return run.summary
        # Pre-registered: the prediction made before the first step, whatever law a resuming call names.
        if before := run.began.get("predicted"):
            record["predicted"] = {key: before.get(key) for key in record["predicted"]}
        if before := moved(run.began, record):
            progress.say(f"note: this run began with {before}; its result will not be bit-identical to one that stayed")
        first = parallel.rank() == 0  # the only process that reads and writes the run's folder
        if first:
            corpus.tokenizer.save(run.folder)

        # Model and optimizer: new, from another run, from given weights, or from this run's newest checkpoint.
        torch.manual_seed(config.seed)  # nothing needs it, but its state is saved: equal runs, equal checkpoints
        model = GPT(plan.shape, dtype=setup.dtype, seed=config.seed, z_loss=config.z_loss).to(device)
        betas, rounded = (config.beta1, config.beta2), config.weight_dtype == "bfloat16"
        optimizer = Adam(model, config.optimizer, config.lr, betas, config.weight_decay, rounded)
        tokens_at_once = min(plan.batch_tokens, DEFAULTS[device.type]["tokens_at_once"])
        micro_batch = config.micro_batch or max(1, tokens_at_once // config.seq_len)
        state = {"step": 0, "seconds": 0.0, "lap": 0.0, "recent": [], "micro_batch": micro_batch}
        if not first:
            pass  # all of it comes from the first process, below
        elif saved := checkpoint.resume(run.folder, model, optimizer, progress.say):
            state = saved
        elif config.branch_from:
            state["step"] = checkpoint.load(find_branch(config, record), model, optimizer)["step"]
        elif setup.load_initial:
            setup.load_initial(model)
        state = parallel.from_rank_0(state, optimizer)
        run.cut_log(state["step"], progress.say)
        if first:
            run.loggers.extend(loggers.open_logger(name, run.folder, record, state["step"]) for name in config.loggers)
        peak, peak_source = peak_of(device, setup.dtype)
        peak = peak and peak * parallel.size()
        sequences = plan.batch_tokens // config.seq_len
        share = parallel.share(sequences)  # of each batch
        train_on = TrainingStep(
            setup.step, train_step, model, optimizer, state["micro_batch"], config.clip, sequences, progress.say
        )
        early = beginning(corpus, config.eval_bytes)  # tokens, bytes of text: for evaluations before the last
        if not quiet:
            show_plan(setup, run, train_on, peak_source, len(early[0]))

        # The loop. `step` counts finished optimizer steps and fixes the data position. Losses and norms stay on the
        # device until they are logged, so that a GPU does not wait for the host.
        step = state["step"]
        recent = [torch.tensor(pair, device=device) for pair in state["recent"]]  # (loss, norm) of steps not yet logged
        watch, lap, last_save = Stopwatch(state["seconds"]), state["lap"], time.monotonic()
        caught: list[int] = []  # signals, so that the loop can finish its step

        def save() -> None:
            nonlocal last_save
            if not first or step in checkpoint.steps(run.folder):
                return
            with watch.paused():
                pending = [pair.tolist() for pair in recent]
                check_finite(pending, step, run)
                state = {"seconds": watch.seconds(), "lap": lap, "recent": pending, "micro_batch": train_on.micro_batch}
                checkpoint.save(run.folder, step, model, optimizer, state)
                checkpoint.prune(run.folder, config.keep, config.save_steps)
                last_save = time.monotonic()

        with signals.handled(caught.append), parallel.saved_if_lost(save):
            while step < plan.steps:
                if config.eval_every and step % config.eval_every == 0:
                    with watch.paused():
                        log_evaluation(setup, step, model, run, *early)

                # On a GPU this overlaps with the previous step: 4 to 8 ns per token on one core (LOG.md).
                batch = torch.from_numpy(setup.windows.batch(step * sequences + share.start, len(share)))  # (n, T+1)
                recent.append(train_on(batch, config.lr * learning_rate(config, step)))
                step += 1

                if step % config.log_every == 0 or step == plan.steps:
                    row = log_row(setup, step, recent, run)
                    now = watch.seconds()  # after log_row, which has waited for the device
                    row["tokens_per_s"] = len(recent) * plan.batch_tokens / (now - lap)
                    row["mfu"] = peak and row["tokens_per_s"] * plan.flops["physical"] / plan.tokens / peak
                    run.log(row)
                    recent, lap = [], now
                    if step == plan.steps and first and not quiet:
                        row["loss"] = closing_loss(read_log(run.folder), step)
                    progress("training", step, plan.steps, progress_note(row))

                due = config.save_every and time.monotonic() - last_save > config.save_every
                stop = train_on.stop(bool(caught))
                if due or step == plan.steps or step in config.save_steps or stop:
                    save()
                if stop:
                    parallel.from_rank_0()  # the other processes wait until it is saved
                if stop or (caught and (parallel.size() == 1 or step == plan.steps)):  # no later step shares it
                    number = caught[0] if caught else signal.SIGTERM  # another process caught it
                    raise InterruptedRun(number, f"{run.folder} is saved at step {step} of {plan.steps}")

        # The result.
        seconds = watch.seconds()
        loss, bpb = log_evaluation(setup, step, model, run, corpus.val, corpus.val_bytes, progress)
        run.finish(summarise(setup, record, name, loss, bpb, seconds).summary())
        progress.close()
        if not quiet:
            show_result(setup, run, model)
        return run.summary


def train_step(shards: Shards, optimizer: Adam, batch: Tensor, micro_batch: int, clip: float) -> Tensor:
    """One step on batch (n, T+1), `micro_batch` sequences at a time -> (loss, gradient norm before clipping).

    The gradient is that of the mean loss over all n x T tokens, for any micro-batch. It is summed in the order of the
    sequences, so the same micro-batch gives bit-identical results.
    """

    def accumulate(model: nn.Module, sequences: Tensor) -> Tensor:
        total = 0.0
        for micro in sequences.split(micro_batch):
            loss = model(micro[:, :-1], micro[:, 1:]) * (len(micro) / len(batch))
            loss.backward()
            total = total + loss.detach()
        return total

    loss = shards.run(accumulate, batch)
    norm = nn.utils.clip_grad_norm_(optimizer.parameters, clip or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack((loss, norm))


# ---------------------------------------------------------------------------------------------------------------------
# Time and signals


class Stopwatch:
    """Seconds of training over all processes of a run, without evaluations and checkpoints."""

    def __init__(self, seconds: float):
        self.started = time.monotonic() - seconds

    def seconds(self) -> float:
        return time.monotonic() - self.started

    @contextmanager
    def paused(self):
        start = time.monotonic()
        yield
        self.started += time.monotonic() - start


class InterruptedRun(RunError):
    """Stopped by a signal, after saving. Exit code 128 + signal number, as in a shell."""

    def __init__(self, number: int, where: str):
        super().__init__(f"stopped by {signal.Signals(number).name}: {where}; rerun the same command to resume")
        self.code = 128 + number


# ---------------------------------------------------------------------------------------------------------------------
# Records


def log_row(setup: Setup, step: int, recent: list[Tensor], run: Run) -> dict:
    """A row of log.jsonl: means over the steps since the last one. Waits for the device. Raises RunError for a loss or
    norm that is not finite."""
    values = torch.stack(recent).tolist()
    check_finite(values, step, run)
    plan, config = setup.plan, setup.config
    losses, norms = zip(*values, strict=True)
    return {
        "step": step,
        "tokens": step * plan.batch_tokens,
        "flops": plan.flops["physical"] * step / plan.steps,
        "loss": sum(losses) / len(losses),
        "lr": config.lr * learning_rate(config, step - 1),
        "grad_norm": sum(norms) / len(norms),
    }


def log_evaluation(
    setup: Setup, step: int, model: GPT, run: Run, tokens: Tokens, text_bytes: int, progress: Progress | None = None
) -> tuple[float, float | None]:
    """(loss, bits per byte) after `step` on `tokens`, the validation text or its beginning, also logged. Raises
    RunError for a loss that is not finite."""
    loss, bpb = evaluate(model, tokens, text_bytes, progress)
    if not math.isfinite(loss):
        raise RunError(f"step {step}: validation loss {loss}; the run diverged, try a lower --lr")
    part = {"val_tokens": len(tokens)} if len(tokens) < len(setup.corpus.val) else {}
    run.log({"step": step, "val_loss": loss, "val_bpb": bpb} | part)
    return loss, bpb


def check_finite(recent: list[list[float]], step: int, run: Run) -> None:
    """Raises RunError for the first of the `recent` steps up to `step` whose loss or gradient norm is not finite."""
    for number, pair in enumerate(recent, start=step - len(recent) + 1):
        if not all(map(math.isfinite, pair)):
            last = checkpoint.newest(run.folder)
            raise RunError(
                f"step {number}: loss {pair[0]}, gradient norm {pair[1]}; the run diverged, try a lower "
                f"--lr. Last good checkpoint: {last or 'none yet'}"
            )


def main() -> None:
    with parallel.started():
        train(parse(Config, prog="train.py", description=__doc__, file=True))


if __name__ == "__main__":
    run_command(main, "train.py")
