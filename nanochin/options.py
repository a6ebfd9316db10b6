"""The options of the commands `python -m nanochin COMMAND`. The docstrings begin their --help.

They are apart from the commands, most of which import torch or matplotlib: --help and errors must not wait for those.
"""

from dataclasses import dataclass

from nanochin.base.cli import opt
from nanochin.config import FLOP_CONVENTIONS, ShapeOptions, TextOptions


@dataclass(frozen=True)
class SampleOptions:
    """Sample text from a run: python -m nanochin sample RUN --prompt "def "

    Without --prompt, a terminal asks for prompts line by line, until Ctrl-D. A prompt follows end-of-text, as documents
    do in training. A sample ends at end-of-text, at a --stop string or after --tokens.
    """

    run: str = opt(None, "folder of the run, or its name under --out", positional=True)
    prompt: str | None = opt(None, "text to continue, - for standard input; default: the start of a document")
    tokens: int = opt(256, "maximum tokens to generate", low=1)
    num_samples: int = opt(1, "continuations of the prompt, generated together", low=1, high=1000)
    stop: tuple[str, ...] = opt((), "strings that end a sample, and are not printed")
    temperature: float = opt(0.8, "1 samples the model's own distribution, 0 is greedy", low=0)
    top_k: int = opt(50, "sample from the k most likely tokens; 0 = all", low=0)
    top_p: float = opt(1.0, "sample from the fewest tokens that have this probability together", above=0, high=1)
    seed: int = opt(0, "seed of the sampling", low=0, high=10**9)
    out: str = opt("runs", "folder of all runs")


@dataclass(frozen=True)
class EvaluateOptions(TextOptions):
    """Loss and bits per byte of runs on any text, and multiple-choice tasks made from it:

    python -m nanochin evaluate RUN [RUN ...] --data PATH [--tasks cloze last-word]
    """

    run: tuple[str, ...] = opt(None, "folders of runs, or their names under --out", positional=True)
    data: tuple[str, ...] = opt((), "text to evaluate on: files, folders, globs such as 'books/*.txt'")
    held_out: bool = opt(False, "the run's own validation text, made again from its data (--data if they moved)")
    out: str = opt("runs", "folder of all runs")
    tasks: tuple[str, ...] = opt((), "multiple-choice tasks made from the text", choices=("cloze", "last-word"))
    items: int = opt(1000, "maximum number of items of a task", low=2)
    passage: int = opt(128, "bytes of an item, its context included", low=80, high=10**6)
    seed: int = opt(0, "seed of the choice of items", low=0, high=10**9)
    normalise: bool = opt(False, "score a candidate by what its context adds to its log-probability")
    json: str | None = opt(None, "file for the results, with the margin of each item")


@dataclass(frozen=True)
class ExportOptions:
    """Export a run as a folder that `transformers` loads: python -m nanochin export RUN OUT"""

    run: str = opt(None, "folder of the run, or its name under --out", positional=True)
    folder: str = opt(None, "folder to write, new or empty", positional=True)
    out: str = opt("runs", "folder of all runs")


@dataclass(frozen=True)
class LadderOptions(ShapeOptions):
    """Models that fit a compute budget: python -m nanochin ladder --budget 1e15 3e15 1e16"""

    vocab_size: int = opt(256, "vocabulary V", low=1)
    seq_len: int = opt(256, "context length T in tokens", low=1)
    budget: tuple[float, ...] = opt((), "one or more budgets in training FLOPs", above=0)
    flops: str = opt("physical", "FLOP convention of the budgets", choices=tuple(FLOP_CONVENTIONS))
    law: str | None = opt(None, "laws.json of a fit; default: the constants of Besiroglu et al. 2024")
    law_approach: int | None = opt(None, "approach of laws.json to use, not its law", choices=(1, 2, 3))
    sizes: int = opt(7, "shapes per budget", low=1, high=1000)
    spread: float = opt(4.0, "N ranges from 1/spread to spread times the optimum", low=1)
    corpus_tokens: float | None = opt(None, "tokens in the corpus: adds a column of epochs", above=0)
    throughput: float | None = opt(None, "sustained FLOP/s, in the convention of --flops: adds hours", above=0)


@dataclass(frozen=True)
class FlopsOptions(ShapeOptions):
    """Exact FLOPs of a model by operation: python -m nanochin flops --model 768x12 --vocab-size 50304 --seq-len 1024"""

    model: str = opt("768x12", "width x layers")
    vocab_size: int = opt(256, "vocabulary V", low=1)
    seq_len: int = opt(256, "context length T in tokens", low=1)
    batch_tokens: int | None = opt(None, "tokens per step, in one pass (default: 16 sequences)", low=1)
    device: str = opt("H100 SXM", "device for the minimum time, as torch names it or as in nanochin/plan/devices.py")
    dtype: str = opt("bfloat16", "dtype of activations and weights", choices=("float16", "bfloat16", "tf32", "float32"))


@dataclass(frozen=True)
class ClaimsOptions:
    """The claims of the paper, each with a verdict from kept sweeps: python -m nanochin claims"""

    results: str = opt("results", "folder of kept sweeps")
    out: str | None = opt(None, "folder to write to; default: claims in --results")
