"""Optional libraries, and errors whose names have control characters."""

import importlib
import sys
from types import SimpleNamespace

import pytest

from nanochin.base.cli import UserError, need, no_torchrun, run_command


@pytest.mark.parametrize(
    "source, said",
    [
        ("", None),
        ("__version__ = '12.0'", None),
        ("__version__ = '3.9.1'", "made_up_library is 3.9.1: pip install 'made_up_library>=4'"),
        ("import nowhere_to_be_found", "nowhere_to_be_found"),
        ("import collections; collections.nothing", "AttributeError"),
    ],
)
def test_need(tmp_path, monkeypatch, source, said):
    """A library that is too old or that fails when imported: one line with the reason, not "not installed"."""
    (tmp_path / "made_up_library.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_up_library", raising=False)
    if said is None:
        assert need("made_up_library", "`data` hf:x", least=4).__name__ == "made_up_library"
    else:
        with pytest.raises(UserError) as error:
            need("made_up_library", "`data` hf:x", least=4)
        assert (
            said in str(error.value) and str(error.value).startswith("`data` hf:x: ") and "\n" not in str(error.value)
        )


@pytest.mark.parametrize("main", ["sweep", "fit"])
def test_no_torchrun(main, monkeypatch):
    """Several processes of torchrun are refused in one line, before the file is read; one process is none of its."""
    monkeypatch.setattr(sys, "argv", [f"{main}.py", "nowhere"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=f"torchrun.*{main}.py") as error:
        importlib.import_module(main).main()
    assert "\n" not in str(error.value)
    monkeypatch.setenv("WORLD_SIZE", "1")
    no_torchrun("nothing")


def test_a_missing_library_names_the_command():
    for name in ("nowhere_to_be_found", "nowhere_to_be_found.inside"):
        with pytest.raises(UserError, match=f"the figure needs an optional library: pip install {name}$"):
            need(name, "the figure")


def test_old_datasets(tmp_path, monkeypatch, refusal):
    """Before version 4 the library runs code of a data set: refused with one line."""
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(__version__="3.6.0"))
    line = refusal("--data", "hf:owner/name", "--max-tokens=1e4", f"--cache={tmp_path}")
    assert "hf:owner/name" in line and "3.6.0" in line and "datasets>=4" in line


def test_an_error_is_one_line(capsys):
    """Line breaks and escape codes in a name are shown."""

    def fails():
        raise UserError("a\nb\x1b[2J\r: no such file")

    with pytest.raises(SystemExit) as end:
        run_command(fails, "x")
    assert (end.value.code, capsys.readouterr().err) == (2, "x: a\\nb\\x1b[2J\\r: no such file\n")
