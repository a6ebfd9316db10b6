"""The rules for batch, learning rate, warm-up and beta2, with the source of each. D tokens, N total parameters."""

import math


def rule_batch(tokens: float) -> float:
    """1) Batch in tokens: 0.03 D^0.69. With bytes and 0.45, 1.4 and 5.6 million tokens, the best batches were 256,
    about 500 and 1024 tokens, a quarter of Step Law's 0.58 D^0.571 (LOG.md). At 1e10 to 1e11 tokens, where Step Law was
    fitted (Li et al. 2025, 2503.04715), the two agree within 20%."""
    return 0.03 * tokens**0.69


def rule_lr(width: int, batch_tokens: int, params: int) -> float:
    """2) Peak learning rate: 0.011 sqrt(B) / C: square root of the batch (Malladi et al. 2022, 2205.10287), inverse
    width (Yang et al. 2022, 2203.03466). Within 1.7x of 13 measured optima, each known within a factor of 2, at 10 to
    430 thousand parameters and 128 to 2700 tokens per batch (LOG.md). A rule by width alone was 3x too high for large
    models on few tokens and raised their loss by 3%. Capped at 3.7 N^-0.36 of Porian et al. 2024 (2406.19146), fitted
    on 5 to 221 million parameters and checked up to 901 million. At 20 tokens per parameter the cap applies from about
    200 million parameters on (and below 2 million with a vocabulary of 50 thousand)."""
    return min(0.011 * math.sqrt(batch_tokens) / width, 3.7 * params**-0.36)


def rule_warmup(params: int, tokens: int) -> int:
    """3) Warm-up: as many tokens as total parameters, at most 5% of the run. A fixed long warm-up biases the exponent
    (Porian et al. 2024, 2406.19146)."""
    return min(params, tokens // 20)


def rule_beta2(batch_tokens: int) -> float:
    """4) Adam's beta2: 0.99 for batches up to 262,144 tokens, whose noisy gradients need longer averaging, else 0.95.
    Porian et al. 2024 (2406.19146) find 0.95 too low up to 128 sequences of 2048 tokens. Larger batches: untested."""
    return 0.99 if batch_tokens <= 262_144 else 0.95
