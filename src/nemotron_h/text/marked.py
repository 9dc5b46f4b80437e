"""Text that remembers, character by character, who wrote it.

    text    H i   < S P E C I A L _ 1 1 >      what the template wrote may be read as a control token,
    marks   0 0 0 1 1 1 1 1 1 1 1 1 1 1 1      what came with a message may not

Marks only ever travel with their own characters. Where an operation does not say which character went where, its result
is unmarked: forgetting a mark costs a control token, inventing one would give a user the power to write them.
"""

from collections.abc import Iterable
from typing import Any, SupportsIndex

WRITTEN = 1  # by the template's own source
REPLY = 2  # inside a `{% generation %}` block: the assistant's words
WITH_MARK = [bytes(value | mark for value in range(256)) for mark in range(WRITTEN | REPLY + 1)]
MAX_CHARACTERS = 1 << 24  # of one text: replacing and joining multiply lengths


class TooLongError(Exception):
    """A text would hold more than MAX_CHARACTERS."""


class MarkedText(str):
    """A str with one byte of marks per character; none when made from a plain str."""

    __slots__ = ("marks",)
    marks: bytes

    def __new__(cls, text: object = "", marks: bytes | None = None) -> "MarkedText":
        self = super().__new__(cls, text)
        inherited = text.marks if isinstance(text, MarkedText) else bytes(len(self))
        self.marks = inherited if marks is None else marks
        return self

    def __str__(self) -> str:
        return self  # str(text) is how jinja2 prints

    def with_mark(self, mark: int) -> "MarkedText":
        """The same text with a mark added to every character."""
        return MarkedText(self, self.marks.translate(WITH_MARK[mark]))

    def __getitem__(self, key: SupportsIndex | slice) -> "MarkedText":
        marks = self.marks[key] if isinstance(key, slice) else bytes([self.marks[key]])
        return MarkedText(super().__getitem__(key), marks)

    def join(self, parts: Iterable[Any]) -> "MarkedText":
        texts = [MarkedText(part) for part in _all_text(parts)]
        _check_length(sum(map(len, texts)) + len(self) * max(len(texts) - 1, 0))
        return MarkedText(super().join(texts), self.marks.join(text.marks for text in texts))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> "MarkedText":
        times = self.count(old) if int(count) < 0 else min(self.count(old), int(count))
        _check_length(len(self) + times * (len(new) - len(old)))
        marked = self.marks.strip(b"\0") or MarkedText(new).marks.strip(b"\0")
        if not old or not marked:  # quick, where nothing is to be kept; between letters, nothing is
            return MarkedText(super().replace(old, new, count))
        return MarkedText(new).join(self.split(old, count))

    def lstrip(self, characters: str | None = None) -> "MarkedText":
        return self[len(self) - len(super().lstrip(characters)) :]

    def rstrip(self, characters: str | None = None) -> "MarkedText":
        return self[: len(super().rstrip(characters))]

    def strip(self, characters: str | None = None) -> "MarkedText":
        return self.lstrip(characters).rstrip(characters)

    def removeprefix(self, prefix: str) -> "MarkedText":
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str) -> "MarkedText":
        return self[: len(super().removesuffix(suffix))]

    # list, as str has it, though of a subclass: the checker knows list to be invariant
    def split(self, separator: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._found(super().split(separator, maxsplit), separator)

    def rsplit(self, separator: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._found(super().rsplit(separator, maxsplit), separator)

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = self._consecutive(super().splitlines(keepends=True))
        return [line[: len(text)] for line, text in zip(lines, super().splitlines(keepends), strict=True)]

    def partition(self, separator: str) -> tuple[str, str, str]:
        before, found, after = self._consecutive(super().partition(separator))
        return before, found, after

    def rpartition(self, separator: str) -> tuple[str, str, str]:
        before, found, after = self._consecutive(super().rpartition(separator))
        return before, found, after

    def upper(self) -> "MarkedText":
        return self._letter_by_letter(super().upper())

    def lower(self) -> "MarkedText":
        return self._letter_by_letter(super().lower())

    def title(self) -> "MarkedText":
        return self._letter_by_letter(super().title())

    def capitalize(self) -> "MarkedText":
        return self._letter_by_letter(super().capitalize())

    def _letter_by_letter(self, mapped: str) -> "MarkedText":
        """No letter maps to nothing, so equal lengths mean that each kept its place; `ß` in capitals takes two."""
        return MarkedText(mapped, self.marks if len(mapped) == len(self) else None)

    def _consecutive(self, pieces: Iterable[str]) -> list["MarkedText"]:
        """The pieces, which joined are this text, with their marks."""
        marked, start = [], 0
        for piece in pieces:
            marked.append(self[start : start + len(piece)])
            start += len(piece)
        return marked

    def _found(self, pieces: list[str], separator: str | None) -> list[str]:
        """The pieces of a split with their marks: one separator apart, or any run of blanks."""
        marked: list[str] = []
        start = 0
        for piece in pieces:
            if separator is None:
                start = self.index(piece, start)  # a piece begins with the first character that is no blank
            marked.append(self[start : start + len(piece)])
            start += len(piece) + len(separator or "")
        return marked


def _all_text(parts: Iterable[Any]) -> Iterable[str]:
    for part in parts:
        if not isinstance(part, str):
            raise TypeError(f"must join text; got {type(part).__name__}")
        yield part


def _check_length(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise TooLongError(f"a text of {length} characters, more than {MAX_CHARACTERS}")
