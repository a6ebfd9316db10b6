import dataclasses
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from nanochin.base.cli import UserError, opt, parse, validate, with_flags
from nanochin.config import Config, Shape, make_shape, parse_model


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


def test_no_option_gives_the_defaults():
    """An empty command line gives Config(), the dataclass's defaults."""
    assert read() == Config()


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--tokens=2e8"], "tokens", 2e8),
        (["--vocab-size", "4.096e3"], "vocab_size", 4096),
        (["--batch-tokens=1_024"], "batch_tokens", 1024),
        (["--bias"], "bias", True),
        (["--bias=False"], "bias", False),
        (["--tied", "false"], "tied", False),
        (["--data", "a.txt", "b.txt"], "data", ("a.txt", "b.txt")),
        (["--save-steps", "10", "2e2"], "save_steps", (10, 200)),
        (["--model=256x4"], "model", "256x4"),
        (["--law-approach=1"], "law_approach", 1),
        (["--seed=1", "--seed=2"], "seed", 2),
        (["--final-lr=0"], "final_lr", 0.0),
    ],
)
def test_forms_of_values(argv, name, value):
    """Counts as 2e8, flags with and without a value, lists as words; types are those of the fields."""
    config = read(*argv)
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)
    assert dataclasses.replace(config, **{name: getattr(Config(), name)}) == Config()


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--budgt=1e15"], "unknown option --budgt; did you mean --budget?"),
        (["--vocab_size", "4096"], "unknown option --vocab_size; did you mean --vocab-size?"),
        (["--bud=1e15"], "unknown option --bud; did you mean --budget?"),
        (["-seed=1"], "unknown option -seed; did you mean --seed?"),
        (["--seed=1", "--lr", "0.1", "stray"], "stray"),
        (["--seed=1.5"], "--seed: '1.5' is not an integer"),
        (["--seed=two"], "--seed: 'two' is not a number"),
        (["--seed"], "--seed: expected one argument"),
        (["--data"], "--data: expected at least one argument"),
        (["--lr=nan"], "--lr: 'nan' is not a finite number"),
        (["--tokens=1e999"], "--tokens: '1e999' is not a finite number"),
        (["--bias=maybe"], "--bias: 'maybe' is not true or false"),
        (["--norm=batchnorm"], "--norm: invalid choice: 'batchnorm' (choose from"),
        (["--lr=0"], "--lr 0: must be above 0"),
        (["--seed=1e30"], "--seed 1e+30: must be at most 1e+09"),
        (["--seq-len=0"], "--seq-len 0: must be at least 1"),
        (["--save-steps", "5", "0"], "--save-steps 0: must be at least 1"),
        (["nowhere.toml"], "nowhere.toml: No such file or directory"),
    ],
)
def test_mistakes_are_one_line(capsys, argv, said):
    """Every mistake on the command line gives one line that names option and value, exit code 2."""
    assert said in refusal(capsys, *argv)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Config)])
def test_misspelt_option_suggests_the_closest(capsys, name):
    """A doubled letter in any option."""
    flag = "--" + name.replace("_", "-")
    misspelt = flag[:4] + flag[3] + flag[4:]
    assert f"unknown option {misspelt}; did you mean {flag}?" in refusal(capsys, misspelt + "=1")


def test_help_lists_every_option(capsys):
    """--help has the description unchanged and each field with help text and default, and exits with code 0."""
    with pytest.raises(SystemExit) as exit:
        parse(Config, ["--help"], prog="train.py", description="Trains.\n\n    train.py    a run", file=True)
    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert "Trains.\n\n    train.py    a run\n" in out
    assert exit.value.code == 0
    for f in dataclasses.fields(Config):
        default = f" (default: {f.default})" if f.default not in (None, ()) else ""
        flag = "--" + f.name.replace("_", "-")
        assert f" {flag} " in words
        assert f"{f.metadata['help']}{default}" in words


def test_positional_options():
    """A positional field is required."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        run: str = opt(None, "a run", positional=True)
        tokens: int = opt(3, "how many")

    given = parse(Options, ["runs/a", "--tokens=5"], prog="x", description="")
    assert given == Options("runs/a", 5)
    with pytest.raises(SystemExit):
        parse(Options, [], prog="x", description="")


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
        (b"seed = 1.5", "--seed: '1.5' is not an integer"),
        (b"bias = 1", "--bias: '1' is not true or false"),
        (b"data = []", "--data: expected at least one argument"),
        (b"[data]\npath = 1", "--data: expected one value, not a table"),
        (b"seed = [1, 2]", "--seed: expected one value, not a list"),
        (b"file = 'other.toml'", "unknown option --file"),
        (b"seed = ", "not TOML"),
        (b"name = '\xff'", "not TOML"),
    ],
)
def test_mistakes_in_the_file_name_the_file(capsys, tmp_path, content, said):
    """One line that names the file; also if it is a folder."""
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    line = refusal(capsys, str(path))
    assert line.startswith(f"train.py: {path}: ") and said in line
    assert "directory" in refusal(capsys, str(tmp_path)).lower()


def test_values_out_of_bounds_from_python():
    """`validate` rejects the same values for a Config made in Python (sweeps) as the command line."""
    validate(Config(save_steps=(1, 2)))
    for wrong in ({"lr": 0.0}, {"seed": -1}, {"final_lr": 1.01}, {"save_steps": (1, 0)}, {"lr": float("nan")}):
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
        (100, 2, {"head_size": 64}, "`head_size` 64: must be even and divide the width 100"),
        (9, 2, {"head_size": 3}, "`head_size` 3: must be even"),
        (7, 2, {}, "width 7: must be even"),
        (0, 2, {}, "`width` 0"),
        (64, 0, {}, "`layers` 0"),
        (64, 2, {"vocab_size": 1e30}, "`vocab_size` 1e+30"),
        (2**31, 2, {}, "`width` 2147483648"),
    ],
)
def test_impossible_shapes(width, layers, options, said):
    with pytest.raises(UserError, match=said.replace("+", r"\+")):
        make_shape(width, layers, **{"vocab_size": 256, "seq_len": 32} | options)


@pytest.mark.parametrize("text", ["256", "256x", "x4", "256x4x2", "256*4", "2.5x4", "", "axb"])
def test_invalid_models(text):
    """Only 'width x layers' is a model."""
    with pytest.raises(UserError, match="expected width x layers, such as 256x4"):
        parse_model(text)
    assert parse_model("256x4") == parse_model("256X4") == (256, 4)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes close otherwise there")
def test_closed_pipe():
    """`| head -1` ends a command silently."""
    code = "from nanochin.base.cli import run_command; run_command(lambda: print('line\\n' * 100_000), 'x')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def test_parameters_are_named_as_options():
    """Library errors name parameters in backquotes, a command prints options."""
    error = UserError("`batch_tokens` 100: must be a multiple of `seq_len` 32; see a`b and `N`")
    assert with_flags(error) == "--batch-tokens 100: must be a multiple of --seq-len 32; see a`b and `N`"


def test_commands(command):
    """python -m nanochin lists its commands and runs them; an unknown one suggests the closest."""
    listed = command("-m", "nanochin", "--help")
    assert listed.returncode == 0
    for name in ("sample", "evaluate", "export", "ladder", "flops"):
        assert re.search(rf"^ +{name} ", listed.stdout, re.MULTILINE)
        assert command("-m", "nanochin", name, "--help").stdout.startswith(f"usage: python -m nanochin {name} ")
    wrong = command("-m", "nanochin", "flop")
    assert (wrong.returncode, wrong.stdout) == (2, "") and "did you mean flops?" in wrong.stderr
