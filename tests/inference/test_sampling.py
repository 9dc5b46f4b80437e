"""Draws against plain definitions: of what is left to draw from, of penalties, and of the numbers that draw."""

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import RequestError
from nemotron_h.inference.sampling import (
    QUANTUM,
    Sampler,
    choices,
    distribution,
    drawable,
    fewest_reaching,
    logprobs,
    place,
    summable,
    uniform,
    weights,
)

LOGITS = [0.3, 2.0, -1.0, 1.5, 1.5, -4.0, 0.9, 0.0]


def random_rows(count: int, vocab: int, *, seed: int = 0) -> Tensor:
    return 3 * torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed))


def draws(sampler: Sampler, rows: Tensor) -> list[int]:
    return [sampler.draw(row) for row in rows]


# What is left to draw from


def definition(logits: list[float], sampling: Sampling) -> dict[int, float]:
    """Temperature, the top k, the fewest likeliest that together reach p, those near enough to the likeliest."""
    weights = {token: math.exp(logit / sampling.temperature) for token, logit in enumerate(logits)}
    best = sorted(weights, key=lambda token: (-logits[token], token))
    best = best[: sampling.top_k or None]
    total = sum(weights[token] for token in best)
    left, reached = {}, 0.0
    for token in best:
        if reached >= sampling.top_p:
            break
        left[token] = weights[token] / total
        reached += left[token]
    left = {token: p for token, p in left.items() if p >= sampling.min_p * max(left.values())}
    return {token: p / sum(left.values()) for token, p in left.items()}


