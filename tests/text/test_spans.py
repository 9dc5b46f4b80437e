import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_h.text.calls import ToolCall
from nemotron_h.text.spans import Piece, SpanParser

JSON_CALL = '<TOOLCALL>[{"name": "add", "arguments": {"a": 1}}]</TOOLCALL>'
TAG_CALL = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
FRAGMENTS = [
    *("<think>", "</think>", "<TOOLCALL>", "</TOOLCALL>", "<tool_call>", "</tool_call>", "<function=f>", "</function>"),
    *(
        "<parameter=p>",
        "</parameter>",
        JSON_CALL,
        TAG_CALL,
        '[{"name": "f", "arguments": {}}]',
        '["',
        "\n",
        " ",
        "<",
        "a",
    ),
]
REPLIES = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


def parse(parts: list[str], *, thinking: bool = False, tools: tuple[dict, ...] = ()) -> list[Piece]:
    parser = SpanParser(thinking=thinking, tools=tools)
    return [piece for part in parts for piece in parser.push(part)] + parser.finish()


def merged(pieces: list[Piece]) -> list[Piece]:
    """Pieces that say no more than their text, joined with their neighbours of the same kind."""
    out: list[Piece] = []
    for piece in pieces:
        if out and out[-1].kind == piece.kind and not (piece.calls or piece.fault or out[-1].calls or out[-1].fault):
            out[-1] = Piece(piece.kind, out[-1].text + piece.text)
        else:
            out.append(piece)
    return out


def told(reply: str, *, thinking: bool = False) -> list[tuple[str, str]]:
    return [(piece.kind, piece.text) for piece in merged(parse([reply], thinking=thinking))]


@settings(max_examples=500, deadline=None)
@given(reply=REPLIES | st.text(), cuts=st.lists(st.integers(0, 400), max_size=12), thinking=st.booleans())
def test_nothing_is_lost_and_cuts_change_nothing(reply: str, cuts: list[int], thinking: bool) -> None:
    borders = [0, *sorted(min(cut, len(reply)) for cut in cuts), len(reply)]
    pieces = parse([reply[a:b] for a, b in pairwise(borders)], thinking=thinking)
    assert "".join(piece.text for piece in pieces) == reply
    assert all(piece.text for piece in pieces)
    whole = merged(parse([reply], thinking=thinking))
    assert merged(pieces) == whole
    assert merged(parse(list(reply), thinking=thinking)) == whole


@pytest.mark.parametrize(
    ("reply", "thinking", "wanted"),
    [
        ("plain\n", False, [("content", "plain\n")]),
        ("  indented", False, [("content", "  indented")]),
        ("hm\n</think>\n\nyes", True, [("reasoning", "hm"), ("marker", "\n</think>\n\n"), ("content", "yes")]),
        ("<think>\nhm</think>yes", False, [
            ("marker", "<think>\n"), ("reasoning", "hm"), ("marker", "</think>"), ("content", "yes"),
        ]),
        ("<think>\nhm</think>yes", True, [
            ("marker", "<think>\n"), ("reasoning", "hm"), ("marker", "</think>"), ("content", "yes"),
        ]),
        ("never closed", True, [("reasoning", "never closed")]),
        ("orphan</think>yes", False, [("content", "orphan"), ("marker", "</think>"), ("content", "yes")]),
        ("a</think>b</think>c", True, [("reasoning", "a"), ("marker", "</think>"), ("content", "b</think>c")]),
        (JSON_CALL + "<think>a", False, [("call", JSON_CALL), ("content", "<think>a")]),
        ("what is <think>?", False, [("content", "what is <think>?")]),
        ("in <think> thought</think>", True, [("reasoning", "in <think> thought"), ("marker", "</think>")]),
    ],
)  # fmt: skip
def test_thinking(reply: str, thinking: bool, wanted: list[tuple[str, str]]) -> None:
    assert told(reply, thinking=thinking) == wanted


@pytest.mark.parametrize("block", [JSON_CALL, TAG_CALL])
def test_a_call_after_content(block: str) -> None:
    pieces = merged(parse(["Let me see.\n\n" + block + "\n"]))
    assert [(piece.kind, piece.text) for piece in pieces] == [
        ("content", "Let me see."),
        ("marker", "\n\n"),
        ("call", block),
        ("marker", "\n"),
    ]
    assert pieces[2].calls == (ToolCall("add", {"a": 1 if block is JSON_CALL else "1"}),)


@pytest.mark.parametrize("block", [JSON_CALL, TAG_CALL])
def test_a_call_inside_thinking_counts_only_if_thinking_is_never_closed(block: str) -> None:
    forgot = merged(parse(["I will add.\n" + block], thinking=True))
    assert [piece.kind for piece in forgot] == ["reasoning", "marker", "call"]
    assert forgot[2].calls[0].name == "add"
    planned = merged(parse([f"I will say {block} now.</think>{block}"], thinking=True))
    assert [piece.kind for piece in planned] == ["reasoning", "marker", "call"]
    assert planned[0].text == f"I will say {block} now."


