"""A small tokenizer, trained in a moment on prose and code that the machine has."""

import json as json_package
import textwrap
from pathlib import Path

import pytest

from nemotron_h.config.tokenizer import TokenizerConfig
from nemotron_h.text.bpe import train
from nemotron_h.text.tokenizer import Tokenizer

PROSE = "Schöne Grüße aus Köln. 你好, 世界! Привет. 🙂👩‍👩‍👧 é e\u0301\n"


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Python source, and a little of other scripts so that merges cross bytes inside characters."""
    folder = Path(json_package.__file__).parent
    sources = [Path(textwrap.__file__), *sorted(folder.glob("*.py"))]
    return [*(source.read_text(encoding="utf-8") for source in sources), PROSE * 40]


@pytest.fixture(scope="session")
def tokenizer(documents: list[str]) -> Tokenizer:
    return train(documents, TokenizerConfig(vocab_size=700))
