"""Rendering a chat template: jinja2 in its sandbox, its work bounded, every character of the output marked.

What a template may say is checked before (`syntax.py`). While it runs, each step and each character that it makes is
counted, so that neither time nor memory grow beyond what a conversation of that length can need; the counts do not
depend on the machine, and one clock stands behind them. No list's text is longer than what was counted: whatever holds
a value several times is charged for each, so that comparing, sorting or printing a list is a step of bounded work.
"""

import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, NoReturn, TypeVar

from jinja2 import Environment, TemplateError, Undefined, meta, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import LoopControlExtension
from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.nodes import EvalContext
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS as JINJA_TESTS
from jinja2.utils import Namespace

from nemotron_h.text.marked import MAX_CHARACTERS, REPLY, WRITTEN, MarkedText, TooLongError
from nemotron_h.text.syntax import FILTERS, TESTS, GenerationBlock, RefusedError, Rewriter, check, words

MAX_SOURCE = 2**18  # characters of a template; published ones have some 20,000
MAX_STEPS = 1_000_000  # calls, look-ups, filters, tests and turns of loops in one rendering
MAX_SECONDS = 10.0  # where single steps are slow; the counts usually speak first
FREE_CHARACTERS = 1 << 22  # that any rendering may make in all, beside COPIES of its input
COPIES = 64  # each replace or strip of a message makes one of it
MAX_DEPTH = 100  # of lists in lists
MAX_BITS = 128  # of a whole number
MAX_POWER = 64
MAX_INDENT = 16
MAX_PATTERN = 100  # of strftime_now, in characters

ATTRIBUTES = {
    str: words(
        """
        capitalize count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle isupper
        join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split
        splitlines startswith strip title upper
        """
    ),
    dict: words("get items keys values"),
    LoopContext: words("cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0"),
}
GLOBALS = words("dict namespace raise_exception range strftime_now")

Value = TypeVar("Value")


class MessagesError(Exception):
    """The template does not take these messages: by its own words, or because it fails on them."""


