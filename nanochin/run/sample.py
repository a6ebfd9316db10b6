"""Sample text from a run, with a cache of keys and values."""

import codecs
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import tee

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ops
from kernels.fallback import rotary
from nanochin.base.cli import UserError
from nanochin.data.tokenizer import Tokenizer
from nanochin.model import GPT
from nanochin.options import SampleOptions
from nanochin.run.checkpoint import load_run
from nanochin.run.folder import find_run

# ---------------------------------------------------------------------------------------------------------------------
# Tokens


class Cache:
    """Keys and values of a context of up to seq_len tokens, for `batch` sequences: each token is computed once."""

    def __init__(self, model: GPT, batch: int):
        shape = model.shape
        size = (shape.layers, 2, batch, shape.heads, shape.seq_len, shape.head_size)
        self.kv = torch.empty(size, dtype=model.dtype, device=model.embed.weight.device)
        self.model, self.length = model, 0

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) after tokens (B, T): the first T of a context, or with T = 1 its next. B is the batch, or 1
        while all its sequences are equal."""
        layers = iter(self.kv)
        with ops.use("auto", attention=lambda *args: self._attention(*next(layers), *args)):
            h = self.model.hidden(tokens, start=self.length)
        self.length += tokens.shape[1]
        return self.model.logits(h[:, -1])

    def _attention(self, keys: Tensor, values: Tensor, qkv: Tensor, n_heads: int, theta: float | None, qk_norm: bool):
        """As `ops.attention`, of the new tokens to all; keys and values are (batch, H, seq_len, D)."""
        B, T, C3 = qkv.shape
        qkv, stop = rotary(qkv, n_heads, theta, qk_norm, start=self.length), self.length + T
        q, k, v = qkv.view(B, T, 3, n_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        keys[:, :, self.length : stop], values[:, :, self.length : stop] = k, v
        y = F.scaled_dot_product_attention(q, keys[:B, :, :stop], values[:B, :, :stop], is_causal=T > 1)
        return y.transpose(1, 2).reshape(B, T, C3 // 3)


@torch.no_grad()
def next_tokens(
    model: GPT, prompt: Tensor, tokens: int, *, samples: int = 1, seed: int = 0, **how: float
) -> Iterator[Tensor]:
    """Continue `prompt` (T,) by `tokens` tokens; yields one of each sample, (samples,), by `draw` with `how`.

    The context begins with the last seq_len tokens of the prompt. Whenever it is full, its second half is computed anew
    as the beginning of the next, so that the cost of a token stays the same.
    """
    generator = torch.Generator().manual_seed(seed)
    cache, seq_len = Cache(model, samples), model.shape.seq_len
    ids = new = prompt[None, -seq_len:]  # (1, T), later (samples, T)
    for _ in range(tokens):
        if cache.length + new.shape[1] > seq_len:
            cache.length, new = 0, ids[:, -max(1, seq_len // 2) :]
        logits = cache.logits(new).cpu().expand(samples, -1)
        drawn = draw(logits, generator, **how)
        yield drawn
        new = drawn[:, None].to(prompt.device)
        ids = torch.cat((ids[:, -seq_len:].expand(samples, -1), new), dim=1)


def draw(
    logits: Tensor, generator: torch.Generator, temperature: float = 0.8, top_k: int = 50, top_p: float = 1.0
) -> Tensor:
    """Sample from logits (B, V) -> (B,): the `top_k` most likely tokens, of these the fewest that have a probability of
    `top_p` together at this temperature."""
    if temperature == 0:
        return logits.argmax(-1)
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    logits = logits.double() - logits.amax(-1, keepdim=True)  # at most 0: no temperature can make them inf or nan
    p = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, place = p.sort(descending=True)
        p = p.scatter(1, place, ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0))
    return torch.multinomial(p, 1, generator=generator)[:, 0]


def generate(model: GPT, prompt: Tensor, tokens: int, **settings) -> Tensor:
    """`prompt` (T,) and one continuation -> (T + tokens,), with the settings of `next_tokens`."""
    return torch.cat((prompt, *(step.to(prompt.device) for step in next_tokens(model, prompt, tokens, **settings))))


# ---------------------------------------------------------------------------------------------------------------------
# Text


def text_of(ids: Iterable[int], tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> Iterator[str]:
    """The text of `ids` up to end-of-text or the first of the `stop` strings, in pieces as soon as they are certain:
    whole characters that do not begin a stop string. Bytes that are not UTF-8 become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held = ""
    for token in ids:
        if token == tokenizer.eot and not tokenizer.numbers:
            break
        held += decoder.decode(b" " * tokenizer.numbers + tokenizer.decode_bytes([token]))
        if ends := [held.index(string) for string in stop if string in held]:
            yield held[: min(ends)]
            return
        begun = [n for string in stop for n in range(1, len(string)) if held.endswith(string[:n])]
        certain = len(held) - max(begun, default=0)
        yield held[:certain]
        held = held[certain:]
    yield held + decoder.decode(b"", final=True)


def write(model: GPT, tokenizer: Tokenizer, prompt: str, options: SampleOptions) -> None:
    """Print the prompt and its continuation, token by token; several samples one after the other."""
    start = [] if tokenizer.numbers and prompt else [tokenizer.eot]  # of ids-N, end-of-text is unknown
    ids = torch.tensor([*start, *tokenizer.encode(prompt.encode()).tolist()])
    samples = options.num_samples
    how = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    steps = next_tokens(model, ids, options.tokens, samples=samples, seed=options.seed, **how)
    for n, own in enumerate(tee(steps, samples)):
        if samples > 1:
            print(f"----- sample {n + 1} of {samples} -----")
        print(prompt, end="", flush=True)
        for piece in text_of((int(step[n]) for step in own), tokenizer, options.stop):
            print(piece, end="", flush=True)
        print()


def main(options: SampleOptions) -> None:
    if "" in options.stop:
        raise UserError("`stop`: an empty string; give the text to stop at, or leave it out")
    model, tokenizer, _ = load_run(find_run(options.run, options.out))
    with open(0, encoding="utf-8", errors="replace", closefd=False) as lines:
        if options.prompt is None and os.isatty(0) and sys.stdout.isatty():
            print("A line of text is continued; Ctrl-D ends.\n> ", end="", flush=True)
            for n, line in enumerate(lines):
                write(model, tokenizer, line.rstrip("\n"), replace(options, seed=options.seed + n))
                print("> ", end="", flush=True)
            print()
        else:
            prompt = lines.read() if options.prompt == "-" else options.prompt or ""
            # An argument that is not UTF-8 has lone surrogates.
            write(model, tokenizer, re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", prompt), options)
