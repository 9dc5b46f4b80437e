"""A small curve in the terminal, drawn with Braille dots: two across and four down in a character.

3.21 │⡇
     │⠱⣀⡀
1.85 │  ⠈⠑⠒⠤⠤⠤⠤
      0          400
"""

import math
from collections.abc import Sequence

from rich.text import Text

from nemotron_h.errors import ConfigError

BRAILLE = 0x2800
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # [row][column] of one character
SMALLEST_WIDTH, SMALLEST_HEIGHT = 40, 3


def curve(points: Sequence[tuple[float, float]], *, width: int = 72, height: int = 12) -> Text:
    """Draw values over steps, joined by straight lines in the order of the steps.

    points: (step, value). Values that are not finite cannot be drawn: they are counted under the curve.
    width, height: characters, labels and the line of steps included.
    """
    if width < SMALLEST_WIDTH or height < SMALLEST_HEIGHT:
        least = f"{SMALLEST_WIDTH} x {SMALLEST_HEIGHT}"
        raise ConfigError(f"curve: width and height must be at least {least}; got {width} x {height}")
    finite = sorted((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))
    lost = len(points) - len(finite)
    note = f"{lost} of {len(points)} points are not finite" if lost else ""
    if not finite:
        return Text(note or "no points")
    rows = height - 1 - bool(note)
    low, high = (choose(y for _, y in finite) for choose in (min, max))
    labels = [f"{high:.4g}", *[""] * (rows - 2), f"{low:.4g}"]
    if rows == 1 or low == high:
        labels = [*[""] * (rows // 2), f"{high:.4g}", *[""] * (rows - rows // 2 - 1)]
    gutter = max(len(label) for label in labels)
    columns = width - gutter - 2
    drawn = Text()
    for label, line in zip(labels, braille(dots(finite, 2 * columns, 4 * rows)), strict=True):
        drawn.append(f"{label:>{gutter}} │", style="dim").append(line.rstrip() + "\n", style="cyan")
    first, last = _step(finite[0][0]), _step(finite[-1][0])
    steps = first if first == last else f"{first}{last:>{columns - len(first)}}"
    drawn.append(" " * (gutter + 2) + steps, style="dim")
    return drawn.append(f"\n{note}", style="bold red") if note else drawn


def _step(x: float) -> str:
    return f"{x:.0f}" if abs(x) < 1e12 and x == int(x) else f"{x:g}"


def dots(points: Sequence[tuple[float, float]], columns: int, rows: int) -> list[list[bool]]:
    """The line through points, sorted by step, on a grid that it fills; row 0 is the top.

    A line that rises or falls within a column fills it, so no peak is lost however many points share a column.
    """
    grid = [[False] * columns for _ in range(rows)]
    left, right = points[0][0], points[-1][0]
    low, high = (choose(y for _, y in points) for choose in (min, max))

    def place(x: float, y: float) -> tuple[int, int]:
        column = (columns - 1) * ((x - left) / (right - left)) if right > left else 0
        row = (rows - 1) * ((high - y) / (high - low)) if high > low else rows // 2
        return round(column), round(row)

    column, row = place(*points[0])
    grid[row][column] = True
    for x, y in points[1:]:
        to_column, to_row = place(x, y)
        start, begin = row, column
        for column in range(begin, to_column + 1):
            share = (column - begin) / (to_column - begin) if to_column > begin else 1
            reached = round(start + share * (to_row - start))
            for filled in range(min(row, reached), max(row, reached) + 1):
                grid[filled][column] = True
            row = reached
    return grid


def braille(grid: Sequence[Sequence[bool]]) -> list[str]:
    """A grid of dots as lines of characters, four rows and two columns to each."""
    lines = []
    for top in range(0, len(grid), 4):
        codes = [BRAILLE] * (len(grid[0]) // 2)
        for dot_row, bits in zip(grid[top : top + 4], DOTS, strict=True):
            for column, lit in enumerate(dot_row):
                codes[column // 2] |= bits[column % 2] if lit else 0
        lines.append("".join(" " if code == BRAILLE else chr(code) for code in codes))
    return lines
