"""Documents to a shard."""

import json
from pathlib import Path

import pytest

from nemotron_h.config.tokenizer import TokenizerConfig
from nemotron_h.data.encode import TOGETHER, encode_documents
from nemotron_h.data.shards import Shard
from nemotron_h.text.bpe import train
from nemotron_h.text.tokenizer import Tokenizer

TEXTS = [f'print("Größe {i}")\n\t你好\n' for i in range(2 * TOGETHER + 3)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TEXTS, TokenizerConfig(vocab_size=290))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    lines = [json.dumps({"path": f"{i}.py", "text": text}) + "\n" for i, text in enumerate(TEXTS)]
    (tmp_path / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path / "texts.jsonl"


def test_each_document_is_encoded_between_its_marks(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    count = encode_documents(source, tokenizer, tmp_path / "shard")
    shard = Shard(tmp_path / "shard")
    assert [shard[i].tolist() for i in range(len(shard))] == [[1, *tokenizer.encode(text), 2] for text in TEXTS]
    assert count == len(shard.tokens)


def test_progress_is_the_fraction_of_documents(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    told: list[float] = []
    encode_documents(source, tokenizer, tmp_path / "shard", progress=told.append)
    assert told == [TOGETHER / len(TEXTS), 2 * TOGETHER / len(TEXTS), 1.0]
