"""Exact parameter and FLOP counts of a shape in every convention.

All counts come from one ledger: a row per operation of the model, in integers for one sequence of T tokens, and a
column per convention that counts operations. A multiply-add is 2 FLOPs, the backward pass costs twice the forward
pass, recomputation is never counted. docs/flops.md compares the conventions with each other and with 6ND.

B batch, T sequence, C width, H heads, F feed-forward width, V vocabulary, L layers.
"""

from typing import NamedTuple

from nanochin.base.cli import UserError
from nanochin.base.console import format_columns
from nanochin.config import FLOP_CONVENTIONS, Shape, parse_model, shape_maker
from nanochin.options import FlopsOptions
from nanochin.plan.devices import BYTES, DEVICES, Device, find_device

OPERATION_CONVENTIONS = ("physical", "causal", "appendix_f", "table_a4")  # counted from the ledger


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


class Params(NamedTuple):
    """Parameter counts of a shape by PARAM_CONVENTIONS. At small scale the choice changes a fitted exponent by up to
    0.25."""

    total: int
    non_embedding: int
    with_head: int


def count_params(shape: Shape) -> Params:
    """Exact parameter counts. `total` is the sum of p.numel() over nanochin.model.GPT(shape)."""
    C, F, V, L = shape.width, shape.ffn, shape.vocab_size, shape.layers
    ups = _ups(shape)
    norm = C * (2 if shape.norm == "layernorm" and shape.bias else 1)
    matrices = L * (3 * C * C + C * C + C * ups * F + F * C)  # QKV, output projection, feed-forward up and down
    biases = L * (3 * C + C + ups * F + C) if shape.bias else 0
    norms = (2 * L + 1) * norm  # two per layer and a final one; QK-norm has no weight
    positions = shape.seq_len * C if shape.positions == "learned" else 0
    non_embedding = matrices + biases + norms
    embeddings = V * C * (1 if shape.tied else 2) + positions
    return Params(total=embeddings + non_embedding, non_embedding=non_embedding, with_head=matrices + V * C)


def _ups(shape: Shape) -> int:
    """Up-projections: 2 for SwiGLU (gate and value, one matrix of 2F columns), else 1."""
    return 2 if shape.activation == "swiglu" else 1


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs


class Row(NamedTuple):
    """One operation over all layers: forward FLOPs of one sequence of T tokens, as each convention counts them."""

    operation: str
    physical: int = 0
    causal: int = 0
    appendix_f: int = 0
    table_a4: int = 0
    elementwise: int = 0  # arithmetic outside matrix products, without masked scores; no convention counts it
    weights: int = 0  # parameters read, once per pass for any batch
    activations: int = 0  # numbers read and written per sequence, if everything that can stay on chip does

    @property
    def forward(self) -> int:
        """FLOPs that run if attention computes all T x T scores. The backward pass needs twice as many: for y = x W
        dx = dy W^T and dW = x^T dy; elementwise work is assumed to double too."""
        return self.physical + self.elementwise


def ledger(shape: Shape) -> list[Row]:
    """Every operation of the forward pass on one sequence."""
    T, C, F, V, H, L = shape.seq_len, shape.width, shape.ffn, shape.vocab_size, shape.heads, shape.layers
    ups, biased = _ups(shape), int(shape.bias)
    pairs, kept = T * T, T * (T + 1) // 2  # (query, key) pairs: all, and kept by the causal mask

    def product(operation: str, flops: int, causal: int | None = None, **more) -> Row:
        """A matrix product inside the layers, counted by every convention."""
        causal = flops if causal is None else causal
        return Row(operation, physical=flops, causal=causal, appendix_f=flops, table_a4=flops, **more)

    learned = int(shape.positions == "learned")
    # FLOPs per element, with a transcendental function as 1.
    per_norm = {"rmsnorm": 4, "layernorm": 6 + shape.bias}[shape.norm]
    per_activation = {"gelu": 5, "gelu_tanh": 9, "relu2": 2, "swiglu": 5}[shape.activation]
    per_qk = 3 * (shape.positions == "rotary") + 3 * shape.qk_norm  # on queries and keys
    rows = [
        # Looked up, not multiplied; Appendix F counts it as a product with one-hot vectors.
        Row("embedding", appendix_f=2 * T * V * C, elementwise=learned * T * C, weights=learned * T * C,
            activations=2 * T * C),
        product("qkv", L * 2 * T * C * 3 * C, weights=L * 3 * C * C, activations=L * 4 * T * C),
        # No memory traffic (a lower bound): rotation can be fused into kernels that read or write queries and keys.
        Row("rotary, qk-norm", elementwise=L * T * 2 * C * per_qk),
        # The scores stay on chip (FlashAttention): traffic of queries and keys here, of values and results below.
        product("attention scores", L * 2 * pairs * C, causal=L * 2 * kept * C, activations=L * 2 * T * C),
        Row("softmax", appendix_f=L * 3 * H * pairs, table_a4=L * 3 * H * pairs, elementwise=L * 3 * H * kept),
        product("attention values", L * 2 * pairs * C, causal=L * 2 * kept * C, activations=L * 2 * T * C),
        product("output projection", L * 2 * T * C * C, weights=L * C * C, activations=L * 2 * T * C),
        product("feed-forward", L * 2 * T * C * F * (ups + 1), weights=L * C * F * (ups + 1),
                activations=L * T * (2 * C + (ups + 1) * F)),
        Row("activation", elementwise=L * T * F * per_activation, activations=L * T * F * (ups + 1)),
        # x + residual and its norm, fused: two numbers in, two out. The first norm has no residual.
        Row("norms, residuals", elementwise=(2 * L + 1) * T * C * per_norm + 2 * L * T * C,
            activations=2 * T * C + 2 * L * 4 * T * C),
        Row("biases", elementwise=biased * L * T * (5 * C + ups * F)),
        Row("logits", physical=2 * T * C * V, causal=2 * T * C * V, appendix_f=2 * T * C * V, weights=V * C,
            activations=T * C),
        Row("loss", elementwise=3 * T * V),
    ]  # fmt: skip
    return [row for row in rows if row != Row(row.operation)]


