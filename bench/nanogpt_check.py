"""Whether an independent implementation reaches the same loss: train.py beside nanoGPT's model and torch's AdamW.

    python -m bench.nanogpt_check --nanogpt ~/nanoGPT --data books/ --budget 3e11 1e12 --seq-len 128

Both train from the same weights on the same batches, in float32 on the CPU. Ours is `train.train` with SAME, options
that make its model nanoGPT's. The other has nanoGPT's model, loss and optimizer; its loop is bench.steps.NanoGPT, its
schedule and validation loss are written here. In both, all matrices decay, embeddings included, and vectors do not.
The exit code is 1 if the final validation losses differ by more than 1%, or the losses of one of the first 20 steps,
when rounding has not grown yet, by more than 0.01%.
"""

import train  # first, since it sets how torch's threads wait

# isort: split
import contextlib
import itertools
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bench.common import save
from bench.steps import NanoGPT
from nanochin.base.cli import UserError, brief, opt, parse, run_command
from nanochin.base.console import Progress, format_columns
from nanochin.base.files import sha256_of
from nanochin.config import Config
from nanochin.data.text import Tokens
from nanochin.data.windows import eval_windows
from nanochin.interop.names import GPT2, rename
from nanochin.model import GPT
from nanochin.run.folder import read_log
from nanochin.run.record import Setup

LIMIT = 0.01  # relative difference of the final validation losses
EARLY, EARLY_LIMIT = 20, 1e-4  # the same of the loss of each of the first steps
SAME = {"norm": "layernorm", "positions": "learned", "bias": True, "activation": "gelu", "tied": True}
SAME |= {"device": "cpu", "dtype": "float32", "log_every": 1, "save_every": 0.0, "sample_tokens": 0}


@dataclass(frozen=True)
class Options:
    nanogpt: str = opt(".peer/nanoGPT", "a checkout of karpathy/nanoGPT")
    budget: tuple[float, ...] = opt((1e12,), "training FLOPs, one or more", above=0)
    out: str | None = opt(None, "folder of our runs; default: a temporary one")
    save: str | None = opt(None, "write the tables to this Markdown file")
    data: tuple[str, ...] | None = opt(None, "text to train on; default: train.py's")
    val_bytes: int = opt(1 << 20, "maximum bytes of validation data", low=1)
    cache: str = opt("cache", "folder of tokenised shards")
    seq_len: int = opt(128, "context length T in tokens", low=1)
    model: str | None = opt(None, "width x layers; default: by the law")
    lr: float | None = opt(None, "peak learning rate; default: by rule", above=0)
    seed: int = opt(0, "seed of the weights and of the data order", low=0, high=10**9)
    threads: int | None = opt(None, "CPU threads; default: torch's", low=1, high=1000)


def run_ours(config: Config, setup: Setup) -> tuple[np.ndarray, float]:
    """((loss, gradient norm) of each step, final validation loss) of train.py. Raises UserError if the run was there,
    with another log."""
    summary = train.train(config, quiet=True, corpus=setup.corpus)
    rows = [(row["loss"], row["grad_norm"]) for row in read_log(Path(config.out) / summary["run"]) if "loss" in row]
    if len(rows) != setup.plan.steps:
        raise UserError(f"`out` {config.out}: has this run, not logged at every step; give another folder")
    return np.array(rows), summary["loss"]


def run_theirs(setup: Setup, checkout: str) -> tuple[np.ndarray, float]:
    """The same of nanoGPT's model."""
    plan, config = setup.plan, setup.config
    sequences, warmup = plan.batch_tokens // config.seq_len, plan.warmup_tokens / plan.batch_tokens
    step = NanoGPT(checkout, plan.shape, sequences, setup.device, setup.dtype, (config.beta1, config.beta2))
    copy_weights(GPT(plan.shape, seed=config.seed), step.model)
    rows = []
    for i in range(plan.steps):
        batch = torch.from_numpy(setup.windows.batch(i * sequences, sequences))
        rows.append(step(batch, plan.lr * schedule(i, plan.steps, warmup)).tolist())
    return np.array(rows), validation_loss(step.model, setup.corpus.val, config.seq_len)


