"""An engine's answers are those of `naive.py`, whatever else it does at the time."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nemotron_h.config.engine import EngineConfig
from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import CapacityError, ConfigError, RequestError, ShapeError
from nemotron_h.grid import BLOCK
from nemotron_h.inference.engine import Engine
from nemotron_h.inference.prefix import Cut
from nemotron_h.inference.request import Answer, Finish, Request
from nemotron_h.model.check import Arithmetic
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.linear import Linear
from nemotron_h.ops.linear import linear
from nemotron_h.text.tokenizer import Tokenizer
from tests.inference.serving import alone, budget, check_alone, check_conserved

Build = Callable[..., Hybrid]
PRECISIONS = ["float32", "bfloat16", "int8", "int4"]
SMALL = EngineConfig(max_running=4, memory_bytes=4_000_000, portion_tokens=96, poisoned=True)


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 352, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def answered(engine: Engine, *requests: Request) -> list[Answer]:
    """All answers, once all have ended."""
    answers = list(chain.from_iterable([engine.add(request) for request in requests]))
    engine.run()
    return answers


@pytest.mark.parametrize("precision", PRECISIONS)
def test_many_at_once_are_each_alone(build: Build, precision: str) -> None:
    model = build(precision=precision)
    engine = Engine(model, config=SMALL)
    requests = [
        Request(
            ids=ids(length, seed=length),
            max_tokens=3 + length % 7,
            sampling=Sampling(temperature=length % 2, seed=length),
            logprobs=length % 3,
        )
        for length in (1, 2, 63, 64, 65, 95, 96, 97, 200, 255, 256, 257, 300)
    ]
    answers = answered(engine, *requests)
    check_alone(model, *answers)
    check_conserved(engine)
    assert all(answer.finish is Finish.LENGTH for answer in answers)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_identical_prompt_reads_nothing(build: Build, precision: str) -> None:
    model = build(precision=precision)
    engine = Engine(model, config=SMALL)
    request = Request(ids=ids(150), max_tokens=1, logprobs=3)
    first, again = (answered(engine, request)[0] for _ in range(2))
    assert engine.counts.read_tokens == 150
    assert first.reuse is not None
    assert again.reuse is not None
    assert (first.reuse.cut, first.reuse.reused) == (Cut.NEW, 0)
    assert (again.reuse.cut, again.reuse.matched, again.reuse.reused) == (Cut.WHOLE, 150, 150)
    check_alone(model, first, again)


@pytest.mark.parametrize("length", [64, 65, 96, 97, 128, 129, 256, 257])
def test_the_next_turn_begins_where_the_last_ended(build: Build, length: int) -> None:
    """Also at prompts one token beyond a chunk, a portion or a page."""
    model = build()
    engine = Engine(model, config=SMALL)
    (first,) = answered(engine, Request(ids=ids(length), max_tokens=9, sampling=Sampling(temperature=1.0), logprobs=0))
    longer = [*ids(length), *first.ids, *ids(30, seed=1)]
    (second,) = answered(engine, Request(ids=longer, max_tokens=9, sampling=Sampling(temperature=1.0), logprobs=0))
    assert second.reuse is not None
    assert second.reuse.reused == length + 8  # all but the last token drawn, which nobody has read
    assert second.reuse.cut is Cut.NEW
    check_alone(model, first, second)
    check_conserved(engine)


def test_a_shared_prefix_is_reused_whole_once_it_is_known_to_be_shared(build: Build) -> None:
    model = build()
    engine = Engine(model, config=SMALL)
    prompts = [[*ids(130), *ids(20, seed=last)] for last in range(1, 4)]
    reuses = []
    for prompt in prompts:
        (answer,) = answered(engine, Request(ids=prompt, max_tokens=2, logprobs=0))
        check_alone(model, answer)
        reuses.append((answer.reuse.matched, answer.reuse.reused, answer.reuse.cut))  # type: ignore[union-attr]
    assert reuses == [(0, 0, Cut.NEW), (130, 0, Cut.NOT_TAKEN), (130, 130, Cut.NEW)]


def test_a_boundary_that_the_caller_names_is_reused_the_first_time(build: Build) -> None:
    engine = Engine(build(), config=SMALL)
    first = Request(ids=[*ids(80), *ids(9, seed=1)], max_tokens=1, boundaries=[80])
    second = Request(ids=[*ids(80), *ids(9, seed=2)], max_tokens=1)
    answers = [answered(engine, request)[0] for request in (first, second)]
    assert [answer.reuse.reused for answer in answers] == [0, 80]  # type: ignore[union-attr]
    check_alone(engine.model, *answers)


def test_identical_requests_at_once_read_their_prompt_once(build: Build) -> None:
    model = build(precision="bfloat16")
    engine = Engine(model, config=replace(SMALL, max_running=8))
    answers = answered(engine, *[Request(ids=ids(140), max_tokens=12)] * 8)
    assert len({tuple(answer.ids) for answer in answers}) == 1
    check_alone(model, answers[0])
    assert engine.counts.read_tokens == 140 + 8 * 11


def test_prompts_at_once_that_begin_alike_read_that_once(build: Build) -> None:
    engine = Engine(build(), config=SMALL)
    answers = answered(engine, *[Request(ids=[*ids(200), *ids(30, seed=last)], max_tokens=2) for last in range(1, 5)])
    assert [answer.reuse.reused for answer in answers] == [0, 200, 200, 200]  # type: ignore[union-attr]
    check_alone(engine.model, *answers)


def test_completions_of_one_request_differ_by_their_seed_alone(build: Build) -> None:
    engine = Engine(build(), config=SMALL)
    request = Request(ids=ids(100), max_tokens=8, n=3, sampling=Sampling(temperature=1.0, seed=5), logprobs=1)
    answers = answered(engine, request)
    check_alone(engine.model, *answers)
    assert [answer.index for answer in answers] == [0, 1, 2]
    assert len({tuple(answer.ids) for answer in answers}) == 3
    assert engine.counts.read_tokens == 100 + 3 * 7
    (alike,) = answered(engine, replace(request, n=1, sampling=Sampling(temperature=1.0, seed=7)))
    assert alike.ids == answers[2].ids


@pytest.mark.parametrize("precision", PRECISIONS)
def test_neighbours_change_nothing_in_batches_of_1_to_17(build: Build, precision: str) -> None:
    model = build(precision=precision)
    request = Request(ids=ids(70), max_tokens=6, logprobs=1)
    for size in range(1, 18):
        engine = Engine(model, config=EngineConfig(max_running=17, memory_bytes=6_000_000, portion_tokens=300))
        others = [Request(ids=ids(3 * other, seed=other), max_tokens=1 + other) for other in range(1, size)]
        answers = answered(engine, *others[: size // 2], request, *others[size // 2 :])
        check_alone(model, answers[size // 2])


def test_a_long_prompt_keeps_nobody_waiting_for_more_than_a_portion(build: Build) -> None:
    """Counted in work: between two tokens of a stream lie one portion of prompts and one token of each stream."""
    model = build()
    engine = Engine(model, config=replace(SMALL, memory_bytes=20_000_000))
    streams = [engine.add(Request(ids=ids(5, seed=seed), max_tokens=60))[0] for seed in (1, 2)]
    while not all(stream.ids for stream in streams):
        engine.step()
    (long,) = engine.add(Request(ids=ids(4000), max_tokens=2))
    while long.begun is None:
        before, read = [len(stream.ids) for stream in streams], engine.counts.read_tokens
        engine.step()
        assert engine.counts.read_tokens - read <= SMALL.portion_tokens + len(streams)
        assert [len(stream.ids) for stream in streams] == [count + 1 for count in before]
    engine.run()
    check_alone(model, *streams, long)


def test_a_short_prompt_is_not_kept_waiting_by_a_long_one(build: Build) -> None:
    engine = Engine(build(), config=replace(SMALL, memory_bytes=20_000_000))
    (long,) = engine.add(Request(ids=ids(4000), max_tokens=2))
    engine.step()
    (short,) = engine.add(Request(ids=ids(90, seed=1), max_tokens=2))
    for _ in range(3):
        engine.step()
    assert short.begun is not None
    assert long.begun is None
    engine.run()
    check_alone(engine.model, long, short)


def test_short_prompts_share_a_pass(build: Build) -> None:
    engine = Engine(build(), config=SMALL)
    for seed in range(4):
        engine.add(Request(ids=ids(20, seed=seed), max_tokens=1))
    engine.step()
    assert engine.counts.passes == 1
    assert not engine.scheduler.running


def test_who_does_not_fit_waits_and_who_never_will_is_refused(build: Build) -> None:
    model = build()
    config = EngineConfig(max_running=2, memory_bytes=1_000_000, poisoned=True, max_snapshots=0, portion_tokens=96)
    engine = Engine(model, config=config)
    pages = engine.memory.sizes.pages
    half = Request(ids=ids(pages * BLOCK // 2 + 1), max_tokens=2)
    answers = [engine.add(replace(half, ids=ids(len(half.ids), seed=seed)))[0] for seed in range(3)]
    for _ in range(4):
        engine.step()
    assert (len(engine.scheduler.running), len(engine.scheduler.queue)) == (1, 2)
    engine.run()
    check_alone(model, *answers)
    check_conserved(engine)
    with pytest.raises(
        CapacityError, match=r"^request: needs [\d,]+ bytes of keys and values for .* tokens; the engine"
    ):
        engine.add(Request(ids=ids(pages * BLOCK), max_tokens=2))


def test_snapshots_go_where_pages_are_needed(build: Build) -> None:
    model = build()
    engine = Engine(
        model, config=EngineConfig(max_running=1, memory_bytes=1_500_000, portion_tokens=300, poisoned=True)
    )
    for seed in range(8):
        (answer,) = answered(engine, Request(ids=ids(engine.memory.sizes.pages * 60, seed=seed), max_tokens=2))
        check_alone(model, answer)
        check_conserved(engine)


def test_memory_that_does_not_hold_those_that_run_is_refused(build: Build) -> None:
    with pytest.raises(
        CapacityError, match=r"^memory_bytes: must hold 4 running sequences of [\d,]+ bytes.*got 100,000"
    ):
        Engine(build(), config=replace(SMALL, memory_bytes=100_000))
    with pytest.raises(CapacityError, match=r"^pages_fraction: must leave room for a page of [\d,]+ bytes; got 0.001"):
        Engine(build(), config=replace(SMALL, pages_fraction=0.001))


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_a_cancelled_request_leaves_at_once_and_what_it_read_is_reused(build: Build, after: int) -> None:
    model = build()
    engine = Engine(model, config=SMALL)
    (gone,) = engine.add(Request(ids=ids(150), max_tokens=20))
    (other,) = engine.add(Request(ids=ids(40, seed=1), max_tokens=12))
    for _ in range(after):
        engine.step()
    read = dict(zip((one.answer for one in engine.scheduler.running), engine.scheduler.positions, strict=True))
    engine.cancel(gone)
    engine.cancel(gone)
    check_conserved(engine)
    assert gone.finish is Finish.CANCELLED
    engine.run()
    check_alone(model, gone, other)
    longer = [*gone.request.ids, *gone.ids, 7]
    (again,) = answered(engine, Request(ids=longer, max_tokens=3))
    check_alone(model, again)
    assert again.reuse is not None
    assert again.reuse.reused == read.get(gone, 0)


def test_who_leaves_before_anything_was_read_leaves_no_snapshot(build: Build) -> None:
    engine = Engine(build(), config=SMALL)
    (gone,) = engine.add(Request(ids=ids(150)))
    engine.scheduler.admit()  # as where a step is interrupted before its pass
    engine.cancel(gone)
    assert not engine.memory.prefixes.snapshots
    check_conserved(engine)


def test_a_prompt_that_ends_where_another_was_cancelled_is_answered(build: Build) -> None:
    """Nobody knows the logits there yet: its last tokens are read again, once."""
    model = build()
    engine = Engine(model, config=SMALL)
    (gone,) = engine.add(Request(ids=ids(150), max_tokens=20))
    engine.step()
    (read,) = engine.scheduler.positions
    assert 0 < read < 150
    engine.cancel(gone)
    request = Request(ids=ids(150)[:read], max_tokens=3, logprobs=0)
    cold, again = (answered(engine, request)[0] for _ in range(2))
    check_alone(model, cold, again)
    check_conserved(engine)
    assert cold.reuse is not None
    assert again.reuse is not None
    assert (cold.reuse.reused, cold.reuse.cut) == (0, Cut.NOT_TAKEN)
    assert (again.reuse.reused, again.reuse.cut) == (read, Cut.WHOLE)


def test_an_interrupted_pass_is_done_again_to_the_same_bits(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    engine = Engine(model, config=SMALL)
    requests = [Request(ids=ids(130, seed=seed), max_tokens=10, sampling=Sampling(temperature=1.0)) for seed in (1, 2)]
    answers = [engine.add(request)[0] for request in requests]
    for _ in range(6):
        engine.step()
    whole = model.backbone.layers[3].forward

    def broken(*args: Any, **options: Any) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.backbone.layers[3], "forward", broken)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert model.backbone.layers[3].forward == whole
    check_conserved(engine)
    assert len(engine.scheduler.queue) == 2
    engine.run()
    check_alone(model, *answers)
    check_conserved(engine)


def test_logits_that_are_no_numbers_end_one_request_and_nobody_else(build: Build) -> None:
    model = build()
    with torch.no_grad():
        model.backbone.embeddings.weight[351] = torch.nan
    engine = Engine(model, config=SMALL)
    good, bad = [token % 351 for token in ids(60)], [*[token % 351 for token in ids(60, seed=1)], 351]
    first = engine.add(Request(ids=good, max_tokens=12, logprobs=0))[0]
    engine.step()
    (second,) = engine.add(Request(ids=bad, max_tokens=5))
    (third,) = engine.add(Request(ids=good[:50], max_tokens=5))
    engine.run()
    assert (second.finish, second.ids) == (Finish.ERROR, [])
    assert second.error is not None
    assert second.error.startswith("logits: must be finite; ")
    check_alone(model, first, third)
    check_conserved(engine)
    assert not any(351 in snapshot.node.keys for snapshot in engine.memory.prefixes.snapshots.values())


def test_answers_end_where_they_should(build: Build, tokenizer: Tokenizer) -> None:
    model = build()
    engine = Engine(model, tokenizer, SMALL)
    request = Request(ids=ids(30), max_tokens=24, sampling=Sampling(temperature=1.0))
    (whole,) = answered(engine, request)
    assert whole.text == tokenizer.decode(whole.ids)
    stop = whole.text[7:10]
    (stopped,) = answered(engine, replace(request, stop=stop))
    assert stopped.finish is Finish.STOP
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.ids == whole.ids[: len(stopped.ids)]
    end = whole.ids[5]
    (ended,) = answered(engine, replace(request, ends=[end]))
    assert (ended.finish, ended.ids) == (Finish.END, whole.ids[: whole.ids.index(end)])
    (late,) = answered(engine, replace(request, max_seconds=1e-9))
    assert (late.finish, late.ids) == (Finish.TIME, [])


def test_time_is_up_in_the_middle_of_an_answer(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(build(), config=SMALL)
    (answer,) = engine.add(Request(ids=ids(9), max_tokens=50, max_seconds=100.0))
    for _ in range(5):
        engine.step()
    now = time.perf_counter()
    monkeypatch.setattr(time, "perf_counter", lambda: now + 101)
    engine.step()
    assert (answer.finish, len(answer.ids)) == (Finish.TIME, 5)
    check_alone(engine.model, answer)


def test_a_stream_gives_what_its_answers_get_and_others_go_on(build: Build, tokenizer: Tokenizer) -> None:
    engine = Engine(build(), tokenizer, SMALL)
    (other,) = engine.add(Request(ids=ids(20, seed=3), max_tokens=30))
    request = Request(ids=ids(40), max_tokens=6, n=2, logprobs=1)
    updates = list(engine.stream(request))
    for index in range(2):
        own = [update for update in updates if update.answer.index == index]
        answer = own[0].answer
        assert [update.token for update in own[:-1]] == answer.ids
        assert own[-1].token is None
        assert "".join(update.text for update in own) == answer.text == tokenizer.decode(answer.ids)
        assert [update.logprobs for update in own[:-1]] == answer.logprobs
    assert other.ids


def test_a_stream_that_is_closed_cancels_its_request(build: Build) -> None:
    engine = Engine(build(), config=SMALL)
    stream = engine.stream(Request(ids=ids(40), max_tokens=60))
    answer = next(stream).answer
    stream.close()
    assert answer.finish is Finish.CANCELLED
    assert not engine.scheduler.running
    check_conserved(engine)


def test_two_streams_may_be_read_in_turns(build: Build) -> None:
    engine = Engine(build(), config=SMALL)
    streams = [engine.stream(Request(ids=ids(40, seed=seed), max_tokens=5)) for seed in (1, 2)]
    found: Sequence[list[int]] = ([], [])
    for _ in range(6):
        for stream, own in zip(streams, found, strict=True):
            own += [update.token for update in [next(stream)] if update.token is not None]
    assert list(found) == [
        alone(engine.model, engine.add(Request(ids=ids(40, seed=seed), max_tokens=5))[0])[0] for seed in (1, 2)
    ]


def test_a_hook_steers_its_own_request(build: Build) -> None:
    def only_even(generated: Sequence[int], logits: Tensor) -> Tensor:
        logits[1::2] = -torch.inf
        return logits

    engine = Engine(build(), config=SMALL)
    free, held = (
        Request(ids=ids(40), max_tokens=10, sampling=Sampling(temperature=2.0), hook=hook) for hook in (None, only_even)
    )
    first, second = answered(engine, free, held)
    check_alone(engine.model, first, second)
    assert any(token % 2 for token in first.ids)
    assert not any(token % 2 for token in second.ids)


def test_a_hook_that_raises_ends_its_own_request(build: Build) -> None:
    engine = Engine(build(), config=SMALL)
    broken = Request(ids=ids(40), max_tokens=5, hook=lambda generated, logits: logits[generated[1]])
    first, second = answered(engine, broken, Request(ids=ids(50, seed=1), max_tokens=9))
    assert first.finish is Finish.ERROR
    assert first.error == "hook: must not raise; got IndexError: list index out of range"
    check_alone(engine.model, second)
    check_conserved(engine)


def test_a_session_of_an_answer_has_its_requests_salt(build: Build) -> None:
    engine = Engine(build(), config=SMALL)
    (answer,) = answered(engine, Request(ids=ids(40), max_tokens=2))
    with pytest.raises(RequestError, match=r"^salt: must be left out for an answer, .*; got 'mine'$"):
        engine.session(answer, salt="mine")


def test_completions_of_a_request_that_reuses_nothing_share_what_they_read_and_nobody_else_does(build: Build) -> None:
    engine = Engine(build(), config=SMALL)
    request = Request(ids=ids(100), max_tokens=2, n=3, reuse=False)
    answers = answered(engine, request)
    assert engine.counts.read_tokens == 100 + 3
    answers += answered(engine, request, replace(request, n=1, reuse=True))
    assert engine.counts.read_tokens == 2 * (100 + 3) + 101
    check_alone(engine.model, *answers)


def test_snapshots_stay_where_all_of_them_would_not_make_room(build: Build) -> None:
    model = build()
    engine = Engine(
        model, config=EngineConfig(max_running=2, memory_bytes=1_000_000, portion_tokens=300, poisoned=True)
    )
    pages = engine.memory.sizes.pages
    answered(engine, Request(ids=ids(100), max_tokens=1))
    (long,) = engine.add(Request(ids=ids(20, seed=1), max_tokens=(pages - 3) * BLOCK))
    engine.step()
    (other,) = engine.add(Request(ids=ids(20, seed=2), max_tokens=4 * BLOCK))
    engine.step()
    assert len(engine.scheduler.queue) == 1
    assert engine.memory.prefixes.match(np.array(ids(100))).reused == 100
    engine.cancel(long)
    engine.step()
    assert other.ids
    engine.cancel(other)


def test_reuse_is_separate_by_salt_and_off_where_asked(build: Build) -> None:
    engine = Engine(build(), config=SMALL)
    request = Request(ids=ids(100), max_tokens=1)
    answered(engine, replace(request, cache_salt="one"))
    cuts = []
    for other in (
        replace(request, cache_salt="other"),
        replace(request, cache_salt="one", reuse=False),
        replace(request, cache_salt="one"),
    ):
        (answer,) = answered(engine, other)
        cuts.append((answer.reuse.reused, answer.reuse.cut))  # type: ignore[union-attr]
    assert cuts == [(0, Cut.NEW), (0, Cut.OFF), (100, Cut.WHOLE)]
    off = Engine(build(), config=replace(SMALL, reuse=False))
    assert [answer.reuse.cut for answer in answered(off, request, request)] == [Cut.OFF] * 2  # type: ignore[union-attr]


def test_where_bits_depend_on_cuts_only_whole_portions_of_a_prompts_grid_are_reused(build: Build) -> None:
    model = build()
    engine = Engine(model, config=SMALL, arithmetic=Arithmetic(False, 4, ("rows of 96 x 32",), 0.0))
    calls: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    hidden = model.hidden

    def watched(tokens: Tensor, segments: Any, *rest: Any) -> Tensor:
        calls.append((segments.starts, segments.lengths))
        return hidden(tokens, segments, *rest)

    model.hidden = watched  # type: ignore[method-assign]
    prompts = [[*ids(250), *ids(60, seed=last)] for last in (1, 2, 3)]
    answers = answered(engine, *[Request(ids=prompt, max_tokens=5) for prompt in prompts])
    assert answers[0].reuse is not None
    (again,) = answered(engine, Request(ids=[*prompts[0], *answers[0].ids], max_tokens=2, boundaries=[100]))
    assert again.reuse is not None
    assert again.reuse.reused == 288  # three portions of 96
    assert {place % 96 for place in (snapshot.node.end for snapshot in engine.memory.prefixes.snapshots.values())} == {
        0
    }
    for starts, lengths in calls:
        if max(lengths) > 1:
            assert len(lengths) == 1
            assert starts[0] % 96 == 0
            assert lengths[0] == 96 or starts[0] + lengths[0] in (310, 315)
    check_conserved(engine)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 0}, "^n: must be 1 or above; got 0$"),
        ({"max_seconds": 0.0}, "^max_seconds: must be above 0, or None; got 0.0$"),
        ({"logprobs": 129}, "^logprobs: must lie in 0..128, or None; got 129$"),
        ({"boundaries": [4]}, "^boundaries: must lie in 0..3; got 4$"),
        ({"ids": []}, "^ids: must hold at least one token"),
        ({"ids": [1, 352]}, "^ids: must be integers in 0..351; got 352 at place 1$"),
        ({"max_tokens": 0}, "^max_tokens: must be 1 or above; got 0$"),
        ({"stop": "x"}, "^stop: needs an engine with a tokenizer; got none"),
        ({"ids": 5}, "^ids: must be a sequence of integers; got 5$"),
        ({"ends": 2}, "^ends: must be a collection of integers; got 2$"),
        ({"ends": [None]}, r"^ends: must be integers; got \[None\]$"),
        ({"generated": [352], "max_tokens": 2}, "^generated: must be integers in 0..351; got 352 at place 0$"),
        ({"n": 1.5}, "^n: must be a whole number; got 1.5$"),
        ({"logprobs": 1.5}, "^logprobs: must be a whole number; got 1.5$"),
        ({"boundaries": [1.5]}, "^boundaries: must lie in 0..3; got 1.5$"),
        ({"drawn_from": [1]}, "^drawn_from: must be a tensor, as `drawable` makes it; got"),
        ({"drawn_from": torch.ones(5, dtype=torch.bool)}, r"^drawn_from: must have shape \(352,\); got \(5,\)$"),
        ({"drawn_from": torch.zeros(352, dtype=torch.bool)}, "^drawn_from: must leave tokens to draw"),
        ({"sampling": Sampling(logit_bias={352: 1.0})}, "^logit_bias: must be integers in 0..351; got 352 at place 0$"),
        (
            {"sampling": Sampling(seed=2**63 - 1), "n": 2},
            r"^n: must leave seeds below 2\^63, each completion's own; got 2",
        ),
    ],
)
def test_requests_that_cannot_be_honoured_are_refused_by_name(build: Build, change: dict[str, Any], words: str) -> None:
    engine = Engine(build(), config=SMALL)
    with pytest.raises((RequestError, ShapeError), match=words):
        engine.add(Request(**{"ids": [1, 2, 3], **change}))
    assert not engine.scheduler.queue


def test_what_is_read_for_one_request_alone_is_forgotten_with_it(build: Build) -> None:
    engine = Engine(build(), config=SMALL)
    answers = answered(
        engine, Request(ids=ids(200), max_tokens=4, n=3, reuse=False, sampling=Sampling(temperature=1.0))
    )
    assert sum(answer.reuse.reused for answer in answers if answer.reuse is not None) == 2 * 200  # read once
    assert not engine.memory.prefixes.snapshots
    assert engine.memory.prefixes.tokens == 0
    check_alone(engine.model, *answers)
    check_conserved(engine)


def test_an_answer_that_is_over_goes_no_further(build: Build, tokenizer: Tokenizer) -> None:
    """Its tokens of before hold the stop string."""
    engine, said = Engine(build(), tokenizer, SMALL), tokenizer.encode("so it is")
    request = Request(ids=ids(20), generated=said, max_tokens=len(said) + 20, stop="o i")
    updates = list(engine.stream(request))
    assert [(update.token, update.answer.finish) for update in updates] == [(None, Finish.STOP)]
    assert updates[0].answer.ids == said
    assert updates[0].answer.text == "s"


def test_for_a_page_those_go_that_end_on_it(build: Build) -> None:
    """Those before them on the same way free none."""
    model = build()
    engine = Engine(model, config=budget(model, max_running=1, pages=4, snapshots=16, portion_tokens=96))
    answered(engine, Request(ids=ids(512), max_tokens=1, boundaries=[256]))  # two pages, and places all over them
    on_the_way = {snapshot.node.end for snapshot in engine.memory.prefixes.snapshots.values()} - {512}
    assert on_the_way == {96, 256, 288, 384}
    answered(engine, Request(ids=ids(512, seed=1), max_tokens=1))
    answered(engine, Request(ids=ids(256, seed=2), max_tokens=1))  # one page more
    left = {snapshot.node.end for snapshot in engine.memory.prefixes.along(np.array(ids(512), dtype=np.int64))}
    assert left == {96, 256}  # those that end on the second page went, and no other
    check_conserved(engine)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_running": 0}, "^max_running: must be 1 or above; got 0$"),
        ({"portion_tokens": 0}, "^portion_tokens: must be 1 or above; got 0$"),
        ({"snapshot_folder": "x", "reuse": False}, "^snapshot_folder: needs reuse, which is off"),
        ({"memory_bytes": 0}, "^memory_bytes: must be 1 or above, or None; got 0$"),
        ({"pages_fraction": 1.5}, "^pages_fraction: must lie in 0..1; got 1.5$"),
        ({"audit_fraction": -0.1}, "^audit_fraction: must lie in 0..1; got -0.1$"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig(**change)


def test_a_machine_where_bits_depend_on_rows_is_told_and_hits_are_still_what_cold_runs_are(
    build: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A product that rounds otherwise with few rows, as a CPU's might."""

    def product(self: Linear, x: Tensor) -> Tensor:
        y = linear(x, self.weight)
        return y if len(x) >= 48 else (y.double() * (1 + 2**-20)).to(y.dtype)

    monkeypatch.setattr(Linear, "forward", product)
    monkeypatch.setattr("nemotron_h.machine.cache_folder", lambda: tmp_path)
    model = build()
    with caplog.at_level(logging.WARNING):
        engine = Engine(model, config=SMALL)
    assert not engine.arithmetic.holds
    assert "one arithmetic does not hold on this machine (" in caplog.text
    request = Request(ids=ids(400), max_tokens=1, logprobs=3)
    cold, hit = (answered(engine, request)[0] for _ in range(2))
    assert hit.reuse is not None
    assert hit.reuse.reused == 384
    assert hit.logprobs == cold.logprobs


def test_rows_are_padded_to_the_multiple_that_was_found(build: Build) -> None:
    model = build()
    multiples = set()
    hidden = model.hidden

    def watched(tokens: Tensor, segments: Any, *rest: Any) -> Tensor:
        multiples.add(segments.rows % 16)
        return hidden(tokens, segments, *rest)

    model.hidden = watched  # type: ignore[method-assign]
    engine = Engine(model, config=SMALL, arithmetic=Arithmetic(True, 16, (), 0.0))
    answers = answered(engine, *[Request(ids=ids(50, seed=seed), max_tokens=4) for seed in range(3)])
    assert multiples == {0}
    check_alone(model, *answers)
