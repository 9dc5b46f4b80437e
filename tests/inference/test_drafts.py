"""What was read ahead changes no token, and leaves nothing where it was in vain."""

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from nemotron_h.config.engine import EngineConfig
from nemotron_h.config.sampling import Sampling
from nemotron_h.grid import AHEAD, CHUNK
from nemotron_h.inference.drafts import FIRST_CHANCE, STALE, Drafts, Lookup
from nemotron_h.inference.engine import Engine
from nemotron_h.inference.request import Answer, Finish, Request
from nemotron_h.inference.sampling import Sampler
from nemotron_h.model.check import Arithmetic
from nemotron_h.model.hybrid import Hybrid
from tests.inference.serving import Alone, budget, check_alone, foretold

Build = Callable[..., Hybrid]

WORDS = [5, 6, 7, 8, 9]


def following(*tokens: int) -> Lookup:
    lookup = Lookup()
    lookup.follow(tokens)
    return lookup


def test_what_followed_before_is_the_draft() -> None:
    tokens = [*WORDS, 1, 2, *WORDS[:2]]
    assert following(*tokens).draft(tokens, 4) == [7, 8, 9, 1]


def test_the_latest_of_the_longest_matches_counts() -> None:
    tokens = [1, 2, 3, 4, 50, 3, 4, 60, 1, 2, 3, 4]
    assert following(*tokens).draft(tokens, 1) == [50]
    tokens = [1, 2, 50, 1, 2, 60, 1, 2]
    assert following(*tokens).draft(tokens, 1) == [60]


def test_without_a_match_there_is_none() -> None:
    for tokens in ([], [1], [1, 2, 3], [1, 2, 3, 1]):
        lookup = following(*tokens)
        assert lookup.draft(tokens, 3) == []
        assert lookup.chances(3) == []


def test_a_match_that_runs_into_the_end_goes_round() -> None:
    tokens = [4, 1, 2, 3, 1, 2]
    assert following(*tokens).draft(tokens, 7) == [3, 1, 2, 3, 1, 2, 3]


def test_it_follows_a_sequence_token_by_token() -> None:
    """As if it had been given at once, but for what it has learnt."""
    generator = random.Random(0)
    tokens = [generator.randrange(4) for _ in range(300)]
    grown = Lookup()
    for end in range(1, len(tokens)):
        grown.follow(tokens[:end])
        place = grown.draft(tokens[:end], 1)
        if place:
            assert any(tokens[k] == place[0] for k in range(end))
    assert bool(grown.draft(tokens, 1)) == bool(following(*tokens).draft(tokens, 1))


def test_chances_follow_what_came() -> None:
    lookup, tokens = Lookup(), [*WORDS, *WORDS[:2]]
    lookup.follow(tokens)
    (before,) = lookup.chances(1)
    assert before == pytest.approx(FIRST_CHANCE)
    for _ in range(20):
        for word in (*WORDS[2:], *WORDS[:2]):
            tokens.append(word)
            lookup.follow(tokens)
    *_, last = lookup.chances(AHEAD)
    assert last > 0.7
    chances = lookup.chances(AHEAD)
    assert chances == sorted(chances, reverse=True)
    tokens.append(99)
    lookup.follow(tokens)
    assert lookup.chances(1) == []


def test_odds_are_of_matches_of_their_length() -> None:
    """Matches of two tokens that are always wrong say nothing of long ones that are right."""
    lookup, tokens = Lookup(), list[int]()
    for number in range(40):
        tokens += [1, 2, 100 + number]
        lookup.follow(tokens)
    tokens += [1, 2]
    lookup.follow(tokens)
    assert lookup.chances(1)[0] < 0.1


def planned(drafts: Drafts, lookup: Lookup, tokens: Sequence[int], room: int = 63) -> int:
    ((draft),) = drafts.plan([lookup], [tokens], [room])
    return len(draft)


def repetitive() -> tuple[Lookup, list[int]]:
    lookup, tokens = Lookup(), WORDS * 2
    for _ in range(20):
        for word in WORDS:
            tokens.append(word)
            lookup.follow(tokens)
    return lookup, tokens


def measured(multiple: int = 1, **seconds: float) -> Drafts:
    """r1: of a pass of one row, and so on."""
    drafts = Drafts("auto", multiple)
    for name, value in seconds.items():
        drafts.measured(1, int(name[1:]) - 1, value)
    return drafts