def test_thinking_that_mentions_a_call_streams_on() -> None:
    parser = SpanParser(thinking=True)
    pieces = parser.push("use <tool_call> tags") + parser.push(" or not")
    assert "".join(piece.text for piece in pieces) == "use <tool_call> tags or not"
    assert {(piece.kind, piece.fault) for piece in pieces} == {("reasoning", None)}


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        ('<TOOLCALL>[{"name": "f",]</TOOLCALL>', "must be JSON; got "),
        ('<TOOLCALL>[{"name": "f", "arguments": {"x": NaN}}]</TOOLCALL>', "NaN, which JSON does not have"),
        ('<TOOLCALL>[{"name": "f", "arguments": {"x": 1e999}}]</TOOLCALL>', "Out of range float"),
        ('<TOOLCALL>[{"name": "f", "arguments": {"x": "\\ud800"}}]</TOOLCALL>', "surrogates not allowed"),
        ('<TOOLCALL>[{"arguments": {}}]</TOOLCALL>', "must have a name"),
        ('<TOOLCALL>[{"name": "f", "arguments": 3}]</TOOLCALL>', "an object of arguments"),
        ('<TOOLCALL>[{"name": "f", "argum', "the reply ended inside it"),
        ('<tool_call>{"name": "f"}</tool_call>', "must begin with <function="),
        ("<tool_call>\n<function=f>\nx\n</function>\n</tool_call>", "must hold <function=NAME>"),
        ("<tool_call>\n<function=f>\n<parameter=a>\n1", "the reply ended inside it"),
        (TAG_CALL.replace("</function>", "<parameter=a>2</parameter></function>"), "got a twice"),
    ],
)
def test_a_malformed_call_is_content_with_its_fault(reply: str, fault: str) -> None:
    pieces = parse([reply])
    assert "".join(piece.text for piece in pieces) == reply
    assert {piece.kind for piece in pieces} == {"content"}
    [found] = [piece.fault for piece in pieces if piece.fault]
    assert fault in found


def test_a_good_call_after_a_bad_one_is_read() -> None:
    pieces = parse(["<tool_call>" + TAG_CALL + "\n<TOOLCALL>[}]</TOOLCALL>" + JSON_CALL])
    assert [piece.kind for piece in pieces if piece.kind != "marker"] == ["content", "call", "content", "call"]


def test_a_closer_inside_a_value_does_not_close() -> None:
    code = "print('</tool_call>')\n</parameter> is a tag\n</tool_call>"
    block = f"<tool_call>\n<function=write>\n<parameter=text>\n{code}\n</parameter>\n</function>\n</tool_call>"
    assert parse([block])[0].calls == (ToolCall("write", {"text": code}),)
    arguments = {"text": "ends with ]</TOOLCALL>"}
    block = f"<TOOLCALL>{json.dumps([{'name': 'write', 'arguments': arguments}])}</TOOLCALL>"
    assert parse([block])[0].calls == (ToolCall("write", arguments),)


@settings(max_examples=300, deadline=None)
@given(
    calls=st.lists(
        st.tuples(st.text(min_size=1), st.dictionaries(st.text(), st.text() | st.integers() | st.booleans())),
        max_size=3,
    )
)
def test_json_calls_are_what_json_says(calls: list[tuple[str, dict]]) -> None:
    entries = [{"name": name, "arguments": arguments} for name, arguments in calls]
    [piece] = parse([f"<TOOLCALL>{json.dumps(entries)}</TOOLCALL>"])
    assert [(call.name, call.arguments) for call in piece.calls] == calls


VALUES = st.text().filter(lambda text: "</parameter>" not in text)
NAMES = st.text(min_size=1).filter(lambda text: not set(text) & set(">\n"))


@settings(max_examples=300, deadline=None)
@given(name=NAMES, arguments=st.dictionaries(NAMES, VALUES, max_size=3))
def test_tag_calls_without_a_schema_are_the_text_itself(name: str, arguments: dict[str, str]) -> None:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    [piece] = parse([f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"])
    assert piece.calls == (ToolCall(name, arguments),)


@pytest.mark.parametrize(
    ("schema", "text", "wanted"),
    [
        (None, "007", "007"),
        ({}, "true", "true"),
        ({"type": "string"}, "1", "1"),
        ({"type": "integer"}, "1", 1),
        ({"type": "integer"}, "1.5", "1.5"),
        ({"type": "integer"}, "true", "true"),
        ({"type": "number"}, "1.5", 1.5),
        ({"type": "boolean"}, "True", True),
        ({"type": ["integer", "null"]}, "None", None),
        ({"type": ["string", "null"]}, "null", "null"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", None),
        ({"anyOf": [{"type": "integer"}, {"enum": ["all"]}]}, "3", "3"),
        ({"type": "array"}, '[1, "a"]', [1, "a"]),
        ({"type": "object"}, '{"a": 1}', {"a": 1}),
        ({"type": "object"}, "[1]", "[1]"),
        ({"type": 3, "anyOf": "x"}, "1", "1"),
    ],
)
def test_a_schema_types_the_values_of_tags(schema: object, text: str, wanted: object) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": schema}}}}
    [piece] = parse([TAG_CALL.replace("\n1\n", f"\n{text}\n")], tools=(tool,))
    [value] = piece.calls[0].arguments.values()
    assert (value, type(value)) == (wanted, type(wanted))