@pytest.mark.parametrize("min_p", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.7), (4, 0.6), (1, 1.0), (0, 1e-9), (99, 0.999)])
def test_the_distribution_is_the_definition(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probabilities = distribution(torch.tensor(LOGITS), sampling)
    wanted = definition([float(torch.tensor(x)) for x in LOGITS], sampling)
    assert set(probabilities.nonzero().flatten().tolist()) == wanted.keys()
    assert probabilities.tolist() == pytest.approx([wanted.get(token, 0.0) for token in range(len(LOGITS))], rel=1e-12)


tied = st.lists(st.sampled_from([-math.inf, -3.0, -0.5, -0.0, 0.0, 0.25, 1.0, 7.5]), min_size=1, max_size=40)
spread = st.builds(
    lambda seed, size, scale: (scale * np.random.default_rng(seed).standard_normal(size)).tolist(),
    st.integers(0, 10**6),
    st.integers(1, 700),
    st.sampled_from([0.01, 1.0, 8.0, 60.0]),
)


@settings(max_examples=300)
@given(
    logits=tied | spread,
    temperature=st.sampled_from([1e-308, 1e-3, 0.7, 1.0, 3.0, 1e30]),
    top_k=st.sampled_from([0, 1, 2, 5, 37, 1000]),
    top_p=st.sampled_from([1e-12, 0.1, 0.5, 0.9, 0.999999, 1 - 2.0**-53, 1.0]),
    min_p=st.sampled_from([0.0, 1e-9, 0.05, 0.9]),
    number=st.sampled_from([0.0, 0.5, 1 - 2.0**-53]) | st.floats(0, 1, exclude_max=True),
)
def test_the_fast_path_leaves_the_same_tokens_and_bits(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, number: float
) -> None:
    row = np.array([*logits, 0.1], np.float32)  # one is finite
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    wanted = distribution(torch.from_numpy(row), sampling).numpy()
    ids, probabilities = choices(row, sampling)
    assert (np.diff(ids) > 0).all()
    got = np.zeros(len(row))
    got[ids] = probabilities
    assert got.tobytes() == wanted.tobytes()
    assert ids[place(probabilities, number)] == place(wanted, number)


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("options", [{"top_p": 0.95}, {"top_k": 1000}, {"top_k": 1000, "top_p": 0.9, "min_p": 0.01}])
def test_the_fast_path_in_a_large_vocabulary(scale: float, options: dict[str, Any]) -> None:
    row = scale * random_rows(1, 32_000)[0].round(decimals=2)
    sampling = Sampling(temperature=0.9, **options)
    ids, probabilities = choices(row.numpy(), sampling)
    wanted = distribution(row, sampling)
    assert wanted.nonzero().flatten().tolist() == ids.tolist()
    assert wanted[torch.from_numpy(ids)].tolist() == probabilities.tolist()


@given(st.lists(st.sampled_from([0.0, 0.1, 0.25, 1 / 3]), min_size=1, max_size=12), st.floats(0, 1, exclude_max=True))
def test_a_number_falls_in_the_first_sum_above_it(chances: list[float], number: float) -> None:
    chances = [*chances, 0.3, 0.0]
    sums = np.cumsum(chances)
    wanted = next(index for index, reached in enumerate(sums) if reached > number * sums[-1])
    assert place(np.array(chances), number) == wanted
    assert chances[wanted] > 0
    assert place(np.array(chances), 1 - 2.0**-53) == len(chances) - 2


def test_min_p_is_a_share_of_the_likeliest() -> None:
    logits = torch.tensor([0.0, math.log(0.5), math.log(0.24), math.log(0.1)])
    ids, probabilities = choices(logits.numpy(), Sampling(temperature=1.0, min_p=0.25))
    assert ids.tolist() == [0, 1]
    assert probabilities.tolist() == pytest.approx([2 / 3, 1 / 3], rel=1e-7)  # logits are float32
    just = float(weights(logits.numpy(), 1.0)[2])
    assert choices(logits.numpy(), Sampling(temperature=1.0, min_p=just))[0].tolist() == [0, 1, 2]


def test_top_p_is_reached_exactly() -> None:
    """Sums of parts have no rounding: against whole numbers of quanta, where a share ends at a token to the bit."""
    chances = weights(random_rows(1, 300)[0].numpy() / 3, 1.0)
    quanta = sorted((int(part / QUANTUM) for part in summable(chances)), reverse=True)
    reached = list(accumulate(quanta))
    for share in (float(sum_ / reached[-1]) for sum_ in reached[:-1]):
        goal = Fraction(share * (reached[-1] * QUANTUM)) / Fraction(QUANTUM)
        wanted = 1 + sum(sum_ < goal for sum_ in reached)
        assert len(fewest_reaching(chances, share)) == wanted


# Numbers


def test_the_numbers_of_a_seed_never_change() -> None:
    """Replies are asked for again by their seed, of later versions too."""
    assert [uniform(0, 0), uniform(0, 1)] == [0.011546754286331562, 0.5023796042735054]
    assert [uniform(5, 0), uniform(2**63 - 1, 10**9)] == [0.7337459554446363, 0.3890922637985291]
    # the generator's published answer for a counter and a key of zeros: one before the first draw
    assert uniform(0, 2**256 - 1) == (0x16554D9ECA36314C >> 11) / 2**53


def test_numbers_are_even_across_draws_and_seeds() -> None:
    """2,000 numbers in 10 bins: chi-square of 9 degrees under its 99.99 % point."""
    for numbers in ([uniform(3, draw) for draw in range(2000)], [uniform(seed, 7) for seed in range(2000)]):
        counts = np.histogram(numbers, bins=10, range=(0, 1))[0]
        assert ((counts - 200) ** 2 / 200).sum() < 33.7
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 4.5 / math.sqrt(2000)


def test_draws_follow_the_distribution() -> None:
    """4,000 times: each count within 4.5 standard deviations of its expectation."""
    sampling = Sampling(temperature=1.2, top_k=6, top_p=0.95, min_p=0.05, seed=5)
    sampler, logits, times = Sampler(sampling), torch.tensor(LOGITS), 4000
    counts = Counter(sampler.draw(logits) for _ in range(times))
    wanted = definition(LOGITS, sampling)
    assert set(counts) <= set(wanted)
    for token, p in wanted.items():
        assert abs(counts[token] - times * p) < 4.5 * math.sqrt(times * p * (1 - p)), token


def test_first_draws_of_neighbouring_seeds_are_independent() -> None:
    """Seeds 0, 1, 2, ... are what a server hands out: their first draws must look like one stream."""
    logits, seeds = torch.zeros(4), 2000
    samplers = [Sampler(Sampling(temperature=1.0, seed=seed)) for seed in range(seeds)]
    firsts = [sampler.draw(logits) for sampler in samplers]
    assert max(abs(firsts.count(token) - seeds / 4) for token in range(4)) < 4.5 * math.sqrt(seeds * 3 / 16)
    same = sum(a == b for a, b in pairwise(firsts))
    assert abs(same - seeds / 4) < 4.5 * math.sqrt(seeds * 3 / 16)


def test_a_draw_depends_on_the_seed_and_its_number_alone() -> None:
    rows = random_rows(40, 60)
    sampling = Sampling(temperature=2.0, top_p=0.9, seed=7)
    wanted = draws(Sampler(sampling), rows)
    assert wanted == [place(distribution(row, sampling).numpy(), uniform(7, draw)) for draw, row in enumerate(rows)]
    own, other, got = Sampler(sampling), Sampler(Sampling(temperature=1.0, seed=8)), []
    for row in rows:
        torch.rand(3)
        other.draw(row)
        got.append(own.draw(row))
        other.draw(row)
    assert got == wanted
    assert other.generated[:40] != wanted


STEERED = {
    "logit_bias": {3: 2.5, 11: -4.0},
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.4,
    "presence_penalty": 0.7,
    "top_k": 20,
    "seed": 3,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("done", [0, 1, 7, 29])
def test_restored_is_uninterrupted(done: int, temperature: float) -> None:
    def hook(tokens: Sequence[int], logits: Tensor) -> Tensor:
        logits[[len(tokens) % 30, *tokens[-1:]]] = -math.inf
        return logits

    rows, prompt = random_rows(30, 30, seed=1) / 3, [4, 4, 9, 28]
    options: dict[str, Any] = {"drawn_from": drawable(range(2, 29), 30), "hook": hook}
    sampling = Sampling(temperature=temperature, **STEERED)
    wanted = draws(Sampler(sampling, prompt=prompt, **options), rows)
    assert len(set(wanted)) > 5
    restored = Sampler(sampling, prompt=prompt, generated=wanted[:done], **options)
    assert draws(restored, rows[done:]) == wanted[done:]
    assert restored.generated == wanted


# Bias and penalties


def steered(logits: list[float], prompt: list[int], reply: list[int], sampling: Sampling) -> list[float]:
    """Bias, then penalties, as their definitions read."""
    logits, bias = list(logits), dict(sampling.logit_bias)
    for token in range(len(logits)):
        logits[token] += bias.get(token, 0.0)
        if token in prompt or token in reply:
            up = logits[token] > 0
            logits[token] *= 1 / sampling.repetition_penalty if up else sampling.repetition_penalty
        logits[token] -= sampling.frequency_penalty * reply.count(token)
        logits[token] -= sampling.presence_penalty * (token in reply)
    return logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.7},
        {"frequency_penalty": 0.3},
        {"frequency_penalty": -0.2, "presence_penalty": 1.1},
        {"presence_penalty": -2.0},
        {"logit_bias": {0: 5.0, 8: -100.0}},
        STEERED,
    ],
)
def test_bias_and_penalties_as_they_are_defined(options: dict[str, Any], temperature: float) -> None:
    seen: list[Tensor] = []

    def hook(tokens: Sequence[int], logits: Tensor) -> Tensor:
        seen.append(logits.clone())
        return logits

    rows, prompt = random_rows(40, 12), [2, 5, 2, 11]
    originals = rows.clone()
    sampling = Sampling(temperature=temperature, **options)
    sampler, plain = Sampler(sampling, prompt=prompt, hook=hook), Sampler(sampling, prompt=prompt)
    reply: list[int] = []
    for row in rows:
        wanted = steered(row.tolist(), prompt, reply, sampling)
        token = sampler.draw(row)
        assert seen[-1].tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-6)  # kept in float32
        assert token == plain.draw(row)  # a hook that changes nothing
        if temperature == 0:
            assert token == np.argmax(wanted)
        reply.append(token)
    assert torch.equal(rows, originals)  # the model's own: log-probabilities are read from them


