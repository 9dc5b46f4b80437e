from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemotron_h.data.batches import IGNORED, Batch, Batches, count_windows, windows
from nemotron_h.data.shards import Shard
from nemotron_h.errors import DataError

DOCUMENTS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def numbered(lengths: Iterable[int]) -> list[list[int]]:
    """Documents of those lengths in which every token is another number."""
    documents, begin = [], 1
    for length in lengths:
        documents.append(list(range(begin, begin + length)))
        begin += length
    return documents


def targets_of(batches: Iterable[Batch]) -> Counter[tuple[int, int]]:
    """How often each pair (input, target) is counted."""
    pairs: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        counted = batch.targets != IGNORED
        pairs.update(zip(batch.inputs[counted].tolist(), batch.targets[counted].tolist(), strict=True))
    return pairs


def wanted_targets(documents: list[list[int]]) -> Counter[tuple[int, int]]:
    return Counter((a, b) for tokens in documents for a, b in pairwise(tokens))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=DOCUMENTS, sequence_length=st.integers(1, 50), batch_size=st.integers(1, 5))
def test_every_token_is_a_target_once(
    shard_of: Callable[..., Shard], lengths: list[int], sequence_length: int, batch_size: int
) -> None:
    documents = numbered([*lengths, 2])
    shard = shard_of(documents)
    assert targets_of(windows(shard, sequence_length, batch_size)) == wanted_targets(documents)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=DOCUMENTS, sequence_length=st.integers(1, 50), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_an_epoch_is_every_window_once(
    shard_of: Callable[..., Shard], lengths: list[int], sequence_length: int, seed: int, epoch: int
) -> None:
    documents = numbered([*lengths, 2])
    shard = shard_of(documents)
    batches = Batches(shard, sequence_length, 1, seed)
    first = epoch * batches.windows_per_epoch
    read = map(batches.at, range(first, first + batches.windows_per_epoch))
    assert targets_of(read) == wanted_targets(documents)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=DOCUMENTS, sequence_length=st.integers(1, 50))
def test_documents_follow_the_tokens(shard_of: Callable[..., Shard], lengths: list[int], sequence_length: int) -> None:
    documents = numbered([*lengths, 2])
    owner = {token: i for i, tokens in enumerate(documents) for token in tokens}
    for batch in windows(shard_of(documents), sequence_length, 3):
        for inputs, ids in zip(batch.inputs, batch.documents, strict=True):
            real = inputs != 0  # padding has token 0, which no document holds
            owners = [owner[token] for token in inputs[real].tolist()]
            assert ids[real].tolist() == [i - owners[0] for i in owners]
            assert (np.diff(ids) >= 0).all()


def test_batches_are_windows_in_another_order(shard_of: Callable[..., Shard]) -> None:
    shard = shard_of(numbered([50, 3, 71]))
    rows = np.concatenate([batch.inputs for batch in windows(shard, 7, 4)])
    batches = Batches(shard, 7, 4, seed=5)
    count = batches.windows_per_epoch
    shuffled = np.concatenate([batches.at(place).inputs for place in range(0, 4 * count, 4)])[:count]
    assert sorted(map(tuple, shuffled)) == sorted(map(tuple, rows))
    assert not np.array_equal(shuffled, rows)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])  # 18 windows: batches that divide an epoch, cross one, hold two
def test_place_alone_decides(shard_of: Callable[..., Shard], size: int) -> None:
    shard = shard_of(numbered([60, 64]))
    one = Batches(shard, 7, 1, seed=2)
    assert one.windows_per_epoch == 18
    for place in (0, 1, 17, 18, 35, 1000):
        batch = Batches(shard, 7, size, seed=2).at(place)
        rows = [one.at(place + i) for i in range(size)]
        for name in ("inputs", "targets", "documents"):
            assert np.array_equal(getattr(batch, name), np.concatenate([getattr(row, name) for row in rows]))


def test_arrays_can_be_handed_on(shard_of: Callable[..., Shard]) -> None:
    batch = Batches(shard_of(numbered([60, 64])), 7, 2, seed=2).at(0)
    for array in (batch.inputs, batch.targets, batch.documents):
        assert (array.shape, array.dtype) == ((2, 7), np.int64)
        assert array.flags.writeable
        assert array.flags.c_contiguous


@pytest.mark.parametrize(("limit", "taken"), [(1, [0]), (3, [0, 6, 12]), (18, list(range(18))), (99, list(range(18)))])
def test_limit_takes_windows_evenly(shard_of: Callable[..., Shard], limit: int, taken: list[int]) -> None:
    shard = shard_of(numbered([60, 64]))
    first = np.concatenate([batch.inputs[:, 0] for batch in windows(shard, 7, 4, limit=limit)])
    assert first.tolist() == [1 + 7 * window for window in taken]


def test_the_loss_ignores_what_we_mark() -> None:
    from nemotron_h.ops import loss

    assert loss.IGNORED == IGNORED


def test_refusals_name_the_argument(shard_of: Callable[..., Shard]) -> None:
    shard = shard_of(numbered([60]))
    with pytest.raises(DataError, match="batch_size: must be positive; got 0"):
        Batches(shard, 7, 0, seed=1)
    with pytest.raises(DataError, match="sequence_length: must be positive; got 0"):
        count_windows(shard, 0)
    with pytest.raises(DataError, match="place: must not be negative; got -1"):
        Batches(shard, 7, 1, seed=1).at(-1)
    with pytest.raises(DataError, match="limit: must be positive; got 0"):
        list(windows(shard, 7, 1, limit=0))
    lone: Shard = shard_of([[5]])
    with pytest.raises(DataError, match="shard: must hold two tokens or more; got 1"):
        Batches(lone, 7, 1, seed=1)
