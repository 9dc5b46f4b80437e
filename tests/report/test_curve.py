import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_h.errors import ConfigError
from nemotron_h.report.curve import BRAILLE, braille, curve, dots

VALUES = st.floats(-1e300, 1e300)
POINTS = st.lists(st.tuples(st.integers(0, 1000), VALUES), min_size=1, max_size=30)


def lit(grid: list[list[bool]]) -> set[tuple[int, int]]:
    return {(column, row) for row, line in enumerate(grid) for column, on in enumerate(line) if on}


@settings(deadline=None)
@given(POINTS)
def test_every_point_is_lit_and_the_line_is_unbroken(points: list[tuple[float, float]]) -> None:
    points = sorted(points)
    grid = lit(dots(points, 20, 12))
    left, right = points[0][0], points[-1][0]
    low, high = min(y for _, y in points), max(y for _, y in points)
    for x, y in points:
        column = round(19 * (x - left) / (right - left)) if right > left else 0
        row = round(11 * ((high - y) / (high - low))) if high > low else 6
        assert (column, row) in grid
    columns = [sorted(row for c, row in grid if c == column) for column in range(20 if right > left else 1)]
    for rows in columns:
        assert rows == list(range(rows[0], rows[-1] + 1))
    for rows, following in pairwise(columns):
        assert rows[0] <= following[-1] + 1 and following[0] <= rows[-1] + 1


def test_a_straight_line_is_the_diagonal() -> None:
    for ends in ([(0, 5.0), (9, 0.0)], [(step, 5.0 - step / 9 * 5) for step in range(10)]):
        grid = dots(ends, 10, 10)
        assert {(i, i) for i in range(10)} <= lit(grid)
        assert all(abs(column - row) <= 1 for column, row in lit(grid))


def test_a_gentle_line_is_within_half_a_dot() -> None:
    grid = lit(dots([(0, 1.0), (1, 0.0)], 50, 5))
    assert {(column, round(4 * column / 49)) for column in range(50)} <= grid


def test_one_spike_among_many_points_is_drawn() -> None:
    points = [(step, 2.0) for step in range(10_000)]
    points[5003] = (5003, 9.0)
    grid = lit(dots(points, 50, 20))
    assert {row for column, row in grid if column == round(49 * 5003 / 9999)} == set(range(20))
    assert {row for column, row in grid if column < 20} == {19}


def test_dots_of_braille_are_where_unicode_says() -> None:
    """Dots 1-2-3-7 go down on the left, 4-5-6-8 on the right; dot n is bit n - 1 (The Unicode Standard, chapter 21)."""
    order = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (3, 1)]
    for bit, (row, column) in enumerate(order):
        grid = [[(row, column) == (r, c - 2) for c in range(4)] for r in range(4)]
        assert braille(grid) == [" " + chr(BRAILLE + (1 << bit))]


@settings(deadline=None)
@given(
    points=st.lists(st.tuples(st.integers(0, 10**9), VALUES | st.just(math.nan) | st.just(math.inf)), max_size=9),
    width=st.integers(40, 90),
    height=st.integers(3, 20),
)
def test_size_is_as_asked(points: list[tuple[float, float]], width: int, height: int) -> None:
    lines = curve(points, width=width, height=height).plain.splitlines()
    assert max(map(len, lines)) <= width
    lost = sum(not math.isfinite(y) for _, y in points)
    assert (f"{lost} of {len(points)} points are not finite" in lines) == (lost > 0)
    assert len(lines) == (height if lost < len(points) else 1)


def test_labels_name_the_ends() -> None:
    draw = random.Random(0)
    points = [(step, draw.uniform(2.1, 3)) for step in range(100, 400)] + [(400, 1.85), (99, 3.214)]
    lines = curve(points, width=60, height=8).plain.splitlines()
    assert lines[0].startswith("3.214 │") and lines[6].startswith(" 1.85 │")
    assert lines[7].split() == ["99", "400"] and len(lines[7]) == 60


@pytest.mark.parametrize(("width", "height"), [(39, 12), (72, 2)])
def test_too_small_is_refused(width: int, height: int) -> None:
    with pytest.raises(ConfigError, match=f"at least 40 x 3; got {width} x {height}"):
        curve([(0, 1.0)], width=width, height=height)