def test_as_many_are_read_as_pay() -> None:
    known = repetitive()
    assert planned(measured(r1=1.0, r4=1.0, r8=1.0, r12=1.0, r16=1.0), *known) == 15
    assert planned(measured(r1=1.0, r4=1.0, r8=1.0, r12=1.0, r16=9.0), *known) == 11
    assert planned(measured(r1=1.0, r4=4.0, r8=8.0, r12=12.0, r16=16.0), *known) == 0
    assert planned(measured(r1=1.0), *known) == 15  # a row more is guessed to take little, until it is measured
    assert planned(measured(), *known) == 0  # first it is measured what a pass takes without
    assert planned(measured(r1=1.0, r4=1.0), *known, room=2) == 2


def test_rows_that_are_there_anyhow_are_filled() -> None:
    known = repetitive()
    assert planned(measured(multiple=4, r4=1.0, r8=9.0, r12=9.0, r16=9.0), *known) == 3
    assert planned(measured(multiple=16, r16=1.0), *known) == 15


def test_where_nothing_is_likely_nothing_is_read() -> None:
    lookup, tokens = Lookup(), list[int]()
    for number in range(40):
        tokens += [1, 2, 100 + number]
        lookup.follow(tokens)
    tokens += [1, 2]
    assert planned(measured(r1=1.0, r4=1.3, r8=1.5, r12=1.7, r16=2.0), lookup, tokens) == 0


def test_a_measurement_is_forgotten_after_a_while() -> None:
    known, drafts = repetitive(), measured(r1=1.0, r16=99.0)
    assert planned(drafts, *known) == 11
    for _ in range(STALE):
        drafts.measured(1, 0, 1.0)
    assert planned(drafts, *known) == 15


def test_the_likeliest_of_all_sequences_are_read() -> None:
    drafts = Drafts("auto", 1)
    drafts.measured(2, 0, 1.0)
    drafts.measured(2, 2, 1.0)
    for rows in (8, 12, 16):
        drafts.measured(2, rows - 2, 50.0)
    likely, fresh = repetitive(), (following(*WORDS, *WORDS[:2]), [*WORDS, *WORDS[:2]])
    lookups, tokens = zip(likely, fresh, strict=True)
    assert list(map(len, drafts.plan(lookups, tokens, [63, 63]))) == [2, 0]
    assert list(map(len, drafts.plan(lookups, tokens, [1, 63]))) == [1, 1]


def test_modes() -> None:
    known = repetitive()
    assert planned(Drafts("always", 1), *known) == AHEAD
    assert planned(Drafts("off", 1), *known) == 0


# in an engine


def requests(count: int, **ways: Any) -> list[Request]:
    """Prompts of a fixed seed, half of them greedy."""
    found = []
    for seed in range(count):
        generator = random.Random(seed)
        ids = [generator.randrange(60) for _ in range(generator.choice([1, 3, 60, 64, 65, 130]))]
        sampling = Sampling(temperature=seed % 2 * 0.8, seed=seed, repetition_penalty=1 + 0.1 * (seed % 3))
        known = {"ids": ids, "max_tokens": generator.choice([1, 2, 9, 30]), "sampling": sampling, "logprobs": 1}
        found.append(Request(**known | ways))
    return found


def served(engine: Engine, asked: Sequence[Request]) -> list[Answer]:
    answers = [answer for request in asked for answer in engine.add(request)]
    engine.run()
    return answers


def config(model: Hybrid, **settings: Any) -> EngineConfig:
    return budget(model, **{"pages": 12, "snapshots": 6, "max_running": 3, "drafts": "always"} | settings)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
