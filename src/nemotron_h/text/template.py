"""Chat templates: messages to the ids of a prompt, in which no message's text is a control token.

    messages -> one text, each character marked (`render.py`)
             -> control tokens, where every character is the template's (`control.py`)
             -> what stands between them, template and message together, encoded in one piece

Encoding in one piece is what makes the ids equal to transformers' wherever no message spells a control token. The marks
are kept with the characters while rendering: there is no placeholder that a user could forge.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from itertools import pairwise
from typing import Any, Self

from nemotron_h.config.keys import shown
from nemotron_h.errors import CheckpointError, RequestError, UnsupportedError
from nemotron_h.text.control import ControlTokens
from nemotron_h.text.marked import REPLY, WRITTEN, MarkedText
from nemotron_h.text.messages import checked_json, checked_messages, checked_tools
from nemotron_h.text.render import MessagesError, Program
from nemotron_h.text.syntax import RefusedError
from nemotron_h.text.tokenizer import TEMPLATE_FILE, TOKENIZER_FILE, Tokenizer

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ARGUMENTS = frozenset(["messages", "tools", "add_generation_prompt"])
IS_REPLY = bytes(bool(mark & REPLY) for mark in range(256))

Message = Mapping[str, Any]  # role, content, and what the template reads beside: reasoning_content, tool_calls...


@dataclass(frozen=True)
class Prompt:
    """What a template makes of messages."""

    text: str
    ids: list[int]
    reply: list[bool]  # per id: it touches a `{% generation %}` block, the words a model is trained to say


class ChatTemplate:
    """A template, and the tokenizer whose control tokens it writes."""

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        *,
        where: str = TEMPLATE_FILE,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """where: named in errors; clock: what the template's `strftime_now` reads.

        Raises: CheckpointError where the template is broken, or uses what no chat template needs.
        """
        self.source = source
        self._tokenizer = tokenizer
        self._where = where
        self._clock = clock
        self._control = ControlTokens(tokenizer)
        try:
            self._program = Program(source)
        except RefusedError as error:
            raise CheckpointError(f"{where}: must be a chat template we can run; {error}") from None

    @classmethod
    def of(cls, source: str | None, tokenizer: Tokenizer) -> Self:
        """A checkpoint's own; None: it has none, and the family's is taken (`built_in`)."""
        return cls(built_in(tokenizer) if source is None else source, tokenizer)

    @property
    def reads(self) -> frozenset[str]:
        """The variables the template takes: messages, tools, enable_thinking..."""
        return self._program.reads

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> MarkedText:
        """The prompt as text. variables: the template's own switches, such as enable_thinking.

        Raises: RequestError, naming the field, for what the template does not take; CheckpointError where it breaks a
        bound.
        """
        variables = variables or {}
        for name in [*variables, *(["tools"] if tools else [])]:
            if name not in self.reads or (name in variables and name in ARGUMENTS.union(ROLES)):
                known = ", ".join(sorted(self.reads.difference(ARGUMENTS, ROLES))) or "none"
                raise RequestError(f"{shown(name)}: must be a variable of the chat template; it has {known}")
        given = {
            **self._role_names(),
            "documents": None,
            **{name: checked_json(value, name) for name, value in variables.items()},
            "messages": checked_messages(messages),
            "tools": None if tools is None else checked_tools(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._program.render(given, clock=self._clock)
        except MessagesError as error:
            raise RequestError(f"messages: must be what the chat template takes; got {error}") from None
        except RefusedError as error:
            raise CheckpointError(f"{self._where}: must render within its bounds; {error}") from None

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The prompt as ids. Arguments and errors: those of `render`."""
        text = self.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables)
        parts = self._control.split(text)
        encoded = iter(self._tokenizer.encode_batch([part for part, control in parts if control is None]))
        ids: list[int] = []
        reply: list[bool] = []
        for part, control in parts:
            new = next(encoded) if control is None else [control]
            ids += new
            reply += self._touching_reply(part, new)
        return Prompt(str.__str__(text), ids, reply)

    def _role_names(self) -> dict[str, MarkedText]:
        """The names of bos_token and its like, which a template may write as its own."""
        settings = self._tokenizer.settings
        names = {role: settings.get(role) for role in ROLES}
        texts = {role: name.get("content") if isinstance(name, dict) else name for role, name in names.items()}
        return {role: MarkedText(name).with_mark(WRITTEN) for role, name in texts.items() if isinstance(name, str)}

    def _touching_reply(self, part: MarkedText, ids: list[int]) -> list[bool]:
        marks = part.marks.translate(IS_REPLY)
        if not any(marks):
            return [False] * len(ids)
        if not part.isascii():
            marks = b"".join(marks[i : i + 1] * len(letter.encode()) for i, letter in enumerate(str.__str__(part)))
        ends = [0]
        for token in ids:
            ends.append(ends[-1] + len(self._tokenizer.token_bytes(token)))
        if ends[-1] != len(marks):
            raise UnsupportedError(
                f"{TOKENIZER_FILE}: must encode text as it is to tell the reply's ids; it changes it"
            )
        return [1 in marks[start:end] for start, end in pairwise(ends)]


def built_in(tokenizer: Tokenizer) -> str:
    """The family's template that the tokenizer's control tokens call for.

    ChatML's are Nemotron 3's. Nemotron-H and Nano v2 have one vocabulary; in Nano v2 `<SPECIAL_12>` ends a text.
    """
    names = tokenizer.control_options
    if {"<|im_start|>", "<|im_end|>"} <= names.keys():
        family = "nemotron_3"
    elif {"<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"} <= names.keys():
        family = "nano_v2" if tokenizer.eos_id == tokenizer.token_id("<SPECIAL_12>") else "nemotron_h"
    else:
        raise CheckpointError(
            f"{TEMPLATE_FILE}: missing, and {TOKENIZER_FILE} has none of the control tokens of the family's templates; "
            "give the model a template of its own"
        )
    folder = files("nemotron_h.text") / "templates"
    return "".join((folder / f"{name}.jinja").read_text(encoding="utf-8") for name in ("message", family))
