"""Text as its tokens come: never half a character, never the beginning of a stop string.

pieces of push and finish, joined = decode of all the ids
"""

import codecs
from collections.abc import Collection, Iterable

from nemotron_h.errors import RequestError
from nemotron_h.text.tokenizer import Tokenizer


class TextStream:
    """Decodes ids one by one; bytes that may yet become a character are held back (three at most)."""

    def __init__(self, tokenizer: Tokenizer, *, special_visible: bool = False, visible: Collection[int] = ()) -> None:
        """special_visible: as in Tokenizer.decode; visible: these of the special tokens appear by name, too."""
        self._tokenizer = tokenizer
        self._hidden = frozenset() if special_visible else tokenizer.special_ids.difference(visible)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id makes certain."""
        return "" if token_id in self._hidden else self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """The rest, U+FFFD for a character that never came whole."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Passes text through up to the first stop string to be complete; of those that end together, the longest.

    Where the pieces were cut changes nothing. Cost: each character advances one matcher per stop string.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""
        self.found: str | None = None
        self.rest = ""  # what was pushed after it, in the same piece

    def push(self, text: str) -> str:
        """The text that certainly stands before any stop string; nothing once one is found."""
        if self.found is not None:
            return ""
        start = -len(self._held)  # position in text of the first character not given out
        whole = self._held + text
        for position, character in enumerate(text):
            complete = [matcher.stop for matcher in self._matchers if matcher.advance(character)]
            if complete:
                self.found = max(complete, key=len)
                self._held = ""
                self.rest = text[position + 1 :]
                return whole[: position + 1 - len(self.found) - start]
        held = max((matcher.length for matcher in self._matchers), default=0)
        certain = len(whole) - held
        self._held = whole[certain:]
        return whole[:certain]

    def finish(self) -> str:
        """What was held as the possible beginning of a stop string, and was none."""
        rest, self._held = self._held, ""
        return rest


class _Matcher:
    """How much of one stop string the text so far ends with (Knuth, Morris and Pratt 1977)."""

    def __init__(self, stop: str) -> None:
        if not stop:
            raise RequestError("stop: must not hold an empty string; got ''")
        self.stop = stop
        self.length = 0
        self._shorter = [0]  # [n]: the longest beginning of stop that stop[: n + 1] also ends with, itself left out
        matched = 0
        for character in stop[1:]:
            matched = self._extend(matched, character)
            self._shorter.append(matched)

    def advance(self, character: str) -> bool:
        """Read one character; whether the stop string is complete."""
        self.length = self._extend(self.length, character)
        return self.length == len(self.stop)

    def _extend(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.stop[matched] == character)
