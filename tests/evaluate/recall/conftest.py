"""A tokenizer of a few hundred tokens, which knows the words of the tasks' texts by their beginnings."""

from itertools import islice
from random import Random

import pytest

from nemotron_h.config.tokenizer import TokenizerConfig
from nemotron_h.evaluate.recall.items import Asker
from nemotron_h.evaluate.recall.words import keys, names, numbers, sentences
from nemotron_h.text.bpe import train
from nemotron_h.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    rng = Random(0)
    text = " ".join(islice(sentences(rng), 400))
    text += " ".join(word for kind in (keys, names, numbers) for word in islice(kind(rng), 400))
    return train([text], TokenizerConfig(vocab_size=1024, reserved_tokens=16))


@pytest.fixture(scope="session")
def asker(tokenizer: Tokenizer) -> Asker:
    assert tokenizer.bos_id is not None
    return Asker(tokenizer, tokenizer.bos_id, None)
