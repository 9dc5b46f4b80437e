"""Draws against a plain definition of what is left to draw from."""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import ConfigError, RequestError
from nemotron_h.inference.sampling import Sampler, distribution


def definition(logits: list[float], sampling: Sampling) -> dict[int, float]:
    """Temperature, then the top k, then the fewest likeliest tokens that together reach p."""
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
    return {token: p / sum(left.values()) for token, p in left.items()}


LOGITS = [0.3, 2.0, -1.0, 1.5, 1.5, -4.0, 0.9, 0.0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.7), (4, 0.6), (1, 1.0), (0, 1e-9), (99, 0.999)])
def test_the_distribution_is_the_definition(temperature: float, top_k: int, top_p: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    probabilities, tokens = distribution(torch.tensor(LOGITS), sampling)
    got = dict(zip(tokens.tolist(), probabilities.tolist(), strict=True))
    wanted = definition([float(torch.tensor(x)) for x in LOGITS], sampling)
    assert got.keys() == wanted.keys()
    assert got == pytest.approx(wanted, rel=1e-12)


def test_draws_follow_the_distribution() -> None:
    """4,000 draws: each count within 4.5 standard deviations of its expectation."""
    sampling = Sampling(temperature=1.2, top_k=6, top_p=0.95, seed=5)
    sampler, logits, draws = Sampler(sampling), torch.tensor(LOGITS), 4000
    counts = Counter(sampler.draw(logits) for _ in range(draws))
    wanted = definition(LOGITS, sampling)
    assert set(counts) <= set(wanted)
    for token, p in wanted.items():
        assert abs(counts[token] - draws * p) < 4.5 * math.sqrt(draws * p * (1 - p)), token


def test_first_draws_of_neighbouring_seeds_are_independent() -> None:
    """Seeds 0, 1, 2, ... are what a server hands out: their first draws must look like one stream."""
    logits, seeds = torch.zeros(4), 2000
    samplers = [Sampler(Sampling(temperature=1.0, seed=seed)) for seed in range(seeds)]
    firsts = [sampler.draw(logits) for sampler in samplers]
    assert max(abs(firsts.count(token) - seeds / 4) for token in range(4)) < 4.5 * math.sqrt(seeds * 3 / 16)
    same = sum(a == b for a, b in pairwise(firsts))
    assert abs(same - seeds / 4) < 4.5 * math.sqrt(seeds * 3 / 16)


def test_a_seed_is_its_draws_whoever_draws_beside_it() -> None:
    logits = torch.tensor(LOGITS)
    sampling = Sampling(temperature=1.0, seed=7)
    alone = [Sampler(sampling)]
    wanted = [alone[0].draw(logits) for _ in range(50)]
    pair = Sampler(sampling), Sampler(Sampling(temperature=1.0, seed=8))
    torch.manual_seed(123)
    got, other = [], []
    for _ in range(50):
        torch.rand(3)
        got.append(pair[0].draw(logits))
        other.append(pair[1].draw(logits))
    assert got == wanted
    assert other != wanted


def test_temperature_nought_takes_the_likeliest_whatever_the_rest() -> None:
    sampler = Sampler(Sampling(temperature=0.0, top_k=5, top_p=0.2, seed=3))
    assert {sampler.draw(torch.tensor(LOGITS)) for _ in range(5)} == {1}


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
    with pytest.raises(RequestError, match="logits: must be finite"):
        Sampler(Sampling()).draw(torch.tensor([0.0, value]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.5),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: must .*; got "):
        Sampling(**{name: value})
