import pytest

from nanochin.base.console import count


@pytest.mark.parametrize(
    "number, text",
    [(7_654_321, "7.65M"), (1.4321e15, "1430T"), (2.162e14, "216T"), (1e12, "1T"), (0.5, "0.5"), (5e19, "5e+19")],
)
def test_counts(number, text):
    """Three significant digits and a suffix, an exponent only if very large."""
    assert count(number) == text
