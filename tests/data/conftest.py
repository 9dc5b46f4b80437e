from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from nemotron_h.data.shards import Shard, ShardWriter


@pytest.fixture
def shard_of(tmp_path: Path) -> Callable[[Sequence[Sequence[int]]], Shard]:
    """Write documents of tokens as a shard, and open it."""

    def write(documents: Sequence[Sequence[int]]) -> Shard:
        with ShardWriter(tmp_path / "shard", vocab_size=60_000) as writer:
            for document in documents:
                writer.add_document(document)
        return Shard(tmp_path / "shard")

    return write
