import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from nemotron_h.report.layers import layer_map

NAMES = {"M": "Mamba-2", "*": "attention", "-": "FFN"}


@given(pattern=st.text(alphabet="M*-", min_size=1, max_size=150), width=st.integers(24, 120))
def test_map_holds_every_layer_at_its_number(pattern: str, width: int) -> None:
    lines = layer_map(pattern, NAMES, width=width).plain.splitlines()
    assert max(map(len, lines)) <= width
    layers = {}
    for line in lines:
        if found := re.match(r" +(\d+)  ([M* -]+)$", line):
            layers |= dict(enumerate(found[2].replace(" ", ""), start=int(found[1])))
    assert [layers[index] for index in range(len(layers))] == list(pattern)


@given(pattern=st.text(alphabet="M*-", min_size=1, max_size=150))
def test_legend_counts_and_positions_are_right(pattern: str) -> None:
    plain = layer_map(pattern, NAMES, width=1000).plain
    counts = {letter: int(n) for letter, n in re.findall(r"([M*-]) (?:Mamba-2|attention|FFN) (\d+)", plain)}
    assert counts == {letter: pattern.count(letter) for letter in "M*-" if letter in pattern}
    listed = re.search(r"^\* at (.*)$", plain, re.MULTILINE)
    places = [int(place) for place in listed[1].split(", ")] if listed else []
    assert places == [index for index, letter in enumerate(pattern) if letter == "*"]


def test_as_it_looks() -> None:
    assert layer_map("M-M-M-M*-M-M-", NAMES, width=40).plain == (
        "   0  M-M-M-M*-M -M-\nM Mamba-2 6   * attention 1   - FFN 6\n* at 7"
    )


def test_a_letter_without_a_name_is_shown_and_counted() -> None:
    assert layer_map("MEE", NAMES).plain == "  0  MEE\nM Mamba-2 1   E 2"


@pytest.mark.parametrize("terminal", [True, False])
def test_colors_only_repeat_the_letters(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    drawn = layer_map("M-M*" * 13, NAMES)
    color = "standard" if terminal else None
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=color)
    console.print(drawn)
    written = console.file.getvalue()
    assert ("\x1b[" in written) == terminal
    assert re.sub(r"\x1b\[[0-9;]*m", "", written) == drawn.plain + "\n"
