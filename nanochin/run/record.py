"""A run with its options resolved, and its records: config.json before the first step, summary.json after the last."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import kernels
from nanochin import laws
from nanochin.base import files
from nanochin.config import PARAM_CONVENTIONS, Config
from nanochin.data.corpus import Corpus
from nanochin.data.windows import Windows
from nanochin.model import GPT
from nanochin.plan import ladder
from nanochin.run import parallel
from nanochin.run.branch import branch_name
from nanochin.run.device import device_name
from nanochin.run.folder import run_identity
from nanochin.runrow import RunRow, flops_column, params_column


@dataclass(frozen=True)
class Setup:
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
    load_initial: Callable[[GPT], None] | None  # loads them


def describe(setup: Setup) -> dict:
    """config.json: the identity (what defines the result), resolved options, and everything the run used."""
    corpus, device = setup.corpus, setup.device
    facts = {"device": device.type, "data_sha": corpus.data_sha, "val_sha": corpus.val_sha}
    facts |= {"init_sha": setup.init_sha} if setup.init_sha else {}
    facts |= {"branch_from": branch_name(setup.config.branch_from)} if setup.config.branch_from else {}
    text = _pick(corpus, "name", "format", "documents", "skipped_bytes", "skipped_records")
    text |= _pick(corpus, "data_sha", "val_sha", "train_bytes", "val_bytes")
    text |= {"tokenizer": corpus.tokenizer.name, "tokenizer_sha": corpus.tokenizer.sha}
    text |= {"train_tokens": len(corpus.train), "val_tokens": len(corpus.val)}
    matmul = torch.backends.cuda.matmul
    precision = {"activations": setup.config.dtype, "weights": "float32"}
    precision |= {"float32_matmul": torch.get_float32_matmul_precision()}  # `highest`: without TF32
    precision |= {"bf16_reduced_precision_reduction": bool(matmul.allow_bf16_reduced_precision_reduction)}
    return {
        "identity": run_identity(setup.config, **facts),
        "options": dataclasses.asdict(setup.config),
        "shape": dataclasses.asdict(setup.plan.shape),
        "corpus": text,
        "device": device_name(device),
        "threads": torch.get_num_threads(),  # of each process
        "processes": parallel.size(),
        "kernels": kernels.backend(device, setup.config.kernels),
        "step": [setup.step, setup.why_step],
        "precision": precision,
        "predicted": predicted(setup),  # pre-registered: written before the first step
        "versions": files.versions(),
    }


def summarise(setup: Setup, record: dict, name: str, loss: float, bpb: float | None, seconds: float) -> RunRow:
    config, plan, corpus = setup.config, setup.plan, setup.corpus
    return RunRow(
        run=name,
        name=name,
        kind="single",
        **{params_column(convention): getattr(plan.params, convention) for convention in PARAM_CONVENTIONS},
        **{flops_column(convention): flops for convention, flops in plan.flops.items()},
        **_pick(plan, "tokens", "batch_tokens", "warmup_tokens"),
        **_pick(plan.shape, "width", "layers", "vocab_size"),
        **_pick(config, "budget", "seq_len", "seed", "schedule", "lr", "beta2"),
        **_pick(corpus, "data_sha", "val_sha"),
        **record["predicted"],
        tokenizer=corpus.tokenizer.name,
        loss=loss,
        val_bpb=bpb,
        trunk=config.branch_from and branch_name(config.branch_from).rpartition("@")[0],
        unique_tokens=min(plan.tokens, setup.windows.per_epoch * config.seq_len),
        epochs=epochs(setup),
        horizon=config.cycle * plan.tokens,
        seconds=seconds,
        device=record["device"],
        threads=record["threads"],
    )


def _pick(source: object, *names: str) -> dict:
    return {name: getattr(source, name) for name in names}


def epochs(setup: Setup) -> float:
    return setup.plan.tokens / (setup.windows.per_epoch * setup.config.seq_len)


def unlike(setup: Setup) -> str:
    """The first way in which this run is unlike those that its law was fitted to, so that the law does not predict its
    loss: another tokenizer, text, validation text or context. Empty if there is none."""
    meta, corpus = setup.law.meta, setup.corpus
    facts = {
        "tokenizer": ("the tokenizer", corpus.tokenizer.name),
        "data_sha": ("the text", corpus.data_sha),
        "val_sha": ("the validation text", corpus.val_sha),  # this and the next are not in older laws
        "seq_len": ("a context of", str(setup.config.seq_len)),
    }
    for key, (name, value) in facts.items():
        known = meta.get(key)
        if known != value and (known is not None or key in ("tokenizer", "data_sha")):
            return f"the law's runs have {name} {known or 'unknown':.12}, this one {value:.12}"
    return ""


def predicted(setup: Setup) -> dict:
    """The law's prediction of this run's loss, with a 95% interval if its file has one. None if the run is `unlike` the
    law's."""
    law, plan = setup.law, setup.plan
    loss = None if unlike(setup) else plan.predicted_loss
    interval = loss and law.forecast(getattr(plan.params, law.params_convention), plan.tokens)
    low, high = interval if interval and all(map(math.isfinite, interval)) else (None, None)
    return {"predicted_loss": loss, "predicted_low": low, "predicted_high": high}
