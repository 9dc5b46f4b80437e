"""What an engine's answers are compared with, and what must hold of its memory at any time."""

from collections import Counter
from dataclasses import replace

from nemotron_h.inference import naive
from nemotron_h.inference.engine import Engine
from nemotron_h.inference.request import Answer, Logprobs
from nemotron_h.inference.sampling import Sampler, logprobs
from nemotron_h.model.hybrid import Hybrid


def alone(model: Hybrid, answer: Answer) -> tuple[list[int], list[Logprobs]]:
    """The tokens of a whole answer and their log-probabilities as they are without cache, batch or queue."""
    request = answer.request
    sampling = replace(request.sampling, seed=request.sampling.seed + answer.index)
    sampler = Sampler(sampling, prompt=request.ids, drawn_from=request.drawn_from, hook=request.hook)
    new = list(naive.draws(model, request.ids, request.max_tokens, sampler, request.ends))
    chances = [] if request.logprobs is None else [logprobs(row, token, request.logprobs) for token, row in new]
    return [token for token, _ in new], chances


def check_alone(model: Hybrid, *answers: Answer) -> None:
    """Each answer, as far as it came, is what it would have been alone: tokens and log-probabilities to the bit."""
    for answer in answers:
        ids, chances = alone(model, answer)
        assert answer.ids == ids[: len(answer.ids)]
        assert answer.logprobs == chances[: len(answer.ids)]
        assert answer.finish in ("cancelled", "time") or len(answer.ids) == len(ids)


def check_conserved(engine: Engine) -> None:
    """Every slot and page is free or held, and held by those that are there, as often as they hold it."""
    memory, running = engine.memory, len(engine.scheduler.running)
    prefixes, state = memory.prefixes, memory.state
    slots = range(memory.scratch + 1, memory.scratch + 1 + memory.sizes.snapshots)
    assert sorted([*prefixes.free, *prefixes.snapshots]) == list(slots)
    assert memory.logits.keys() == prefixes.snapshots.keys()
    held = Counter(page for row in (*range(running), *prefixes.snapshots) for page in state.tables[row])
    assert memory.pages.holders == [held[page] for page in range(memory.sizes.pages)]
    assert sorted(memory.pages.free) == [page for page in range(memory.sizes.pages) if not held[page]]
    assert not any(state.tables[row] for row in (*range(running, memory.scratch + 1), *prefixes.free))
    for slot, snapshot in prefixes.snapshots.items():
        assert state.positions[slot] == snapshot.node.end
    for row, sequence in enumerate(engine.scheduler.running):
        assert 0 <= state.positions[row] <= len(sequence.tokens)
        assert len(state.tables[row]) <= memory.promised[row]
    counts = engine.counts
    assert counts.prompt_tokens == counts.reused_tokens + sum(counts.lost_tokens.values())
