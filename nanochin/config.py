"""Options and shapes: every option of a run in one dataclass, the command line and TOML parsers, the model's shape.

    python train.py [FILE.toml] [--key=value ...]      the command line overrides the file overrides the default

argparse reads the command line and tomllib the file. Options are named only in the dataclass, so `--help`, errors for
misspelt options and config.json always agree with it. No torch here.
"""

import argparse
import difflib
import functools
import importlib
import math
import os
import re
import signal
import sys
import tomllib
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path


class UserError(Exception):
    """An error that the user can fix: printed as one line without a traceback, exit code 2.

    Library functions name parameters in backquotes, as in "`seq_len` 0: ...". Commands print them as options
    (`with_flags`)."""

    code = 2


class RunError(UserError):
    """A failure during a run (disk full, NaN loss): also printed as one line, exit code 1."""

    code = 1


def need(module: str, what: str):
    """Import the optional library `module`. Raises UserError with `what` and the install command if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{what} needs an optional library: pip install {module}") from None


def opt(
    default,
    help: str,
    *,
    choices: tuple | None = None,
    above: float | None = None,
    low: float | None = None,
    high: float | None = None,
    result: bool = True,
    later: bool = False,
    positional: bool = False,
):
    """One option: default, help text, allowed values (`above` excludes its bound, `low` and `high` include theirs).

    `result=False` leaves it out of the run's identity (the hash in its name): either it does not affect the result, or
    the identity has what it resolves to (the data's fingerprint for its path, model and tokens for the budget).
    `later=True`: added after version 0.1; the identity omits it at its default, so that older runs keep their names.
    """
    meta = {
        "help": help,
        "choices": choices,
        "above": above,
        "low": low,
        "high": high,
        "result": result,
        "later": later,
        "positional": positional,
    }
    return field(default=default, metadata=meta)


def check(options) -> None:
    """Raises UserError for the first value out of bounds."""
    for f in fields(options):
        value, meta = getattr(options, f.name), f.metadata
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float):
                continue
            if meta["above"] is not None and not number > meta["above"]:
                raise UserError(f"`{f.name}` {number:g}: must be above {meta['above']:g}")
            if meta["low"] is not None and not number >= meta["low"]:
                raise UserError(f"`{f.name}` {number:g}: must be at least {meta['low']:g}")
            if meta["high"] is not None and not number <= meta["high"]:
                raise UserError(f"`{f.name}` {number:g}: must be at most {meta['high']:g}")


FLOP_CONVENTIONS = {  # counted in flops.py
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

    head_size: int | None = opt(None, "head size; default: by width, 16 from 32 to 128 wide, 64 from 512 on")
    ffn: int | None = opt(None, "feed-forward width; default 4C (swiglu: 8C/3 rounded up to a multiple of 8)")
    norm: str = opt("rmsnorm", "normalisation before each block", choices=("rmsnorm", "layernorm"))
    positions: str = opt("rotary", "positions", choices=("rotary", "learned"))
    activation: str = opt("gelu", "feed-forward activation", choices=("gelu", "gelu_tanh", "relu2", "swiglu"))
    bias: bool = opt(False, "biases in linear layers and in layernorm")
    tied: bool = opt(True, "output matrix shared with the embedding")
    qk_norm: bool = opt(False, "RMS-normalise queries and keys")


@dataclass(frozen=True)
class Config(ShapeOptions):
    """One training run. None means: derived, and printed with the reason before training."""

    # What to train: any two of budget, model and tokens give the third; with one, the law gives the others.
    budget: float | None = opt(
        None, "compute budget in training FLOPs, in the convention of --flops", above=0, result=False
    )
    model: str | None = opt(None, "width x layers, such as 256x4")
    tokens: float | None = opt(None, "training tokens D", above=0)
    flops: str = opt("physical", "FLOP convention of the budget", choices=tuple(FLOP_CONVENTIONS), result=False)
    law: str | None = opt(None, "laws.json of a fit; default: the constants of Besiroglu et al. 2024", result=False)
    law_approach: int = opt(3, "which approach of laws.json chooses the model", choices=(1, 2, 3), result=False)

    # Data.
    data: tuple[str, ...] | None = opt(
        None,
        "python, python-all, files, folders, globs (text: .txt .jsonl .parquet, also .gz .xz .zst; tokens: "
        ".bin), or hf:OWNER/NAME[:CONFIG] for a data set of the Hugging Face hub",
        result=False,
    )
    val: tuple[str, ...] | None = opt(
        None, "validation text; default: files named val*, else documents chosen by hash", result=False
    )
    val_bytes: int = opt(
        1 << 20, "maximum validation text or tokens, in bytes (evenly spaced blocks)", low=1, result=False
    )
    max_tokens: float | None = opt(None, "maximum tokens to read from an hf: data set", above=0, result=False)
    skip_bad: bool = opt(False, "leave out and count lines and rows without a text", result=False)
    tokenizer: str | None = opt(
        None, "bytes (the default for text), bpe (our own, trained on the corpus), or a tiktoken name such as gpt2"
    )
    vocab_size: int | None = opt(
        None, "vocabulary size; default: the tokenizer's (bpe: 4096); enough for token files without a tokenizer"
    )
    seq_len: int | None = opt(None, "context length T in tokens", low=1)
    cache: str = opt("cache", "folder of tokenised shards", result=False)

    # Optimisation. None: by the numbered rules in nanochin/plan/ladder.py.
    optimizer: str = opt("adamw", "adamw (decoupled decay) or adam (L2 in the gradient)", choices=("adamw", "adam"))
    lr: float | None = opt(None, "peak learning rate", above=0)
    batch_tokens: int | None = opt(None, "tokens per optimizer step; a multiple of seq_len", low=1)
    warmup_tokens: float | None = opt(None, "linear warm-up, in tokens", low=0)
    beta1: float = opt(0.9, "Adam's beta1", low=0, high=0.999999)
    beta2: float | None = opt(None, "Adam's beta2", low=0, high=0.999999)
    weight_decay: float = opt(0.1, "weight decay, on matrices only", low=0)
    clip: float = opt(1.0, "maximum gradient norm; 0 = no clipping", low=0)
    z_loss: float = opt(0.0, "weight of the z-loss, log(Z)^2 (1e-4 is usual)", low=0)
    schedule: str = opt("cosine", "learning-rate schedule", choices=("cosine", "wsd", "linear", "constant"))
    cycle: float = opt(1.0, "length of the cosine as a multiple of the run (above 1 overshoots, Appendix B)", above=0)
    final_lr: float | None = opt(
        None, "final learning rate / peak; default: 0.1 for cosine, 0 for wsd and linear", low=0, high=1
    )
    cooldown: float = opt(0.2, "fraction of a wsd run in its 1-sqrt cooldown", low=0, high=1)
    seed: int = opt(0, "seed of the weights and of the data order", low=0, high=10**9)

    # Execution.
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps", result=False)
    dtype: str = opt("auto", "compute dtype (weights stay float32)", choices=("auto", "float32", "bfloat16"))
    kernels: str = opt(
        "auto",
        "auto: Triton kernels where supported; fallback: PyTorch operations",
        choices=("auto", "fallback"),
        result=False,
    )
    step: str = opt(
        "auto",
        "how a step runs: eager, compile (torch.compile) or graph (CUDA graph); auto: by device",
        choices=("auto", "eager", "compile", "graph"),
        result=False,
    )
    micro_batch: int | None = opt(
        None, "sequences per forward pass of a new run; default: by device", low=1, high=10**6, result=False
    )
    threads: int | None = opt(None, "CPU threads; default: torch's", low=1, high=1000, result=False)

    # The run's folder.
    name: str | None = opt(None, "name of the run; default: corpus, size and a hash of the options", result=False)
    out: str = opt("runs", "folder of all runs", result=False)
    branch_from: str | None = opt(None, "RUN@STEP: start from another run's checkpoint (cooldowns)")
    init_from: str | None = opt(
        None, "GPT-2 weights to start from: a transformers folder or a .safetensors file", result=False
    )
    log_every: int | None = opt(None, "steps between log lines; default: 200 lines per run", low=1, result=False)
    eval_every: int = opt(0, "steps between evaluations; 0 = only at the end", low=0, result=False)
    save_every: float = opt(60.0, "seconds between checkpoints; 0 = only at the end", low=0, result=False)
    save_steps: tuple[int, ...] = opt((), "additional steps whose checkpoint is saved and kept", low=1, result=False)
    keep: int = opt(2, "number of newest checkpoints to keep", low=1, result=False)
    loggers: tuple[str, ...] = opt((), "also log to these", choices=("wandb", "tensorboard"), result=False)
    sample_tokens: int = opt(256, "length in tokens of the sample printed at the end; 0 = none", low=0, result=False)


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
    """A Shape with defaults filled in.

    Raises UserError for sizes below 1, a head size that is odd or does not divide the width.
    """
    for name, value in (
        ("width", width),
        ("layers", layers),
        ("vocab_size", vocab_size),
        ("seq_len", seq_len),
        ("head_size", head_size),
        ("ffn", ffn),
    ):
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


# ---------------------------------------------------------------------------------------------------------------------
# Command line and TOML file


def parse(cls, argv: list[str] | None = None, *, prog: str, description: str, file: bool = False):
    """Read the options of dataclass `cls` from `argv` (default: sys.argv) and, with `file`, from a TOML file given
    first. `--help` is generated from the dataclass. On an error, prints one line to stderr and exits with code 2.
    """
    parser = _parser(cls, prog, description, file)
    given = _read(parser, sys.argv[1:] if argv is None else argv)
    if path := given.pop("file", None):
        # The file is parsed as another command line: same types, same checks, errors that name the file.
        in_file = _parser(cls, f"{prog}: {path}", description, file=False)
        given = _read(in_file, _toml_arguments(path, in_file)) | given
    options = cls(**given)
    try:
        check(options)
    except UserError as error:
        parser.error(with_flags(error))
    return options


def with_flags(message: object) -> str:
    """An error message with options in place of parameters: `seq_len` becomes --seq-len."""
    return re.sub("`([a-z][a-z0-9_]*)`", lambda name: _flag(name[1]), str(message))


def run_command(main, prog: str) -> None:
    """Run a command's `main` and exit with its return value (None: 0). A UserError is printed as one line on stderr and
    gives the exit code; Ctrl-C and `| head` exit silently."""
    try:
        code = main()
        sys.stdout.flush()
        sys.exit(code or 0)
    except UserError as error:
        print(f"{prog}: {with_flags(error)}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(128 + 13)  # as if by SIGPIPE


def run_renamed(main, name: str) -> None:
    """`run_command` for python -m nanochin.NAME, the name of the command up to version 0.1."""
    print(f"python -m nanochin.{name} is now called python -m nanochin {name}", file=sys.stderr)
    run_command(main, f"python -m nanochin {name}")


def _parser(cls, prog: str, description: str, file: bool) -> argparse.ArgumentParser:
    positional = [f.name.upper() for f in fields(cls) if f.metadata["positional"]]
    usage = " ".join([prog, *(["[FILE.toml]"] if file else []), *positional, "[--key=value ...]"])
    parser = _OneLineParser(
        prog=prog,
        usage=usage,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if file:
        parser.add_argument("file", nargs="?", metavar="FILE.toml", help="options in TOML, `key = value` per line")
    hints = typing.get_type_hints(cls)
    own_first = sorted(fields(cls), key=lambda f: f.name not in cls.__annotations__)  # then the inherited ones
    for f in own_first:
        kind = value_type(hints[f.name])
        many = typing.get_origin(kind) is tuple
        kind = typing.get_args(kind)[0] if many else kind
        default = "" if f.default in (None, MISSING, (), "") else f" (default: {f.default})"
        spec = {"help": (f.metadata["help"] + default).replace("%", "%%"), "choices": f.metadata["choices"]}
        spec["type"] = {int: _read_int, float: _read_float, bool: _read_bool}.get(kind, str)
        spec["metavar"] = None if spec["choices"] else {str: "TEXT"}.get(kind, kind.__name__.upper())
        if f.metadata["positional"]:
            parser.add_argument(f.name, **spec | {"metavar": f.name.upper()})
        elif kind is bool:  # --bias, --bias=true and --bias=false
            parser.add_argument(_flag(f.name), nargs="?", const=True, **spec)
        else:
            parser.add_argument(_flag(f.name), **spec, **({"nargs": "+"} if many else {}))
    return parser


class _OneLineParser(argparse.ArgumentParser):
    """argparse with one-line errors that name the option, the value and --help."""

    def error(self, message: str) -> typing.NoReturn:
        message = message.removeprefix("argument ")
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _read(parser: argparse.ArgumentParser, argv: list[str]) -> dict:
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        name = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
        parser.error(f"unknown option {name}" + did_you_mean(name, list(parser._option_string_actions)))
    return {key: tuple(value) if isinstance(value, list) else value for key, value in vars(given).items()}


def did_you_mean(name: str, known: list[str], after: str = "") -> str:
    """End of an error message: '; did you mean NAME?' with the closest of `known` + `after`, or "" if none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}{after}?" if close else ""


def _toml_arguments(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """{'vocab-size': 4096, 'data': ['a', 'b']} -> ['--vocab-size=4096', '--data', 'a', 'b']"""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(error.strerror)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        parser.error(f"not TOML: {error}")
    argv = []
    for key, value in table.items():
        option, many = parser._option_string_actions.get(_flag(key)), isinstance(value, list)
        if isinstance(value, dict) or (many and option and option.nargs != "+"):
            parser.error(f"{_flag(key)}: expected one value, not a {'list' if many else 'table'}")
        argv += [_flag(key), *map(str, value)] if many else [f"{_flag(key)}={value}"]
    return argv


def value_type(hint):
    """`float | None` -> float."""
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not types.NoneType)
    return hint


def _read_int(text: str) -> int:
    number = _read_float(text)  # counts may be written 2e8
    if number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer")
    return int(number)


def _read_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() == "true"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
