"""Every option of a training run, and the model's shape. No torch here."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from nanochin.base.cli import UserError, opt

FLOP_CONVENTIONS = {  # counted in nanochin/plan/flops.py
    "physical": "matrix products that run, with logits, without lookup, attention as full T x T",
    "causal": "the same, attention only for the pairs that the causal mask keeps",
    "appendix_f": "all eight rows of Appendix F of Hoffmann et al. 2022, with lookup and softmax",
    "table_a4": "only its rows inside the layers, from which the paper's Table A4 was computed",
    "6nd": "6 x total parameters x tokens",
    "kaplan": "6 x non-embedding parameters x tokens",
}
PARAM_CONVENTIONS = {
    "total": "every trained parameter, a tied matrix once",
    "non_embedding": "without token and position embeddings and output matrix (Kaplan et al. 2020)",
    "with_head": "parameters in matrix products: layers and output matrix, no lookup",
}


@dataclass(frozen=True)
class ShapeOptions:
    """Options of the model's shape besides width, layers, vocabulary and context. The default is Chinchilla's GPT;
    `norm=layernorm positions=learned bias=true activation=gelu_tanh` is GPT-2, `activation=swiglu tied=false` Llama."""

    head_size: int | None = opt(
        None, "head size; default: by width, 16 from 32 to 128 wide, 64 from 512 on", section="The model's shape"
    )
    ffn: int | None = opt(None, "feed-forward width; default 4C (swiglu: 8C/3 rounded up to a multiple of 8)")
    norm: str = opt("rmsnorm", "normalisation before each block", choices=("rmsnorm", "layernorm"))
    positions: str = opt("rotary", "positions", choices=("rotary", "learned"))
    activation: str = opt("gelu", "feed-forward activation", choices=("gelu", "gelu_tanh", "relu2", "swiglu"))
    bias: bool = opt(False, "biases in linear layers and in layernorm")
    tied: bool = opt(True, "output matrix shared with the embedding")
    qk_norm: bool = opt(False, "RMS-normalise queries and keys")


@dataclass(frozen=True)
class TextOptions:
    """How text files are read."""

    skip_bad: bool = opt(
        False, "leave out and count lines and rows without a text", result=False, section="How text files are read"
    )
    text_column: str = opt("text", "field of JSON records, or column of .parquet, that has the text", later=True)
    encoding: str = opt("utf-8", "encoding of text without a byte-order mark, such as latin-1", later=True)
    document_separator: str | None = opt(
        None, "string between the documents of a .txt, such as '<|endoftext|>'; default: a file is one", later=True
    )


@dataclass(frozen=True)
class Config(ShapeOptions, TextOptions):
    """One training run. None means: derived, and printed with the reason before training."""

    budget: float | None = opt(
        None,
        "training FLOPs, in the convention of --flops; default: by device, 1e13 on a CPU, 1e15 on CUDA",
        above=0,
        result=False,
        section="What to train (two of budget, model and tokens give the third; with one, the law gives the others)",
    )
    model: str | None = opt(None, "width x layers, such as 256x4")
    tokens: float | None = opt(None, "training tokens D", above=0)
    flops: str = opt("physical", "FLOP convention of the budget", choices=tuple(FLOP_CONVENTIONS), result=False)
    law: str | None = opt(None, "laws.json of a fit; default: the constants of Besiroglu et al. 2024", result=False)
    law_approach: int | None = opt(None, "approach of laws.json to use, not its law", choices=(1, 2, 3), result=False)

    data: tuple[str, ...] | None = opt(
        None,
        "python (default on a CPU), python-all (default elsewhere), files, folders, globs such as 'books/*.txt' (text: "
        ".txt .jsonl .json .parquet, also .gz .xz .zst; tokens: .bin; quotes keep the shell from expanding a glob), or "
        "hf:OWNER/NAME[:CONFIG] for a data set of the Hugging Face hub",
        result=False,
        section="Data",
    )
    val: tuple[str, ...] | None = opt(None, "validation text; default: files val*, else chosen by hash", result=False)
    val_bytes: int = opt(1 << 20, "maximum bytes of validation data (evenly spaced blocks)", low=1, result=False)
    max_tokens: float | None = opt(None, "maximum tokens to read from an hf: data set", above=0, result=False)
    tokenizer: str | None = opt(None, "bytes (default for text), bpe (trained on the corpus), or tiktoken: gpt2, ...")
    vocab_size: int | None = opt(None, "vocabulary size of bpe (default 4096), or of token files without a tokenizer")
    seq_len: int | None = opt(None, "context length T in tokens; default: by device, 256 on a CPU, 1024 on CUDA", low=1)
    cache: str = opt("cache", "folder of tokenised shards", result=False)

    optimizer: str = opt(
        "adamw",
        "adamw (decoupled decay) or adam (L2 in the gradient)",
        choices=("adamw", "adam"),
        section="Optimisation (rules: nanochin/plan/rules.py; B tokens per batch, C width, D tokens, N parameters)",
    )
    lr: float | None = opt(None, "peak learning rate; by rule: 0.011 sqrt(B) / C, at most 3.7 N^-0.36", above=0)
    batch_tokens: int | None = opt(
        None, "tokens per optimizer step, a multiple of seq_len; by rule: 0.03 D^0.69", low=1, high=10**12
    )
    warmup_tokens: float | None = opt(
        None, "linear warm-up, in tokens; by rule: as many tokens as parameters, at most 5% of the run", low=0
    )
    epochs: float | None = opt(
        None, "train on a random part of the text, as often as this; default: on all of it", low=1, later=True
    )
    beta1: float = opt(0.9, "Adam's beta1", low=0, high=0.999999)
    beta2: float | None = opt(
        None, "Adam's beta2; by rule: 0.99 for batches up to 262,144 tokens, else 0.95", low=0, high=0.999999
    )
    weight_decay: float = opt(0.1, "weight decay, on matrices only", low=0)
    clip: float = opt(1.0, "maximum gradient norm; 0 = no clipping", low=0)
    weight_dtype: str = opt(
        "float32", "bfloat16 rounds the weights after each step", choices=("float32", "bfloat16"), later=True
    )
    z_loss: float = opt(0.0, "weight of the z-loss, log(Z)^2 (1e-4 is usual)", low=0)
    schedule: str = opt("cosine", "learning-rate schedule", choices=("cosine", "wsd", "linear", "constant"))
    cycle: float = opt(
        1.0, "length of the cosine as a multiple of the run (above 1 overshoots, Appendix B)", above=0, high=1e6
    )
    final_lr: float | None = opt(None, "final / peak learning rate; default: 0.1 for cosine, else 0", low=0, high=1)
    cooldown: float = opt(0.2, "fraction of a wsd run in its 1-sqrt cooldown", low=0, high=1)
    seed: int = opt(0, "seed of the weights and of the data order", low=0, high=10**9)

    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps", result=False, section="Execution")
    dtype: str = opt("auto", "compute dtype (weights stay float32)", choices=("auto", "float32", "bfloat16"))
    kernels: str = opt("auto", "Triton kernels where supported, or none", choices=("auto", "fallback"), result=False)
    step: str = opt(
        "auto",
        "how a step runs: eager, compile (torch.compile) or graph (CUDA graph); auto: by device",
        choices=("auto", "eager", "compile", "graph"),
        result=False,
    )
    micro_batch: int | None = opt(None, "sequences per forward pass; auto by device", low=1, high=10**6, result=False)
    threads: int | None = opt(
        None, "CPU threads; default: torch's; on a shared machine 1 costs less CPU time", low=1, high=1000, result=False
    )

    name: str | None = opt(
        None,
        "name of the run; default: corpus, size and a hash of the options",
        result=False,
        section="The run's folder, log and checkpoints",
    )
    out: str = opt("runs", "folder of all runs", result=False)
    branch_from: str | None = opt(
        None, "RUN@STEP: go on from another run's checkpoint, with its options where none are given"
    )
    init_from: str | None = opt(
        None,
        "weights to start from: a run, a checkpoint, an export of a run, or GPT-2 (folder, .safetensors)",
        result=False,
    )
    log_every: int | None = opt(None, "steps between log lines; default: 200 lines per run", low=1, result=False)
    eval_every: int = opt(0, "steps between evaluations, from step 0 on; 0 = only at the end", low=0, result=False)
    eval_bytes: int | None = opt(
        None, "held-out text of evaluations before the last, from its beginning; default: all", low=1, result=False
    )
    save_every: float = opt(60.0, "seconds between checkpoints; 0 = only at the end", low=0, result=False)
    save_steps: tuple[int, ...] = opt((), "additional steps whose checkpoint is saved and kept", low=1, result=False)
    keep: int = opt(2, "number of newest checkpoints to keep", low=1, result=False)
    loggers: tuple[str, ...] = opt((), "also log to these", choices=("wandb", "tensorboard"), result=False)
    sample_tokens: int = opt(
        256, "length in tokens of the sample printed at the end; 0 = none", low=0, high=10**6, result=False
    )


# ---------------------------------------------------------------------------------------------------------------------
# The model's shape


@dataclass(frozen=True)
class Shape:
    """Everything that determines a model's parameters. Made by `make_shape`, which fills in and checks defaults."""

    width: int  # C
    layers: int
    vocab_size: int  # V
    seq_len: int  # T; affects parameters only with learned positions
    head_size: int  # D
    ffn: int  # F
    norm: str = "rmsnorm"
    positions: str = "rotary"
    activation: str = "gelu"
    bias: bool = False
    tied: bool = True
    qk_norm: bool = False

    @property
    def heads(self) -> int:
        return self.width // self.head_size

    def __str__(self) -> str:
        return f"{self.width}x{self.layers}"


