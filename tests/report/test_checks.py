"""Checks as one list: what a check says stands on the terminal, in laws.json and in the report."""

import json

from conftest import QUICK, unchecked
from conftest import read_laws as read

import fit
from nanochin.laws import NotIdentified
from nanochin.report import checks
from nanochin.report.checks import CHECKS, Check, CheckResult, Table


def made_up_check(analysis) -> CheckResult:
    """The largest run, which is a doubt."""
    largest = float(analysis.N.max())
    table = Table(
        "Sizes <made up>", ("N", "C"), [["smallest", "10^3"], [("largest", "1 – 2"), NotIdentified("as said")]]
    )
    return CheckResult("doubt", f"The largest run has {largest:g} parameters.", {"largest": largest}, (table,))


def impossible_check(analysis) -> CheckResult:
    raise NotIdentified("the stars: they are too far")


def test_a_check_is_added_by_one_line(run, made_up, tmp_path, monkeypatch):
    """Two functions, each named once: their sentences with their marks, their JSON and a table are everywhere."""
    added = Check("size", made_up_check), Check("stars", impossible_check, "The stars")
    monkeypatch.setattr(checks, "CHECKS", (*CHECKS, *added))
    out = run(made_up, *QUICK, "--out", tmp_path, checks=False)
    found, page = read(tmp_path)["checks"], (tmp_path / "report.html").read_text()
    large, far = found["outcomes"][-2:]
    said = f"The largest run has {found['size']['largest']:g} parameters."
    assert large == ["size", "doubt", said] and f"\n! {said}\n" in out and f'<li class="doubt">{said}</li>' in page
    sorry = "The stars could not be checked: they are too far."
    assert far == ["stars", "not checked", sorry] and f"\n? {sorry}\n" in out
    assert f'<li class="not-checked">{sorry}</li>' in page and found["stars"] == {
        "reason": "the stars: they are too far"
    }
    assert "Sizes &lt;made up&gt;" in page and "<td>10<sup>3</sup></td>" in page
    assert '<td>largest <span class="ci">1 – 2</span></td><td><em>as said</em></td>' in page


def test_what_could_not_be_checked_is_no_doubt(run, made_up, tmp_path, monkeypatch):
    """The head of the report counts doubts alone, and says how many checks could not be made."""
    three = Check("a", made_up_check), Check("b", impossible_check, "B"), Check("c", impossible_check)
    needed = [check for check in CHECKS if check.name in ("cost", "hold_out")]
    monkeypatch.setattr(checks, "CHECKS", (*needed, *three))
    run(made_up, *QUICK, "--out", tmp_path, checks=False)
    page = (tmp_path / "report.html").read_text()
    assert "The checks below raise 1 doubt. 1 could not be made." in page  # c has no title: another one's sentence does


def test_names_are_different_and_outcomes_are_known(made_up):
    """Each check has a name of its own, and a status of three, on an analysis with and without Approach 3."""
    from dataclasses import replace

    from nanochin.report.analysis import Settings, analyse
    from nanochin.report.table import read_rows

    assert len({check.name for check in CHECKS}) == len(CHECKS)
    analysis = analyse(read_rows(made_up), settings=Settings(bootstrap=0))
    without = replace(analysis, results=analysis.results | {3: NotIdentified("as the test says")})
    for some in (analysis, without):
        outcomes = unchecked(some)
        assert {one.status for one in outcomes.values()} <= set(fit.MARKS)
        assert json.dumps([one.json for one in outcomes.values()])
        assert all(one.sentence.endswith(".") for one in outcomes.values() if one.sentence)
