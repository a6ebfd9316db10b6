"""What the kernel bench times: operations at the shapes of training, each by our kernel and by its best peers."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Bench:
    """Where and on what sizes."""

    device: torch.device
    dtype: torch.dtype
    dry: bool
    deadline: float  # on the monotonic clock
    cache: int  # bytes of L2

    def compiled(self, function: Callable) -> Callable:
        return torch.compile(function, dynamic=False, backend="eager" if self.dry else "inductor")

    def randn(self, *size: int, dtype: torch.dtype | None = None, grad: bool = True) -> Tensor:
        return torch.randn(size, device=self.device, dtype=dtype or self.dtype).requires_grad_(grad)


@dataclass(frozen=True)
class Contender:
    """A differentiable function of the inputs, or of what `prepare` makes of them beforehand."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    prepare: Callable[[list[Tensor]], list[Tensor]] = lambda inputs: inputs


@dataclass(frozen=True)
class Case:
    """One operation at one shape. The contender "ours" is compared with the best of the others."""

    group: str
    operation: str
    shape: str
    inputs: Callable[[], list[Tensor]]
    contenders: dict[str, Contender]
    directions: tuple[str, ...]  # of forward, backward, both
    flops: dict[str, float]  # by direction
    bytes: dict[str, float]


def attention_cases(bench: Bench) -> Iterator[Case]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from kernels import ops

    flex = bench.compiled(flex_attention)
    shapes = [(tokens, D, T) for tokens in (16384, 65536) for D in (64, 128) for T in (512, 1024, 2048, 4096)]
    for tokens, D, T in [(16, 16, 16)] if bench.dry else shapes:
        B, H = tokens // T, (1 if bench.dry else 2048 // D)

        def split(inputs, H=H, D=D):  # what is best for the others: no packing, no transposed copies
            qkv = inputs[0].detach().view(*inputs[0].shape[:2], 3, H, D).permute(2, 0, 3, 1, 4)
            return [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in qkv]  # (B, H, T, D)

        def sdpa(q, k, v, backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        @functools.cache
        def mask(T=T):
            return create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device=bench.device)

        contenders = {
            "ours": Contender(lambda qkv, H=H: ops.attention(qkv, H)),
            "SDPA flash": Contender(functools.partial(sdpa, backend=SDPBackend.FLASH_ATTENTION), split),
            "SDPA cuDNN": Contender(functools.partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION), split),
        }
        if tokens == 65536 or bench.dry:  # each shape takes it 10 s to compile
            contenders["flex_attention"] = Contender(lambda q, k, v, mask=mask: flex(q, k, v, block_mask=mask()), split)
        forward = 2 * B * H * T * T * D
        yield Case(
            "attention",
            "attention",
            f"D{D} T{T} {tokens} tokens",
            lambda size=(B, T, 3 * H * D): [bench.randn(*size)],
            contenders,
            ("forward", "backward"),
            {"forward": forward, "backward": 2.5 * forward},
            {},
        )


def rotary_attention_cases(bench: Bench) -> Iterator[Case]:
    """Attention as the model calls it, with rotary positions; torch's own rotates packed qkv, compiled."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from kernels import fallback, ops

    rotate = bench.compiled(torch_rotary)

    def sdpa(qkv, H, backend):
        with sdpa_kernel(backend):
            return fallback.attention(rotate(qkv, *tables(qkv, H)), H)

    for D, T in [(16, 16)] if bench.dry else [(64, 1024), (64, 2048), (128, 1024), (128, 2048)]:
        tokens, H = (16, 1) if bench.dry else (65536, 768 // D)
        contenders = {"ours": Contender(lambda qkv, H=H: ops.attention(qkv, H, 10_000.0))}
        for name in ("flash", "cuDNN"):
            backend = getattr(SDPBackend, f"{name.upper()}_ATTENTION")
            contenders[f"SDPA {name}"] = Contender(functools.partial(sdpa, H=H, backend=backend))
        forward = 2 * tokens * H * T * D
        yield Case(
            "rotary attention",
            "rotary attention",
            f"D{D} T{T} {tokens} tokens",
            lambda size=(tokens // T, T, 3 * H * D): [bench.randn(*size)],
            contenders,
            ("forward", "backward"),
            {"forward": forward, "backward": 2.5 * forward},
            {},
        )


def torch_rotary(qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, qk_norm: bool = False) -> Tensor:
    """Rotary positions on packed qkv (B, T, 3C), to be compiled."""
    B, T, C3 = qkv.shape
    D = C3 // 3 // n_heads
    qk, v = qkv.view(B, T, 3 * n_heads, D).split((2 * n_heads, n_heads), dim=2)
    x1, x2 = (F.rms_norm(qk, (D,), eps=1e-6) if qk_norm else qk).chunk(2, dim=-1)
    qk = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    return torch.cat((qk, v), dim=2).view(B, T, C3)


def tables(qkv: Tensor, n_heads: int) -> tuple[Tensor, Tensor, int]:
    """What `torch_rotary` needs beside qkv."""
    return *_tables(qkv.shape[1], qkv.shape[2] // 3 // n_heads, qkv.device, qkv.dtype), n_heads


@functools.cache
def _tables(T: int, D: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    from kernels.reference import rotary_table

    return rotary_table(T, D, 10_000.0, device)[:, None].to(dtype).chunk(2, dim=-1)  # (T, 1, D/2) each


def liger(name: str) -> Callable | None:
    """A function of Liger's, if it is installed."""
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        return None
    return getattr(functional, name, None)


