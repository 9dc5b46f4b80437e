import json
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_h.errors import UnsupportedError
from nemotron_h.text.control import ControlTokens
from nemotron_h.text.marked import WRITTEN, MarkedText
from nemotron_h.text.tokenizer import Tokenizer

NAMES = ["<a>", "<a><b>", "<b>", "<a>b", "aa", "a", "\n\n", "<SPECIAL_3"]


def added(tokenizer: Tokenizer, names: list[str], **options: Any) -> Tokenizer:
    """The tokenizer with more control tokens."""
    data = json.loads(tokenizer._source)
    for name in names:
        entry = {**data["added_tokens"][0], "id": tokenizer.vocab_size + names.index(name), "content": name, **options}
        data["added_tokens"].append(entry)
    return Tokenizer(json.dumps(data).encode())


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.sampled_from([*NAMES, "<", ">", "b", " ", "<s>", "</s>", "_", "1>"]), max_size=12).map("".join))
def test_where_all_is_written_the_library_finds_the_same(tokenizer: Tokenizer, text: str) -> None:
    """Overlapping names, some of them looked for late, as `normalized` says."""
    names = NAMES[:5]
    ours = added(added(tokenizer, names), NAMES[6:], normalized=True)
    library = tokenizers.Tokenizer.from_str(ours._source.decode())
    parts = ControlTokens(ours).split(MarkedText(text).with_mark(WRITTEN))
    ids = [i for part, control in parts for i in (ours.encode(part) if control is None else [control])]
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert "".join(part for part, _ in parts) == text
    assert all(parts)


@settings(max_examples=300, deadline=None)
@given(
    halves=st.lists(
        st.tuples(st.sampled_from(["<s>", "</s>", "<SPECIAL_11>", "<", "s", ">"]), st.booleans()), max_size=9
    ),
    cut=st.integers(0, 30),
)
def test_a_name_counts_only_where_every_character_is_written(
    tokenizer: Tokenizer, halves: list[tuple[str, bool]], cut: int
) -> None:
    text = MarkedText().join(MarkedText(half).with_mark(WRITTEN * written) for half, written in halves)
    text = text[:cut] + MarkedText(text[cut:]) if cut % 2 else text
    text = text if isinstance(text, MarkedText) else MarkedText(text)
    place = 0
    for part, control in ControlTokens(tokenizer).split(text):
        if control is not None:
            assert set(part.marks) == {WRITTEN}
            assert tokenizer.token_id(part) == control
        else:
            for run in part.marks.split(b"\0"):
                start = part.marks.find(run)
                assert not any(name in part[start : start + len(run)] for name in tokenizer.control_options if run)
        place += len(part)
    assert place == len(text)


@pytest.mark.parametrize("option", ["lstrip", "rstrip", "single_word"])
def test_options_that_reach_into_the_text_are_refused_when_met(tokenizer: Tokenizer, option: str) -> None:
    control = ControlTokens(added(tokenizer, ["<a>"], **{option: True}))
    assert control.split(MarkedText("<a>")) == [("<a>", None)]
    with pytest.raises(UnsupportedError, match=rf"tokenizer\.json: {option} must be off .* '<a>'; got true"):
        control.split(MarkedText("<a>").with_mark(WRITTEN))


def test_no_control_tokens_at_all(tokenizer: Tokenizer) -> None:
    data = json.loads(tokenizer._source)
    data["added_tokens"] = []
    text = MarkedText("<s>").with_mark(WRITTEN)
    assert ControlTokens(Tokenizer(json.dumps(data).encode())).split(text) == [("<s>", None)]
