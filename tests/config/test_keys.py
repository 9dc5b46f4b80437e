"""Values by name and kind, and what an error shows of them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nemotron_h.config.keys import Keys, as_number, read_object, short, shown
from nemotron_h.errors import CheckpointError, ConfigError


def test_what_nobody_asked_for_is_known() -> None:
    keys = Keys({"a": 1, "b": None, "c": 2.5, "d": True})
    assert (keys.integer("a"), keys.integer("b", 7), keys.number("c"), keys.boolean("d", default=False)) == (
        1,
        7,
        2.5,
        True,
    )
    assert keys.asked == {"a", "b", "c", "d"}
    assert "a" in keys
    assert "b" not in keys  # a null counts as absent
    with pytest.raises(ConfigError, match=r"^b: must be given; got nothing$"):
        keys.integer("b")


@pytest.mark.parametrize(("value", "ids"), [(3, (3,)), ([3, 4], (3, 4)), ([], ()), (None, ())])
def test_one_integer_or_many(value: Any, ids: tuple[int, ...]) -> None:
    assert Keys({"x": value}).integers("x") == ids


@pytest.mark.parametrize("value", [1.0, "1", True, [[1]], 2**31, -(2**31) - 1])
def test_no_integer_of_32_bits(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^x: must be an integer"):
        Keys({"x": value}).integers("x")


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (1, 1.0),
        (-2.5, -2.5),
        (10**400, math.inf),
        (-(10**400), -math.inf),
        ({"__float__": "Infinity"}, math.inf),
        ({"__float__": "-Infinity"}, -math.inf),
        ({"__float__": "NaN"}, None),
        ({"__float__": ["Infinity"]}, None),
        (True, None),
        ("1", None),
        ([1], None),
    ],
)
def test_numbers(value: Any, number: float | None) -> None:
    assert as_number(value) == number


def test_an_error_shows_little_and_soon() -> None:
    assert short("a") == "'a'"
    assert shown("a.b") == "a.b"
    assert shown("a\nb") == r"'a\nb'"
    for value in ("x" * 10**6, "\x1b[31m", "\ud800", ["y" * 999] * 999, {"z": {"z": {"z": {"z": {}}}}}, 10**400):
        assert short(value).isprintable()
        assert len(short(value)) <= 200
    endless: list[Any] = []
    for _ in range(100):
        endless = [endless] * 10  # 10^100 lists, if anyone wrote them out
    assert len(short(endless)) <= 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1]", "must hold a JSON object; got list"),
        (b"\xff", "must be JSON; got 'utf-8'"),
        (b"[" * 99_999, "must be JSON"),
    ],
)
def test_damage_names_the_file(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_object(path)
    assert str(caught.value).startswith(f"{path}: {words}")


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"a": [1, None]}))
    assert read_object(tmp_path / "x.json") == {"a": [1, None]}
    with pytest.raises(CheckpointError, match=r"y\.json: must exist; found no such file; copy it$"):
        read_object(tmp_path / "y.json", hint="copy it")
