"""A table of plain values in the terminal."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from nemotron_h.errors import DataError


def table(rows: Iterable[Sequence[object]], columns: Sequence[str], *, title: str | None = None) -> Table:
    """Draw rows under their columns.

    Columns of numbers stand to the right. Integers get thousands' commas, floats four significant digits, None a dash;
    everything else is shown as str says, brackets included.
    """
    kept = [list(row) for row in rows]
    for index, row in enumerate(kept):
        if len(row) != len(columns):
            raise DataError(f"rows[{index}]: must have a value for each of {len(columns)} columns; got {len(row)}")
    drawn = Table(box=box.SIMPLE_HEAD, title=None if title is None else Text(title), title_justify="left")
    for name, values in zip(columns, zip(*kept, strict=True) if kept else [()] * len(columns), strict=True):
        numeric = all(value is None or _is_number(value) for value in values)
        drawn.add_column(Text(name), justify="right" if numeric and kept else "left", overflow="fold")
    for row in kept:
        drawn.add_row(*(Text(format_cell(value)) for value in row))
    return drawn


def format_cell(value: object) -> str:
    """One value as a table shows it."""
    if value is None:
        return "-"
    if _is_number(value):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
