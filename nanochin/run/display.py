"""What train.py prints: the resolved options with their reasons, progress, and the result."""

import math

import torch

import kernels
from nanochin.base.console import clock, count, table
from nanochin.model import GPT
from nanochin.run.device import device_name
from nanochin.run.folder import Run
from nanochin.run.record import Job, epochs, predicted
from nanochin.run.sample import generate
from nanochin.run.step import TrainingStep


def show_plan(job: Job, run: Run, train_on: TrainingStep, peak_source: str) -> None:
    config, plan, corpus, why = job.config, job.plan, job.corpus, job.plan.why
    backend, why_backend = kernels.backend(job.device, config.kernels)
    params = plan.params
    text = f"{count(corpus.train_bytes)}B in {corpus.documents} documents, {count(corpus.val_bytes)}B held out"
    forecast = predicted(job)
    if corpus.format != "text":
        text = f"token files ({corpus.format}), {count(len(corpus.val))} tokens for validation"
    threads = len(train_on.shards.models)
    at_once = f"{min(train_on.micro_batch, math.ceil(plan.batch_tokens / config.seq_len / threads))} sequences"
    if threads > 1:
        at_once += f" on each of {threads} threads"
    rows = [
        ("text", f"{corpus.name}", f"{text}; sha {corpus.data_sha[:12]}"),
        ("tokenizer", corpus.tokenizer.name, f"{plan.shape.vocab_size} tokens; {count(len(corpus.train))} to train on"),
        ("model", f"{plan.shape}", why.get("model", "as asked")),
        ("N parameters", count(params.total), f"total; {count(params.non_embedding)} without embedding and head, "
         f"{count(params.with_head)} with head"),
        ("D tokens", count(plan.tokens), why.get("tokens", "as asked")),
        *([("loss", f"{forecast['predicted_loss']:.4f}", f"predicted by {job.law.name}{by_interval(forecast)}")]
          if forecast["predicted_loss"] else []),
        ("D / N", f"{plan.tokens / params.total:.1f}", f"tokens per parameter; {epochs(job):.2f} epochs of the text"),
        ("C FLOPs", f"{plan.flops['physical']:.3e}", f"physical; 6ND is {plan.flops['6nd']:.3e}"),
        ("steps", f"{plan.steps}", f"{config.schedule}, to {config.final_lr:g} of the peak rate"),
        ("context", f"{config.seq_len}", "tokens"),
        ("batch", f"{count(plan.batch_tokens)} tokens",
         f"{why.get('batch_tokens', 'as asked')}; micro-batch {at_once}"),
        ("learning rate", f"{plan.lr:.3g}", why.get("lr", "as asked")),
        ("warm-up", f"{count(plan.warmup_tokens)} tokens", why.get("warmup_tokens", "as asked")),
        ("beta2", f"{plan.beta2}", why.get("beta2", "as asked")),
        ("device", device_name(job.device), f"{torch.get_num_threads()} CPU threads; {peak_source}"),
        ("dtype", config.dtype, job.why_dtype),
        ("operations", backend, why_backend),
        ("step", job.step, job.why_step),
        ("run", str(run.folder), "rerun the same command to resume"),
    ]  # fmt: skip
    table("nanochin", rows)
    if epochs(job) > 1:
        print(f"warning: {epochs(job):.1f} epochs of the text; the law assumes less than one, expect a higher loss")
    if corpus.skipped_bytes:
        print(f"note: {corpus.skipped_bytes} bytes of the text are not UTF-8 and were skipped")
    if corpus.skipped_records:
        print(f"note: {corpus.skipped_records} lines or rows have no text and were skipped (--skip-bad)")
    if config.init_from:
        print(f"note: initialised from GPT-2 weights in {config.init_from}")


def by_interval(forecast: dict) -> str:
    low, high = forecast["predicted_low"], forecast["predicted_high"]
    return f" (95%: {low:.4f} to {high:.4f})" if low else ""


def show_result(job: Job, run: Run, model: GPT) -> None:
    summary, tokenizer = run.summary, job.corpus.tokenizer
    bpb = f"{summary['val_bpb']:.4f} bits per byte" if summary["val_bpb"] else "bits per byte unknown"
    law = summary["predicted_loss"]
    law = f", the law predicted {law:.4f}{by_interval(summary)}" if law else ""
    print(
        f"\nvalidation loss {summary['loss']:.4f} nats per token, {bpb}{law}; {clock(summary['seconds'])} of training"
    )
    if job.config.sample_tokens:
        start = torch.tensor([tokenizer.eot], device=job.device)
        ids = generate(model, start, job.config.sample_tokens)[1:]
        print(f"\n----- a sample -----\n{tokenizer.decode(ids.tolist())}\n--------------------")
    print(f'\n{run.folder}   (python -m nanochin sample {run.folder} --prompt "..." for more)')


def progress_note(row: dict) -> str:
    mfu = f"  MFU {row['mfu']:.0%}" if row["mfu"] else ""
    return f"loss {row['loss']:.3f}  {count(row['tokens_per_s'])} tok/s{mfu}"
