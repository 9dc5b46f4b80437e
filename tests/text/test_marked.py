from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_h.text.marked import MAX_CHARACTERS, WRITTEN, MarkedText, TooLongError

LETTERS = st.text(alphabet="ab \n\tßİǆ🙂", max_size=12)


@st.composite
def marked(draw: st.DrawFn) -> MarkedText:
    """Texts whose marks tell each character's place, so that a mark that went astray is seen."""
    text = draw(LETTERS)
    return MarkedText(text, bytes(range(1, len(text) + 1)))


def pieces(result: Any) -> list[str]:
    return list(result) if isinstance(result, list | tuple) else [result]


def places(result: Any) -> list[tuple[str, int]]:
    """Each character of a result with its mark."""
    texts = [MarkedText(piece) for piece in pieces(result)]
    return [pair for text in texts for pair in zip(str.__str__(text), text.marks, strict=True)]


SELECTIONS = [
    lambda text, other, n: text.strip(),
    lambda text, other, n: text.lstrip(other or None),
    lambda text, other, n: text.rstrip(other or None),
    lambda text, other, n: text.strip("a "),
    lambda text, other, n: text.removeprefix(other[:1]),
    lambda text, other, n: text.removesuffix(other[:1]),
    lambda text, other, n: text[n:],
    lambda text, other, n: text[:n],
    lambda text, other, n: text[::-1],
    lambda text, other, n: text[n % len(text)] if text else "",
    lambda text, other, n: text.split(None, n),
    lambda text, other, n: text.split(other[:1] or "a", n),
    lambda text, other, n: text.split("ab"),
    lambda text, other, n: text.rsplit(None, n),
    lambda text, other, n: text.rsplit(other[:1] or "b", n),
    lambda text, other, n: text.splitlines(),
    lambda text, other, n: text.splitlines(True),
    lambda text, other, n: text.partition(other[:1] or "a"),
    lambda text, other, n: text.rpartition(other[:1] or "a"),
    lambda text, other, n: text.replace(other[:1], "", n),
]
OPERATIONS = [
    *SELECTIONS,
    lambda text, other, n: text.replace("a", other, n),
    lambda text, other, n: text.upper(),
    lambda text, other, n: text.lower(),
    lambda text, other, n: text.title(),
    lambda text, other, n: text.capitalize(),
]


@pytest.mark.parametrize("operation", OPERATIONS)
@given(text=marked(), other=LETTERS, n=st.integers(-1, 6))
def test_operations_equal_strs_and_no_mark_goes_astray(operation: Any, text: MarkedText, other: str, n: int) -> None:
    got = operation(text, other, n)
    assert got == operation(str.__str__(text), other, n)
    for letter, mark in places(got):
        assert mark == 0 or text[mark - 1] in (letter, letter.lower(), letter.upper())


@pytest.mark.parametrize("operation", SELECTIONS)
@given(letters=st.permutations("abcde \n\t"), other=st.sampled_from("abcde "), n=st.integers(-1, 6))
def test_selected_characters_keep_their_marks(operation: Any, letters: list[str], other: str, n: int) -> None:
    """Where each character occurs once, its mark is known: none is lost."""
    text = MarkedText("".join(letters), bytes(range(1, len(letters) + 1)))
    assert places(operation(text, other, n)) == [
        (letter, letters.index(letter) + 1) for piece in pieces(operation(text, other, n)) for letter in str(piece)
    ]


@given(parts=st.lists(marked() | LETTERS, max_size=4), separator=marked())
def test_join(parts: list[str], separator: MarkedText) -> None:
    got = separator.join(parts)
    assert got == str.__str__(separator).join(parts)
    assert got.marks == separator.marks.join(MarkedText(part).marks for part in parts)


def test_join_takes_text_alone_as_str_does() -> None:
    with pytest.raises(TypeError, match="must join text; got list"):
        MarkedText("-").join(["a", [1]])


def test_text_of_a_plain_str_is_unmarked_and_printing_keeps_marks() -> None:
    assert MarkedText("ab").marks == b"\0\0"
    text = MarkedText("ab").with_mark(WRITTEN)
    assert str(text) is text
    assert MarkedText("ß").with_mark(WRITTEN).upper().marks == b"\0\0"  # which S was it? neither
    assert MarkedText("ab").with_mark(WRITTEN).upper().marks == b"\1\1"


@pytest.mark.parametrize(
    "operation",
    [
        lambda text: text.join(["x"] * 5),
        lambda text: text.replace("a", "aaa"),
        lambda text: text.replace("", "a"),
    ],
)
def test_no_text_beyond_the_bound(operation: Any) -> None:
    with pytest.raises(TooLongError, match="more than 16777216"):
        operation(MarkedText("a" * (MAX_CHARACTERS // 2 + 1)))