class Program:
    """A template's source, compiled once; `reads` names the variables it takes."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise RefusedError(f"has {len(source):,} characters; at most {MAX_SOURCE:,}")
        environment = _Environment()
        try:
            tree = environment.parse(source)
            check(tree)
            # a tree of its own: looking for variables folds constants in place, unmarked
            self.reads = frozenset(meta.find_undeclared_variables(environment.parse(source))) - GLOBALS
            self._code = environment.compile(Rewriter().visit(tree))
        except (TemplateError, SyntaxError, ValueError) as error:  # ValueError: a number of too many digits
            line = getattr(error, "lineno", None)
            raise RefusedError(_one_line(error) + (f" in line {line}" if line else "")) from None
        except RecursionError:
            raise RefusedError("nests expressions too deeply") from None

    def render(self, variables: Mapping[str, object], *, clock: Callable[[], datetime]) -> MarkedText:
        """The output, marked. clock: what `strftime_now` reads.

        Raises: RefusedError, MessagesError.
        """
        given = measure(variables, MAX_CHARACTERS)
        if given > MAX_CHARACTERS:
            raise MessagesError(f"more than {MAX_CHARACTERS} characters")
        environment = _Environment(characters=FREE_CHARACTERS + COPIES * given, clock=clock)
        template = environment.template_class.from_code(environment, self._code, environment.globals)
        try:
            return MarkedText(template.render(variables))
        except (SecurityError, TooLongError, OverflowError, RecursionError) as error:
            raise RefusedError(_one_line(error)) from None
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise MessagesError(_one_line(error)) from None


def measure(value: object, limit: int) -> int:
    """The characters and elements that value's text is made of, counted up to a little over limit.

    A list may hold another many times over, so its text can be far longer than what it takes in memory.
    """
    waiting: list[tuple[object, int]] = [(value, 0)]
    total = 0
    while waiting and total <= limit:
        item, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise RefusedError(f"nests lists more than {MAX_DEPTH} deep")
        if isinstance(item, Mapping):
            total += 1 + 2 * len(item)
            if total <= limit:
                waiting += ((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list | tuple):
            total += 1 + len(item)
            if total <= limit:
                waiting += ((part, depth + 1) for part in item)
        elif item is None or isinstance(item, str | bool | int | float | range | Undefined):
            total += len(item) if isinstance(item, str) else 1 + _digits(item)
        else:
            raise RefusedError(f"uses a {type(item).__name__} as text")
    return total


def _digits(value: object) -> int:
    return value.bit_length() // 3 if isinstance(value, int) else 0


class _Environment(ImmutableSandboxedEnvironment):
    """One rendering: what the compiled template calls, and how much it may still do."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, *, characters: int = 0, clock: Callable[[], datetime] = datetime.now) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # every expression is evaluated while rendering, where it is counted
            finalize=pass_context(lambda _, value: self.text_of(value)),
            extensions=[LoopControlExtension, GenerationBlock],
        )
        self._characters = self._left = characters
        self._steps = 0
        self._deadline = time.monotonic() + MAX_SECONDS
        self._clock = clock
        own: dict[str, Callable[..., Any]] = {
            "map": self._map,
            "indent": self._indent,
            "join": self._join,
            "replace": self._replace,
            "safe": self.text_of,  # nothing is escaped here
            "string": self.text_of,
            "tojson": self._tojson,
        }
        self.filters = {name: self._counted(own.get(name) or JINJA_FILTERS[name]) for name in FILTERS}
        self.tests = {name: self._counted(JINJA_TESTS[name]) for name in TESTS}
        self.globals = {
            "range": self.globals["range"],  # the sandbox's: of at most 100,000
            "namespace": lambda *pairs, **items: Namespace(self._spend(dict(*pairs, **items))),
            "dict": lambda *pairs, **items: self.built(dict(*pairs, **items)),
            "raise_exception": _raise_exception,
            "strftime_now": self._strftime_now,
        }

    # What the rewritten tree calls

    def tick(self) -> bool:
        """Count a step; true, so that it can stand in a condition."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise RefusedError(f"takes more than {MAX_STEPS} steps")
        if time.monotonic() > self._deadline:
            raise RefusedError(f"takes more than {MAX_SECONDS:g} seconds")
        return True

    def literal(self, text: str) -> MarkedText:
        return MarkedText(text).with_mark(WRITTEN)

    def joined(self, *parts: object) -> MarkedText:
        return self.concat(self.text_of(part) for part in parts)

    def built(self, value: Value) -> Value:
        """A list, tuple or dict made in the template: counted whole, for it may hold another many times over."""
        self._left -= measure(value, self._left)
        return self._spend(value)

    def sliced(self, value: Any, start: int | None, stop: int | None, step: int | None) -> Any:
        return (MarkedText(value) if isinstance(value, str) else value)[start:stop:step]

    def generation(self, caller: Callable[[], str]) -> MarkedText:
        return MarkedText(caller()).with_mark(REPLY)

    # What jinja2 calls

    def concat(self, parts: Iterable[str]) -> MarkedText:
        return self._spend(MarkedText().join(parts))

    def text_of(self, value: object) -> str:
        """How a value is printed."""
        return self._spend(value) if isinstance(value, str) else str(self.built(value))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.tick()
        value = super().call(context, function, *args, **kwargs)
        return self.built(value) if isinstance(value, list | tuple) else self._spend(value)  # the pieces of a split

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            return self.concat([left, right])
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formats text with %; join it with ~")
        if operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            return self._repeated(*((right, left) if isinstance(left, int) else (left, right)))
        if operator == "**" and right > MAX_POWER:
            raise OverflowError(f"takes a power over {MAX_POWER}")
        if operator == "+" and isinstance(left, list | tuple) and isinstance(right, list | tuple):
            self.built(min(left, right, key=len))  # what the longer one grows by
        return self._spend(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.tick()
        return super().getattr(MarkedText(obj) if isinstance(obj, str) else obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.tick()
        return super().getitem(MarkedText(obj) if isinstance(obj, str) else obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, Namespace):
            return super().is_safe_attribute(obj, attr, value)
        return any(isinstance(obj, kind) and attr in names for kind, names in ATTRIBUTES.items())

    def wrap_str_format(self, value: Any) -> None:
        """No str.format: `is_safe_attribute` refuses it, with its widths of any size."""

    # Filters and functions of our own

    def _join(self, values: Iterable[object], separator: str = "", attribute: str | int | None = None) -> MarkedText:
        if attribute is not None:
            values = [self.getitem(value, attribute) for value in values]
        return MarkedText(separator).join([self.text_of(value) for value in values])

    def _replace(self, text: object, old: object, new: object, count: int = -1) -> MarkedText:
        return MarkedText(self.text_of(text)).replace(self.text_of(old), self.text_of(new), count)

    def _indent(self, value: object, width: int | str = 4, *options: bool, **named: bool) -> Any:
        _check_width(width)
        return JINJA_FILTERS["indent"](self.text_of(value), width, *options, **named)

    def _tojson(
        self,
        value: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As in transformers: other scripts as they are, nothing escaped for HTML."""
        for width in (indent or 0, *(separators or ())):
            _check_width(width)
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        # in pieces: an indent makes far more of a deep list than is in it
        return "".join(map(self._spend, encoder.iterencode(self.built(value))))

    @pass_context
    def _map(self, context: Context, values: Any, *names: Any, **options: Any) -> Any:
        if "default" in options:  # one value many times over, uncounted
            raise SecurityError("map: takes no default")
        return JINJA_FILTERS["map"](context, values, *names, **options)

    def _strftime_now(self, pattern: str) -> str:
        if len(pattern) > MAX_PATTERN:
            raise SecurityError(f"strftime_now: a pattern of {len(pattern)} characters; at most {MAX_PATTERN}")
        return self._clock().strftime(pattern)

    def _repeated(self, value: Any, times: Any) -> Any:
        if isinstance(value, str | list | tuple) and isinstance(times, int) and len(value) * times > self._left:
            self._refuse_characters()
        return self.concat([value] * times) if isinstance(value, str) else self.built(value * times)

    def _counted(self, function: Any) -> Callable[..., Any]:
        @functools.wraps(function)  # also copies how jinja2 marks a function that takes its context
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            given = 2 if args and isinstance(args[0], Context | EvalContext | Environment) else 1
            for option in (*args[given:], *kwargs.values()):  # `map` may give each element the same
                if isinstance(option, list | tuple | dict):
                    self.built(option)
            return self._spend(function(*args, **kwargs))

        return counted

    def _spend(self, value: Value) -> Value:
        """Count what a new value holds at its first level."""
        if isinstance(value, str | list | tuple | dict):
            self._left -= len(value)
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise OverflowError(f"makes a number of more than {MAX_BITS} bits")
        if self._left < 0:
            self._refuse_characters()
        return value

    def _refuse_characters(self) -> NoReturn:
        raise RefusedError(f"makes more than {self._characters} characters, {COPIES} for each of its input and some")


def _check_width(width: int | str) -> None:
    width = width if isinstance(width, int) else len(width)
    if width > MAX_INDENT:
        raise SecurityError(f"asks for an indent of {width}; at most {MAX_INDENT}")


def _raise_exception(message: object) -> NoReturn:
    raise MessagesError(_one_line(message))


def _one_line(message: object) -> str:
    return " ".join(str(message).split())[:300] or type(message).__name__
