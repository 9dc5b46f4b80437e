"""Thousands of requests through one small engine: nothing grows, nothing is lost."""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from random import Random

import psutil
import pytest

from nemotron_h.config.sampling import Sampling
from nemotron_h.inference.engine import Engine
from nemotron_h.inference.request import Answer, Finish, Request
from nemotron_h.model.hybrid import Hybrid
from tests.inference.serving import alone, budget, check_answer, check_conserved
from tests.inference.test_engine import ids

Build = Callable[..., Hybrid]
MEBIBYTE = 2**20


def small(model: Hybrid) -> Engine:
    return Engine(model, config=budget(model, pages=9, snapshots=6, max_running=4, portion_tokens=96))


def soak(engine: Engine, *, requests: int, seed: int, sample: int) -> None:
    """So many requests of mixed lengths, some of which go on from others, some cancelled: all are answered, the counts
    add up, and a sample is what a plain loop gives."""
    before = deepcopy(engine.counts)
    rng, answers = Random(seed), list[Answer]()
    while len(answers) < requests:
        prompt = ids(rng.choice([5, 40, 150, 400]) + rng.randrange(30), seed=rng.randrange(20))
        if answers and rng.random() < 0.4:
            earlier = rng.choice(answers[-20:])
            prompt = [*earlier.request.ids, *earlier.ids, *prompt[:20]][:600]
        sampling = Sampling(temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(3))
        answers += engine.add(
            Request(ids=prompt, max_tokens=rng.randint(1, 16), sampling=sampling, logprobs=rng.choice([None, 1]))
        )
        for _ in range(rng.randrange(8)):
            engine.step()
        under_way = [answer for answer in answers[-20:] if answer.finish is None]
        if under_way and rng.random() < 0.1:
            engine.cancel(rng.choice(under_way))
    engine.run()
    check_conserved(engine)
    assert {answer.finish for answer in answers} == {Finish.LENGTH, Finish.CANCELLED}
    whole = [answer for answer in answers if answer.finish is Finish.LENGTH]
    assert all(len(answer.ids) == answer.request.max_tokens for answer in whole)
    for answer in rng.sample(answers, sample):
        check_answer(answer, *alone(engine.model, answer))

    counts, reuses = engine.counts, [answer.reuse for answer in answers if answer.reuse is not None]
    assert counts.requests - before.requests == len(answers)
    assert counts.prompt_tokens - before.prompt_tokens == sum(reuse.prompt for reuse in reuses)
    assert counts.matched_tokens - before.matched_tokens == sum(reuse.matched for reuse in reuses)
    assert counts.reused_tokens - before.reused_tokens == sum(reuse.reused for reuse in reuses)
    lost = Counter[str]()
    for reuse in reuses:
        lost[reuse.cut] += reuse.prompt - reuse.reused
    assert counts.lost_tokens - before.lost_tokens == +lost
    # whole answers read what was not reused of their prompts, and each token but the last; others no more than that
    most, least = (sum(map(read, some)) for some in (answers, whole))
    assert least <= counts.read_tokens - before.read_tokens <= most


def read(answer: Answer) -> int:
    """Tokens that were read for an answer, at most."""
    return len(answer.request.ids) - answer.reuse.reused + max(0, len(answer.ids) - 1) if answer.reuse else 0


def test_sixty_requests_are_all_answered(build: Build) -> None:
    soak(small(build()), requests=60, seed=0, sample=20)


@pytest.mark.slow
def test_two_thousand_requests_leave_memory_as_it_was(build: Build) -> None:
    engine = small(build())
    engine.memory.prefixes.remembered_tokens = 10_000  # reached before memory is looked at
    for seed in range(2):
        soak(engine, requests=250, seed=seed, sample=5)
    before = psutil.Process().memory_info().rss
    for seed in range(2, 10):
        soak(engine, requests=250, seed=seed, sample=5)
    grown = psutil.Process().memory_info().rss - before
    # 4 MiB is 2 KiB a request: less than its prompt's keys and its last logits, were they kept. Measured: under 1 MiB.
    assert grown < 4 * MEBIBYTE, grown
