"""A conversation goes on from where the last turn's reading can be used again, and says what it would without."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron_h.checkpoint.companions import Companions
from nemotron_h.config.engine import EngineConfig
from nemotron_h.config.generation import Generation
from nemotron_h.config.sampling import Sampling
from nemotron_h.config.tokenizer import TokenizerConfig
from nemotron_h.errors import CapacityError, CheckpointError, DataError, RequestError
from nemotron_h.inference.conversation import Conversation, spoken, told_apart
from nemotron_h.inference.engine import Engine
from nemotron_h.inference.load import LanguageModel
from nemotron_h.inference.partings import partings
from nemotron_h.inference.request import Answer, Finish, Request
from nemotron_h.inference.session_file import read_header
from nemotron_h.model import fingerprint
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.text.bpe import train
from nemotron_h.text.spans import THINK, THINK_END, Piece
from nemotron_h.text.template import ChatTemplate, Message, built_in
from nemotron_h.text.tokenizer import Tokenizer
from tests.inference.conftest import PROSE
from tests.inference.serving import check_alone, check_conserved

Build = Callable[..., Hybrid]
SMALL = EngineConfig(max_running=1, memory_bytes=4_000_000, portion_tokens=96, poisoned=True)
FAMILIES = ["nemotron_h", "nano_v2", "nemotron_3"]
ENDS = {"nemotron_h": "</s>", "nano_v2": "<SPECIAL_12>", "nemotron_3": "<|im_end|>"}
NAMES = {"<SPECIAL_10>": "<|im_start|>", "<SPECIAL_11>": "<|im_end|>", "<SPECIAL_12>": THINK, "<SPECIAL_13>": THINK_END}
REPLIES = [
    ("A thought, long enough to matter.", "Grüße aus Köln!"),
    ("Only this.", ""),
    ("Another.", "**Hi** there."),
    ("", "Привет, мир"),
]


@dataclass
class Stage:
    """A conversation whose replies the test writes, and the answers that the engine gave."""

    language: LanguageModel
    end: int
    monkeypatch: pytest.MonkeyPatch
    answers: list[Answer] = field(default_factory=list)

    def __post_init__(self) -> None:
        add = Engine.add

        def noted(engine: Engine, request: Request) -> tuple[Answer, ...]:
            answers = add(engine, request)
            self.answers += answers
            return answers

        self.monkeypatch.setattr(Engine, "add", noted)

    @property
    def reused(self) -> int:
        """Of the last prompt."""
        reuse = self.answers[-1].reuse
        assert reuse is not None
        return reuse.reused

    def say(self, talk: Conversation, message: str, reply: str) -> list[Piece]:
        """A turn in which the model says that, and ends."""
        with self.saying(reply):
            return list(talk.reply(message))

    @contextmanager
    def saying(self, reply: str) -> Iterator[None]:
        """The model says that, and ends, whatever it is asked."""
        tokenizer = self.language.tokenizer
        assert tokenizer is not None
        script: list[int] = []
        for number, part in enumerate(reply.split(THINK_END)):
            mark = [tokenizer.token_id(THINK_END)] if THINK_END in tokenizer.control_options else None
            script += (mark or tokenizer.encode(THINK_END)) if number else []
            script += tokenizer.encode(part)
        script.append(self.end)
        request = LanguageModel.request

        def scripted(said: Sequence[int], logits: Tensor) -> Tensor:
            return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor(script[len(said)]), 0.0)

        with self.monkeypatch.context() as patch:
            patch.setattr(LanguageModel, "request", lambda *given, **more: request(*given, **more, hook=scripted))
            yield


@pytest.fixture(scope="session")
def letters() -> Tokenizer:
    """It joins what stands before a reply to the reply's first letters, as large vocabularies do."""
    joined = "x</think>** </think>A </think>\n\nAssistant\n\n" * 3
    return train([(PROSE + joined) * 20], TokenizerConfig(vocab_size=352))


