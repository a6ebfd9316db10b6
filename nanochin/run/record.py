"""A resolved run (Job) and its records: config.json before the first step, summary.json after the last."""

import dataclasses
from dataclasses import dataclass

import torch

import kernels
from nanochin import laws
from nanochin.base import files
from nanochin.config import PARAM_CONVENTIONS, Config
from nanochin.data.corpus import Corpus
from nanochin.data.windows import Windows
from nanochin.plan import ladder
from nanochin.run.device import device_name, precision
from nanochin.run.folder import run_identity
from nanochin.runrow import RunRow, flops_column, params_column


@dataclass(frozen=True)
class Job:
    """A run with every option resolved."""

    config: Config
    plan: ladder.Plan
    law: laws.Law | laws.PowerLaw
    corpus: Corpus
    windows: Windows
    device: torch.device
    dtype: torch.dtype
    why_dtype: str
    step: str  # eager, compile or graph
    why_step: str
    init_sha: str | None  # of the weight files that `init_from` names


def describe(job: Job) -> dict:
    """config.json: the identity (what defines the result), resolved options, and everything the run used."""
    corpus = job.corpus
    initial = {"init_sha": job.init_sha} if job.init_sha else {}
    identity = run_identity(
        job.config, device=job.device.type, data_sha=corpus.data_sha, val_sha=corpus.val_sha, **initial
    )
    return {
        "identity": identity,
        "options": dataclasses.asdict(job.config),
        "shape": dataclasses.asdict(job.plan.shape),
        "corpus": {"name": corpus.name, "tokenizer": corpus.tokenizer.name, "train_tokens": len(corpus.train),
                   "train_bytes": corpus.train_bytes, "val_tokens": len(corpus.val), "val_bytes": corpus.val_bytes,
                   "data_sha": corpus.data_sha, "val_sha": corpus.val_sha, "documents": corpus.documents,
                   "skipped_bytes": corpus.skipped_bytes, "skipped_records": corpus.skipped_records,
                   "format": corpus.format},
        "device": device_name(job.device),
        "threads": torch.get_num_threads(),
        "kernels": kernels.backend(job.device, job.config.kernels),
        "step": [job.step, job.why_step],
        "precision": precision(job.dtype),
        "predicted": predicted(job),  # pre-registered: written before the first step
        "versions": files.versions(),
    }  # fmt: skip


def summarise(job: Job, record: dict, name: str, loss: float, bpb: float | None, seconds: float) -> RunRow:
    config, plan, corpus = job.config, job.plan, job.corpus
    return RunRow(
        run=name,
        name=name,
        **{params_column(convention): getattr(plan.params, convention) for convention in PARAM_CONVENTIONS},
        tokens=plan.tokens,
        loss=loss,
        val_bpb=bpb,
        **{flops_column(convention): flops for convention, flops in plan.flops.items()},
        budget=config.budget,
        kind="single",
        trunk=config.branch_from and config.branch_from.rpartition("@")[0],
        width=plan.shape.width,
        layers=plan.shape.layers,
        vocab_size=plan.shape.vocab_size,
        seq_len=config.seq_len,
        tokenizer=corpus.tokenizer.name,
        data_sha=corpus.data_sha,
        val_sha=corpus.val_sha,
        unique_tokens=min(plan.tokens, job.windows.per_epoch * config.seq_len),
        epochs=epochs(job),
        seed=config.seed,
        schedule=config.schedule,
        horizon=config.cycle * plan.tokens,
        lr=config.lr,
        batch_tokens=plan.batch_tokens,
        beta2=config.beta2,
        warmup_tokens=plan.warmup_tokens,
        **record["predicted"],
        seconds=seconds,
        device=record["device"],
        threads=record["threads"],
    )


def epochs(job: Job) -> float:
    return job.plan.tokens / (job.windows.per_epoch * job.config.seq_len)


def predicted(job: Job) -> dict:
    """The law's prediction of this run's loss, with a 95% interval if its file has one. None if the law was fitted with
    another tokenizer, text or context."""
    meta, plan, corpus = job.law.meta, job.plan, job.corpus
    same = meta.get("seq_len") in (None, str(job.config.seq_len)) and meta.get("val_sha") in (None, corpus.val_sha)
    same = same and (meta.get("tokenizer"), meta.get("data_sha")) == (corpus.tokenizer.name, corpus.data_sha)
    loss = plan.predicted_loss if same else None
    ends = loss and job.law.forecast(getattr(plan.params, job.law.params_convention), plan.tokens)
    low, high = ends or (None, None)
    return {"predicted_loss": loss, "predicted_low": low, "predicted_high": high}
