"""Operations compared with PyTorch's own and with float64, for the tests of kernels."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from interpreted import DEVICE


def sdpa(qkv: torch.Tensor, n_heads: int) -> torch.Tensor:
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C3 // 3)


def torch_norm(name: str):
    """F.rms_norm or F.layer_norm with the signature of our operation `name`."""
    norm, eps = (F.rms_norm, 1e-6) if name.endswith("rms_norm") else (F.layer_norm, 1e-5)

    def alone(x, *parameters):
        return norm(x, x.shape[-1:], *(p.to(x.dtype) for p in parameters), eps=eps)

    def added(x, residual, *parameters):
        return alone(x + residual, *parameters), x + residual

    return added if name.startswith("add") else alone


def torch_loss(h, weight, targets, ignore_index=-1, z_loss=0.0):
    """F.cross_entropy on materialised logits, at least float32."""
    logits = F.linear(h, weight).to(torch.promote_types(h.dtype, torch.float32))
    keep = targets != ignore_index
    nll = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    return (nll + z_loss * logits.logsumexp(-1).square()[keep].sum()) / keep.sum().clamp(min=1)


def randn(*size: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers in float64, the same on every device."""
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(*sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """float32 tensors on DEVICE that require gradients, one per size."""
    return [randn(*size, seed=i).float().to(DEVICE).requires_grad_() for i, size in enumerate(sizes)]


def draw_targets(M: int, V: int) -> torch.Tensor:
    """Targets (M,), some ignored if there are enough rows."""
    targets = torch.randint(V, (M,), generator=torch.Generator().manual_seed(2))
    targets[1 : M // 3] = -1
    targets[-1] = V - 1
    return targets.to(DEVICE)


def compare(ours, theirs, exact, inputs, dtype, weights=(), at_least=0.0) -> None:
    """Ours against `exact` in float64, values and every gradient: at most twice the error of PyTorch's own operation
    (`theirs`) at that dtype, plus four units in the last place of the largest value. Where a single rounding makes a
    larger error, `at_least` of the largest value is allowed.

    `inputs` are rounded to `dtype` first; `weights` follow them, stay float32 and hold numbers of `dtype`.
    """

    def run(function, dtype, weight_dtype):
        dtypes = [dtype] * len(inputs) + [weight_dtype] * len(weights)
        xs = [x.to(t).requires_grad_() for x, t in zip(rounded, dtypes, strict=True)]
        return gradients(function, xs, seed_dtype)

    seed_dtype = dtype
    rounded = [x.to(DEVICE, dtype) for x in (*inputs, *weights)]
    with poisoned():
        got = run(ours, dtype, torch.float32)
    peers, wanted = run(theirs, dtype, torch.float32), run(exact, torch.float64, torch.float64)
    for i, (a, peer, want) in enumerate(zip(got, peers, wanted, strict=True)):
        assert a.dtype == peer.dtype and a.shape == peer.shape
        error, allowed = (a.double() - want).abs().max(), (peer.double() - want).abs().max()
        unit = max(4 * torch.finfo(a.dtype).eps, at_least) * want.abs().max()
        assert error <= 2 * allowed + unit, f"output {i}: error {error:.2e}, PyTorch's {allowed:.2e}"


def gradients(function, xs, seed_dtype=torch.float64) -> list[torch.Tensor]:
    """The outputs of function(*xs), then the gradients of those xs that require one, for seeded output gradients."""
    out = function(*xs)
    outs = out if isinstance(out, tuple) else (out,)
    seeds = [randn(*o.shape, seed=9 + i).to(seed_dtype).to(o) for i, o in enumerate(outs)]
    return [*outs, *torch.autograd.grad(outs, [x for x in xs if x.requires_grad], seeds)]


@contextmanager
def poisoned():
    """New memory is NaN in the block, to reveal what a kernel does not write."""

    def poison(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return made

    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(place, name, poison(getattr(place, name)))
        yield


def repeats(function, *inputs: torch.Tensor) -> None:
    """Two runs on the same inputs and one under torch.compile are bit-identical, gradients included."""
    runs = (function, function, torch.compile(function, backend="aot_eager", fullgraph=True))
    first, *others = (
        gradients(run, [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]) for run in runs
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