def variant(tokenizer: Tokenizer, family: str) -> Tokenizer:
    """With a family's control tokens."""
    data = json.loads(tokenizer._source)
    for old, new in NAMES.items() if family == "nemotron_3" else ():
        next(entry for entry in data["added_tokens"] if entry["content"] == old)["content"] = new
        data["model"]["vocab"][new] = data["model"]["vocab"].pop(old)
    settings = {"eos_token": ENDS["nano_v2"]} if family == "nano_v2" else {}
    return Tokenizer(json.dumps(data).encode(), json.dumps(settings).encode())


@pytest.fixture
def stage(build: Build, letters: Tokenizer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Stage:
    return Stage(*model_of(build, letters, getattr(request, "param", "nemotron_3")), monkeypatch)


def model_of(build: Build, letters: Tokenizer, family: str) -> tuple[LanguageModel, int]:
    tokenizer = variant(letters, family)
    end = tokenizer.token_id(ENDS[family])
    companions = Companions(generation=Generation(end_ids=(end,)), chat_template=built_in(tokenizer))
    return LanguageModel(build(), tokenizer, companions, SMALL), end


def parted(answer: Answer, ids: Sequence[int]) -> int:
    """Tokens of ids that were read with an answer."""
    read = [*answer.request.ids, *answer.ids]
    return next((place for place, pair in enumerate(zip(read, ids, strict=False)) if len(set(pair)) > 1), len(read))


def known(answer: Answer, ids: Sequence[int]) -> int:
    """The deepest place of an answer, up to where ids part from it, that must have a snapshot: where its reply ends,
    its prompt, or what could be told before."""
    prompt = len(answer.request.ids)
    read = len(answer.ids) - (answer.finish is not Finish.END)  # who ends early has not read the last one drawn
    places = [*answer.request.boundaries, prompt, prompt + read]
    return max(place for place in places if place <= parted(answer, ids))


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("stage", FAMILIES, indirect=True)
def test_a_turn_begins_where_the_prompts_part(stage: Stage, thinking: bool) -> None:
    """Where thinking is stripped, exactly there; else at the end of the reply, or of the prompt before it where the
    reply reads otherwise with what follows it."""
    talk = Conversation(stage.language, system="Be brief.", variables={"enable_thinking": thinking})
    for number, (thought, said) in enumerate(REPLIES):
        reply = f"{thought}\n{THINK_END}\n\n{said}" if thinking else said
        pieces = stage.say(talk, f"Question {number}?", reply)
        assert told_apart(pieces) == (thought if thinking else "", said)
        assert (talk.turns[-1].reasoning, talk.turns[-1].content) == told_apart(pieces)
    assert [message["role"] for message in talk.messages] == ["system", *["user", "assistant"] * 4]
    for before, answer in zip(stage.answers, stage.answers[1:], strict=False):
        place = parted(before, answer.request.ids)
        assert place >= len(before.request.ids) - 8  # nothing but what opens the thinking, and it, is read again
        assert answer.reuse is not None
        assert answer.reuse.reused == (place if thinking else known(before, answer.request.ids))
    check_alone(stage.language.model, *stage.answers)
    check_conserved(stage.language.engine)


@pytest.mark.parametrize("said", ["A", "** Hi", "", "\n\n", "5", " A", "*"])
@pytest.mark.parametrize("stage", ["nemotron_h"], indirect=True)
def test_a_reply_that_joins_what_stands_before_it(stage: Stage, said: str) -> None:
    """`<think></think>` ends in a piece that is one token with some first letters, and not with others."""
    talk = Conversation(stage.language, variables={"enable_thinking": False})
    stage.say(talk, "One?", said)
    stage.say(talk, "Two?", "x")
    first, second = stage.answers
    assert stage.reused == known(first, second.request.ids)
    assert stage.reused >= min(parted(first, second.request.ids), len(first.request.ids))


def test_thinking_that_the_template_keeps_is_not_read_again(stage: Stage) -> None:
    talk = Conversation(stage.language, variables={"truncate_history_thinking": False})
    stage.say(talk, "One?", f"So it is.\n{THINK_END}\nYes.")
    stage.say(talk, "Two?", "No.")
    assert stage.reused == len(stage.answers[0].request.ids) + len(stage.answers[0].ids)
    check_alone(stage.language.model, *stage.answers)


@pytest.mark.parametrize("stage", FAMILIES, indirect=True)
def test_messages_that_somebody_else_keeps_are_reused_as_a_conversations_are(stage: Stage) -> None:
    """`chat` is given all messages each time: the thinking of the reply before is stripped, a last message is another
    one, a tool has answered."""

    def chat(reply: str, *messages: Message) -> int:
        """How much of the prompt is read again that stood in one before."""
        with stage.saying(reply):
            text = "".join(stage.language.chat(messages, max_tokens=64))
        assert told_apart(spoken([text], thinking=True))[1] == reply.rpartition(THINK_END)[2].strip()
        *before, answer = stage.answers
        return max(parted(other, answer.request.ids) for other in before) - stage.reused

    said = {"role": "assistant", "content": "Yes.", "reasoning_content": "So it is."}
    opening = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}]
    with stage.saying(f"So it is.\n{THINK_END}\nYes."):
        assert "".join(stage.language.chat(opening, max_tokens=64)).endswith("Yes.")
    assert chat(f"Hm.\n{THINK_END}\nNo.", *opening, said, {"role": "user", "content": "Two?"}) == 0
    assert chat(f"Hm.\n{THINK_END}\nNo.", *opening, said, {"role": "user", "content": "Another?"}) == 0
    assert chat(f"Hm.\n{THINK_END}\nNo.", opening[0], {"role": "user", "content": "Zero?"}) == 0
    if "tools" in stage.language.template.reads:
        called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
        for result in ("5", "6"):
            # the newline before a call is not told beforehand
            assert chat(f"Hm.\n{THINK_END}\nNo.", *opening, called, {"role": "tool", "content": result}) <= 1
    check_alone(stage.language.model, *stage.answers)


