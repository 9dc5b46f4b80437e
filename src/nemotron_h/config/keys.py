"""The keys of one JSON object: each is asked for by name and kind, and what nobody asked for is known at the end.

Whole numbers fit in 32 bits, as sizes and token ids do, and files are small: a damaged or hostile one costs no memory.
"""

import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron_h.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.json"
MOST_BYTES = 2**24  # of a JSON file; the index of a 56B has 100 kB
INT32 = range(-(2**31), 2**31)
BRIEF = reprlib.Repr()  # goes no further into lists than it shows: one that holds itself ten times over may be endless
BRIEF.maxlevel = 3
BRIEF.maxstring = BRIEF.maxother = 100


class Keys:
    """The values of an object, by name and kind; a null counts as absent."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.asked: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.any(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{key}: must be an integer; got {short(value)}")
        if value not in INT32:
            raise ConfigError(f"{key}: must be an integer of 32 bits; got {short(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.any(key, default)
        number = as_number(value)
        if number is None:
            raise ConfigError(f"{key}: must be a number; got {short(value)}")
        return number

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self.any(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{key}: must be true or false; got {short(value)}")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """One integer or a list of them; absent: none."""
        if key not in self:
            return ()
        values = self.any(key)
        if not isinstance(values, list):
            return (self.integer(key),)
        return tuple(Keys({key: value}).integer(key) for value in values)

    def any(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{key}: must be given; got nothing")
        return value


def as_number(value: object) -> float | None:
    """A JSON number as a float, or None; transformers writes `{"__float__": "Infinity"}` for what JSON has not."""
    if isinstance(value, dict) and value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity"):
        return float(value["__float__"])
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf if value > 0 else -math.inf


def short(value: object) -> str:
    """A value as an error shows it: printable, on one line, not much longer than a line, and soon made."""
    text = BRIEF.repr(value)
    return f"{text if text.isprintable() else ascii(text)[1:-1]:.200}"


def shown(name: str) -> str:
    """A name from a file, or a library's words about one, as an error shows it."""
    return name if name.isprintable() and len(name) <= 200 else short(name)


def read_object(path: Path, *, hint: str = "is this a checkpoint folder?") -> dict[str, Any]:
    """The JSON object in a file. Raises: CheckpointError naming the file."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait
            raise CheckpointError(f"{path}: must be a file; got something else")
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise CheckpointError(f"{path}: must have at most {MOST_BYTES:,} bytes; got {size:,}")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: must exist; found no such file; {hint}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: must be a readable file; got {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are both ValueErrors
        raise CheckpointError(f"{path}: must be JSON; got {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object; got {type(values).__name__}")
    return values