def norm_cases(bench: Bench) -> Iterator[Case]:
    from kernels import ops

    def torch_norm(name, x, *parameters):
        norm, eps = (F.rms_norm, 1e-6) if name == "rms_norm" else (F.layer_norm, 1e-5)
        return norm(x, x.shape[-1:], *(p.to(x.dtype) for p in parameters), eps=eps)

    def torch_add_norm(name, x, residual, *parameters):
        total = x + residual
        return torch_norm(name, total, *parameters), total

    for tokens, C in [(20, 24)] if bench.dry else [(16384, 768), (65536, 768), (65536, 2048)]:
        for name in ("rms_norm", "layer_norm"):
            for add in (False, True):
                eager = functools.partial(torch_add_norm if add else torch_norm, name)
                operation = f"add_{name}" if add else name
                contenders = {
                    "ours": Contender(getattr(ops, operation)),
                    "eager": Contender(eager),
                    "torch.compile": Contender(bench.compiled(eager)),
                }
                if not add and (theirs := liger(f"liger_{name}")):
                    eps = 1e-6 if name == "rms_norm" else 1e-5
                    contenders["Liger"] = Contender(lambda *xs, f=theirs, eps=eps: f(*xs, eps))

                def inputs(tokens=tokens, C=C, name=name, add=add):
                    parameters = [bench.randn(C, dtype=torch.float32) for _ in range(1 + (name == "layer_norm"))]
                    return [*(bench.randn(tokens, C) for _ in range(1 + add)), *parameters]

                number = tokens * C * torch.finfo(bench.dtype).bits // 8
                moved = {"forward": (4 if add else 2) * number, "backward": (4 if add else 3) * number}
                yield Case(
                    "norms", operation, f"C{C} {tokens} tokens", inputs, contenders, ("forward", "backward"), {}, moved
                )


def elementwise_cases(bench: Bench) -> Iterator[Case]:
    """Activations."""
    from kernels.activation import activate

    def swiglu(x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    tokens, width = (16, 40) if bench.dry else (65536, 3072)
    for kind, theirs, ups in (("gelu", F.gelu, 1), ("swiglu", swiglu, 2)):
        contenders = {
            "ours": Contender(functools.partial(activate, kind=kind)),
            "eager": Contender(theirs),
            "torch.compile": Contender(bench.compiled(theirs)),
        }
        number = tokens * width * torch.finfo(bench.dtype).bits // 8
        yield Case(
            "elementwise",
            kind,
            f"F{width} {tokens} tokens",
            lambda u=ups: [bench.randn(tokens, u * width)],
            contenders,
            ("forward", "backward"),
            {},
            {"forward": (1 + ups) * number, "backward": (1 + 2 * ups) * number},
        )


def loss_cases(bench: Bench) -> Iterator[Case]:
    from kernels import ops

    def eager(h, weight, targets):
        return F.cross_entropy(F.linear(h, weight).float(), targets)

    def pad(weight):  # rows of logits at round addresses, as ours has them: what makes the products fastest
        return F.pad(weight.detach(), (0, 0, 0, -len(weight) % 64)).requires_grad_()

    shapes = [(16384, 768, 50257), (65536, 768, 50257), (16384, 2048, 50257), (65536, 320, 8192)]
    for tokens, C, V in [(8, 16, 65)] if bench.dry else shapes:

        def inputs(tokens=tokens, C=C, V=V):
            weight = (0.02 * bench.randn(V, C, grad=False)).requires_grad_()
            return [bench.randn(tokens, C), weight, torch.randint(V, (tokens,), device=bench.device)]

        contenders = {
            "ours": Contender(ops.linear_cross_entropy),
            "matrix products alone": Contender(_ThreeProducts.apply, lambda inputs: [inputs[0], pad(inputs[1])]),
            "eager": Contender(eager),
            "torch.compile": Contender(bench.compiled(eager)),
        }
        if hasattr(F, "linear_cross_entropy"):
            contenders["F.linear_cross_entropy"] = Contender(F.linear_cross_entropy)
            chunked = functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())
            contenders["F.linear_cross_entropy chunked"] = Contender(chunked)
        if theirs := liger("liger_fused_linear_cross_entropy"):
            contenders["Liger"] = Contender(theirs)
        yield Case(
            "loss",
            "linear_cross_entropy",
            f"C{C} V{V} {tokens} tokens",
            inputs,
            contenders,
            ("both",),
            {"both": 6 * tokens * C * V},
            {},
        )


class _ThreeProducts(torch.autograd.Function):
    """What the output layer cannot do without: logits, and from something of their size both gradients."""

    @staticmethod
    def forward(ctx, h, weight):
        logits = h @ weight.T
        ctx.save_for_backward(h, weight, logits)
        return logits[0, 0].float()

    @staticmethod
    def backward(ctx, grad):
        h, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.T @ h
