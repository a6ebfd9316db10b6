"""Loss and bits per byte of runs on any text, and multiple-choice tasks made from it."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from nanochin.base.cli import UserError, with_flags
from nanochin.base.console import Progress, count, format_columns
from nanochin.base.files import write_file
from nanochin.config import Config, TextOptions
from nanochin.data.corpus import Corpus, prepare, read_tokens
from nanochin.data.text import Tokens
from nanochin.data.tokenizer import Tokenizer
from nanochin.data.windows import eval_windows
from nanochin.model import GPT
from nanochin.options import EvaluateOptions
from nanochin.run import parallel
from nanochin.run.checkpoint import given_tokenizer, load_run
from nanochin.run.folder import Run, find_run, read_options, read_record
from nanochin.run.step import thread_pool
from nanochin.run.tasks import TASKS, better, documents_of, log_probabilities, margins_of, sha_of, summarise, wilson

TOKENS_AT_ONCE = 16384  # per forward pass: the logits (x V) must fit in memory
# Options that determine a run's text and where its tokens are.
TEXT = tuple(f.name for f in fields(TextOptions))
TEXT += ("data", "val", "val_bytes", "max_tokens", "tokenizer", "vocab_size", "cache")


def evaluate(
    model: GPT, tokens: Tokens | np.ndarray, text_bytes: int, progress: Progress | None = None
) -> tuple[float, float | None]:
    """(loss in nats per token, bits per byte) over `tokens`: every token but the first is predicted exactly once, from
    the tokens before it in its window of seq_len; windows do not overlap.

    Bits per byte = total nats / ln 2 / `text_bytes`, the bytes of text in the tokens; None if unknown (0). Several
    ranks share the work and get the same result.
    """
    T = model.shape.seq_len
    device = next(model.parameters()).device
    at_once = max(1, TOKENS_AT_ONCE // T) * T
    count = len(tokens) - 1  # predicted tokens
    starts = range(0, count, at_once)
    own = range(parallel.rank(), len(starts), parallel.size())  # this process's pieces
    nats = torch.zeros(len(starts), dtype=torch.float64)

    @torch.no_grad()  # in each thread
    def mean_loss(i: int) -> float:
        x, y = eval_windows(tokens[starts[i] : starts[i] + at_once + 1], T)  # (n, T) each, y -1 beyond the end
        return model(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)).item()

    threads = torch.get_num_threads()
    parts = min(len(own), threads) if device.type == "cpu" else 1  # at the same time, each on its own thread of a CPU
    pool = thread_pool(parts, threads // parts) if parts > 1 else None
    try:
        for i, loss in zip(own, (pool.map if pool else map)(mean_loss, own), strict=True):
            done = min(starts[i] + at_once, count)
            nats[i] = loss * (done - starts[i])
            if progress:
                progress("evaluating", done, count)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C
    total = 0.0
    for part in parallel.sum_over_ranks(nats).tolist():  # not sum(), which rounds differently from Python 3.12 on
        total += part
    return total / count, total / math.log(2) / text_bytes if text_bytes else None


def beginning(corpus: Corpus, text_bytes: int | None) -> tuple[Tokens, int]:
    """About the first `text_bytes` of the validation text (None: all of it), as tokens, and how many bytes exactly.
    Where the bytes of text are unknown (0), those of the token file count."""
    tokens, known = corpus.val, corpus.val_bytes
    share = (text_bytes or math.inf) / (known or len(tokens) * tokens.parts[0].itemsize)
    if share >= 1:
        return tokens, known
    part = tokens[: max(2, round(share * len(tokens)))]
    return Tokens([part]), len(corpus.tokenizer.decode_bytes(part)) if known else 0


def held_out(folder: Path, data: tuple[str, ...], progress: Progress | None = None) -> Corpus:
    """The corpus of a run, made again from its config.json, or from `data` if its files moved. Raises UserError, as
    `prepare` does, and unless the training and the validation text have the SHA-256 that the run recorded."""
    recorded = read_record(folder, {"corpus": {"data_sha": str, "val_sha": str}})["corpus"]
    config = Config(**read_options(folder, TEXT) | ({"data": data} if data else {}))
    corpus = prepare(config, progress, given_tokenizer(folder))
    for side in ("data_sha", "val_sha"):
        if (now := getattr(corpus, side)) != (then := recorded[side]):
            raise UserError(
                f"{folder}: its {side} is {then:.12}, that of the data is {now:.12}; give its text as `data`"
            )
    return corpus


def main(options: EvaluateOptions) -> None:
    if not (options.data or options.held_out):
        raise UserError("`data`: missing; give the text to evaluate on")
    records, said, made = [], set(), {}
    with Progress(quiet=not sys.stdout.isatty()) as progress:
        for name in options.run:
            folder = find_run(name, options.out)
            model, tokenizer, _ = load_run(folder)
            if options.held_out:
                corpus = held_out(folder, options.data, progress)
                tokens, text_bytes, notes = corpus.val[:], corpus.val_bytes, ()
            else:
                tokens, text_bytes, notes = read_tokens(options.data, tokenizer, options)
            loss, bpb = evaluate(model, tokens, text_bytes, progress)
            progress.close()
            for note in notes:
                if note not in said:  # about another run
                    print(f"note: {with_flags(note)}")
                said.add(note)
            per_byte = f"{bpb:.4f} bits per byte" if bpb else "bits per byte unknown"
            size = f"{count(len(tokens))} tokens, {count(text_bytes)} bytes"
            print(f"{folder.name}: loss {loss:.4f} nats per token, {per_byte} ({size})")
            if options.tasks or options.json:
                documents = documents_of(tokens, tokenizer)
                record = _record(folder, model, documents, options) | {"loss": loss, "bpb": bpb}
                answered = [_answers(task, model, tokenizer, documents, options, made) for task in options.tasks]
                records += [record | answers for answers in answered or [{}]]
    if options.tasks:
        print("", *_tables(records), sep="\n")
    if options.json:
        lines = ",\n".join(map(json.dumps, records))
        write_file(Path(options.json), f"[\n{lines}\n]\n".encode())


def _record(folder: Path, model: GPT, documents: list[str], options: EvaluateOptions) -> dict:
    summary = Run(folder).summary
    return {
        "run": folder.name,
        "data": list(options.data),
        "held_out": options.held_out,
        "data_sha": sha_of(documents),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": summary and summary["tokens"],  # null: not finished
    }


def _answers(
    task: str, model: GPT, tokenizer: Tokenizer, documents: list[str], options: EvaluateOptions, made: dict
) -> dict:
    """What a model makes of a task. `made` keeps the items, which are the same for all models."""
    key = task, sha_of(documents)
    if key not in made:
        made[key] = TASKS[task](documents, options.items, options.passage, options.seed)
    if len(made[key]) < 2:
        raise UserError(f"`tasks` {task}: fewer than two items in this text; give a longer one")
    nats = log_probabilities(model, tokenizer, made[key])
    if options.normalise:  # as in section 2.4 of Brown et al. 2020 (GPT-3): candidates differ in their own probability
        nats -= log_probabilities(model, tokenizer, [replace(item, context=b"\n") for item in made[key]])
    margins = margins_of(nats).round(6)
    results = {"correct": (margins > 0).astype(int).tolist(), "margins": margins.tolist()}
    return {"task": task, "normalise": options.normalise} | summarise(margins) | results


def _tables(records: list[dict]) -> Iterator[str]:
    """Each run's results, and how often the first run is better than each other one on the same items."""
    rows = [["run", "task", "accuracy", "95%", "margin, nats", "95%", "items"]]
    for r in records:
        accuracy, margin = ("{:.3f} to {:.3f}".format(*r[key]) for key in ("accuracy_ci", "margin_ci"))
        rows.append([r["run"], r["task"], f"{r['accuracy']:.3f}", accuracy, f"{r['margin']:.3f}", margin])
        rows[-1].append(str(r["items"]))
    yield format_columns(rows)
    rows = [["first run against", "task", "better on", "share, 95%"]]
    for r in records:
        first = next(other for other in records if other["task"] == r["task"])
        if r is not first and r["data_sha"] == first["data_sha"]:
            k, n = better(first["margins"], r["margins"])
            rows.append([r["run"], r["task"], f"{k} of {n}", "{:.3f} to {:.3f}".format(*wilson(k, n))])
    if len(rows) > 1:
        yield "\n" + format_columns(rows)
