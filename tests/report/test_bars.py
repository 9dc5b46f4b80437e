"""Bars say what is larger, and by how much."""

from pathlib import Path

import pytest

from nemotron_h.errors import RequestError
from nemotron_h.report.bars import Group, bar, bars, check_picture, number, save_bars

GROUPS = [
    Group("reading, tokens/s", {"nemotron-h": 1000.0, "other [1]": 250.0}, roof=2000.0),
    Group("writing, tokens/s", {"nemotron-h": 10.0}),
]


def test_the_largest_of_a_group_fills_the_line() -> None:
    first, ours, theirs, empty, second, alone = bars(GROUPS, width=60).plain.splitlines()
    assert first == "reading, tokens/s  50% of what the machine allows"
    assert ours.split() == ["nemotron-h", "1,000", "█" * ours.count("█")]
    assert theirs.startswith("  other [1]     250  ")
    assert ours.count("█") == alone.count("█") > 30
    assert theirs.count("█") == ours.count("█") // 4
    assert max(map(len, (first, ours, theirs, alone))) <= 60
    assert (empty, second) == ("", "writing, tokens/s")


@pytest.mark.parametrize(("length", "drawn"), [(0, ""), (0.5, "▌"), (1, "█"), (2.25, "██▎"), (2.99, "███")])
def test_a_bar_has_eighths(length: float, drawn: str) -> None:
    assert bar(length) == drawn


@pytest.mark.parametrize(
    ("value", "written"), [(0.12345, "0.1235"), (12.345, "12.35"), (999.94, "999.9"), (12345.6, "12,346")]
)
def test_a_number_is_written_out(value: float, written: str) -> None:
    assert number(value) == written


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_is_written(tmp_path: Path, kind: str) -> None:
    save_bars(GROUPS, tmp_path / f"speed.{kind}", title="8b")
    written = (tmp_path / f"speed.{kind}").read_bytes()
    assert written.startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    assert len(written) > 5000


def test_a_format_that_nobody_writes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^plot: must be a file of one of .*png.*; got speed\.txt$"):
        check_picture(tmp_path / "speed.txt")
    with pytest.raises(RequestError, match=r"^plot: must lie in a folder that is there; got .*none/speed\.png$"):
        check_picture(tmp_path / "none" / "speed.png")
