import random
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from nanochin.config import FLOP_CONVENTIONS, make_shape
from nanochin.options import FlopsOptions
from nanochin.plan import flops
from nanochin.plan.devices import BYTES, DEVICES, find_device, peak_flops
from nanochin.plan.flops import count_flops, count_params, flops_per_token, ledger

# Hoffmann et al. 2022, Table A4: layers, width, ffn, heads, head size, and training FLOPs over 6ND: as printed (layers
# only), then computed from Appendix F by hand, to four decimals: layers only, with logits, with logits and lookup.
TABLE_A4 = [
    (10, 640, 2560, 10, 64, 1.03, 1.0250, 1.3024, 1.5799),
    (20, 1024, 4096, 16, 64, 1.10, 1.1008, 1.2080, 1.3152),
    (24, 1280, 5120, 10, 128, 1.08, 1.0829, 1.1570, 1.2312),
    (26, 1792, 7168, 14, 128, 1.04, 1.0441, 1.0942, 1.1444),
    (28, 2048, 8192, 16, 128, 1.03, 1.0329, 1.0740, 1.1152),
    (40, 3584, 14336, 28, 128, 0.99, 0.9941, 1.0110, 1.0279),
]

OPTIONS = {
    "norm": ("rmsnorm", "layernorm"),
    "positions": ("rotary", "learned"),
    "activation": ("gelu", "gelu_tanh", "relu2", "swiglu"),
    "bias": (False, True),
    "tied": (True, False),
    "qk_norm": (False, True),
}


def random_shapes(n: int, seed: int):
    """Small shapes with odd sizes, with every value of every option, and explicit head sizes and ffn."""
    rng = random.Random(seed)
    for i in range(n):
        options = {name: values[i % len(values)] if i < 6 else rng.choice(values) for name, values in OPTIONS.items()}
        options |= {"head_size": rng.choice((2, 4, 6, 10)), "ffn": rng.choice((None, 1, 7, 50))}
        width, layers = options["head_size"] * rng.choice((1, 2, 3, 5)), rng.randint(1, 3)
        yield make_shape(width, layers, vocab_size=rng.randint(2, 97), seq_len=rng.randint(1, 33), **options)


@pytest.mark.parametrize("shape", list(random_shapes(30, seed=1)), ids=str)
def test_count_params_equals_the_model(shape):
    """The three counts equal sums over the real model's parameters."""
    from nanochin.model import GPT

    parameters = dict(GPT(shape).named_parameters())
    in_blocks = {name: p for name, p in parameters.items() if name.split(".")[0] not in ("embed", "positions", "head")}
    matrices = sum(p.numel() for p in in_blocks.values() if p.ndim == 2)
    params = count_params(shape)
    assert params.total == sum(p.numel() for p in parameters.values())
    assert params.non_embedding == sum(p.numel() for p in in_blocks.values())
    assert params.with_head == matrices + shape.vocab_size * shape.width


def test_gpt2_small():
    """GPT-2's published 124,439,808 parameters."""
    gpt2 = make_shape(768, 12, vocab_size=50257, seq_len=1024, norm="layernorm", positions="learned", bias=True)
    assert count_params(gpt2).total == 124_439_808


def chinchilla_params(width: int, ffn: int, head_size: int, heads: int, layers: int, vocab_size: int = 32_000) -> int:
    """Parameters of the paper's models, within 0.7% of the 50 of its Table A9: layernorm, biases, tied head, and
    Transformer-XL's relative positions, with a fifth attention matrix for their keys. Heads need not fill the width."""
    d, f, q = width, ffn, heads * head_size
    layer = 3 * (d * q + q) + (d * q + 2 * q) + (q * d + d) + (d * f + f) + (f * d + d) + 4 * d
    return vocab_size * d + 2 * d + layers * layer


