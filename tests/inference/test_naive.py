"""A state is a faster way to the same tokens."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import RequestError
from nemotron_h.inference import naive
from nemotron_h.model.hybrid import Hybrid

Build = Callable[..., Hybrid]
GREEDY = Sampling()


def prompt_of(length: int) -> list[int]:
    return torch.randint(0, 352, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int4"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 131, 259])
def test_with_a_state_as_recomputed(build: Build, length: int, precision: str) -> None:
    model, prompt = build(precision=precision), prompt_of(length)
    wanted = naive.recomputed(model, prompt, max_tokens=6, sampling=GREEDY)
    assert list(naive.tokens(model, prompt, max_tokens=6, sampling=GREEDY)) == wanted
    assert len(set(wanted)) > 1  # a model that repeats itself would prove little


def test_drawn_with_a_state_as_recomputed(build: Build) -> None:
    model, prompt = build(), prompt_of(70)
    sampling = Sampling(temperature=1.0, top_k=50, seed=4)
    wanted = naive.recomputed(model, prompt, max_tokens=12, sampling=sampling)
    assert list(naive.tokens(model, prompt, max_tokens=12, sampling=sampling)) == wanted


def test_portions_of_any_size_give_the_same_logits(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = build(), prompt_of(201)
    found = []
    for portion in (1, 3, 64, 100, 200, 201, 512):
        monkeypatch.setattr(naive, "PORTION", portion)
        found.append(naive.next_logits(model, prompt, model.empty_state(1)))
    assert all(torch.equal(logits, found[0]) for logits in found)
    with torch.no_grad():
        assert torch.equal(found[0], model(torch.tensor([prompt]))[0, -1])


def test_it_ends_before_an_end_token(build: Build) -> None:
    model, prompt = build(), prompt_of(30)
    whole = list(naive.tokens(model, prompt, max_tokens=10, sampling=GREEDY))
    end = whole[4]
    got = list(naive.tokens(model, prompt, max_tokens=10, sampling=GREEDY, ends=[end, 400]))
    assert got == whole[: whole.index(end)]


def test_only_the_ids_allowed_are_drawn(build: Build) -> None:
    model, prompt = build(), prompt_of(30)
    logits = naive.next_logits(model, prompt, model.empty_state(1))
    best = int(logits.argmax())
    others = [token for token in range(352) if token != best]
    second = next(naive.tokens(model, prompt, max_tokens=1, sampling=GREEDY, drawn_from=others))
    assert logits[second] == logits[others].max()
    drawn = naive.tokens(model, prompt, max_tokens=60, sampling=Sampling(temperature=5.0), drawn_from=[350, 3, 9])
    assert set(drawn) == {3, 9, 350}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ends_and_allowed_ids_as_recomputed(build: Build, temperature: float) -> None:
    model, prompt = build(), prompt_of(30)
    options = {"max_tokens": 20, "sampling": Sampling(temperature=temperature), "drawn_from": range(0, 352, 3)}
    whole = naive.recomputed(model, prompt, **options)
    assert list(naive.tokens(model, prompt, **options)) == whole
    assert len(whole) == 20
    ends = iter([whole[5], 400])
    assert naive.recomputed(model, prompt, **options, ends=ends) == whole[: whole.index(whole[5])]


@pytest.mark.parametrize("ids", [[], [3, 352], [-1]])
def test_allowed_ids_that_are_none_are_refused(build: Build, ids: list[int]) -> None:
    for generate in (naive.tokens, naive.recomputed):
        with pytest.raises(RequestError, match=r"drawn_from: must be one id or more of 0\.\.351; got"):
            generate(build(), [1], max_tokens=1, sampling=GREEDY, drawn_from=ids)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        ([], 5, "ids: must hold at least one token"),
        ([1, 352], 5, r"ids: must be integers in 0..351; got 352 at place 1"),
        ([-1], 5, r"ids: must be integers in 0..351; got -1 at place 0"),
        ([1.5], 5, r"ids: must be integers in 0..351; got 1.5"),
        ([5, True], 5, r"ids: must be integers in 0..351; got True at place 1"),
        ([1], 0, "max_tokens: must be 1 or above; got 0"),
        ([1], 1.5, "max_tokens: must be a whole number; got 1.5"),
        ([1], True, "max_tokens: must be a whole number; got True"),
        ([1], "3", "max_tokens: must be a whole number; got '3'"),
    ],
)
def test_refusals_come_before_the_first_token(build: Build, prompt: list[int], max_tokens: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        naive.tokens(build(), prompt, max_tokens=max_tokens, sampling=GREEDY)
    with pytest.raises(RequestError, match=words):
        naive.recomputed(build(), prompt, max_tokens=max_tokens, sampling=GREEDY)


def test_ids_may_be_numpys(build: Build) -> None:
    prompt = prompt_of(9)
    wanted = list(naive.tokens(build(), prompt, max_tokens=3, sampling=GREEDY))
    assert list(naive.tokens(build(), np.array(prompt, np.int32), max_tokens=3, sampling=GREEDY)) == wanted
