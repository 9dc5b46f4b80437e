import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_h.report.units import BINARY, DECIMAL, format_bytes, format_count


@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (131_072, "131k"),
        (999_499, "999k"),
        (999_500, "1.00M"),
        (8_100_000_000, "8.10B"),
        (-5000, "-5.00k"),
        (0.3125, "0.31"),
        (12.34, "12.3"),
        (9.996, "10.0"),
    ],
)
def test_counts(count: float, wanted: str) -> None:
    assert format_count(count) == wanted


@pytest.mark.parametrize(
    ("size", "wanted"),
    [(0, "0 B"), (812, "812 B"), (1023, "1.00 KiB"), (1536, "1.50 KiB"), (97 * 2**20, "97.0 MiB"), (2**40, "1.00 TiB")],
)
def test_bytes(size: int, wanted: str) -> None:
    assert format_bytes(size) == wanted


@given(st.integers(-(10**14), 10**14))
def test_what_is_written_is_the_number_to_three_digits(value: int) -> None:
    """Read back, it is within half of the third digit; near the top of a unit, of the second after the point."""
    number, unit = format_bytes(value).split()
    assert float(number) * 1024 ** BINARY.index(unit) == pytest.approx(value, rel=0.0052)
    unit = format_count(value).lstrip("-0123456789.")
    number = format_count(value).removesuffix(unit)
    assert float(number) * 1000 ** DECIMAL.index(unit) == pytest.approx(value, rel=0.0051)
    assert abs(float(number)) < 1000
