"""A conversation: turns of a message and a reply, each read from where the last one's reading can be used again.

    talk = Conversation(nemotron_h.load(path), system="Be brief.")
    for piece in talk.reply("Hello"):
        print(piece.text, end="")
    talk.save("talk.session")  # later: Conversation(language).load("talk.session")

Each turn's prompt is rendered whole, by the template; its request names the places where the next may part from it
(`partings.py`), and the engine keeps a snapshot there.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import DataError, RequestError
from nemotron_h.inference.load import LanguageModel
from nemotron_h.inference.partings import partings, user
from nemotron_h.inference.prefix import common
from nemotron_h.inference.request import Answer, Finish
from nemotron_h.text.spans import THINK, THINK_END, Piece, SpanParser
from nemotron_h.text.template import Message, Prompt

KEY = "conversation"  # of ours in a session file's extra


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a turn took. prompt_tokens = reused_tokens + those that were read, and `cut` says why no more was reused."""

    prompt_tokens: int
    reused_tokens: int
    cut: str
    reply_tokens: int
    finish: str
    first_token_seconds: float | None  # None: none came
    tokens_per_second: float | None  # after the first; None: there was no second
    drafted_tokens: int = 0  # read ahead of being known
    accepted_tokens: int = 0  # of them, those that came

    @property
    def stopped(self) -> bool:
        """The reply is what had come when it was stopped."""
        return self.finish == Finish.CANCELLED


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A message and its reply."""

    message: str
    reasoning: str
    content: str
    statistics: Statistics

    @property
    def messages(self) -> list[Message]:
        """As a template takes them: which of the thinking it shows is its business."""
        said = {"reasoning_content": self.reasoning} if self.reasoning else {}
        return [user(self.message), {"role": "assistant", "content": self.content, **said}]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a session file has of a conversation, beside what the engine knows of it."""

    system: str
    documents: dict[str, str]
    turns: list[Turn]
    asked: int


