"""Published values of a published checkpoint: Nemotron-H-8B-Base-8K, greedy, no special tokens.

Source: TensorRT-LLM's tests of the model (Megatron's log-probabilities; its tolerance is 0.3). They run where the
checkpoint is: a folder that NEMOTRON_H_8B names, or the standard cache.
"""

import os
from pathlib import Path

import pytest
import torch

from nemotron_h.checkpoint.hub import HubName, cached
from nemotron_h.config.sampling import Sampling
from nemotron_h.inference.load import LanguageModel, load

pytestmark = pytest.mark.checkpoint

NAME = HubName("nvidia/Nemotron-H-8B-Base-8K", "main")
CONTINUATIONS = {
    "The future of AI is": " bright, with endless possibilities for innovation and growth",
    "The president of the United States is": " the head of state and head of government of",
}
LOG_PROBABILITIES = [-7.4160, -0.3619, -2.8658, -2.3163]  # of tokens 2 to 5 of the first prompt


@pytest.fixture(scope="module")
def language() -> LanguageModel:
    named = os.environ.get("NEMOTRON_H_8B")
    folder = Path(named) if named else cached(NAME)
    if folder is None:
        pytest.skip(f"{NAME} is not on this machine, and NEMOTRON_H_8B names no folder")
    return load(folder)


@pytest.mark.parametrize("prompt", CONTINUATIONS)
def test_continuations(language: LanguageModel, prompt: str) -> None:
    assert language.tokenizer is not None
    ids = language.tokenizer.encode(prompt)
    new = list(language.tokens(ids, max_tokens=9, sampling=Sampling(), ignore_end=True))
    assert language.tokenizer.decode(new).startswith(CONTINUATIONS[prompt][:40])


def test_log_probabilities_of_the_prompt(language: LanguageModel) -> None:
    assert language.tokenizer is not None
    ids = language.tokenizer.encode(next(iter(CONTINUATIONS)))
    assert len(ids) == 5
    with torch.no_grad():
        scores = language.model(torch.tensor([ids]))[0].log_softmax(-1)
    got = [scores[place, token].item() for place, token in enumerate(ids[1:])]
    assert got == pytest.approx(LOG_PROBABILITIES, abs=0.3)
