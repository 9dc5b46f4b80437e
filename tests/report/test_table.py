import io

import pytest
from rich.console import Console

from nemotron_h.errors import DataError
from nemotron_h.report.table import table


def shown(drawn: object, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(drawn)
    return console.file.getvalue().splitlines()


def test_values_stand_under_their_columns() -> None:
    lines = shown(table([["first", 8_100_000_000, 0.123456, None], ["b", 7, 2.0, 3]], ["name", "count", "loss", "gap"]))
    cells = [line.split() for line in lines if line.strip()]
    assert cells[0] == ["name", "count", "loss", "gap"]
    assert cells[2:] == [["first", "8,100,000,000", "0.1235", "-"], ["b", "7", "2", "3"]]
    # numbers end where their column's name ends, words begin where it begins
    head, first, second = lines[1], lines[3], lines[4]
    for word, other in [("count", "8,100,000,000"), ("loss", "0.1235"), ("gap", "-")]:
        assert head.index(word) + len(word) == first.index(other) + len(other)
    assert head.index("name") == first.index("first") == second.index("b ")


def test_brackets_are_text_and_nothing_is_cut() -> None:
    word = "[red]x[/nonsense]"
    assert any(word in line for line in shown(table([[word]], ["[bold]name"], title="[t]")))
    folded = "".join(line.strip() for line in shown(table([["abcdefghij" * 5]], ["name"]), width=30))
    assert "abcdefghij" * 5 in folded


def test_no_rows_is_a_header() -> None:
    assert any(line.split() == ["a", "b"] for line in shown(table([], ["a", "b"])))


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(DataError, match=r"rows\[1\]: must have a value for each of 2 columns; got 1"):
        table([[1, 2], [3]], ["a", "b"])
