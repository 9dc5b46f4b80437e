import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_h.errors import DataError, RequestError
from nemotron_h.text.stream import StopStrings, TextStream
from nemotron_h.text.tokenizer import Tokenizer

TRICKY = "👩‍👩‍👧🙂 e\u0301 ï 你好 \ufffd \u200d\x00\n  x"


def streamed(stream: TextStream | StopStrings, parts: list) -> list[str]:
    return [*(stream.push(part) for part in parts), stream.finish()]


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 2**32), visible=st.booleans())
def test_pieces_join_to_the_whole_for_any_ids(tokenizer: Tokenizer, seed: int, visible: bool) -> None:
    draw = random.Random(seed)
    last = draw.choice([18, 272, tokenizer.vocab_size])  # control tokens; bytes, mostly broken UTF-8; everything
    ids = [draw.randrange(last) for _ in range(draw.randrange(40))]
    pieces = streamed(TextStream(tokenizer, special_visible=visible), ids)
    assert "".join(pieces) == tokenizer.decode(ids, special_visible=visible)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=TRICKY) | st.text())
def test_no_piece_cuts_a_character_and_nothing_certain_is_held(tokenizer: Tokenizer, text: str) -> None:
    """After each byte, exactly the characters that are whole by then are out."""
    byte_id = {tokenizer.token_bytes(i): i for i in range(16, 272)}
    content, stream, out = text.encode(), TextStream(tokenizer), ""
    for end in range(1, len(content) + 1):
        out += stream.push(byte_id[content[end - 1 : end]])
        assert out == content[:end].decode(errors="ignore")
    assert out + stream.finish() == text


def test_leading_space_stays(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" self self")
    assert streamed(TextStream(tokenizer), ids) == [" self", " self", ""]


def test_a_control_token_inside_a_character_changes_nothing(tokenizer: Tokenizer) -> None:
    byte_id = {tokenizer.token_bytes(i): i for i in range(16, 272)}
    ids = [byte_id[b"\xc3"], 2, byte_id[b"\xa9"]]
    assert streamed(TextStream(tokenizer), ids) == ["", "", "é", ""]
    assert streamed(TextStream(tokenizer, special_visible=True), ids) == ["", "\ufffd</s>", "\ufffd", ""]


def test_an_id_without_a_token_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="got 700"):
        TextStream(tokenizer).push(700)


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None, int]:
    """By definition: the shortest beginning of text that ends with a stop string, without the longest such string."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest, end
    return text, None, len(text)


@settings(max_examples=600)
@given(
    text=st.text(alphabet="ab\n", max_size=40),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=6), max_size=4),
    cuts=st.lists(st.integers(0, 40), max_size=12),
)
def test_stop_strings_equal_the_definition_at_any_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stream = StopStrings(stops)
    pieces = streamed(stream, [text[a:b] for a, b in pairwise(borders)])
    wanted, found, _ = first_stop(text, stops)
    assert "".join(pieces) == wanted
    assert stream.found == found


@settings(max_examples=300)
@given(
    text=st.text(alphabet="ab", max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=7), min_size=1, max_size=3),
)
def test_held_is_exactly_what_may_begin_a_stop_string(text: str, stops: list[str]) -> None:
    stream, out = StopStrings(stops), ""
    _, _, end = first_stop(text, stops)
    for position, character in enumerate(text[: max(end - 1, 0)], start=1):
        out += stream.push(character)
        suffixes = (text[start:position] for start in range(position))
        held = next((s for s in suffixes if any(stop.startswith(s) for stop in stops)), "")
        assert out + held == text[:position]


@pytest.mark.parametrize("stop", ["\n\n", "Grüße", " self", "🙂"])
def test_one_stop_string_is_plain_find(tokenizer: Tokenizer, documents: list[str], stop: str) -> None:
    """Across token borders: the text before the first occurrence, in whole texts of both kinds."""
    for document in (documents[0], documents[-1]):
        text, stops = TextStream(tokenizer), StopStrings([stop])
        out = "".join(stops.push(text.push(token)) for token in tokenizer.encode(document))
        out += stops.push(text.finish()) + stops.finish()
        assert out == document.partition(stop)[0]
        assert stops.found == (stop if stop in document else None)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="stop: must not hold an empty string"):
        StopStrings(["a", ""])