def test_what_a_template_does_not_take_parts_nothing(letters: Tokenizer) -> None:
    """One that wants the first message to be a question, say."""
    source = "{% if messages[0].content[-1] != '?' %}{{ raise_exception('a question') }}{% endif %}" + "".join(
        "{% for message in messages %}{{ message.content }}|{% endfor %}"
    )
    template = ChatTemplate(source, letters)
    messages = [{"role": "user", "content": "One?"}]
    ids = template.encode(messages).ids
    with pytest.raises(RequestError, match="a question"):
        template.encode([{"role": "user", "content": "a"}])
    assert partings(template, messages, ids) == [len(ids)]
    source = "{% for message in messages %}{{ message.content }}{% if message.role == 'assistant' %}{{ '%s' % 1 }}"
    template = ChatTemplate(source + "{% endif %}{% endfor %}", letters)
    with pytest.raises(CheckpointError):
        template.encode([{"role": "assistant", "content": "a"}])
    assert partings(template, messages, template.encode(messages).ids) == [0]


CALL = "<tool_call>\n<function=f>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("reply", "thinking", "apart"),
    [
        (f"So.\n{THINK_END}\n\nYes.\n", True, ("So.", "Yes.\n")),
        (f"{THINK}\nSo.\n{THINK_END}\nYes.", False, ("So.", "Yes.")),
        ("So.", True, ("So.", "")),
        (f"See.\n\n{CALL}\n{CALL}", False, ("", f"See.\n\n{CALL}\n{CALL}")),
        (f"So.{THINK_END}\n{CALL}", True, ("So.", CALL)),
        (f"So.{THINK_END}Yes. {THINK_END}", False, ("So.", f"Yes. {THINK_END}")),  # nobody had opened it
    ],
)
def test_a_reply_as_messages_have_it(reply: str, thinking: bool, apart: tuple[str, str]) -> None:
    assert told_apart(spoken([reply], thinking=thinking)) == apart
    assert told_apart(spoken(reply, thinking=thinking)) == apart  # letter by letter


def test_what_is_drawn_is_what_is_drawn_without_a_cache(stage: Stage) -> None:
    """Each reply with a seed of its own, also of a message that is sent again."""
    sampling = Sampling(temperature=1.0, top_k=40, seed=5)
    talk = Conversation(stage.language, max_tokens=12, sampling=sampling)
    for message in ("Hello", "你好", "", "Hello"):
        assert "".join(piece.text for piece in talk.reply(message)) != ""
    talk.rewind()
    list(talk.reply("Hello"))
    assert [answer.request.sampling.seed for answer in stage.answers] == [5, 6, 7, 8, 9]
    assert stage.answers[-1].request.ids == stage.answers[-2].request.ids
    assert stage.answers[-1].ids != stage.answers[-2].ids
    check_alone(stage.language.model, *stage.answers)


