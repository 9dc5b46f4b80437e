"""Control tokens in a text that is only partly trusted.

Names are found where the `tokenizers` library would find them, leftmost and longest first, but only where every
character was written by the template: a message that spells one, whole, in halves or around another, stays letters.
"""

import re
from collections.abc import Iterable, Iterator

from nemotron_h.errors import UnsupportedError
from nemotron_h.text.marked import REPLY, WRITTEN, MarkedText
from nemotron_h.text.tokenizer import TOKENIZER_FILE, Tokenizer

WRITTEN_RUN = re.compile(b"[%c%c]+" % (WRITTEN, WRITTEN | REPLY))
# With these, a control token takes blanks of its neighbours with it, or is none beside a letter.
REFUSED_OPTIONS = ("lstrip", "rstrip", "single_word")


class ControlTokens:
    """The control tokens of one tokenizer, ready to be looked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        options = tokenizer.control_options
        late = {name for name in options if options[name].get("normalized")}
        # the library looks for these after the others, in what they left
        self._stages = [_any_of(options.keys() - late), _any_of(late)]

    def split(self, text: MarkedText) -> list[tuple[MarkedText, int | None]]:
        """The text in parts, none empty: a control token with its id, or what stands between two of them with None."""
        parts: list[tuple[MarkedText, int | None]] = [(text, None)] if text else []
        for names in self._stages:
            parts = [
                smaller
                for part, control in parts
                for smaller in (self._split(part, names) if control is None else [(part, control)])
            ]
        return parts

    def _split(self, text: MarkedText, names: re.Pattern[str]) -> Iterator[tuple[MarkedText, int | None]]:
        start, plain = 0, str.__str__(text)
        for run in WRITTEN_RUN.finditer(text.marks):
            for match in names.finditer(plain, run.start(), run.end()):
                if match.start() > start:
                    yield text[start : match.start()], None
                yield text[match.start() : match.end()], self._id(match.group())
                start = match.end()
        if start < len(text):
            yield text[start:], None

    def _id(self, name: str) -> int:
        options = self._tokenizer.control_options[name]
        refused = [option for option in REFUSED_OPTIONS if options.get(option)]
        if options.get("normalized") and self._tokenizer.normalizes:
            refused.append("normalized")
        if refused:
            rule = f"must be off for a control token of a chat template, {name!r}"
            raise UnsupportedError(f"{TOKENIZER_FILE}: {refused[0]} {rule}; got true")
        return self._tokenizer.token_id(name)


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!): nothing