def flops_per_token(shape: Shape, convention: str = "physical") -> float:
    """Training FLOPs (3 x forward) per token."""
    return _sequence_flops(shape)[convention] / shape.seq_len


def count_flops(shape: Shape, tokens: float) -> dict[str, float]:
    """Training FLOPs of a run of `tokens` in each convention. Exact Python integers until the final division gives a
    float64: int64 would overflow at 2^63 = 9.2e18."""
    exact = int(tokens) if tokens == int(tokens) else tokens
    return {convention: flops * exact / shape.seq_len for convention, flops in _sequence_flops(shape).items()}


def _sequence_flops(shape: Shape) -> dict[str, int]:
    """Training FLOPs of one sequence, by convention."""
    rows, params = ledger(shape), count_params(shape)
    flops = {convention: 3 * sum(getattr(row, convention) for row in rows) for convention in OPERATION_CONVENTIONS}
    per_param = 6 * shape.seq_len
    return flops | {"6nd": per_param * params.total, "kaplan": per_param * params.non_embedding}


# ---------------------------------------------------------------------------------------------------------------------
# The shortest time of an operation


def row_bytes(row: Row, sequences: int, number: int) -> int:
    """Minimum bytes of memory traffic of an operation's forward pass over `sequences`, at `number` bytes per number."""
    return number * (row.weights + sequences * row.activations)


def floor_seconds(row: Row, sequences: int, device: Device, dtype: str) -> float:
    """Minimum seconds of an operation, forward and backward, over `sequences`, without masked scores: the longest of
    matrix units, other arithmetic and memory traffic, each at its peak. The device has the dtype."""
    matrices = sequences * row.causal / (getattr(device, dtype) * 1e12)
    other = sequences * row.elementwise / (device.float32 * 1e12)
    return 3 * max(matrices, other, row_bytes(row, sequences, BYTES[dtype]) / (device.bandwidth * 1e9))


# ---------------------------------------------------------------------------------------------------------------------
# Command


def main(options: FlopsOptions) -> None:
    shape = shape_maker(options, options.vocab_size, options.seq_len)(*parse_model(options.model))
    T = shape.seq_len
    batch = 16 * T if options.batch_tokens is None else options.batch_tokens
    if batch % T:
        raise UserError(f"`batch_tokens` {batch}: must be a multiple of `seq_len` {T}")
    device = find_device(options.device)
    if device is None:
        raise UserError(f"`device` {options.device}: unknown; choose from {', '.join(DEVICES)}")
    if getattr(device, options.dtype) is None:
        raise UserError(f"`dtype` {options.dtype}: {options.device} has no matrix units for it")

    params = count_params(shape)
    print(
        f"{shape}, vocabulary {shape.vocab_size}, sequences of {T} tokens. Parameters: {params.total:,} total, "
        f"{params.non_embedding:,} non_embedding, {params.with_head:,} with_head.\n"
    )
    print("FLOPs per token: forward and backward as run, and training (3 x forward) in each convention.\n")
    print(_ledger_table(shape, batch // T, device, options.dtype))
    print(f"""
step        training FLOPs of {batch:,} tokens in one pass, as run
FLOPs/byte  of the forward pass in {options.dtype}, each number read and written once, scores and logits on chip
floor       minimum time of a step on {options.device}: each operation at the peak of matrix units, arithmetic or
            memory, without masked scores and optimizer
""")
    print(_convention_table(shape, batch))


def _ledger_table(shape: Shape, sequences: int, device: Device, dtype: str) -> str:
    T, rows = shape.seq_len, ledger(shape)
    lines = [["operation", "forward", "backward", *OPERATION_CONVENTIONS, "step", "FLOPs/byte", "floor us"]]
    for name, part in [*((row.operation, [row]) for row in rows), ("sum", rows)]:
        forward = sum(row.forward for row in part)
        traffic = sum(row_bytes(row, sequences, BYTES[dtype]) for row in part)
        counted = [3 * sum(getattr(row, column) for row in part) / T for column in OPERATION_CONVENTIONS]
        numbers = [forward / T, 2 * forward / T, *counted, 3 * sequences * forward]
        intensity = f"{sequences * forward / traffic:.1f}" if traffic else "on chip"
        floor = 1e6 * sum(floor_seconds(row, sequences, device, dtype) for row in part)
        lines.append([name, *map(_flops, numbers), intensity, f"{floor:.1f}"])
    return format_columns(lines)


def _convention_table(shape: Shape, batch: int) -> str:
    of_6nd = flops_per_token(shape, "6nd")
    lines = [["convention", "FLOPs/token", "FLOPs/step", "/ 6nd"]]
    for convention in FLOP_CONVENTIONS:
        token = flops_per_token(shape, convention)
        lines.append([convention, _flops(token), _flops(token * batch), f"{token / of_6nd:.4f}"])
    meanings = ["", *FLOP_CONVENTIONS.values()]
    lines = format_columns(lines).split("\n")
    return "\n".join(f"{line}   {meaning}".rstrip() for line, meaning in zip(lines, meanings, strict=True))


def _flops(number: float) -> str:
    return f"{number:.4g}" if number < 1e4 else f"{number:.3e}"