def test_the_penalties_meanings() -> None:
    logits = torch.tensor([2.0, 1.9, 1.0])
    assert draws(Sampler(Sampling()), logits.repeat(3, 1)) == [0, 0, 0]
    assert draws(Sampler(Sampling(repetition_penalty=2.0), prompt=[0]), logits.repeat(3, 1)) == [1, 0, 0]
    # the prompt does not count for these
    assert draws(Sampler(Sampling(presence_penalty=0.5), prompt=[0]), logits.repeat(3, 1)) == [0, 1, 0]
    assert draws(Sampler(Sampling(frequency_penalty=0.3), prompt=[0]), logits.repeat(4, 1)) == [0, 1, 0, 1]


def test_a_bias_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^logit_bias: must name tokens of 0\.\.7; got 8$"):
        Sampler(Sampling(logit_bias={2: 1.0, 8: 1.0})).draw(torch.tensor(LOGITS))


@pytest.mark.parametrize(
    "options", [{"logit_bias": {1: 1e300}}, {"repetition_penalty": 1e-300}, {"repetition_penalty": 1e-320}]
)
def test_what_float32_cannot_hold_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"^logits: must leave logits that are finite or -inf; got inf"):
        Sampler(Sampling(**options), prompt=[1]).draw(torch.tensor(LOGITS))
    assert Sampler(Sampling(logit_bias={1: -1e300})).draw(torch.tensor(LOGITS)) == 3


