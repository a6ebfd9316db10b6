"""The optimizer and the learning-rate schedule."""

import math

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from nanochin.base.cli import UserError
from nanochin.config import Config

# The final learning rate as a fraction of the peak: 10% for a cosine (Hoffmann et al. 2022, Appendix B).
FINAL_LR = {"cosine": 0.1, "wsd": 0.0, "linear": 0.0, "constant": 1.0}


class Adam:
    """torch's fused Adam on float32 parameters, without the class `torch.optim.Adam`, which imports torch's compiler:
    2 s at every start.

    `adamw` subtracts lr * weight_decay * w from the weight (Loshchilov & Hutter 2019); `adam` adds weight_decay * w to
    the gradient (L2). Hoffmann et al. 2022, section 4.1, compare the two. Matrices decay, vectors (norms, biases) do
    not. With `rounded`, weights have the precision of bfloat16 after each step (their Figure A6). `state[p]` holds
    step, exp_avg and exp_avg_sq of parameter p, as torch names them. `lr` is a number, or a tensor on the parameters'
    device for a captured step (step.py).
    """

    def __init__(
        self, model: nn.Module, kind: str, lr: float, betas: tuple[float, float], weight_decay: float, rounded: bool
    ):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.decoupled = kind == "adamw"
        self.lr: float | Tensor = lr
        self.betas, self.weight_decay, self.rounded = betas, weight_decay, rounded
        self.state = {}
        for p in self.parameters:
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.state[p] = {"step": torch.zeros((), device=p.device), **moments}

    @torch.no_grad()
    def step(self) -> None:
        """One update of all parameters that have a gradient."""
        for matrices in (True, False):
            params = [p for p in self.parameters if p.grad is not None and (p.ndim >= 2) == matrices]
            names = ("exp_avg", "exp_avg_sq", "step")
            means, squares, steps = ([self.state[p][name] for p in params] for name in names)
            if params:
                adam(params, [p.grad for p in params], means, squares, [], steps, fused=True, amsgrad=False,
                     beta1=self.betas[0], beta2=self.betas[1], lr=self.lr, eps=1e-8, maximize=False,
                     weight_decay=self.weight_decay if matrices else 0.0,
                     decoupled_weight_decay=self.decoupled)  # fmt: skip
            for p in params if self.rounded else ():
                p.copy_(p.bfloat16())

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of `step` (from 0) of a resolved config, as a fraction of the peak.

    After a linear warm-up whose first step is already above 0:
    `cosine`    half a cosine from 1 to `final_lr`, reached at `cycle` x the length of the run. With cycle > 1 the run
                ends before (the overshoot of Hoffmann et al. 2022, Appendix B); with cycle < 1 the rate then stays;
    `wsd`       1, then 1 - sqrt(progress) down to `final_lr` over the last `cooldown` share of the run (Hägele et al.
                2024);
    `linear`    a line from 1 to `final_lr`;
    `constant`  1.
    `final_lr` is reached after the last step, so no step has rate 0.

    Raises UserError if the warm-up is as long as the schedule (`cycle` times the run for a cosine).
    """
    steps = round(config.tokens / config.batch_tokens)
    warmup_steps = config.warmup_tokens / config.batch_tokens
    horizon = config.cycle * steps if config.schedule == "cosine" else steps
    if warmup_steps >= horizon:
        raise UserError(
            f"`warmup_tokens`: warm-up of {warmup_steps:g} steps in a {config.schedule} schedule of {horizon:g}; "
            "use a shorter warm-up"
        )
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    start = steps * (1 - config.cooldown) if config.schedule == "wsd" else warmup_steps
    progress = min(1.0, max(0.0, (step - start) / (horizon - start))) if horizon > start else 0.0
    shape = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "wsd": 1 - math.sqrt(progress),
        "linear": 1 - progress,
        "constant": 1.0,
    }[config.schedule]
    return min(warmup, config.final_lr + (1 - config.final_lr) * shape)
