"""Messages of a conversation, checked and copied before a template reads them.

A message has a role and a content, text or a list of parts, as in OpenAI's interface and transformers; other keys
(reasoning_content, tool_calls, tool_call_id...) are the template's business. Keys whose value is None are left out, and
reasoning is found under each name it goes by, both as in transformers.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nemotron_h.config.keys import shown
from nemotron_h.errors import DataError, RequestError
from nemotron_h.text.tokenizer import utf8

REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
MAX_DEPTH = 64  # of lists and objects in each other


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy of messages that holds JSON and nothing else. Raises: RequestError, naming the field."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(f"messages: must be a list of at least one message; got {_shown(messages)}")
    return [_checked_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def checked_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy of tools that holds JSON and nothing else. Raises: RequestError, naming the field."""
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError(f"tools: must be a list of objects; got {_shown(tools)}")
    return [checked_json(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def checked_json(value: object, where: str, depth: int = 0) -> Any:
    """A copy of value, which must be JSON and Unicode. where: named in errors."""
    if depth > MAX_DEPTH:
        raise RequestError(f"{where}: must not nest more than {MAX_DEPTH} deep")
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        try:
            utf8(value)
        except DataError as error:
            raise RequestError(f"{where}: {str(error).removeprefix('text: ')}") from None
        return str.__str__(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RequestError(f"{where}: must have names of text; got {_shown(key)}")
        return {
            checked_json(key, where): checked_json(item, f"{where}.{shown(key)}", depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [checked_json(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise RequestError(f"{where}: must be JSON; got {_shown(value)}")


def _checked_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where}: must be an object with role and content; got {_shown(message)}")
    checked = {key: item for key, item in checked_json(message, where).items() if item is not None}
    if not isinstance(checked.get("role"), str):
        raise RequestError(f"{where}.role: must be text; got {_shown(checked.get('role'))}")
    content = checked.get("content", "")
    if not isinstance(content, str) and not (
        isinstance(content, list) and all(isinstance(part, dict) for part in content)
    ):
        raise RequestError(f"{where}.content: must be text or a list of parts; got {_shown(content)}")
    for name in REASONING_NAMES:
        if not isinstance(checked.get(name, ""), str):
            raise RequestError(f"{where}.{name}: must be text; got {_shown(checked[name])}")
    reasoning = next((checked[name] for name in REASONING_NAMES if name in checked), None)
    if reasoning is not None:
        checked = {"thinking": reasoning, **checked, "reasoning_content": reasoning}
    if "tool_calls" in checked:
        checked["tool_calls"] = _checked_calls(checked["tool_calls"], f"{where}.tool_calls")
    return checked


def _checked_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Calls whose arguments are objects: OpenAI's interface sends them as JSON text, templates read their keys."""
    if not isinstance(calls, list):
        raise RequestError(f"{where}: must be a list of calls; got {_shown(calls)}")
    for index, call in enumerate(calls):
        name = f"{where}[{index}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"{name}: must be a function with a name and arguments; got {_shown(call)}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = checked_json(json.loads(arguments), f"{name}.function.arguments")
            except (ValueError, RecursionError):
                arguments = function["arguments"]
        if not isinstance(arguments, dict):
            raise RequestError(f"{name}.function.arguments: must be a JSON object; got {_shown(arguments)}")
        function["arguments"] = arguments
    return calls


def _shown(value: object) -> str:
    return f"{value!r:.60}"
