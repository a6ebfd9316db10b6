"""Output layer and loss in one operation, in Triton and cuBLAS (`kernels.reference.linear_cross_entropy`).

For a row x = h W^T of logits (V,) and its target t, in float32:
    loss  =  log Z - x_t + z (log Z)^2,  log Z = m + log(sum(exp(x - m))),  m = max(x)
    dx    =  p (1 + 2 z log Z) - [v = t],  p = exp(x - m) / sum(exp(x - m))
and then dh = dx W, dW = dx^T h. The result is the mean over the rows whose target is not `ignore_index`, 0 if there
are none; ignored rows have loss 0 and dx = 0.

The logits are the largest tensor of a small model (V = 50k, 64k tokens: 6.6 GB in bf16, three times that with float32
copies and gradients). So the forward processes the rows in chunks of at most CHUNK_BYTES: cuBLAS computes the logits,
one kernel replaces them by their gradients and writes the losses, and cuBLAS computes dh and adds to dW. The backward
only scales. This is the idea of Liger-Kernel (Hsu et al. 2024), with chunks that fill the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK_BYTES = 2**30  # of logits; 10,000 rows at V = 50k in bf16, enough for full-speed matrix products


@triton.jit
def _loss_and_gradient(Logits, Targets, Loss, M, V, stride, ignore_index, z_loss,
                       GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Replaces Logits (M, V), each row padded to `stride`, by their gradients. Masks end at the stride, a multiple of
    64, for 16-byte accesses; values in the padding do not matter. The second pass reads from the L2 cache if the rows
    of all running programs fit there (`_config`)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = rows < M
    row = Logits + rows.to(tl.int64) * stride
    target = tl.load(Targets + rows, mask=real, other=ignore_index)
    keep = real & (target != ignore_index)
    # A target outside the vocabulary makes the loss NaN; nothing is read out of bounds.
    right = tl.load(row + target, mask=keep & (target >= 0) & (target < V), other=float("nan")).to(tl.float32)

    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)  # sums of exp(x - top) per column, reduced at the end
    for start in range(0, stride, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = real[:, None] & (cols < stride)[None, :]
        x = tl.load(row[:, None] + cols[None, :], mask=inside, other=0.0, eviction_policy="evict_last")
        x = tl.where((cols < V)[None, :], x.to(tl.float32), float("-inf"))
        higher = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp2((top - higher) * LOG2E)[:, None] + tl.exp2((x - higher[:, None]) * LOG2E)
        top = higher
    Z = tl.sum(total, 1)
    log_z = top + tl.log(Z)
    loss = tl.log(Z) + (top - right) + z_loss * log_z * log_z  # top - right first: both may be large
    tl.store(Loss + rows, tl.where(keep, loss, 0.0), mask=real)

    if GRADIENT:
        scale = tl.where(keep, (1 + 2 * z_loss * log_z) / Z, 0.0)
        target = tl.where(keep, target, -1)
        for start in range(0, stride, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            inside = real[:, None] & (cols < stride)[None, :]
            x = tl.load(row[:, None] + cols[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
            dx = tl.exp2((x.to(tl.float32) - top[:, None]) * LOG2E) * scale[:, None]
            dx = tl.where(cols[None, :] == target[:, None], dx - 1, dx)
            tl.store(
                row[:, None] + cols[None, :], dx.to(Logits.dtype.element_ty), mask=inside, eviction_policy="evict_first"
            )


def _config(V: int, train: bool) -> dict:
    """16 numbers per thread, from one row or several short ones. In training, 512 threads of 64 registers: two programs
    fit a multiprocessor, and the 264 rows of an H100 (27 MB at V = 50k) stay in its L2 of 50 MB until the second pass.
    Without gradients there is no second pass: 256 threads."""
    size, warps = (8192, 16) if train else (4096, 8)
    block = min(size, triton.next_power_of_2(V))
    return {"ROWS": min(64, size // block), "BLOCK": block, "num_warps": warps}


@torch.library.custom_op("nanochin::linear_cross_entropy", mutates_args=())
def head(
    h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, train: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> mean loss, number of targets not ignored (float32 scalars), and, still to be divided by that number, dh (M, C)
    and dweight (V, C, float32); empty unless `train`. Matrix products are in the dtype of h."""
    h, weight, targets = h.contiguous(), weight.to(h.dtype).contiguous(), targets.contiguous()
    M, V = len(h), len(weight)
    if targets.shape != (M,):
        raise ValueError(f"targets of shape {tuple(targets.shape)} for {M} rows")
    _, _, dh, dweight = _outputs(h, weight, targets, ignore_index, z_loss, train)
    losses = h.new_empty(M, dtype=torch.float32)
    config = _config(V, train)
    stride = triton.cdiv(V, 64) * 64  # unaligned rows slow the kernel and the matrix products
    chunks = max(1, triton.cdiv(M * stride * h.element_size(), CHUNK_BYTES))
    rows = max(1, triton.cdiv(M, chunks))  # chunks of equal size
    if rows > 128:
        rows = triton.cdiv(rows, 128) * 128  # whole tiles of the matrix products, aligned chunks
    buffer = h.new_empty((rows, stride))
    for start in range(0, M, rows):
        chunk = slice(start, start + rows)
        x, target, loss = h[chunk], targets[chunk], losses[chunk]
        logits = buffer[: len(x), :V]
        torch.mm(x, weight.T, out=logits)
        _loss_and_gradient[(triton.cdiv(len(x), config["ROWS"]),)](
            logits, target, loss, len(x), V, stride, ignore_index, z_loss, GRADIENT=train, **config
        )
        if train:
            torch.mm(logits, weight, out=dh[chunk])
            _add_product(dweight, logits, x, first=start == 0)
    count = (targets != ignore_index).sum().clamp(min=1).float()
    return losses.sum() / count, count, dh, dweight


@head.register_fake
def _outputs(h, weight, targets, ignore_index, z_loss, train):
    scalars = h.new_empty((), dtype=torch.float32), h.new_empty((), dtype=torch.float32)
    shapes = (h.shape, weight.shape) if train else (0, 0)
    return *scalars, h.new_empty(shapes[0]), h.new_empty(shapes[1], dtype=torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (V, C) float32 += a^T b, or = if `first`; cuBLAS reads bf16 and adds in float32 in one call."""
    if total.is_cuda:
        torch.addmm(total, a.T, b, out_dtype=torch.float32, beta=1 - first, out=total)
    else:
        torch.addmm(total, a.T.float(), b.float(), beta=1 - first, out=total)


def _setup_context(ctx, inputs, output):
    _, weight, *_ = inputs
    _, count, dh, dweight = output
    ctx.mark_non_differentiable(count, dh, dweight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(count, dh, dweight)
    ctx.dtype = weight.dtype


def _autograd(ctx, grad, *_):
    count, dh, dweight = ctx.saved_tensors
    scale = (grad / count)[None]  # (1,): a scalar tensor would not promote bf16 to float32
    return (dh * scale).to(dh.dtype), (dweight * scale).to(ctx.dtype), None, None, None, None


head.register_autograd(_autograd, setup_context=_setup_context)


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -1, z_loss: float = 0.0
) -> Tensor:
    """`kernels.ops.linear_cross_entropy`; NaN if a target is outside 0..V-1. The weight may be float32 and h half
    precision; the weight's gradient is then float32, never rounded to half. Raises ValueError unless h has one target
    per row."""
    train = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    return head(h, weight, targets, ignore_index, z_loss, train)[0]
