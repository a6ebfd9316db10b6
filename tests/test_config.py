import dataclasses
import math
import sys
import typing

import pytest
from conftest import call
from hypothesis import strategies as st

from fit import FitOptions
from nanochin import __main__
from nanochin.base.cli import UserError, _parser, opt, parse, run_command, validate, value_type, with_flags
from nanochin.config import Config, Shape, make_shape, parse_model
from nanochin.options import LadderOptions, SampleOptions
from nanochin.sweep.spec import Spec
from sweep import SweepOptions


def read(*argv, cls=Config):
    return parse(cls, list(argv), prog="train.py", description="about", file=True)


def refusal(capsys, *argv) -> str:
    """The error printed for `argv`: one line on stderr, exit code 2."""
    with pytest.raises(SystemExit) as exit:
        read(*argv)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert err.endswith("\n") and err.count("\n") == 1 and err.startswith("train.py: ")
    return err


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--tokens=2e8"], "tokens", 2e8),
        (["--vocab-size", "4.096e3"], "vocab_size", 4096),
        (["--batch-tokens=1_024"], "batch_tokens", 1024),
        (["--bias"], "bias", True),
        (["--tied", "False"], "tied", False),
        (["--data", "a.txt", "b.txt"], "data", ("a.txt", "b.txt")),
        (["--save-steps", "10", "2e2"], "save_steps", (10, 200)),
        (["--model=256x4"], "model", "256x4"),
        (["--seed=1", "--seed=2"], "seed", 2),
    ],
)
def test_forms_of_values(argv, name, value):
    """Counts as 2e8, flags with and without a value, lists as words; types are those of the fields."""
    assert read() == Config()
    config = read(*argv)
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)
    assert dataclasses.replace(config, **{name: getattr(Config(), name)}) == Config()


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--budgt=1e15"], "unknown option --budgt; did you mean --budget?"),
        (["--bud=1e15"], "--bud; did you mean --budget?"),
        (["--seed=1", "--lr", "0.1", "stray"], "stray"),
        (["--seed=1.5"], "--seed: '1.5'"),
        (["--seed"], "--seed: "),
        (["--data"], "--data: "),
        (["--lr=two"], "--lr: 'two'"),
        (["--lr=--"], "--lr: '--'"),
        (["--data=--"], "--data: '--'"),
        (["--tokens=1e999"], "--tokens: '1e999'"),
        (["--bias=maybe"], "--bias: 'maybe'"),
        (["--norm=batchnorm"], "--norm: invalid choice: 'batchnorm'"),
        (["--save-steps", "5", "0"], "--save-steps 0: must be at least 1"),
        (["nowhere.toml"], "nowhere.toml: "),
    ],
)
def test_mistakes_are_one_line(capsys, argv, said):
    """Every mistake on the command line gives one line that names option and value, exit code 2."""
    assert said in refusal(capsys, *argv)


def test_help_lists_every_option(capsys):
    """--help has each field with help text and default, and exits with code 0."""
    with pytest.raises(SystemExit) as exit:
        read("--help")
    words = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for f in dataclasses.fields(Config):
        default = f" (default: {f.default})" if f.default not in (None, ()) else ""
        assert f" --{f.name.replace('_', '-')} " in words and f"{f.metadata['help']}{default}" in words


EXTREMES = [
    "1e308",
    "-1e308",
    "1e309",
    "inf",
    "nan",
    "1e-320",
    "-0",
    "9" * 400,
    "9" * 5000,
    "1_0",
    "0x10",
    "\u0661",
    "",
]
EXTREMES += ["true", "a\nb", "\x1b[31m", "--", "-", "-1", "=", "16x2", "@file", "%s", "\udcff"]


@st.composite
def words(draw, cls) -> list[str]:
    """A command line for the options of `cls`, with values at their bounds, of other types and misspelt names."""
    found = ["x"] * sum(f.metadata["positional"] for f in dataclasses.fields(cls))
    for f in draw(st.lists(st.sampled_from(dataclasses.fields(cls)), max_size=4)):
        meta = f.metadata
        bounds = [b for key in ("above", "low", "high") if (b := meta[key]) is not None]
        near = [repr(x) for b in bounds for x in (b, math.nextafter(b, -math.inf), math.nextafter(b, math.inf), b + 1)]
        known = [*map(str, meta["choices"] or ()), *near, "1", "0.5"]
        value = draw(st.one_of(st.sampled_from(known), st.sampled_from([*known, *EXTREMES]), st.text(max_size=5)))
        flag = "--" + f.name.replace("_", "-")
        found += draw(
            st.sampled_from([[f"{flag}={value}"]] * 9 + [[flag, value], [flag], [f"{flag[:-1]}={value}"], [value]])
        )
    return found