# Hooks and allowed ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_hook_forbids_and_forces(temperature: float) -> None:
    told: list[list[int]] = []

    def in_place(tokens: Sequence[int], logits: Tensor) -> Tensor:
        assert logits.dtype == torch.float32
        told.append(list(tokens))
        logits[[1, 3]] = -math.inf
        return logits

    def forced(tokens: Sequence[int], logits: Tensor) -> Tensor:
        return torch.full_like(logits, -math.inf).index_fill(0, torch.tensor([len(tokens)]), -50.0)

    logits = torch.tensor(LOGITS)
    rows = logits.repeat(8, 1)
    sampling = Sampling(temperature=temperature, top_k=3, top_p=0.9)
    free = draws(Sampler(sampling, hook=in_place), rows)
    assert not {1, 3} & set(free)
    assert 4 in free
    assert told == [free[:step] for step in range(8)]
    assert draws(Sampler(sampling, hook=forced), rows) == list(range(8))
    assert torch.equal(rows, logits.repeat(8, 1))


def test_the_likeliest_is_taken_after_bias_penalties_and_hook() -> None:
    logits = torch.tensor(LOGITS)

    def hook(tokens: Sequence[int], given: Tensor) -> Tensor:
        given[4] += 0.1
        return given

    assert Sampler(Sampling()).draw(logits) == 1
    assert Sampler(Sampling(logit_bias={1: -1.0})).draw(logits) == 3
    assert Sampler(Sampling(logit_bias={1: -1.0}, repetition_penalty=1.2), prompt=[3]).draw(logits) == 4
    assert Sampler(Sampling(logit_bias={1: -1.0}), hook=hook).draw(logits) == 4
    sampling = Sampling(logit_bias={1: -1.0}, top_k=5, top_p=0.2, min_p=0.5, seed=3)
    assert draws(Sampler(sampling), logits.repeat(5, 1)) == [3] * 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_hook_that_leaves_nothing_is_named(temperature: float) -> None:
    logits, sampling = torch.tensor(LOGITS), Sampling(temperature=temperature)
    only_two = drawable([2], len(LOGITS))

    def result(value: Any) -> Any:
        return Sampler(sampling, hook=lambda tokens, given: value).draw(logits)

    none_left = torch.full((8,), -math.inf)
    with pytest.raises(RequestError, match=r"^hook: must leave a token to draw; got -inf for all that may be drawn$"):
        result(none_left)
    with pytest.raises(RequestError, match=r"^hook: must leave a token to draw"):
        kept = none_left.index_fill(0, torch.tensor([3]), 0.0)
        Sampler(sampling, hook=lambda tokens, given: kept, drawn_from=only_two).draw(logits)
    for bad in (math.nan, math.inf):
        with pytest.raises(RequestError, match=rf"^hook: must leave logits that are finite or -inf; got {bad}$"):
            result(torch.tensor([0.0] * 7 + [bad]))
    with pytest.raises(RequestError, match=r"^hook: must return logits of shape \(8,\); got \(7,\)$"):
        result(torch.zeros(7))
    with pytest.raises(RequestError, match=r"^hook: must return logits of shape \(8,\); got NoneType$"):
        result(None)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_only_what_may_be_drawn_is_drawn(temperature: float) -> None:
    """And a hook cannot bring back the rest, nor is its own tensor written to."""
    own = torch.tensor(LOGITS)
    allowed = [7, 2, 5]
    sampler = Sampler(
        Sampling(temperature=temperature), drawn_from=drawable(allowed, 8), hook=lambda tokens, given: own
    )
    got = draws(sampler, own.repeat(60, 1))
    assert set(got) == ({7} if temperature == 0 else set(allowed))
    assert torch.equal(own, torch.tensor(LOGITS))
    assert got == draws(Sampler(sampler.sampling, drawn_from=drawable(allowed, 8)), own.repeat(60, 1))