def test_every_row_by_hand():
    """A model small enough to count on paper: C 4, F 6 (swiglu), H 2, V 5, T 3, one layer, all options on."""
    shape = make_shape(4, 1, vocab_size=5, seq_len=3, head_size=2, ffn=6, activation="swiglu", norm="layernorm",
                       bias=True, qk_norm=True, tied=False)  # fmt: skip
    rows = {row.operation: row for row in ledger(shape)}
    physical = {name: row.physical for name, row in rows.items() if row.physical}
    assert physical == {
        "qkv": 2 * 3 * 4 * 12,  # (3 x 4) (4 x 12)
        "attention scores": 2 * 2 * 9 * 2,  # 2 heads, (3 x 2) (2 x 3)
        "attention values": 2 * 2 * 9 * 2,
        "output projection": 2 * 3 * 4 * 4,
        "feed-forward": 2 * 3 * 4 * 12 + 2 * 3 * 6 * 4,
        "logits": 2 * 3 * 4 * 5,
    }
    assert rows["attention scores"].causal == rows["attention values"].causal == 2 * 2 * 6 * 2  # 6 of 9 pairs kept
    assert rows["embedding"].appendix_f == 2 * 3 * 5 * 4
    assert rows["softmax"].appendix_f == rows["softmax"].table_a4 == 3 * 2 * 9
    assert rows["norms, residuals"].elementwise == 3 * (3 * 4 * 7) + 2 * 3 * 4  # 3 norms, 2 additions
    assert rows["rotary, qk-norm"].elementwise == 3 * 8 * 6
    assert rows["activation"].elementwise == 3 * 6 * 5
    assert rows["biases"].elementwise == 3 * (12 + 4 + 12 + 4)
    assert rows["loss"].elementwise == 3 * 3 * 5


def test_conventions_by_hand():
    """All six counts of the same model, from sums on paper."""
    shape = make_shape(4, 1, vocab_size=5, seq_len=3, head_size=2, ffn=6, activation="swiglu", tied=False)
    layers = 288 + 72 + 72 + 96 + 288 + 144
    total, non_embedding = 20 + 20 + 48 + 16 + 48 + 24 + 12, 48 + 16 + 48 + 24 + 12
    want = {
        "physical": 3 * (layers + 120),
        "causal": 3 * (layers - 48 + 120),
        "appendix_f": 3 * (120 + layers + 54 + 120),
        "table_a4": 3 * (layers + 54),
        "6nd": 6 * total * 3,
        "kaplan": 6 * non_embedding * 3,
    }
    assert count_flops(shape, 3) == want
    assert count_flops(shape, 3000) == {name: 1000 * value for name, value in want.items()}
    assert {name: flops_per_token(shape, name) for name in FLOP_CONVENTIONS} == {n: v / 3 for n, v in want.items()}


@pytest.mark.parametrize("layers, width, ffn, heads, head_size, printed, only_layers, with_logits, all_rows", TABLE_A4)
def test_table_a4(layers, width, ffn, heads, head_size, printed, only_layers, with_logits, all_rows):
    """Appendix F, with and without its rows outside the layers, over 6ND with the paper's N: as published."""
    shape = make_shape(width, layers, vocab_size=32_000, seq_len=2048, head_size=head_size, ffn=ffn)
    six_n = 6 * chinchilla_params(width, ffn, head_size, heads, layers)
    table_a4, appendix_f = (flops_per_token(shape, name) / six_n for name in ("table_a4", "appendix_f"))
    logits = next(3 * row.physical / 2048 for row in ledger(shape) if row.operation == "logits") / six_n
    assert round(table_a4, 2) == printed
    assert round(table_a4, 4) == only_layers
    assert round(table_a4 + logits, 4) == with_logits
    assert round(appendix_f, 4) == all_rows


@pytest.mark.parametrize("shape", list(random_shapes(20, seed=2)), ids=str)
def test_physical_equals_torchs_count(shape):
    """torch's FlopCounterMode on the real model with the reference operations, forward and backward, two sequences."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import kernels
    from nanochin.model import GPT

    tokens = torch.randint(shape.vocab_size, (2, shape.seq_len), generator=torch.Generator().manual_seed(0))
    model = GPT(shape)
    with kernels.use("reference"):
        with FlopCounterMode(display=False) as forward:
            loss = model(tokens, tokens)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    ours = sum(row.physical for row in ledger(shape))
    assert (forward.get_total_flops(), backward.get_total_flops()) == (2 * ours, 2 * 2 * ours)
    assert count_flops(shape, 2 * shape.seq_len)["physical"] == 2 * 3 * ours


def test_float64_beyond_int64():
    """A budget above 2^63 FLOPs is exact to float64."""
    shape, tokens = make_shape(512, 8, vocab_size=256, seq_len=256), 10**13
    want = 6 * count_params(shape).total * tokens
    assert want > 2**63
    assert count_flops(shape, tokens)["6nd"] == float(want) and isinstance(count_flops(shape, tokens)["6nd"], float)


def test_documented_error_of_6nd():
    """The tables in docs/flops.md are the command's output."""
    from bench.flops_error import table

    page = (Path(__file__).parents[2] / "docs" / "flops.md").read_text()
    assert table(tied=True) in page and table(tied=False) in page