def is_within(f: dataclasses.Field, value: object, kind: object) -> bool:
    """Whether a value has the type of its field and is within its bounds."""
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(is_within(f, each, typing.get_args(kind)[0]) for each in value)
    meta = f.metadata
    if meta["choices"] and value not in meta["choices"]:
        return False
    if kind in (int, float):
        above, low, high = (meta[key] for key in ("above", "low", "high"))
        return (isinstance(value, kind) and math.isfinite(value) and (above is None or value > above)
                and (low is None or value >= low) and (high is None or value <= high))  # fmt: skip
    return isinstance(value, kind)


def test_any_command_line(for_all):
    """Options within their bounds, or one line with exit code 2."""

    def check(options: tuple[type, list[str]]) -> str:
        (cls, argv), found = options, []
        hints = typing.get_type_hints(cls)
        code, out, err = call(lambda: found.append(parse(cls, prog="command", description="about")), *argv)
        if code:
            assert code == 2 and err.count("\n") == 1 and err.startswith("command: ") and not found, err
            return "refused"
        assert not err and bool(out) != bool(found)  # --help
        for f in dataclasses.fields(cls) if found else ():
            value = getattr(found[0], f.name)
            assert value is f.default or is_within(f, value, value_type(hints[f.name])), (f.name, value)
        return "options"

    classes = st.sampled_from([Config, Spec, FitOptions, SweepOptions, SampleOptions, LadderOptions])
    for_all(check, options=classes.flatmap(lambda cls: st.tuples(st.just(cls), words(cls))))


def test_help_has_sections():
    """Each option is under the last heading before it; inherited options and their headings come last."""

    @dataclasses.dataclass(frozen=True)
    class Base:
        old: int = opt(1, "inherited", section="Of the base")

    @dataclasses.dataclass(frozen=True)
    class Derived(Base):
        path: str = opt(None, "where", positional=True)
        a: int = opt(1, "no heading")
        b: int = opt(1, "first", section="One (of 100%)")
        c: bool = opt(False, "second")

    lines = _parser(Derived, "x", "about", file=False).format_help().splitlines()
    found = [line.split()[0] if line.startswith("  ") else line for line in lines if line][2:]
    assert found == ["positional arguments:", "PATH", "options:", "-h,", "--a", "One (of 100%):", "--b", "--c",
                     "Of the base:", "--old"]  # fmt: skip
    assert [f.metadata["section"] for f in dataclasses.fields(Config) if f.metadata["section"]][2:4] == [
        "What to train (two of budget, model and tokens give the third; with one, the law gives the others)",
        "Data",
    ]


COMMANDS = {"train": (), "sweep": (), "fit": (), **{f"nanochin {name}": (name,) for name in __main__.COMMANDS}}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_mistakes_load_no_heavy_library(command, name):
    """--help, an unknown option and a wrong value are answered before torch, scipy, matplotlib and jinja2 load."""
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print(sorted({'torch', 'scipy', 'matplotlib', 'jinja2'} & sys.modules.keys())))\n"
        f"runpy.run_module({name.split()[0]!r}, run_name='__main__', alter_sys=True)"
    )
    for words, exit_code in ((["--help"], 0), (["--no-such-option"], 2), (["--out"], 2)):
        done = command("-c", code, *COMMANDS[name], *words)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (exit_code, "[]"), done.stderr
        assert done.stdout.startswith("usage:") if exit_code == 0 else done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# The TOML file


def test_command_line_overrides_file_overrides_default(tmp_path):
    """Both spellings of a key work."""
    path = tmp_path / "run.toml"
    path.write_text(
        'seed = 3\nvocab-size = 4096\nbatch_tokens = 256\nbias = true\ndata = ["a", "b"]\nsave-steps = [5]\n'
    )
    expected = {"seed": 7, "vocab_size": 4096, "batch_tokens": 256, "bias": True, "data": ("a", "b")}
    found = read(str(path), "--seed=7", "--norm=layernorm")
    assert found == Config(**expected, save_steps=(5,), norm="layernorm")


