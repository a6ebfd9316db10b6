"""Checks as one list: terminal, laws.json and report show each of them."""

from conftest import QUICK
from conftest import read_laws as read

from nanochin.laws import NotIdentified
from nanochin.report import checks
from nanochin.report.checks import CHECKS, Check
from nanochin.report.findings import CheckResult, Table


def doubtful(analysis) -> CheckResult:
    """A doubt with a number and a table."""
    largest = float(analysis.N.max())
    rows = [["smallest", "10^3"], [("largest", "1 – 2"), NotIdentified("as the test says")]]
    table = Table("Sizes <made up>", ("N", "C"), rows)
    return CheckResult("doubt", f"The largest run has {largest:g} parameters.", {"largest": largest}, (table,))


def impossible(analysis) -> CheckResult:
    raise NotIdentified("the stars: they are too far")


def test_a_check_is_one_function_and_one_line(run, made_up, tmp_path, monkeypatch):
    """Its sentence with its mark, its JSON and its table appear everywhere. Checks that cannot be run are no doubts;
    those without a title are not counted."""
    added = Check("size", doubtful), Check("stars", impossible, "The stars"), Check("untitled", impossible)
    needed = tuple(check for check in CHECKS if check.name in ("cost", "hold_out"))
    monkeypatch.setattr(checks, "CHECKS", needed + added)
    out = run(made_up, *QUICK, "--out", tmp_path, checks=False)
    found, page = read(tmp_path)["checks"], (tmp_path / "report.html").read_text()
    said = f"The largest run has {found['size']['largest']:g} parameters."
    sorry = "The stars could not be checked: they are too far."
    assert found["outcomes"][-3:-1] == [["size", "doubt", said], ["stars", "not checked", sorry]]
    assert found["stars"] == {"reason": "the stars: they are too far"}
    assert f"\n! {said}\n" in out and f'<li class="doubt">{said}</li>' in page
    assert f"\n? {sorry}\n" in out and f'<li class="not-checked">{sorry}</li>' in page
    assert "raise 1 doubt. 1 could not be run." in page
    assert "Sizes &lt;made up&gt;" in page and "<td>10<sup>3</sup></td>" in page
    assert '<td>largest <span class="ci">1 – 2</span></td><td><em>as the test says</em></td>' in page
