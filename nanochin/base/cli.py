"""Errors that users see, and options from a dataclass: on the command line and in a TOML file.

    python train.py [FILE.toml] [--key=value ...]      the command line overrides the file overrides the default

Options are named only in the dataclass, so `--help`, errors for misspelt options and config.json agree with it.
"""

import argparse
import difflib
import importlib
import math
import os
import re
import signal
import sys
import tomllib
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, field, fields
from operator import ge, gt, le
from pathlib import Path

from nanochin.base import signals
from nanochin.base.console import lasting_output


class UserError(Exception):
    """An error that the user can fix: printed as one line without a traceback, exit code 2.

    Library functions name parameters in backquotes, as in "`seq_len` 0: ...". Commands print them as options
    (`with_flags`)."""

    code = 2


class RunError(UserError):
    """A failure during a run (disk full, NaN loss): also printed as one line, exit code 1."""

    code = 1


@contextmanager
def errors_name(path: str | Path) -> Iterator[None]:
    """UserErrors of the block begin with the file whose content caused them."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def need(module: str, what: str, least: int = 0):
    """Import the optional library `module`. Raises UserError with `what` and the install command if it is missing,
    cannot be imported, or has a major version below `least`."""
    try:
        found = importlib.import_module(module)
    except Exception as error:  # of the library, or of what it imports
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"{what} needs an optional library: pip install {module}") from None
        raise UserError(f"{what}: {module} cannot be imported ({brief(error)}); reinstall it") from None
    version = getattr(found, "__version__", "")
    if (major := re.match(r"\d+", version)) and int(major[0]) < least:
        raise UserError(f"{what}: {module} is {version}: pip install '{module}>={least}'")
    return found


def brief(error: Exception) -> str:
    """The error of a library, in at most 300 characters on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def no_torchrun(instead: str) -> None:
    """Raises UserError with what to do `instead` if torchrun has started several processes of this command."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"torchrun is for train.py only; {instead}")


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
    section: str | None = None,
):
    """One option: default, help text, allowed values (`above` excludes its bound, `low` and `high` include theirs).
    `section` is a heading of `--help`, above this option and those that follow.

    `result=False` leaves it out of the run's identity (the hash in its name): either it does not affect the result, or
    the identity has what it resolves to (the data's fingerprint for its path, model and tokens for the budget).
    `later=True`: added after version 0.1; the identity omits it at its default, so that older runs keep their names.
    """
    meta = {"help": help, "choices": choices, "above": above, "low": low, "high": high}
    meta |= {"result": result, "later": later, "positional": positional, "section": section}
    return field(default=default, metadata=meta)


def validate(options) -> None:
    """Raises UserError for the first value out of bounds."""
    for f in fields(options):
        value, meta = getattr(options, f.name), f.metadata
        for number in value if isinstance(value, tuple) else (value,):
            for key, holds, words in (("above", gt, "above"), ("low", ge, "at least"), ("high", le, "at most")):
                if isinstance(number, int | float) and meta[key] is not None and not holds(number, meta[key]):
                    raise UserError(f"`{f.name}` {number:g}: must be {words} {meta[key]:g}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line and TOML file


def parse(cls, argv: list[str] | None = None, *, prog: str, description: str, file: bool = False):
    """Read the options of dataclass `cls` from `argv` (default: sys.argv) and, with `file`, from a TOML file given
    first. On an error, prints one line to stderr and exits with code 2."""
    parser = _parser(cls, prog, description, file)
    given = _read(parser, sys.argv[1:] if argv is None else argv)
    if path := given.pop("file", None):
        # The file is parsed as another command line: same types, same checks, errors that name the file.
        in_file = _parser(cls, f"{prog}: {path}", description, file=False)
        given = _read(in_file, _toml_arguments(path, in_file)) | given
    options = cls(**given)
    try:
        validate(options)
    except UserError as error:
        parser.error(with_flags(error))
    return options


def with_flags(message: object) -> str:
    """An error message with options in place of parameters: `seq_len` becomes --seq-len."""
    return re.sub("`([a-z][a-z0-9_]*)`", lambda name: _flag(name[1]), str(message))


def run_command(main, prog: str, only_prints: bool = False) -> None:
    """Run a command's `main` and exit with its return value (None: 0). A UserError is printed as one line on stderr and
    gives the exit code; Ctrl-C, SIGTERM and SIGHUP exit silently. Standard output that is full, closed or gone ends
    nothing; for a command that `only_prints` the exit code is then 1."""
    with lasting_output(prog) as lost, signals.handled(lambda number: sys.exit(128 + number)):
        try:
            code = main() or 0
        except UserError as error:
            message = with_flags(error).replace("\n", r"\n")  # of a file name
            print(f"{prog}: {message}", file=sys.stderr)
            code = error.code
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
    sys.exit(code or int(only_prints and bool(lost)))


def _parser(cls, prog: str, description: str, file: bool) -> argparse.ArgumentParser:
    hints = typing.get_type_hints(cls)
    several = {f.name: typing.get_origin(value_type(hints[f.name])) is tuple for f in fields(cls)}
    positional = [f.name.upper() + " ..." * several[f.name] for f in fields(cls) if f.metadata["positional"]]
    usage = " ".join([prog, *["[FILE.toml]"] * file, *positional, "[--key=value ...]"])
    parser = _OneLineParser(prog, usage, description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.color = False  # Python 3.14: escape codes
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # keeps its line breaks
    if file:
        parser.add_argument("file", nargs="?", metavar="FILE.toml", help="options in TOML, `key = value` per line")
    group = parser
    for f in sorted(fields(cls), key=lambda f: f.name not in cls.__annotations__):  # inherited ones last
        if section := f.metadata["section"]:
            group = parser.add_argument_group(section)
        kind = value_type(hints[f.name])
        kind = typing.get_args(kind)[0] if several[f.name] else kind
        default = "" if f.default in (None, MISSING, (), "") else f" (default: {f.default})"
        spec = {"help": (f.metadata["help"] + default).replace("%", "%%"), "choices": f.metadata["choices"]}
        spec["type"] = {int: _read_int, float: _read_float, bool: _read_bool}.get(kind, str)
        spec["metavar"] = None if spec["choices"] else {str: "TEXT"}.get(kind, kind.__name__.upper())
        spec |= {"nargs": "+"} if several[f.name] else {}
        if f.metadata["positional"]:
            parser.add_argument(f.name, **spec | {"metavar": f.name.upper()})
        elif kind is bool:  # --bias, --bias=true and --bias=false
            group.add_argument(_flag(f.name), nargs="?", const=True, **spec)
        else:
            group.add_argument(_flag(f.name), **spec)
    return parser


class _OneLineParser(argparse.ArgumentParser):
    """argparse with one-line errors that name the option, the value and --help."""

    def error(self, message: str) -> typing.NoReturn:
        message = f"{self.prog}: {message.removeprefix('argument ')}".replace("\n", r"\n")
        self.exit(2, f"{message} (see --help)\n")


def _read(parser: argparse.ArgumentParser, argv: list[str]) -> dict:
    if lost := next((word for word in argv if word[:2] == "--" and word.partition("=")[2] == "--"), None):
        parser.error(f"{lost[:-3]}: '--' is no value")  # argparse would leave it out
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
    try:
        table = read_toml(path)
        for key, value in table.items():
            option, many = parser._option_string_actions.get(_flag(key)), isinstance(value, list)
            if isinstance(value, dict) or (many and option and option.nargs != "+"):
                raise UserError(f"{_flag(key)}: expected one value, not a {'list' if many else 'table'}")
        return to_arguments(table)
    except UserError as error:
        parser.error(str(error))


def read_toml(path: str | Path) -> dict:
    """The table in a TOML file. Raises UserError, without the path, if it cannot be read."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        str(table)  # fails for hexadecimal integers of more digits than Python prints
    except OSError as error:
        raise UserError(error.strerror) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"not TOML: {error}") from None
    return table


def to_arguments(table: dict) -> list[str]:
    """{'vocab-size': 4096, 'data': ['a', 'b']} -> ['--vocab-size=4096', '--data', 'a', 'b']. Raises UserError for a
    word in a list that would be read as another option."""
    argv = []
    for key, value in table.items():
        words = list(map(str, value)) if isinstance(value, list) else []
        if option := next((word for word in words if word.startswith("-")), None):
            raise UserError(f"{_flag(key)}: {option!r} begins as an option does; a path may begin with ./")
        argv += [_flag(key), *words] if isinstance(value, list) else [f"{_flag(key)}={value}"]
    return argv


def value_type(hint):
    """`float | None` -> float."""
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not types.NoneType)
    return hint


def _read_int(text: str) -> int:
    number = _read_float(text)  # counts may be written 2e8
    if number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not an integer")
    return int(number)


def _read_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a number") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a finite number")
    return number


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not true or false")
    return text.lower() == "true"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
