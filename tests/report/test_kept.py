"""The README of a kept sweep: its numbers are those of laws.json."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

import fit
from nanochin.report.kept import readme
from nanochin.runrow import RunRow, read_csv

RESULTS = sorted(path.parent for path in ROOT.glob("results/*/laws.json"))
ROW = RunRow("a", params=2000, tokens=30_000, loss=2.5, flops=4e8, data_sha="d" * 64, val_sha="e" * 64)


def text_of(found: dict | None = None, rows=(ROW,)) -> str:
    return readme("some", list(rows), found, {"runs.csv"}, ["python sweep.py some.toml"])


@pytest.mark.slow
@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_kept_fits(folder, tmp_path, monkeypatch):
    """fit.py on the kept rows gives the kept exponents and intervals."""
    monkeypatch.setattr(sys, "argv", ["fit.py", str(folder), "--out", str(tmp_path), "--figures", "none"])
    fit.main()
    kept, found = (json.loads((place / "laws.json").read_text()) for place in (folder, tmp_path))
    for key in ("approach1", "approach2", "approach3", "law"):
        ours, theirs = (one[key] and one[key].get("frontier", one[key]) for one in (found, kept))
        assert bool(ours) == bool(theirs)
        if theirs:
            for read in (lambda one: one["a"], lambda one: (one.get("ci") or {}).get("a")):  # null: no interval
                np.testing.assert_allclose(*(np.array(read(one), float) for one in (ours, theirs)), rtol=1e-3)


def law(**changes) -> dict:
    """What a README reads of laws.json."""
    return {
        "meta": {"params_convention": "total", "flops_convention": "physical", "git": "c" * 40 + "-dirty"},
        "answers": {"approach": 2},
        "approach2": {"a": 0.5, "b": 0.6, "ci": {"a": [0.4, 0.55], "b": [0.5, 0.7]}},
        "approach3": {"a": 0.1, "b": 0.9, "frontier": {"a": 0.2, "b": 0.8, "ci": {"a": [0.1, 0.3], "b": [0.7, 0.9]}}},
        "checks": {"hold_out": {"rows": [3, 4], "error": 0.012, "bias": -0.01, "outside": 1}},
    } | changes


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_kept_readmes(folder):
    """Numbers of law and hold-out are those of laws.json, links lead to files, and the file is what `readme` gives."""
    text, found = (folder / "README.md").read_text(), json.loads((folder / "laws.json").read_text())
    command = next(line for line in text.splitlines() if line.startswith("python sweep.py"))
    best = found.get("law") or found[f"approach{found['answers']['approach']}"]
    best = best.get("frontier", best)
    shown = [float(number) for number in re.findall(r"-?\d+\.\d+", next(x for x in text.splitlines() if "C^" in x))]
    ends = best.get("ci") or {}
    values = [value for name in "ab" for value in (best[name], *ends.get(name, ()))]
    assert shown == [round(value, 3) for value in values]
    assert f"{100 * found['checks']['hold_out']['error']:.2f}%" in text and f"- {found['meta']['n_runs']} runs" in text
    assert found["meta"]["data_sha"][:10] in text and found["meta"]["git"][:10] in text
    assert all((folder / link).exists() for link in re.findall(r"\]\(([^)]+)\)", text))
    rows = list(read_csv(folder / "runs.csv").values())
    commands = [command, f"python fit.py results/{folder.name}"]
    files = {path.name for path in folder.iterdir()}
    assert text == readme(folder.name, rows, found, files, commands)


def test_the_table_of_all_sweeps():
    """results/README.md has a row for each kept sweep, with its number of runs and its a."""
    table = (ROOT / "results/README.md").read_text().splitlines()
    for folder in RESULTS:
        found = json.loads((folder / "laws.json").read_text())
        (line,) = [line for line in table if line.startswith(f"| [{folder.name}]({folder.name}) |")]
        _, _, _, runs, a, _ = line.split("|")
        best = found.get("law") or found[f"approach{found['answers']['approach']}"]
        assert int(runs) == found["meta"]["n_runs"] and f"{best.get('frontier', best)['a']:.3f}" in a


def test_law():
    """The exponents of the approach used for answers, with intervals if there are any; those of the frontier if C is
    not 6ND. The reason if there is no hold-out."""
    assert "too few budgets" in text_of(law(checks={"hold_out": {"reason": "too few budgets"}}))
    assert "N grows as C^0.500 [0.400, 0.550] and D as C^0.600 [0.500, 0.700] by Approach 2" in text_of(law())
    assert "C^0.200 [0.100, 0.300] and D as C^0.800 [0.700, 0.900]" in text_of(law(answers={"approach": 3}))
    assert "C^0.500 and D as C^0.600 by Approach 2, without" in text_of(law(approach2={"a": 0.5, "b": 0.6}))
    assert "no law of N and D" in text_of({"single": {"of": "D"}, "meta": law()["meta"]})


def test_runs():
    """Finished runs are counted in the law's conventions; failed ones are counted too."""
    failed = replace(ROW, run="c", status="failed", loss=None, params=10**9)
    rows = [ROW, replace(ROW, run="b", params=9_000, tokens=10_000, flops=6e8), failed]
    said = text_of(rows=rows)
    assert "2 runs (1 more failed) of 2 sizes: 2k to 9k parameters, 10k to 30k tokens, 4e8 to 6e8 FLOPs" in said
    assert "These runs gave no law" in said and "cccccccccc-dirty" in text_of(law())
    assert "No run was finished (1 more failed)" in text_of(rows=[failed])