def test_drawable_ids_as_a_mask() -> None:
    mask = drawable({5, 0, 2}, 6)
    assert mask is not None
    assert mask.tolist() == [True, False, True, False, False, True]
    assert drawable(range(6), 6) is None
    assert drawable(None, 6) is None


# Logits, and what is told of them


def test_a_tiny_temperature_is_the_likeliest_too() -> None:
    sampler = Sampler(Sampling(temperature=1e-308))
    assert {sampler.draw(1000 * torch.tensor(LOGITS)) for _ in range(5)} == {1}


def test_what_can_never_be_drawn() -> None:
    logits = torch.full((5,), -1e30)
    logits[3] = 0.0
    sampler = Sampler(Sampling(temperature=1.0))
    assert {sampler.draw(logits) for _ in range(20)} == {3}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_refused(value: float) -> None:
    logits = torch.tensor([0.0, value])
    for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.5)):
        with pytest.raises(RequestError, match=r"^logits: must be finite"):
            Sampler(sampling, drawn_from=drawable([0], 2)).draw(logits)
    with pytest.raises(RequestError, match=r"^logits: must be finite"):
        logprobs(logits, 0, 1)


@pytest.mark.parametrize("top", [0, 1, 3, 12])
def test_log_probabilities_are_the_models_own(top: int) -> None:
    for row in random_rows(20, 12).round():  # many ties
        wanted = row.double().log_softmax(0)
        best = sorted(range(12), key=lambda token: (-row[token].item(), token))[:top]
        own, likeliest = logprobs(row, 5, top)
        assert own == pytest.approx(wanted[5].item(), rel=1e-14)
        assert [token for token, _ in likeliest] == best
        assert [value for _, value in likeliest] == pytest.approx([wanted[token].item() for token in best], rel=1e-14)


def test_log_probabilities_of_a_row_are_the_same_bits_wherever_it_lies() -> None:
    rows = random_rows(5, 1001)
    wanted = [logprobs(row.clone(), 17, 20) for row in rows]
    assert [logprobs(row, 17, 20) for row in rows] == wanted
    assert [logprobs(row, 17, 20) for row in rows.T.contiguous().T] == wanted


@pytest.mark.parametrize("top", [-1, 9])
def test_more_log_probabilities_than_tokens_are_refused(top: int) -> None:
    with pytest.raises(RequestError, match=rf"^top: must lie in 0\.\.8, the vocabulary; got {top}$"):
        logprobs(torch.tensor(LOGITS), 0, top)
