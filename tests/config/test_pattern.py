import pytest

from nemotron_h.config.pattern import read_pattern
from nemotron_h.errors import ConfigError, UnsupportedError


@pytest.mark.parametrize("pattern", ["M", "*-*-", "M-M---MM*-"])
def test_known_letters_pass(pattern: str) -> None:
    assert read_pattern(pattern) == pattern


@pytest.mark.parametrize(
    ("pattern", "letter", "place"), [("M-x-", "x", 2), ("m", "m", 0), ("M- *", " ", 2), ("M|", "|", 1)]
)
def test_a_wrong_letter_is_named_with_its_place(pattern: str, letter: str, place: int) -> None:
    known = r"'M' Mamba-2, '\*' attention, '-' FFN"
    message = rf"^pattern: must be made of {known}; got '{'[|]' if letter == '|' else letter}' at layer {place}$"
    with pytest.raises(ConfigError, match=message):
        read_pattern(pattern)


def test_experts_are_refused_by_name() -> None:
    with pytest.raises(
        UnsupportedError,
        match=r"^pattern: mixture-of-experts models \(Nemotron 3 .*\) are not supported; got 'E' at layer 1$",
    ):
        read_pattern("MEM")


def test_an_empty_pattern_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^pattern: must hold at least one layer; got an empty string$"):
        read_pattern("")
