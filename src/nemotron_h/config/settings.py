"""What every settings class is: a frozen value, strict about types, that refuses unknown fields in one line.

@settings
class Schedule:
    \"\"\"How the learning rate moves.\"\"\"
    warmup_steps: int
    decay: Annotated[Decay, Lenient] = Decay.COSINE
"""

import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from nemotron_h.errors import ConfigError

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", strict=True)
UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")  # pydantic's words for it
Lenient = Strict(False)  # for tuples, enums and paths, which TOML and JSON write as lists and strings


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make cls a frozen pydantic dataclass whose only error is ConfigError."""
    made = dataclass(frozen=True, kw_only=True, config=STRICT)(cls)
    validate = cast(Callable[..., None], made.__init__)

    def __init__(self: T, **values: Any) -> None:
        try:
            validate(self, **values)
        except ValidationError as error:
            raise ConfigError(one_line(error, list(made.__dataclass_fields__))) from None

    made.__init__ = __init__  # type: ignore[method-assign,assignment]
    return cast(type[T], made)


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build cls from plain values (a TOML table, a JSON object), nested settings too; where: the dotted name so far."""
    built = dict(values)
    for name, field in getattr(cls, "__dataclass_fields__", {}).items():
        if isinstance(built.get(name), Mapping) and hasattr(field.type, "__pydantic_validator__"):
            built[name] = from_mapping(field.type, built[name], f"{where}{name}.")
    try:
        return cls(**built)
    except ConfigError as error:
        raise ConfigError(where + str(error)) from None


def to_mapping(config: object) -> dict[str, Any]:
    """Plain values, as JSON has them. (`from_mapping` reads them back where no field is a choice of classes.)"""
    values: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return values


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting, by its dotted name, that differs between two mappings of plain values, with both values."""
    # through JSON: one side has been, and tuples come back as lists
    old, new = (flat(json.loads(json.dumps(values))) for values in (before, now))
    changed = sorted(key for key in set(old) | set(new) if key not in old or key not in new or old[key] != new[key])
    return (changed[0], old.get(changed[0]), new.get(changed[0])) if changed else None


def flat(values: Any, before: str = "") -> dict[str, Any]:
    """Nested tables, and lists of them, as dotted keys: `train.steps`, `model.layers.3.num_heads`."""
    if isinstance(values, Mapping):
        inner = list(values.items())
    elif isinstance(values, list) and values and all(isinstance(value, Mapping) for value in values):
        inner = list(enumerate(values))
    else:
        return {before: values}
    return {key: value for name, part in inner for key, value in flat(part, f"{before}.{name}".strip(".")).items()}


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean X?` where one is near, else the names there are."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def one_line(error: ValidationError, known: list[str]) -> str:
    """The first complaint of a pydantic error, in our grammar: *what: rule; got value; do this.*"""
    errors = error.errors(include_url=False)
    # an unknown name before a missing one: it may be the missing one, misspelt
    first = next((one for one in errors if one["type"] in UNKNOWN), errors[0])
    name = ".".join(str(part) for part in first["loc"])
    match first["type"]:
        case unknown if unknown in UNKNOWN:
            return f"{name}: unknown setting; {nearest(name, known)}"
        case "missing" | "missing_keyword_only_argument":
            return f"{name}: must be given; got nothing"
        case _:
            rule = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            return f"{name}: must be {rule}; got {first['input']!r}"