def test_what_is_restored_is_its_owners(stage: Stage, tmp_path: Path) -> None:
    talk = Conversation(stage.language, salt="alice")
    stage.say(talk, "One?", "Yes.")
    talk.save(tmp_path / "talk")
    again = Conversation(
        LanguageModel(stage.language.model, stage.language.tokenizer, stage.language.companions, SMALL)
    )
    again.salt = "bob"
    again.load(tmp_path / "talk")
    assert {one.node.salt for one in again.language.engine.memory.prefixes.snapshots.values()} == {"bob"}
    list(again.reply("Two?"))
    assert stage.answers[-1].request.cache_salt == "bob"
    assert stage.reused > 0


def test_statistics(stage: Stage) -> None:
    talk = Conversation(stage.language)
    stage.say(talk, "One?", f"So.\n{THINK_END}\nYes.")
    stage.say(talk, "Two?", f"So.\n{THINK_END}\nYes.")
    first, second = (turn.statistics for turn in talk.turns)
    assert (first.prompt_tokens, first.reused_tokens, first.cut) == (len(stage.answers[0].request.ids), 0, "new")
    assert (second.prompt_tokens, second.reused_tokens) == (len(stage.answers[1].request.ids), stage.reused)
    assert second.reply_tokens == len(stage.answers[1].ids)
    assert (first.finish, first.stopped) == ("end", False)
    assert first.first_token_seconds is not None
    assert first.tokens_per_second is not None
    assert first.first_token_seconds > 0
    assert first.tokens_per_second > 0


@pytest.mark.parametrize("stage", FAMILIES, indirect=True)
@pytest.mark.parametrize("closed", [True, False])
def test_a_stopped_reply_is_what_had_come(stage: Stage, closed: bool) -> None:
    talk = Conversation(stage.language, max_tokens=40, sampling=Sampling(temperature=1.0, seed=1))
    seen, tokens = "", 0
    with closing(talk.reply("Go on and on.")) as reply:
        for piece in reply:
            seen, tokens = seen + piece.text, tokens or len(stage.answers[0].ids)
            if closed:
                break
            talk.stop()
    [turn] = talk.turns
    assert turn.statistics.stopped
    assert turn.statistics.reply_tokens == tokens < 20
    assert (turn.reasoning + turn.content).startswith(seen[:-1])
    list(talk.reply("And now?"))
    assert not talk.turns[1].statistics.stopped
    first, second = stage.answers
    assert stage.reused == known(first, second.request.ids)
    assert stage.reused >= min(parted(first, second.request.ids), len(first.request.ids))
    check_alone(stage.language.model, first, second)
    check_conserved(stage.language.engine)


