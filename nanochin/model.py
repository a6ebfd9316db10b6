"""A decoder-only transformer.

The default is like Chinchilla: pre-norm RMSNorm, rotary positions, GELU feed-forward of width 4C, no biases, tied
embedding and output. Variants are options of `Shape`: `layernorm`, `learned` positions and biases give GPT-2; `swiglu`
and an untied head give Llama; `qk_norm` and `relu2` combine with any.

References: Hoffmann et al. 2022 (Chinchilla); Radford et al. 2019 (GPT-2) and its rewrite in karpathy/nanoGPT;
Su et al. 2021 (rotary positions); Zhang & Sennrich 2019 (RMSNorm).

B batch, T sequence, C width, H heads, D head size, F feed-forward width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import ops
from nanochin.config import Shape


class Linear(nn.Linear):
    """Its weight is float32; it multiplies in the dtype of its input (bf16 on a GPU), without autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.cast(x.dtype))

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)


class RMSNorm(nn.Module):
    """`forward(x)` normalises; `add(x, residual)` normalises x + residual and returns that sum too."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.width))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_rms_norm(x, residual, self.weight)


class LayerNorm(nn.Module):
    """As RMSNorm, with an optional bias."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.width))
        self.bias = nn.Parameter(torch.zeros(shape.width)) if shape.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_layer_norm(x, residual, self.weight, self.bias)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
ROTARY_THETA = 10_000.0  # base of the rotary frequencies


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        C = shape.width
        self.heads, self.qk_norm = shape.heads, shape.qk_norm
        self.theta = ROTARY_THETA if shape.positions == "rotary" else None
        self.qkv = Linear(C, 3 * C, bias=shape.bias)
        self.out = Linear(C, C, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)  # (B, T, 3C)
        return self.out(ops.attention(qkv, self.heads, self.theta, self.qk_norm))  # (B, T, C)


class FeedForward(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        C, F = shape.width, shape.ffn
        self.kind = shape.activation
        self.up = Linear(C, 2 * F if self.kind == "swiglu" else F, bias=shape.bias)
        self.down = Linear(F, C, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)  # (B, T, F), or 2F for swiglu
        return ops.activation_linear(x, *self.down.cast(x.dtype), self.kind)  # (B, T, C)


class Block(nn.Module):
    """Takes and returns the residual stream x and its normalised copy h, so that each residual addition and the norm
    after it are one operation. `norm2` is the first norm of the next block in the usual layout, or the final norm."""

    def __init__(self, shape: Shape):
        super().__init__()
        norm = NORMS[shape.norm]
        self.attention = Attention(shape)
        self.norm1 = norm(shape)
        self.feed_forward = FeedForward(shape)
        self.norm2 = norm(shape)

    def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h, x = self.norm1.add(self.attention(h), x)
        return self.norm2.add(self.feed_forward(h), x)


class GPT(nn.Module):
    """`model(tokens, targets)` is the mean loss in nats; `model(tokens)` the logits.

    Weights are float32, initialised on the CPU from `seed` alone, so a run starts from the same weights on every
    device; activations are in `dtype`.
    """

    def __init__(self, shape: Shape, *, dtype: torch.dtype = torch.float32, seed: int = 0, z_loss: float = 0.0):
        super().__init__()
        self.shape, self.dtype, self.z_loss = shape, dtype, z_loss
        self.embed = nn.Embedding(shape.vocab_size, shape.width)
        self.positions = nn.Embedding(shape.seq_len, shape.width) if shape.positions == "learned" else None
        self.norm = NORMS[shape.norm](shape)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.head = self.embed if shape.tied else Linear(shape.width, shape.vocab_size, bias=False)
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Matrices normal with standard deviation sqrt(2 / (5 C)) (Nguyen & Salazar 2019, "SmallInit"; GPT-2's 0.02 at
        C = 1000), over sqrt(2 layers) for the two that write to the residual stream (GPT-2); norms 1, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        std = (2 / (5 * self.shape.width)) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                to_residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
                scale = (2 * self.shape.layers) ** -0.5 if to_residual else 1.0
                parameter.normal_(0.0, std * scale, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """tokens (B, T), targets (B, T), -1 for none -> loss; without targets: logits (B, T, V)."""
        h = self.hidden(tokens)
        if targets is None:
            return self.logits(h)
        z_loss = self.z_loss if torch.is_grad_enabled() else 0.0  # regularises training, not part of the measured loss
        return ops.linear_cross_entropy(h.flatten(0, 1), self.head.weight, targets.flatten(), z_loss=z_loss)

    def hidden(self, tokens: Tensor, start: int = 0) -> Tensor:
        """The last normalised states (B, T, C) of tokens (B, T), with learned positions from `start`."""
        x = self.embed(tokens).to(self.dtype)  # (B, T, C)
        if self.positions is not None:
            x = x + self.positions.weight[start : start + tokens.shape[1]].to(self.dtype)
        h = self.norm(x)
        for block in self.blocks:
            h, x = block(h, x)
        return h

    def logits(self, h: Tensor) -> Tensor:
        """h (..., C) -> (..., V) in float32."""
        return F.linear(h, self.head.weight.to(self.dtype)).float()