@dataclass(eq=False, kw_only=True)
class Conversation:
    """Messages and replies on a model's engine. Its methods are for one thread, but for `stop`.

    documents: texts by name, read with the system message. variables: of the chat template, such as enable_thinking.
    sampling: its seed is the first reply's, each one asked for later has the next; None: the checkpoint's own.
    """

    language: LanguageModel = field(kw_only=False)
    system: str = ""
    documents: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int = 1024  # of a reply
    sampling: Sampling | None = None
    turns: list[Turn] = field(default_factory=list)
    asked: int = 0  # replies, with those that were taken back
    salt: str = ""  # of requests and of what is restored
    apart: str = ""  # instead, where what was restored is inexact, and nobody else reuses it
    _stopping: bool = field(default=False, init=False)

    @property
    def messages(self) -> list[Message]:
        """All so far."""
        return [*self._opening, *(message for turn in self.turns for message in turn.messages)]

    def reply(self, message: str) -> Generator[Piece, None, None]:
        """The reply to a message as it comes, told apart; its turn is there when it has ended.

        `stop`, or to close the iterator, ends it: what came so far is the reply; if nothing came, the message is taken
        back. Raises: RequestError or CapacityError; then no turn is added.
        """
        self._stopping = False
        engine, messages = self.language.engine, [*self.messages, user(message)]
        prompt = self._prompt(messages)
        sampling = self.sampling or self.language.companions.generation.sampling()
        request = self.language.request(
            prompt.ids,
            max_tokens=self.max_tokens,
            sampling=replace(sampling, seed=sampling.seed + self.asked),
            boundaries=partings(self.language.template, messages, prompt.ids, variables=self.variables),
            cache_salt=self._salt,
            marks_visible=True,
        )
        (answer,) = engine.add(request)
        self.asked += 1
        thinking = prompt.text.rstrip().endswith(THINK)
        try:
            yield from spoken(self._said(answer), thinking=thinking)
        finally:
            engine.cancel(answer)
            if answer.error is None and (answer.ids or answer.finish is not Finish.CANCELLED):
                reasoning, content = told_apart(spoken([answer.text], thinking=thinking))
                statistics = statistics_of(answer)
                self.turns.append(Turn(message=message, reasoning=reasoning, content=content, statistics=statistics))

    def stop(self) -> None:
        """End the reply under way after the step at hand; for handlers of signals, which must not break into one."""
        self._stopping = True

    def read(self) -> Generator[tuple[int, int, int], None, None]:
        """Read what stands before the next message, for the turn to come to reuse: the tokens that were reused, those
        known so far, and all. To close the iterator ends it: what was read stays."""
        engine, ids = self.language.engine, self._beginning()
        sampling = self.sampling or Sampling()  # of a token that nobody sees
        (answer,) = engine.add(self.language.request(ids, max_tokens=1, sampling=sampling, cache_salt=self._salt))
        before = engine.counts.read_tokens
        try:
            while answer.finish is None:
                engine.step()
                reused = answer.reuse.reused if answer.reuse is not None else 0
                yield reused, min(len(ids), reused + engine.counts.read_tokens - before), len(ids)
        finally:
            engine.cancel(answer)
        if answer.error is not None:
            raise RequestError(answer.error)

    def instruct(self, system: str) -> None:
        """Another system message from the next turn on, which reads everything after it again."""
        replace(self, system=system)._beginning()  # refused before it is taken
        self.system = system

    def rewind(self, turns: int = 1) -> None:
        """Take back the last turns. Raises: RequestError where there are not so many."""
        if not 1 <= turns <= len(self.turns):
            there = f"must lie in 1..{len(self.turns)}" if self.turns else "there are none to take back"
            raise RequestError(f"turns: {there}; got {turns}")
        del self.turns[-turns:]

    def fork(self) -> "Conversation":
        """Another conversation that goes on from here."""
        return replace(self, turns=list(self.turns))

    def save(self, path: str | Path) -> None:
        """Write it to a file, with what the next message can reuse. Raises: CapacityError for a disk that is full."""
        saved = Saved(system=self.system, documents=dict(self.documents), turns=self.turns, asked=self.asked)
        session = self.language.engine.session(self._beginning(), salt=self._salt, extra={KEY: asdict(saved)})
        try:
            session.save(path)
        finally:
            session.close()

    def load(self, path: str | Path, *, inexact: bool = False) -> None:
        """Go on with the conversation of a file instead. How it is drawn, max_tokens and variables stay this one's.

        inexact: take one that another machine's arithmetic computed, too.
        Raises: DataError where the file is damaged, of another model, or holds no conversation; CapacityError.
        """
        session = self.language.engine.restore(path, salt=self.salt, inexact=inexact)
        session.close()  # its snapshots stay while they are worth it
        try:
            saved = TypeAdapter(Saved).validate_python(session.extra.get(KEY))
        except ValidationError:
            raise DataError(f"{path}: must be a conversation that was saved; got a session of another kind") from None
        self.system, self.documents, self.turns = saved.system, saved.documents, saved.turns
        self.asked, self.apart = saved.asked, "" if session.exact else session.salt

    @property
    def _salt(self) -> str:
        return self.apart or self.salt

    @property
    def _opening(self) -> list[Message]:
        """The system message, where there is something to say."""
        documents = [f'<document name="{name}">\n{text}\n</document>' for name, text in self.documents.items()]
        text = "\n\n".join([*([self.system] if self.system else []), *documents])
        return [{"role": "system", "content": text}] if text else []

    def _prompt(self, messages: list[Message]) -> Prompt:
        return self.language.template.encode(messages, variables=self.variables, add_generation_prompt=True)

    def _beginning(self) -> list[int]:
        """The ids that the next message follows, whatever it is."""
        one, other = (self._prompt([*self.messages, user(text)]).ids for text in "ab")
        return one[: common(np.array(one), np.array(other))]

    def _said(self, answer: Answer) -> Iterator[str]:
        """The text of an answer as it comes."""
        given = 0
        while given < len(answer.text) or answer.finish is None:
            if given < len(answer.text):
                text, given = answer.text[given:], len(answer.text)
                yield text
            elif self._stopping:
                self.language.engine.cancel(answer)
            else:
                self.language.engine.step()
        if answer.error is not None:
            raise RequestError(answer.error)


def spoken(parts: Iterable[str], *, thinking: bool) -> Iterator[Piece]:
    """The pieces of a reply as its text comes. Newlines beside a call are content: the call stays where it stood.

    thinking: the prompt ends inside it.
    """
    begun = False
    for piece in parsed(parts, SpanParser(thinking=thinking)):
        begun = begun or piece.kind in ("content", "call")
        if piece.kind != "marker" or piece.text.strip():
            yield piece
        elif begun:
            yield Piece("content", piece.text)


def parsed(parts: Iterable[str], parser: SpanParser) -> Iterator[Piece]:
    for text in parts:
        yield from parser.push(text)
    yield from parser.finish()


def told_apart(pieces: Iterable[Piece]) -> tuple[str, str]:
    """Reasoning and content, as messages have them; calls are content."""
    reasoning, content = "", ""
    for piece in pieces:
        if piece.kind == "reasoning":
            reasoning += piece.text
        elif piece.kind != "marker":
            content += piece.text
        elif piece.text == THINK_END and content:  # it ends thinking that neither prompt nor reply had opened
            reasoning, content = content, ""
    return reasoning, content


def statistics_of(answer: Answer) -> Statistics:
    """Of an answer that has ended."""
    assert answer.reuse is not None
    assert answer.ended is not None
    assert answer.finish is not None
    begun, later = answer.begun, len(answer.ids) - 1
    return Statistics(
        prompt_tokens=answer.reuse.prompt,
        reused_tokens=answer.reuse.reused,
        cut=answer.reuse.cut.value,
        reply_tokens=len(answer.ids),
        finish=answer.finish.value,
        first_token_seconds=None if begun is None else begun - answer.added,
        tokens_per_second=None if begun is None or later < 1 else later / (answer.ended - begun),
        drafted_tokens=answer.drafted,
        accepted_tokens=answer.accepted,
    )
