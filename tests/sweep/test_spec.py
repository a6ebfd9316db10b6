"""nanochin/sweep/spec.py: what docs/sweeps.md says of sweep files."""

import re
import tomllib
from dataclasses import fields

import pytest
from conftest import ROOT

from nanochin.base.cli import UserError
from nanochin.sweep.cells import plan_cells
from nanochin.sweep.spec import Spec, read_sweep

PAGE = (ROOT / "docs" / "sweeps.md").read_text()


def test_table_of_keys():
    """The table has a row for each key of `Spec`, in order, with its default."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) ?\| .+ \|$", PAGE.partition("| key | default |")[2], re.MULTILINE)
    defaults = {key: tomllib.loads(f"value = {text}")["value"] if text else None for key, text in rows}
    assert list(defaults) == [f.name for f in fields(Spec)]
    for f in fields(Spec):
        default = list(f.default) or None if isinstance(f.default, tuple) else f.default
        assert defaults[f.name] == default, f.name


def test_minimal_sweep(tmp_path):
    """The first sweep file of the page can be planned, and has no line to spare."""
    path, lines = tmp_path / "some.toml", re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)[1].splitlines()
    path.write_text("\n".join(lines))
    assert read_sweep(path).base.data and plan_cells(read_sweep(path), 256)
    for i in range(len(lines)):
        path.write_text("\n".join(lines[:i] + lines[i + 1 :]))
        if "data" not in lines[i]:  # which may be given on the command line
            with pytest.raises(UserError, match="is missing"):
                read_sweep(path)