@pytest.mark.parametrize(
    "content, said",
    [
        (b"sed = 1", "unknown option --sed; did you mean --seed?"),
        (b"seed = 1.5", "--seed: '1.5'"),
        (b"data = []", "--data: "),
        (b"[data]\npath = 1", "--data: "),
        (b"seed = [1, 2]", "--seed: "),
        (b"file = 'other.toml'", "--file"),
        (b"name = '\xff'", "not TOML"),
    ],
)
def test_mistakes_in_the_file_name_the_file(capsys, tmp_path, content, said):
    """One line that names the file."""
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    line = refusal(capsys, str(path))
    assert line.startswith(f"train.py: {path}: ") and said in line


def test_values_out_of_bounds_from_python():
    """`validate` rejects the same values for a Config made in Python (sweeps): bounds of each kind, and nan."""
    validate(Config(save_steps=(1, 2)))
    for wrong in ({"lr": 0.0}, {"seed": -1}, {"final_lr": 1.01}, {"lr": float("nan")}):
        with pytest.raises(UserError, match="must be"):
            validate(Config(**wrong))


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def test_shape_defaults():
    """As documented: 2 heads, head size 16, 8 heads, then head size 64; ffn 4C, or 8C/3 rounded up to 8s."""
    sizes = {"vocab_size": 256, "seq_len": 32}
    assert make_shape(256, 4, **sizes) == Shape(256, 4, 256, 32, head_size=32, ffn=1024)
    assert make_shape(6, 1, **sizes) == Shape(6, 1, 256, 32, head_size=2, ffn=24)
    assert make_shape(2, 1, **sizes).heads == 1
    assert make_shape(160, 3, **sizes).head_size == 20 and make_shape(160, 3, **sizes).heads == 8
    assert make_shape(100, 1, activation="swiglu", **sizes).ffn == 272  # 8 * ceil(100 / 3)
    assert make_shape(64, 2, head_size=32, ffn=100, bias=True, **sizes) == Shape(64, 2, 256, 32, 32, 100, bias=True)
    assert str(make_shape(256, 4, **sizes)) == "256x4"


@pytest.mark.parametrize(
    "width, layers, options, said",
    [
        (100, 2, {"head_size": 64}, "`head_size` 64"),
        (9, 2, {"head_size": 3}, "`head_size` 3"),
        (7, 2, {}, "width 7"),
        (64, 0, {}, "`layers` 0"),
        (2**31, 2, {}, "`width` 2147483648"),
    ],
)
def test_impossible_shapes(width, layers, options, said):
    with pytest.raises(UserError, match=said):
        make_shape(width, layers, vocab_size=256, seq_len=32, **options)


def test_models():
    """Only 'width x layers' is a model."""
    assert parse_model("256x4") == parse_model("256X4") == (256, 4)
    for text in ("256", "x4", "256x4x2", "2.5x4", ""):
        with pytest.raises(UserError, match="`model`"):
            parse_model(text)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def test_parameters_are_named_as_options():
    """Library errors name parameters in backquotes, a command prints options."""
    error = UserError("`batch_tokens` 100: must be a multiple of `seq_len` 32; see a`b and `N`")
    assert with_flags(error) == "--batch-tokens 100: must be a multiple of --seq-len 32; see a`b and `N`"


def test_commands(monkeypatch, capsys):
    """python -m nanochin lists its commands and runs them; an unknown one suggests the closest."""

    def run(*argv) -> tuple:
        monkeypatch.setattr(sys, "argv", ["nanochin", *argv])
        with pytest.raises(SystemExit) as end:
            run_command(__main__.main, "python -m nanochin")
        return end.value.code, *capsys.readouterr()

    assert run("--help") == (0, __main__.__doc__.strip() + "\n", "")
    for name in ("sample", "evaluate", "export", "ladder", "flops"):
        code, out, _ = run(name, "--help")
        assert (
            code == 0 and out.startswith(f"usage: python -m nanochin {name} ") and f"\n    {name} " in __main__.__doc__
        )
    code, out, err = run("flop")
    assert (code, out) == (2, "") and "did you mean flops?" in err