def make_shape(
    width: int,
    layers: int,
    *,
    vocab_size: int,
    seq_len: int,
    head_size: int | None = None,
    ffn: int | None = None,
    **options,
) -> Shape:
    """A Shape with defaults filled in. Raises UserError for sizes below 1, and for a head size that is odd or does not
    divide the width."""
    names = ("width", "layers", "vocab_size", "seq_len", "head_size", "ffn")
    for name, value in zip(names, (width, layers, vocab_size, seq_len, head_size, ffn), strict=True):
        if value is not None and (value != int(value) or not 1 <= value < 2**31):
            raise UserError(f"`{name}` {value}: must be an integer from 1 to 2^31")
    if head_size is None:
        head_size = default_head_size(width)
    if head_size % 2 or width % head_size:
        raise UserError(f"`head_size` {head_size}: must be even and divide the width {width}")
    if ffn is None:
        ffn = 4 * width if options.get("activation") != "swiglu" else 8 * math.ceil(width / 3)
    return Shape(width, layers, vocab_size, seq_len, head_size, ffn, **options)


def shape_maker(options: ShapeOptions, vocab_size: int, seq_len: int) -> Callable[[int, int], Shape]:
    """make(width, layers): `make_shape` with everything else bound to these options."""
    more = {f.name: getattr(options, f.name) for f in fields(ShapeOptions)}
    return functools.partial(make_shape, vocab_size=vocab_size, seq_len=seq_len, **more)


def default_head_size(width: int) -> int:
    """The even divisor of the width closest, as a ratio, to width / 2 up to width 32, 16 up to 128, width / 8 (eight
    heads) up to 512, then 64 as in the paper (Table A9). Measured from 16 to 128, where one head of 64 or of the whole
    width raises the loss by up to 7% (LOG.md). Raises UserError for an odd width."""
    target = min(64, max(min(16, width / 2), width / 8))
    sizes = [d for d in range(2, width + 1, 2) if width % d == 0]
    if not sizes:
        raise UserError(f"width {width}: must be even, since rotary embeddings need even head sizes")
    return min(sizes, key=lambda d: max(d / target, target / d))


def parse_model(text: str) -> tuple[int, int]:
    """'256x4' -> (256, 4): width x layers. Raises UserError for other formats."""
    try:
        width, layers = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise UserError(f"`model` {text}: expected width x layers, such as 256x4") from None
    return width, layers
