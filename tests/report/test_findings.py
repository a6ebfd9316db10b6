"""Words of the findings."""

from nanochin.report.findings import plus


def test_a_term_of_0_is_left_out():
    """Of a formula; others have four digits."""
    assert [plus(1.81722), plus(0.0)] == ["1.817 + ", ""]