def test_what_is_read_ahead_changes_no_token(
    build: Build, precision: str, monkeypatch: pytest.MonkeyPatch, count: int = 24
) -> None:
    """Right as far as chance has it, wrong from there on."""
    model = build(precision=precision)
    if model.quantized:  # as it is loaded: calls of a few rows are recorded
        model.requires_grad_(False)
        model.pack()
    alone = Alone(model)
    engine = Engine(model, config=config(model, audit_fraction=1.0, pages=200, snapshots=2 * count))
    foretold(monkeypatch, engine, alone, random.Random(1))
    answers = served(engine, requests(count))
    check_alone(alone, *answers)
    counts = engine.counts
    assert 0.2 < counts.accepted_tokens / counts.drafted_tokens < 0.9
    assert counts.accepted_tokens == sum(answer.accepted for answer in answers)
    assert counts.drafted_tokens == sum(answer.drafted for answer in answers)
    assert all(answer.accepted <= answer.drafted for answer in answers)
    recorded = [call for call in engine._calls._calls.values() if call is not None]
    assert recorded or not model.quantized
    # what they left is right as well: their prompts and answers again, one token further
    turns = [[*answer.request.ids, *answer.ids, 3] for answer in answers]
    again = served(engine, [replace(a.request, ids=ids) for a, ids in zip(answers, turns, strict=True)])
    check_alone(alone, *again)
    assert engine.counts.audits > 0
    assert engine.memory.distrusted is None


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
def test_a_thousand_prompts(build: Build, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test_what_is_read_ahead_changes_no_token(build, precision, monkeypatch, count=1000)


def test_fewer_passes_give_the_same_tokens(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(precision="int8")
    request = Request(ids=list(range(40)), max_tokens=100)
    passes = {}
    for mode in ("off", "always"):
        engine = Engine(model, config=config(model, drafts=mode))
        if mode == "always":
            foretold(monkeypatch, engine, Alone(model), None)
        (answer,) = served(engine, [request])
        passes[mode] = engine.counts.passes, answer.ids
        assert engine.counts.read_tokens == 139
    assert passes["off"][1] == passes["always"][1]
    assert passes["off"][0] == 100
    # a draft ends with the chunk: 24 tokens to its end, 64, and the rest
    assert passes["always"][0] <= 1 + 2 + 4 + 1


@pytest.mark.parametrize("last", [1, 2, 10])
def test_an_answer_ends_within_a_draft(build: Build, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    model = build(precision="int8")
    alone = Alone(model)
    plain = Request(ids=list(range(30)), max_tokens=last)
    engine = Engine(model, config=config(model))
    foretold(monkeypatch, engine, alone, None)
    (whole,) = served(engine, [plain])
    assert (whole.finish, len(whole.ids)) == (Finish.LENGTH, last)
    (longer,) = served(engine, [replace(plain, max_tokens=30)])
    end = longer.ids[last]
    (ended,) = served(engine, [replace(plain, max_tokens=30, ends=(end,))])
    assert ended.finish is Finish.END
    assert ended.ids == longer.ids[: longer.ids.index(end)]
    check_alone(alone, whole, longer, ended)


def test_no_draft_goes_over_the_end_of_a_chunk(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the state moves on, and could not go back."""
    model = build(precision="int8")
    engine = Engine(model, config=config(model))
    foretold(monkeypatch, engine, Alone(model), random.Random(2))
    plan = engine._drafts.plan

    def watched(lookups: Any, tokens: Any, rooms: Sequence[int]) -> list[list[int]]:
        drafts = plan(lookups, tokens, rooms)
        for place, draft in zip(engine.scheduler.positions, drafts, strict=True):
            assert place // CHUNK == (place + len(draft)) // CHUNK
        return drafts

    monkeypatch.setattr(engine._drafts, "plan", watched)
    served(engine, [Request(ids=[1, 2, 3], max_tokens=200), Request(ids=list(range(50)), max_tokens=90)])
    assert engine.counts.accepted_tokens > 50


def test_where_bits_depend_on_cuts_nothing_is_read_ahead(build: Build) -> None:
    model = build()
    engine = Engine(model, config=config(model), arithmetic=Arithmetic(False, 16, ("it is made so",), 0.0))
    served(engine, [Request(ids=[1, 2] * 20, max_tokens=30)])
    assert engine.counts.drafted_tokens == 0


def test_an_interrupted_pass_with_drafts_is_done_again(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(precision="int8")
    alone = Alone(model)
    engine = Engine(model, config=config(model))
    foretold(monkeypatch, engine, alone, random.Random(3))
    answers = [engine.add(request)[0] for request in requests(6, max_tokens=40)]
    for answer in answers:
        alone(answer)  # worked out before draws are interrupted
    draws, draw = 0, Sampler.draw

    def interrupted(self: Sampler, logits: Tensor) -> int:
        nonlocal draws
        draws += 1
        if draws % 7 == 0:
            raise KeyboardInterrupt
        return draw(self, logits)

    monkeypatch.setattr("nemotron_h.inference.sequence.Sampler.draw", interrupted)
    while engine.busy:
        with suppress(KeyboardInterrupt):
            engine.step()
    monkeypatch.undo()
    assert draws > 100
    assert engine.counts.accepted_tokens > 0
    check_alone(alone, *answers)