def test_stopped_before_the_first_word_a_message_is_taken_back(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation(stage.language)
    stage.say(talk, "One?", "Yes.")
    step, steps = Engine.step, []

    def interrupted(engine: Engine) -> Any:
        steps.append(1)
        talk.stop()
        return step(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupted)
        assert list(talk.reply("word " * 300)) == []
    assert len(steps) == 1  # between two passes, not at the end of the prompt
    assert [turn.message for turn in talk.turns] == ["One?"]
    assert not stage.language.engine.busy
    stage.say(talk, "Two?", "No.")
    assert [turn.message for turn in talk.turns] == ["One?", "Two?"]
    check_alone(stage.language.model, stage.answers[-1])


def test_what_cannot_be_answered_adds_no_turn(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation(stage.language, max_tokens=100)
    stage.say(talk, "One?", "Yes.")
    with pytest.raises(CapacityError, match=r"^request: needs "):
        list(talk.reply("word " * 100_000))
    with pytest.raises(RequestError, match=r"^messages\[2\].content: "):
        list(talk.reply("\udcff"))
    with monkeypatch.context() as patch:
        patch.setattr("nemotron_h.inference.engine.read", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            list(talk.reply("Two?"))
    assert [turn.message for turn in talk.turns] == ["One?"]
    stage.say(talk, "Two?", "No.")
    check_alone(stage.language.model, stage.answers[0], stage.answers[-1])
    check_conserved(stage.language.engine)


def test_after_a_rewind_another_message_begins_where_the_first_one_did(stage: Stage) -> None:
    talk = Conversation(stage.language, system="Be brief.")
    for question in ("One?", "Two?", "More?"):
        stage.say(talk, question, f"So.\n{THINK_END}\nYes.")
    talk.rewind(2)
    stage.say(talk, "Another.", "No.")
    assert stage.reused == parted(stage.answers[1], stage.answers[-1].request.ids) > len(stage.answers[0].request.ids)
    talk.rewind(2)
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    stage.say(talk, "Another.", "No.")
    assert stage.reused == parted(stage.answers[0], stage.answers[-1].request.ids)
    check_alone(stage.language.model, *stage.answers)
    for turns in (0, 2, -1):
        with pytest.raises(RequestError, match=rf"^turns: must lie in 1\.\.1; got {turns}$"):
            talk.rewind(turns)
    talk.rewind()
    with pytest.raises(RequestError, match=r"^turns: there are none to take back; got 1$"):
        talk.rewind()


def test_a_fork_goes_its_own_way(stage: Stage) -> None:
    talk = Conversation(stage.language)
    stage.say(talk, "One?", f"So.\n{THINK_END}\nYes.")
    fork = talk.fork()
    stage.say(talk, "Two?", "No.")
    prompt = stage.answers[-1].request.ids
    stage.say(fork, "More?", "Perhaps.")
    assert stage.reused == parted(stage.answers[1], stage.answers[2].request.ids) > parted(stage.answers[0], prompt)
    assert [[turn.message for turn in one.turns] for one in (talk, fork)] == [["One?", "Two?"], ["One?", "More?"]]
    check_alone(stage.language.model, *stage.answers)


@pytest.mark.parametrize("stage", FAMILIES, indirect=True)
def test_saved_and_loaded_in_another_engine_the_next_turn_is_the_same(
    stage: Stage, build: Build, letters: Tokenizer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    options: dict[str, Any] = {"max_tokens": 10, "sampling": Sampling(temperature=1.0, seed=3)}
    talk = Conversation(stage.language, system="Be brief.", documents={"a.md": "# A\n"}, **options)
    for question in ("One?", "Two?", "Three?"):
        list(talk.reply(question))
    talk.save(tmp_path / "talk")
    list(talk.reply("Four?"))
    language, _ = model_of(build, letters, request.node.callspec.params["stage"])
    other = Conversation(language, **options)
    other.load(tmp_path / "talk")
    assert (other.system, other.documents) == ("Be brief.", {"a.md": "# A\n"})
    list(other.reply("Four?"))
    here, there = stage.answers[-2:]
    assert (there.request.ids, there.ids) == (here.request.ids, here.ids)
    assert there.reuse is not None
    assert here.reuse is not None
    assert there.reuse.reused == here.reuse.reused
    assert stage.reused > len(stage.answers[1].request.ids)
    assert other.turns[:3] == talk.turns[:3]
    other.rewind(2)
    list(other.reply("Another."))
    assert stage.reused == parted(stage.answers[2], stage.answers[-1].request.ids)
    check_alone(language.model, *stage.answers[-2:])
    assert not any(snapshot.pins for snapshot in language.engine.memory.prefixes.snapshots.values())


def test_another_arithmetic_is_taken_where_it_is_asked_for_and_kept_apart(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Conversation(stage.language)
    stage.say(talk, "One?", f"So.\n{THINK_END}\nYes.")
    talk.save(tmp_path / "talk")
    here = fingerprint.arithmetic(stage.language.model)
    monkeypatch.setattr(fingerprint, "arithmetic", lambda model: here | {"torch": "another"})
    other = Conversation(stage.language)
    with pytest.raises(DataError, match="must have been computed by this machine's arithmetic"):
        other.load(tmp_path / "talk")
    assert other.turns == []
    other.load(tmp_path / "talk", inexact=True)
    stage.say(other, "Two?", "No.")
    assert stage.answers[-1].request.cache_salt != ""
    assert stage.reused == parted(stage.answers[0], stage.answers[-1].request.ids)
    other.save(tmp_path / "other")
    with pytest.raises(DataError, match="inexact is True there"):
        talk.load(tmp_path / "other")


def test_a_session_that_is_no_conversation_is_refused(stage: Stage, tmp_path: Path) -> None:
    talk = Conversation(stage.language, system="Be brief.")
    stage.say(talk, "One?", "Yes.")
    stage.language.engine.session(stage.answers[0], extra={"conversation": {"turns": 3}}).save(tmp_path / "other")
    with pytest.raises(
        DataError, match=r"other: must be a conversation that was saved; got a session of another kind$"
    ):
        talk.load(tmp_path / "other")
    assert (talk.system, len(talk.turns)) == ("Be brief.", 1)


def test_an_empty_conversation_is_saved_too(stage: Stage, tmp_path: Path) -> None:
    Conversation(stage.language, system="Be brief.").save(tmp_path / "talk")
    talk = Conversation(stage.language)
    talk.load(tmp_path / "talk")
    assert talk.messages == [{"role": "system", "content": "Be brief."}]


def test_reading_that_was_stopped_goes_on_from_there(stage: Stage) -> None:
    talk = Conversation(stage.language, documents={"a.md": PROSE * 6})
    places = talk.read()
    next(places)
    _, known, total = next(places)
    places.close()
    assert 0 < known < total
    assert [reused for reused, _, _ in talk.read()][-1] == known


def test_where_reading_was_stopped_is_not_held_for_the_end_of_the_documents(stage: Stage, tmp_path: Path) -> None:
    talk = Conversation(stage.language, documents={"a.md": PROSE * 6})
    places = talk.read()
    next(places)
    next(places)
    places.close()
    *_, (_, known, total) = talk.read()
    assert known == total
    for turn in range(3):
        stage.say(talk, f"question {turn}", "Yes.")
    talk.save(tmp_path / "talk")
    header, _ = read_header(tmp_path / "talk")
    assert header.snapshots[0] == (total, "end")


def test_documents_are_read_before_the_first_question(stage: Stage, build: Build) -> None:
    texts = {"a.md": PROSE * 6, "b.md": "<SPECIAL_11> is no control token here\n"}
    talk = Conversation(stage.language, system="Read.", documents=texts)
    read = list(talk.read())
    places, totals = [place for _, place, _ in read], {total for _, _, total in read}
    assert {reused for reused, _, _ in read} == {0}
    assert places == sorted(set(places))
    assert totals == {places[-1]}
    assert len(places) > 3
    before = stage.language.engine.counts.read_tokens
    stage.say(talk, "What is it?", "Yes.")
    assert stage.reused == places[-1]
    prompt, reply = stage.answers[-1].request.ids, stage.answers[-1].ids
    assert stage.language.engine.counts.read_tokens - before == len(prompt) - places[-1] + len(reply)
    [content] = [message["content"] for message in talk.messages if message["role"] == "system"]
    assert content.startswith("Read.\n\n")
    assert all(f'<document name="{name}">\n{text}\n</document>' in content for name, text in texts.items())
    check_alone(stage.language.model, stage.answers[-1])


def test_another_system_message(stage: Stage) -> None:
    talk = Conversation(stage.language, system="Be brief.")
    stage.say(talk, "One?", "Yes.")
    with pytest.raises(RequestError, match=r"^messages\[0\].content: "):
        talk.instruct("\udcff")
    assert talk.system == "Be brief."
    talk.instruct("Be long.")
    stage.say(talk, "Two?", "No.")
    assert stage.reused == 0
    assert talk.messages[0] == {"role": "system", "content": "Be long."}
    check_alone(stage.language.model, *stage.answers)


def test_a_variable_that_the_template_does_not_take_is_refused(stage: Stage) -> None:
    talk = Conversation(stage.language, variables={"enable_thoughts": True})
    with pytest.raises(RequestError, match=r"^enable_thoughts: must be a variable of the chat template"):
        list(talk.reply("One?"))
