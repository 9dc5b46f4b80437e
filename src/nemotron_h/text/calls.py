"""Tool calls as the family writes them, read from a whole block.

    Nano v2       <TOOLCALL>[{"name": "add", "arguments": {"a": 1}}, ...]</TOOLCALL>
    Nemotron 3    <tool_call>\\n<function=add>\\n<parameter=a>\\n1\\n</parameter>\\n</function>\\n</tool_call>

The second has no types. A value takes the type that the tool's JSON schema asks for, where it can be read as that type;
otherwise it stays text: `007` and `true` may be meant as they stand, and nothing is guessed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CLOSERS = {"<TOOLCALL>": "</TOOLCALL>", "<tool_call>": "</tool_call>"}
HEADS = {"<TOOLCALL>": "[", "<tool_call>": "<function="}  # what a block begins with, after blanks

FUNCTION = re.compile(r"\s*<function=([^>\n]+)>")
# A value may hold `</parameter>`: its end is the one that another parameter, or the function's end, follows.
PARAMETER = re.compile(
    r"\s*<parameter=([^>\n]+)>(.*?)</parameter>(?=\s*(?:<parameter=[^>\n]+>|</function>))", re.DOTALL
)
FUNCTION_END = re.compile(r"\s*</function>\s*")

JSON_TYPES: dict[str, type | tuple[type, ...]] = {
    **{"array": list, "boolean": bool, "integer": int, "null": type(None), "object": dict},
    "number": (int, float),
}
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}  # as jinja2 prints them in earlier turns


@dataclass(frozen=True)
class ToolCall:
    """A function the model asks for."""

    name: str
    arguments: dict[str, Any]


class FaultyCallError(Exception):
    """A block that is no call, and why."""


def opened_only(block: str) -> bool:
    """Whether the closer that block ends with may stand inside one of its values, so that more is to come."""
    inner = block[: block.rindex("</")]
    if block.startswith("<tool_call>"):
        _, _, rest = _walk(inner.removeprefix("<tool_call>"))
        return rest.lstrip().startswith("<parameter=") and not rest.rstrip().endswith("</function>")
    try:
        json.loads(inner.removeprefix("<TOOLCALL>"))
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except RecursionError:
        pass
    return False


def read_calls(block: str, tools: Sequence[Mapping[str, Any]]) -> tuple[ToolCall, ...]:
    """The calls of a block, its markers included. tools: their JSON schemas, as a template takes them.

    Raises: FaultyCallError.
    """
    opener = next(opener for opener in CLOSERS if block.startswith(opener))
    inner = block.removeprefix(opener).removesuffix(CLOSERS[opener])
    return _read_json(inner) if opener == "<TOOLCALL>" else (_read_tags(inner, tools),)


def _read_json(inner: str) -> tuple[ToolCall, ...]:
    entries = _loads(inner)
    if not isinstance(entries, list):
        raise FaultyCallError("must be a list of calls")
    return tuple(_read_entry(entry) for entry in entries)


def _read_entry(entry: object) -> ToolCall:
    name = entry.get("name") if isinstance(entry, dict) else None
    arguments = entry.get("arguments", {}) if isinstance(entry, dict) else None
    if isinstance(arguments, str):
        arguments = _loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise FaultyCallError("must have a name and an object of arguments in each call")
    return ToolCall(name, arguments)


def _read_tags(inner: str, tools: Sequence[Mapping[str, Any]]) -> ToolCall:
    name, pairs, rest = _walk(inner)
    schemas = _parameters(name, tools)
    arguments: dict[str, Any] = {}
    for key, value in pairs:
        if key in arguments:
            raise FaultyCallError(f"must give each parameter once; got {key} twice")
        arguments[key] = _typed(value, schemas.get(key))
    if not name or not FUNCTION_END.fullmatch(rest):
        raise FaultyCallError("must hold <function=NAME>, <parameter=KEY>...</parameter> and </function>")
    return ToolCall(name, arguments)


def _walk(inner: str) -> tuple[str, list[tuple[str, str]], str]:
    """A function's name, its parameters as far as they are whole, and what follows them."""
    function = FUNCTION.match(inner)
    if function is None:
        return "", [], inner
    pairs, end = [], function.end()
    while parameter := PARAMETER.match(inner, end):
        pairs.append((parameter[1], parameter[2].removeprefix("\n").removesuffix("\n")))
        end = parameter.end()
    return function[1], pairs, inner[end:]


def _parameters(name: str, tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The schemas of a function's parameters, by their names."""
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and function.get("name") == name:
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
            return properties if isinstance(properties, Mapping) else {}
    return {}


def _typed(text: str, schema: object) -> Any:
    """The value that text stands for under schema; text itself where a string is allowed, or where nothing fits."""
    types = _types(schema)
    if not types or "string" in types:
        return text
    try:
        value = _loads(PYTHON_WORDS.get(text, text))
    except FaultyCallError:
        return text
    fits = [name for name in types if name in JSON_TYPES and isinstance(value, JSON_TYPES[name])]
    if isinstance(value, bool) and "boolean" not in fits:  # a bool is an int in Python, not in JSON
        return text
    return value if fits else text


def _types(schema: object) -> set[str]:
    """The JSON types a schema allows, as far as it says so itself."""
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type")
    types = {name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)}
    choices = schema.get("anyOf", schema.get("oneOf"))
    for choice in choices if isinstance(choices, list) else []:
        types |= _types(choice) or {"string"}
    return types


def _loads(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        # whoever sends the arguments on must be able to: 1e999 and a lone surrogate can be read but not written
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise FaultyCallError(f"must be JSON; got {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which JSON does not have")