@pytest.mark.parametrize(
    "name, dtype, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 NVL", "float16", 835.5),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA A100 80GB PCIe", "bfloat16", 312),
        ("NVIDIA L4", "float32", 30.3),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("AMD Instinct MI300X", "bfloat16", 1307.4),
        # Slower variants of known devices, and devices without a published peak.
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "bfloat16", None),
        ("Intel(R) Xeon(R) Platinum 8481C", "float32", None),
    ],
)
def test_peaks_by_torchs_names(name, dtype, teraflops):
    """Published dense peaks for full device names; None for similar names."""
    assert peak_flops(name, dtype) == (None if teraflops is None else teraflops * 1e12)


def test_table_of_devices_is_consistent():
    """Half the rate for twice the bits, never a sparse rate by mistake; memory between 0.3 and 8 TB/s."""
    for name, device in DEVICES.items():
        assert find_device(name) is device
        assert 300 <= device.bandwidth <= 8000
        assert device.bfloat16 in (None, device.float16)
        if device.tf32 is not None:
            assert device.tf32 == pytest.approx(device.float16 / 2, rel=0.02)
        assert device.float16 >= 1.9 * device.float32 or name in ("L40", "RTX 3080")


def test_floor_and_intensity_by_hand():
    """The QKV row on an A100, from its shapes: compute-bound with many tokens, memory-bound with few."""
    shape = make_shape(512, 1, vocab_size=256, seq_len=128)
    qkv = next(row for row in ledger(shape) if row.operation == "qkv")
    a100 = DEVICES["A100 SXM 80GB"]
    for sequences in (1, 1000):
        tokens = 128 * sequences
        moved = 2 * (512 * 1536 + tokens * 512 + tokens * 1536)  # weights, input, output in 2 bytes
        seconds = 3 * max(2 * tokens * 512 * 1536 / 312e12, moved / 2039e9)
        assert flops.row_bytes(qkv, sequences, 2) == moved
        assert flops.floor_seconds(qkv, sequences, a100, "bfloat16") == pytest.approx(seconds, rel=1e-12)


def test_command_prints_the_ledger(cli):
    """Ledger, ratios and floor for the size of GPT-2 small."""
    out = cli("flops", "--model", "768x12", "--vocab-size", "50304", "--seq-len", "1024")
    ratios = {line.split()[0]: line.split()[3] for line in out.splitlines() if len(line.split()) > 4}
    # 854,654,976 / (6 x 123,587,328); the parameters are the matrices and 25 norms of 768
    assert ratios["physical"] == f"{854_654_976 / (6 * (84_934_656 + 38_633_472 + 25 * 768)):.4f}"
    assert ratios["6nd"] == "1.0000"


@pytest.mark.parametrize(
    "argv, names",
    [
        (["--model", "770x12", "--head-size", "64"], "--head-size 64"),
        (["--seq-len", "nan"], "'nan'"),
        (["--device", "RTX 9090"], "--device RTX 9090"),
        (["--device", "T4"], "--dtype bfloat16"),
        (["--batch-tokens", "257"], "--batch-tokens 257"),
    ],
)
def test_bad_options_are_one_line(cli, argv, names):
    """Exit code 2 and one line that names the option and its value."""
    assert names in cli("flops", *argv, code=2)


@pytest.mark.parametrize("module, heavy", [("flops", {"torch", "numpy"}), ("ladder", {"torch"})])
def test_starts_light(module, heavy):
    """Heavy libraries are not imported (the ladder's laws need numpy)."""
    code = f"import sys, nanochin.plan.{module} as m; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_choices():
    """The options offer the dtypes of the device table."""
    assert {f.name: f.metadata["choices"] for f in fields(FlopsOptions)}["dtype"] == tuple(BYTES)