def copy_weights(ours: GPT, theirs: nn.Module) -> None:
    """Give nanoGPT's model our weights. It names parameters as GPT-2, but stores matrices as we do, (out, in). Raises
    UserError if it has other parameters."""
    weights = {rename(name, ours.shape.layers, GPT2): parameter for name, parameter in ours.named_parameters()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    try:
        theirs.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"`nanogpt`: its model is another one ({brief(error)})") from None


def schedule(step: int, steps: int, warmup: float) -> float:
    """The learning rate of a step, from 0, as a fraction of the peak: a linear warm-up, then half a cosine to 0.1."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup))


@torch.no_grad()
def validation_loss(model: nn.Module, tokens: Tokens, seq_len: int) -> float:
    """The mean loss of every token but the first, each predicted once."""
    inputs, targets = (torch.from_numpy(each).split(64) for each in eval_windows(tokens[:], seq_len))
    total = 0.0
    for x, y in zip(inputs, targets, strict=True):
        logits = model(x, y)[0].flatten(0, 1)  # (n T, V)
        total += F.cross_entropy(logits, y.flatten(), ignore_index=-1, reduction="sum").item()
    return total / (len(tokens) - 1)


def compare(config: Config, checkout: str) -> tuple[str, bool]:
    """(table of both runs, which is also printed; whether the losses agree)."""
    setup = train.resolve(config, Progress())
    theirs, their_loss = run_theirs(setup, checkout)
    ours, our_loss = run_ours(config, setup)
    plan, apart, difference = setup.plan, abs(ours / theirs - 1), abs(our_loss / their_loss - 1)
    some = {digit * 10**k for k in range(12) for digit in (1, 2, 5)} | {plan.steps}
    rows = [["step", "loss", "nanoGPT's", "difference", "gradient norm", "nanoGPT's", "difference"]]
    for i in sorted(step - 1 for step in some if step <= plan.steps):
        cells = ((f"{a:.5f}", f"{b:.5f}", f"{c:.1e}") for a, b, c in zip(ours[i], theirs[i], apart[i], strict=True))
        rows.append([str(i + 1), *itertools.chain(*cells)])
    (early, _), (loss, norm) = apart[:EARLY].max(axis=0), apart.max(axis=0)
    text = [
        f"budget {config.budget:g}: {plan.shape}, {plan.steps} steps of {plan.batch_tokens} tokens, lr {plan.lr:.3g}",
        format_columns(rows),
        f"largest difference in {EARLY} steps: loss {early:.1e} of {EARLY_LIMIT:g} allowed; "
        f"in all steps: loss {loss:.1e}, gradient norm {norm:.1e}",
        f"validation loss {our_loss:.5f}, nanoGPT's {their_loss:.5f}, difference {difference:.1e} of {LIMIT} allowed",
    ]
    print(*text, sep="\n", end="\n\n", flush=True)
    return "\n".join(text), bool(difference <= LIMIT and early <= EARLY_LIMIT)


def main() -> int:
    options = parse(Options, prog="python -m bench.nanogpt_check", description=__doc__)
    given = {name: value for name, value in vars(options).items() if name not in ("nanogpt", "save")}
    with contextlib.nullcontext(options.out) if options.out else tempfile.TemporaryDirectory() as out:
        configs = [Config(**given | {"budget": budget, "out": out} | SAME) for budget in options.budget]
        tables, agree = zip(*(compare(config, options.nanogpt) for config in configs), strict=True)
    if options.save:
        digest = sha256_of(Path(options.nanogpt) / "model.py")
        note = f"{torch.get_num_threads()} threads, float32; nanoGPT's model.py has SHA-256 {digest[:12]}..."
        save(options.save, "bench.nanogpt_check", note, "\n\n".join(tables))
    return 0 if all(agree) else 1


if __name__ == "__main__":
    run_command(main, "python -m bench.nanogpt_check")
