"""A question of a length: a task's draft with as much filler as fits, in the tokens that the model reads.

asker = Asker.of(language, chat=False)
item = fitted(TASKS["needle"], asker, length=4096, depth=0.5, seed=0, index=0)
item.ids, item.passages, item.answers
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Self

from nemotron_h.errors import RequestError
from nemotron_h.evaluate.recall.tasks import Draft, Draw, Task, Turn
from nemotron_h.inference.load import LanguageModel
from nemotron_h.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nemotron_h.text.template import ChatTemplate

ROLES = {"user": "User", "assistant": "Assistant", "tool": "Tool"}
THINKING = "enable_thinking"  # the switch of templates that have one
FIRST_GUESS = 16  # lines of filler


@dataclass(frozen=True)
class Item:
    """One question as a model reads it."""

    task: str
    length: int  # tokens asked for; ids are as many or a line of filler less
    depth: float | None  # asked for; None: its passages stand all over the text
    index: int
    ids: tuple[int, ...]
    answers: tuple[str, ...]
    passages: tuple[range, ...]  # the places in ids of what holds the answers

    @property
    def cell(self) -> tuple[str, int, float | None]:
        return self.task, self.length, self.depth


@dataclass(frozen=True)
class Asker:
    """How a model is asked: by its chat template, or by a plain text that it completes."""

    tokenizer: Tokenizer
    bos_id: int
    template: "ChatTemplate | None"

    @classmethod
    def of(cls, language: LanguageModel, *, chat: bool) -> Self:
        """chat: by the checkpoint's template. Raises: RequestError without a tokenizer, CheckpointError without one."""
        if language.tokenizer is None:
            raise RequestError("recall: needs a tokenizer, to write its texts in tokens; the folder has none")
        return cls(language.tokenizer, language.model.config.bos_token_id, language.template if chat else None)

    def ids(self, draft: Draft) -> list[int]:
        """The prompt, up to where the answer begins: its lead is part of it."""
        if self.template is None:
            return [self.bos_id, *self.tokenizer.encode(plain(draft.turns, draft.lead))]
        variables = {THINKING: False} if THINKING in self.template.reads else {}
        rendered = self.template.encode(draft.turns, variables=variables, add_generation_prompt=True)
        return [*rendered.ids, *self.tokenizer.encode(draft.lead)]

    def places(self, ids: Sequence[int], passage: str) -> range:
        """Where in ids a passage stands, every token that has a byte of it. Raises: RequestError where it does not
        stand there once."""
        pieces = [self.tokenizer.token_bytes(token) for token in ids]
        whole, sought = b"".join(pieces), passage.encode()
        begin = whole.find(sought)
        if begin < 0 or whole.find(sought, begin + 1) >= 0:
            times = "never" if begin < 0 else "more than once"
            raise RequestError(
                f"passage: must stand in the prompt once; got it {times}: {passage!r}; is the text changed?"
            )
        ends = list(accumulate(map(len, pieces)))
        inside = [
            place for place, end in enumerate(ends) if end > begin and end - len(pieces[place]) < begin + len(sought)
        ]
        return range(inside[0], inside[-1] + 1)


def plain(turns: Sequence[Turn], lead: str) -> str:
    """Turns as a text that ends where the answer goes on: one turn alone as it is, several as a transcript."""
    if len(turns) == 1:
        return f"{turns[0]['content']}\n{lead}"
    told = [f"{ROLES[turn['role']]}: {turn['content']}" for turn in turns if turn["content"]]
    return "\n\n".join([*told, f"{ROLES['assistant']}: {lead}"])


def fitted(task: Task, asker: Asker, *, length: int, depth: float | None, seed: int, index: int) -> Item:
    """The question of that number, with as many units of filler as a prompt of that many tokens holds.

    Raises: RequestError where it holds none.
    """
    known: dict[int, tuple[Draft, list[int]]] = {}

    def tokens(units: int) -> int:
        if units not in known:
            draft = task.build(Draw(f"{seed}/{task.name}/{length}/{depth}/{index}", units, depth or 0.0))
            known[units] = draft, asker.ids(draft)
        return len(known[units][1])

    if tokens(1) > length:
        raise RequestError(f"length: must hold the task {task.name}, which has {tokens(1)} tokens; got {length}")
    low, high = 1, FIRST_GUESS
    while tokens(high) <= length:
        # a line's tokens, from what is known, and a little more: the step after next is seldom needed
        low, high = high, high + 1 + (length - tokens(high)) * high // tokens(high)
    while high - low > 1:
        share = (length - tokens(low)) / (tokens(high) - tokens(low))
        middle = min(high - 1, max(low + 1, low + int(share * (high - low))))
        low, high = (middle, high) if tokens(middle) <= length else (low, middle)
    draft, ids = known[low]
    places = tuple(asker.places(ids, passage) for passage in draft.passages)
    return Item(task.name, length, depth, index, tuple(ids), draft.answers, places)
