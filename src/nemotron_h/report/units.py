"""Numbers as people say them: three digits and a unit."""

from collections.abc import Sequence

BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
DECIMAL = ("", "k", "M", "B", "T")


def format_bytes(size_bytes: float) -> str:
    """1536 -> `1.50 KiB`; units of 1,024."""
    return " ".join(_scale(size_bytes, 1024, BINARY))


def format_count(count: float) -> str:
    """8100000000 -> `8.10B`; units of a thousand, B a thousand million, as in the names of models."""
    return "".join(_scale(count, 1000, DECIMAL))


def _scale(value: float, step: int, units: Sequence[str]) -> tuple[str, str]:
    """The number in the first unit where it has at most three digits before the point, and the unit."""
    if isinstance(value, int) and abs(value) < 1000:
        return str(value), units[0]
    scaled, index = float(value), 0
    # 999.5 would be written 1000
    while abs(scaled) >= 999.5 and index < len(units) - 1:
        scaled, index = scaled / step, index + 1
    return _three_digits(scaled), units[index]


def _three_digits(value: float) -> str:
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"
