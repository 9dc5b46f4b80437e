import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemotron_h.config.model import AttentionConfig, MambaConfig, MlpConfig, ModelConfig
from nemotron_h.config.train import Precision, TrainConfig
from nemotron_h.data.batches import Batches, windows
from nemotron_h.data.shards import Shard, ShardWriter
from nemotron_h.training.loop import Trained, train

VOCAB = 64
LENGTH = 32
TINY = ModelConfig.from_pattern(
    "M-*-",
    hidden_size=32,
    vocab_size=VOCAB,
    mamba=MambaConfig(num_heads=4, head_dim=16, state_size=16, num_groups=2),
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16),
    mlp=MlpConfig(intermediate_size=48),
)
SETTINGS = TrainConfig(
    steps=40,
    sequence_length=LENGTH,
    batch_size=2,
    learning_rate=3e-3,
    warmup_fraction=0.1,
    precision=Precision.FLOAT32,
    seed=3,
    validate_every_steps=10,
    validation_windows=4,
    checkpoint_every_steps=7,
)


@pytest.fixture
def model_config() -> ModelConfig:
    return TINY


@pytest.fixture
def settings() -> TrainConfig:
    return SETTINGS


@pytest.fixture(scope="session")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    """Documents of random tokens with a pattern to learn: each token is followed by one of two."""
    random = np.random.default_rng(0)
    name = tmp_path_factory.mktemp("data") / "shard"
    with ShardWriter(name, vocab_size=VOCAB) as writer:
        for length in random.integers(1, 90, size=50):
            tokens = [int(random.integers(VOCAB))]
            for _ in range(int(length)):
                tokens.append((tokens[-1] * 5 + int(random.integers(2))) % VOCAB)
            writer.add_document(tokens)
    return Shard(name)


@pytest.fixture
def run(shard: Shard) -> Callable[..., Trained]:
    """Train in a folder with some settings changed."""

    def train_in(
        folder: Path, model: ModelConfig = TINY, watch: Any = lambda progress: None, **changes: Any
    ) -> Trained:
        config = replace(SETTINGS, **changes)
        batches = Batches(shard, LENGTH, config.batch_size, config.seed)
        return train(model, config, batches, lambda limit: windows(shard, LENGTH, 3, limit=limit), folder, watch=watch)

    return train_in


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """A model this small only waits for a second thread, most of all on a busy machine."""
    threads(1)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process, unlike a power cut, loses nothing of what it wrote."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
