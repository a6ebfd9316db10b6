"""What train.py prints: the resolved options with their reasons, progress, and the result."""

import math
from collections import defaultdict

import torch

import kernels
from nanochin.base.cli import with_flags
from nanochin.base.console import clock, count, table
from nanochin.model import GPT
from nanochin.run import parallel
from nanochin.run.device import device_name
from nanochin.run.folder import Run
from nanochin.run.record import Setup, epochs, predicted, unlike
from nanochin.run.sample import generate
from nanochin.run.step import TrainingStep


def show_plan(setup: Setup, run: Run, train_on: TrainingStep, peak_source: str, early_tokens: int) -> None:
    """Print the resolved options with their reasons, and warnings about the text. `early_tokens` are those of each
    evaluation before the last."""
    config, plan, corpus = setup.config, setup.plan, setup.corpus
    why = defaultdict(lambda: "as in the trunk" if config.branch_from else "as requested", plan.why)
    text = f"{count(corpus.train_bytes)}B in {corpus.documents} training documents, {count(corpus.val_bytes)}B held out"
    if corpus.format != "text":
        text = f"token files ({corpus.format}), {count(len(corpus.val))} tokens for validation"
    threads, processes = len(train_on.shards.models), parallel.size()
    sequences = math.ceil(plan.batch_tokens / config.seq_len / processes / threads)
    micro_batch = f"{min(train_on.micro_batch, sequences)} sequences"
    if threads > 1:
        micro_batch += f" on each of {threads} threads"
    devices, peaks = device_name(setup.device), f"{torch.get_num_threads()} CPU threads; {peak_source}"
    if processes > 1:
        devices, peaks = f"{processes} x {devices}", f"each: {peaks}"
        micro_batch += f" in each of {processes} processes"
    params = plan.params
    counts = f"total; {count(params.non_embedding)} without embedding and head, {count(params.with_head)} with head"
    forecast = predicted(setup)
    loss = forecast["predicted_loss"]
    prediction = []
    if loss:
        prediction = [("loss", f"{loss:.4f}", f"predicted by {setup.law.name}{_interval(forecast)}{_untested(setup)}")]
    elif config.law:
        prediction = [("loss", "not predicted", unlike(setup) or "this law has no loss")]
    # Measured (LOG.md): on the new text the rule's rate is best; a tenth of it keeps more of the old one.
    forgets = "; a lower --lr keeps more of what the weights know" if config.init_from and "lr" in plan.why else ""
    rows = [
        ("text", f"{corpus.name}", f"{text}; sha {corpus.data_sha[:12]}"),
        ("tokenizer", corpus.tokenizer.name, f"{plan.shape.vocab_size} tokens; {count(len(corpus.train))} to train on"),
        ("model", f"{plan.shape}", why["model"]),
        ("N parameters", count(params.total), counts),
        ("D tokens", count(plan.tokens), why["tokens"]),
        *prediction,
        ("D / N", f"{plan.tokens / params.total:.1f}", f"tokens per parameter; {epochs(setup):.2f} epochs of the text"),
        ("C FLOPs", f"{plan.flops['physical']:.3e}", f"physical; 6ND is {plan.flops['6nd']:.3e}"),
        ("evaluation", f"{count(len(corpus.val))} tokens", _evaluation_cost(setup, early_tokens)),
        ("steps", f"{plan.steps}", f"{config.schedule}, to {config.final_lr:g} of the peak rate"),
        ("context", f"{config.seq_len}", "tokens"),
        ("batch", f"{count(plan.batch_tokens)} tokens", f"{why['batch_tokens']}; micro-batch {micro_batch}"),
        ("learning rate", f"{plan.lr:.3g}", why["lr"] + forgets),
        ("warm-up", f"{count(plan.warmup_tokens)} tokens", why["warmup_tokens"]),
        ("beta2", f"{plan.beta2}", why["beta2"]),
        ("device", devices, peaks),
        ("dtype", config.dtype, setup.why_dtype),
        ("operations", *kernels.backend(setup.device, config.kernels)),
        ("step", setup.step, setup.why_step),
        ("run", str(run.folder), "rerun the same command to resume"),
    ]
    table("nanochin", rows)
    if epochs(setup) > 1:
        print(f"warning: {epochs(setup):.1f} epochs of the text; the law assumes less than one, expect a higher loss")
    for note in corpus.notes:
        print(f"note: {with_flags(note)}")
    if config.init_from:
        print(f"note: starts from the weights in {config.init_from}, with a new schedule and optimizer")
    if config.branch_from:
        print(f"note: goes on from {config.branch_from}, with that run's options where none were given")


def show_result(setup: Setup, run: Run, model: GPT) -> None:
    summary, tokenizer = run.summary, setup.corpus.tokenizer
    bpb = f"{summary['val_bpb']:.4f} bits per byte" if summary["val_bpb"] else "bits per byte unknown"
    law = summary["predicted_loss"]
    law = f", the law predicted {law:.4f}{_interval(summary)}" if law else ""
    loss, seconds = summary["loss"], clock(summary["seconds"])
    print(f"\nvalidation loss {loss:.4f} nats per token, {bpb}{law}; {seconds} of training")
    if setup.config.sample_tokens:
        start = torch.tensor([tokenizer.eot], device=setup.device)
        ids = generate(model, start, setup.config.sample_tokens)[1:]
        print(f"\n----- a sample -----\n{tokenizer.decode(ids.tolist())}\n--------------------")
    print(f'\n{run.folder}   (python -m nanochin sample {run.folder} --prompt "..." for more)')


def closing_loss(rows: list[dict], steps: int) -> float:
    """Mean training loss of the last 5% of steps, from the rows of the log, whose losses are means since the row
    before."""
    last, total = 0.95 * steps, 0.0
    for row in rows:
        if "loss" in row:
            total += row["loss"] * max(0.0, row["step"] - last)
            last = max(last, row["step"])
    return total / (0.05 * steps)


def progress_note(row: dict) -> str:
    mfu = f"  MFU {row['mfu']:.0%}" if row["mfu"] else ""
    return f"loss {row['loss']:.3f}  {count(row['tokens_per_s'])} tok/s{mfu}"


def _evaluation_cost(setup: Setup, early_tokens: int) -> str:
    """Evaluation takes the forward pass, a third of a training step."""
    training, every = 3 * setup.plan.tokens, setup.config.eval_every
    text = f"{len(setup.corpus.val) / training:.1%} of the training FLOPs, at the end"
    if every:
        times = math.ceil(setup.plan.steps / every)
        text += f"; before it {times} times {count(early_tokens)}: {times * early_tokens / training:.1%}"
    return text


def _untested(setup: Setup) -> str:
    """A warning if the run, by its exact FLOPs, is farther beyond the law's runs than its form was tested. (Its
    interval is at the smooth cost of the law.)"""
    law, flops = setup.law, setup.plan.flops
    error, C = getattr(law, "form_error", None), flops.get(str(law.meta.get("flops_convention")), flops["physical"])
    if error is None or error.is_tested(C):
        return ""
    return f"; {C / error.largest:.2g} times the compute of the law's largest run, tested at {error.tested:.2g}"


def _interval(forecast: dict) -> str:
    low, high = forecast["predicted_low"], forecast["predicted_high"]
    return f" (95%: {low:.4f} to {high:.4f})" if low else ""
