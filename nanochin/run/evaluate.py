"""Loss and bits per byte of a run on any text: python -m nanochin evaluate RUN --data PATH"""

import math
import sys
from dataclasses import dataclass

import torch

from nanochin.base.cli import UserError, opt, parse, with_flags
from nanochin.base.console import Progress, count
from nanochin.config import TextOptions
from nanochin.data.corpus import read_tokens
from nanochin.data.text import Tokens
from nanochin.data.windows import eval_windows
from nanochin.model import GPT
from nanochin.run.checkpoint import load_run
from nanochin.run.folder import find_run

TOKENS_AT_ONCE = 16384  # per forward pass: the logits (x V) must fit in memory


@dataclass(frozen=True)
class EvaluateOptions(TextOptions):
    run: str = opt(None, "folder of the run, or its name under --out", positional=True)
    data: tuple[str, ...] = opt((), "text to evaluate on: files, folders, globs")
    out: str = opt("runs", "folder of all runs")


@torch.no_grad()
def evaluate(model: GPT, tokens: Tokens, text_bytes: int, progress=None) -> tuple[float, float | None]:
    """(loss in nats per token, bits per byte) over `tokens`: every token but the first is predicted exactly once, from
    the tokens before it in its window of seq_len; windows do not overlap.

    Bits per byte = total nats / ln 2 / `text_bytes`, the bytes of text in the tokens; None if unknown (0).
    """
    T = model.shape.seq_len
    device = next(model.parameters()).device
    at_once = max(1, TOKENS_AT_ONCE // T) * T
    total, count = 0.0, len(tokens) - 1  # predicted tokens
    for start in range(0, count, at_once):
        x, y = eval_windows(tokens[start : start + at_once + 1], T)  # (n, T) each, y -1 beyond the end
        loss = model(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)).item()
        done = min(start + at_once, count)
        total += loss * (done - start)
        if progress:
            progress("evaluating", done, count)
    return total / count, total / math.log(2) / text_bytes if text_bytes else None


def main(argv: list[str] | None = None) -> None:
    options = parse(EvaluateOptions, argv, prog="python -m nanochin evaluate", description=__doc__)
    if not options.data:
        raise UserError("`data`: missing; give the text to evaluate on")
    folder = find_run(options.run, options.out)
    model, tokenizer, _ = load_run(folder)
    tokens, text_bytes, notes = read_tokens(options.data, tokenizer, options)
    for note in notes:
        print(f"note: {with_flags(note)}")
    with Progress(quiet=not sys.stdout.isatty()) as progress:
        loss, bpb = evaluate(model, tokens, text_bytes, progress)
    per_byte = f"{bpb:.4f} bits per byte" if bpb else "bits per byte unknown"
    size = f"{count(len(tokens))} tokens, {count(text_bytes)} bytes"
    print(f"{folder.name}: loss {loss:.4f} nats per token, {per_byte} ({size})")
