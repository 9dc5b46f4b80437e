"""A reply as it streams, told apart: reasoning, content, tool calls.

    reply -> pieces, which joined are the reply again: nothing is lost, and what was given out is never taken back

What is not clear-cut, and how it is read:
- A `<think>` opens thinking at the start of a reply only; later ones are text. So is a `</think>` after the first.
- A first `</think>` without thinking open is a marker: the prompt opened thinking and the caller did not say so. What
  came before it stays content, for it has been given out.
- A call inside thinking counts if thinking is never closed (the model forgot to); where `</think>` comes after all, the
  model was only planning, and it is reasoning. It is held back until then.
- A block that is no call, by its form or because the reply ended, is content, with its fault.
Newlines beside a marker go with the marker. Markers are read as text, whether or not the vocabulary has them as tokens.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nemotron_h.text.calls import CLOSERS, HEADS, FaultyCallError, ToolCall, opened_only, read_calls
from nemotron_h.text.stream import StopStrings
from nemotron_h.text.tokenizer import Tokenizer

THINK, THINK_END = "<think>", "</think>"
MARKERS = (THINK, THINK_END, *CLOSERS)
NEWLINES = "\r\n"
BLANKS = re.compile(r"\s*")

Kind = Literal["reasoning", "content", "call", "marker"]


@dataclass(frozen=True)
class Piece:
    """A stretch of the reply."""

    kind: Kind
    text: str  # as it came
    calls: tuple[ToolCall, ...] = ()  # of a whole block of calls
    fault: str | None = None  # why content that begins like a call is none


def mark_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The control tokens that mark spans, in a vocabulary that has some: decoding may leave them out."""
    names = {*MARKERS, *CLOSERS.values()}
    return frozenset(tokenizer.token_id(name) for name in names if name in tokenizer.control_options)


class SpanParser:
    """Takes a reply in any pieces and gives out what each stretch of it is, as soon as that is certain."""

    def __init__(self, *, thinking: bool = False, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        """thinking: the prompt ends inside `<think>`; tools: as a template takes them, for the types of arguments."""
        self._thinking = thinking
        self._tools = tools
        self._closed = False  # a </think> was met
        self._begun = False  # more than blanks was said
        self._after_marker = False
        self._newlines = ""  # said, but perhaps the next marker's
        self._search = StopStrings(MARKERS)
        self._block: _Block | None = None
        self._pieces: list[Piece] = []

    def push(self, text: str) -> list[Piece]:
        """The pieces that text makes certain."""
        while text:
            text = self._read_block(self._block, text) if self._block else self._read(text)
        return self._given_out()

    def finish(self) -> list[Piece]:
        """The rest, when the reply has ended."""
        if self._block is None:
            self._say(self._search.finish())
        else:
            self._finish_block(self._block.text + self._block.search.finish())
        self._emit(self._kind, self._newlines)
        return self._given_out()

    @property
    def _kind(self) -> Kind:
        return "reasoning" if self._thinking else "content"

    def _given_out(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _read(self, text: str) -> str:
        """Read up to a marker and over it; what is left of text."""
        search = self._search
        self._say(search.push(text))
        if search.found is None:
            return ""
        self._search = StopStrings(MARKERS)
        self._meet(search.found)
        return search.rest

    def _meet(self, marker: str) -> None:
        if marker in CLOSERS:
            self._block = _Block(marker, THINK_END if self._thinking else CLOSERS[marker])
        elif marker == THINK and not self._begun and not self._closed:
            self._thinking = True
            self._mark(Piece("marker", marker))
        elif marker == THINK_END and not self._closed:
            self._thinking, self._closed = False, True
            self._mark(Piece("marker", marker))
        else:
            self._say(marker)

    def _read_block(self, block: "_Block", text: str) -> str:
        """Read on in what may be a call; what is left of text."""
        end = block.needs(text)
        block.text += block.search.push(text[:end])
        found, rest = block.search.found, block.search.rest + text[end:]
        if not block.may_be_call():
            self._block = None
            fault = None if self._thinking else f"must begin with {HEADS[block.opener]}"
            self._say(block.opener, fault=fault)
            unread = block.text.removeprefix(block.opener)
            return unread + (found or block.search.finish()) + rest
        if found is None:
            return rest
        if found == THINK_END:
            self._block = None
            self._say(block.text)
            self._meet(found)
        elif opened_only(block.text + found):
            block.text += found
            block.search = StopStrings([found])
        else:
            self._block = None
            self._say_block(block.text + found)
        return rest

    def _finish_block(self, text: str) -> None:
        if self._thinking:
            answer = SpanParser(tools=self._tools)
            pieces = answer.push(text) + answer.finish()
            if any(piece.kind == "call" for piece in pieces):
                self._thinking = False
                self._mark(pieces[0])
                self._pieces += pieces[1:]
            else:
                self._say(text)
        else:
            self._say(text, fault="must be whole; the reply ended inside it")

    def _say_block(self, text: str) -> None:
        try:
            self._mark(Piece("call", text, calls=read_calls(text, self._tools)))
        except FaultyCallError as fault:
            self._say(text, fault=str(fault))

    def _say(self, text: str, fault: str | None = None) -> None:
        """Reasoning or content; the newlines at its end wait for what follows."""
        if self._after_marker:
            stripped = text.lstrip(NEWLINES)
            self._emit("marker", text[: len(text) - len(stripped)])
            text = stripped
        if not text:
            return
        text = self._newlines + text
        kept = text.rstrip(NEWLINES)
        self._newlines = text[len(kept) :]
        self._begun = self._begun or bool(kept.strip())
        self._after_marker = False
        self._emit(self._kind, kept, fault)

    def _mark(self, piece: Piece) -> None:
        """A marker or a call, with the newlines before it."""
        self._emit("marker", self._newlines)
        self._newlines, self._after_marker = "", True
        self._begun = self._begun or piece.kind != "marker"
        self._pieces.append(piece)

    def _emit(self, kind: Kind, text: str, fault: str | None = None) -> None:
        if text:
            self._pieces.append(Piece(kind, text, fault=fault))


class _Block:
    """A stretch that begins like a call, until it is whole."""

    def __init__(self, opener: str, end: str) -> None:
        self.opener = opener
        self.text = opener
        self.search = StopStrings([end])
        self._has_head = False

    def needs(self, text: str) -> int:
        """How much of text to read next: until this is known to be a call, no more than tells it."""
        blanks = BLANKS.match(text)
        return len(text) if self._has_head or not blanks else blanks.end() + len(HEADS[self.opener])

    def may_be_call(self) -> bool:
        if not self._has_head:
            head = HEADS[self.opener]
            begun = self.text.removeprefix(self.opener).lstrip()[: len(head)]
            self._has_head = begun == head
            return head.startswith(begun)
        return True
