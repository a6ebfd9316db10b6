"""The optimizer and the learning-rate schedule."""

import math

import torch
from torch import nn

from nanochin.config import UserError


def make_optimizer(
    model: nn.Module, kind: str, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Adam over two parameter groups: matrices, which decay, and vectors (norms, biases), which do not.

    `adamw` takes lr * weight_decay * w off the weight (Loshchilov & Hutter 2019), `adam` adds weight_decay * w to
    the gradient (L2); Hoffmann et al. 2022, section 4.1, compare the two. One fused kernel a step where we know
    torch to have it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    optimizer = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[kind]
    return optimizer(groups, lr=lr, betas=betas, eps=1e-8, fused=fused, foreach=not fused)


def default_final(schedule: str) -> float:
    """Where a schedule ends, as a fraction of the peak rate: a cosine at 10% (Hoffmann et al. 2022, Appendix B)."""
    return {"cosine": 0.1, "wsd": 0.0, "linear": 0.0, "constant": 1.0}[schedule]


def lr_at(
    step: int, steps: int, warmup_steps: float, schedule: str, cycle: float, final: float, cooldown: float
) -> float:
    """The learning rate of step 0 <= `step` < `steps`, as a fraction of the peak rate.

    After a linear warm-up whose first step is already above 0:
    `cosine`    half a cosine from 1 to `final`, which it reaches at `cycle` x the end of the run: with cycle > 1 the
                run ends on the way (the overshoot of Hoffmann et al. 2022, Appendix B), with cycle < 1 it stays there;
    `wsd`       1, then from 1 to `final` as 1 - sqrt(progress) over the last `cooldown` share of the run
                (Hägele et al. 2024);
    `linear`    a line from 1 to `final`;
    `constant`  1.
    `final` belongs to the moment after the last step, so no step is lost to a rate of 0.

    Raises UserError where the warm-up is as long as the decay that should follow it.
    """
    horizon = cycle * steps if schedule == "cosine" else steps
    if warmup_steps >= horizon:
        raise UserError(f"--warmup-tokens: warm-up of {warmup_steps:g} steps in a {schedule} schedule of {horizon:g}"
                        "; use a shorter warm-up")  # fmt: skip
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    start = steps * (1 - cooldown) if schedule == "wsd" else warmup_steps
    progress = min(1.0, max(0.0, (step - start) / (horizon - start))) if horizon > start else 0.0
    shape = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "wsd": 1 - math.sqrt(progress),
        "linear": 1 - progress,
        "constant": 1.0,
    }[schedule]
    return min(warmup, final + (1 - final) * shape)
