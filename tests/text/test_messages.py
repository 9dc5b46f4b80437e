import re

import pytest

from nemotron_h.errors import RequestError
from nemotron_h.text.messages import checked_json, checked_messages

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def test_a_copy_of_json_without_nones() -> None:
    message = {"role": "user", "content": "hi", "name": None, "parts": ({"a": [1, 1.5, True, None]},)}
    [checked] = checked_messages([message])
    assert checked == {"role": "user", "content": "hi", "parts": [{"a": [1, 1.5, True, None]}]}
    checked["parts"][0]["a"].append(2)
    assert message["parts"][0]["a"] == [1, 1.5, True, None]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_found_under_each_name(name: str) -> None:
    [checked] = checked_messages([{"role": "assistant", "content": "a", name: "b"}])
    assert (checked["reasoning_content"], checked["thinking"]) == ("b", "b")


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
def test_arguments_are_objects_though_sent_as_json_text(arguments: object) -> None:
    call = {**CALL, "function": {"name": "add", "arguments": arguments}}
    [checked] = checked_messages([{"role": "assistant", "tool_calls": [call]}])
    assert checked["tool_calls"] == [CALL]


def nested(depth: int) -> object:
    return [nested(depth - 1)] if depth else 1


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: must be a list of at least one message; got []"),
        ("hi", "messages: must be a list of at least one message; got 'hi'"),
        ([7], "messages[0]: must be an object with role and content; got 7"),
        ([{"content": "a"}], "messages[0].role: must be text; got None"),
        ([{"role": "user", "content": 5}], "messages[0].content: must be text or a list of parts; got 5"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content: must be text or a list of parts; got ['a']"),
        ([{"role": "user", "thinking": 5}], "messages[0].thinking: must be text; got 5"),
        ([{"role": "user", "content": "a\ud800"}], "messages[0].content: must be Unicode without lone surrogates"),
        ([{"role": "user", "x": {1: 2}}], "messages[0].x: must have names of text; got 1"),
        ([{"role": "user", "x": [object]}], "messages[0].x[0]: must be JSON; got <class 'object'>"),
        ([{"role": "user", "x": nested(99)}], "must not nest more than 64 deep"),
        ([{"role": "user", "tool_calls": {}}], "messages[0].tool_calls: must be a list of calls; got {}"),
        ([{"role": "user", "tool_calls": [{"function": "add"}]}], "tool_calls[0]: must be a function with a name"),
        (
            [{"role": "user", "tool_calls": [{"name": "add", "arguments": "{"}]}],
            "messages[0].tool_calls[0].function.arguments: must be a JSON object; got '{'",
        ),
        (
            [{"role": "user", "tool_calls": [{"name": "add", "arguments": "[1]"}]}],
            "messages[0].tool_calls[0].function.arguments: must be a JSON object; got [1]",
        ),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused_by_name(messages: object, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        checked_messages(messages)


def test_values_of_subclasses_become_plain() -> None:
    class Sly(str):
        __slots__ = ("marks",)

    assert type(checked_json(Sly("a"), "x")) is str
