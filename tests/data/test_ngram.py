import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_h.data.ngram import MAX_ORDER, Ngrams, definition, discounts
from nemotron_h.errors import DataError

LETTERS = st.lists(st.lists(st.sampled_from([0, 1, 97, 255]), max_size=25).map(bytes), max_size=5)


def text(seed: int, length: int) -> bytes:
    """Letters in which some follow others more often."""
    draw = random.Random(seed)
    words = [bytes(draw.choices(b"abcdefgh", k=draw.randint(1, 6))) for _ in range(30)]
    return b" ".join(draw.choices(words, weights=range(1, 31), k=length // 4))[:length]


@settings(max_examples=60, deadline=None)
@given(documents=LETTERS, context=st.lists(st.sampled_from([0, 1, 97, 255]), max_size=9).map(bytes))
def test_equals_the_definition(documents: list[bytes], context: bytes) -> None:
    documents = [*documents, b"\0a\0"]
    for order in (1, 2, 3, 6, MAX_ORDER):
        got = Ngrams(documents, order).distribution(context)
        # the same sums in another order: float64 rounding, some hundred terms deep
        np.testing.assert_allclose(got, definition(documents, context, order), rtol=1e-12)


def test_equals_the_definition_with_estimated_discounts() -> None:
    documents = [text(1, 900), text(1, 1100)[500:], text(2, 700)]
    ngrams = Ngrams(documents, 4)
    for context in (b"", b"a", documents[0][100:103], documents[0][200:207], b"zzz", b"\xff"):
        for order in (1, 2, 3, 4):
            got = ngrams.distribution(context, order)
            np.testing.assert_allclose(got, definition(documents, context, order), rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(documents=LETTERS, context=st.binary(max_size=9), order=st.integers(1, MAX_ORDER))
def test_probabilities_sum_to_one(documents: list[bytes], context: bytes, order: int) -> None:
    p = Ngrams([*documents, text(3, 500)], order).distribution(context)
    assert p.min() > 0
    assert abs(p.sum() - 1) < 1e-12  # 256 terms of rounding


def test_bits_are_those_of_each_byte_after_its_document() -> None:
    documents, held_out = [text(1, 900), text(1, 800)], [text(1, 90)[40:], b"", b"q", text(4, 60)]
    ngrams = Ngrams(documents, 5)
    for order, got in enumerate(ngrams.bits_per_byte(held_out), start=1):
        bits = [
            -np.log2(definition(documents, part[:i], order)[part[i]]) for part in held_out for i in range(len(part))
        ]
        assert abs(got - np.mean(bits)) < 1e-10


def test_orders_below_the_highest_do_not_depend_on_it() -> None:
    documents, held_out = [text(1, 900)], [text(1, 300)]
    whole = Ngrams(documents, 6).bits_per_byte(held_out)
    for order in (1, 3, 5):
        np.testing.assert_allclose(Ngrams(documents, order).bits_per_byte(held_out), whole[:order], rtol=1e-12)


def test_order_of_documents_changes_nothing() -> None:
    documents = [text(seed, 200) for seed in range(5)]
    assert Ngrams(documents, 5).bits_per_byte([b"abc"]) == Ngrams(documents[::-1], 5).bits_per_byte([b"abc"])


def test_no_context_reaches_over_a_border() -> None:
    y = ord("y")
    assert Ngrams([b"aaxyaa"] * 9, 2).distribution(b"x")[y] > 0.8
    assert Ngrams([b"aax", b"yaa"] * 9, 2).distribution(b"x")[y] < 0.01  # xy occurs across the border only


def test_random_bytes_cost_eight_bits() -> None:
    draw = random.Random(5)
    got = Ngrams([draw.randbytes(200_000)], 1).bits_per_byte([draw.randbytes(50_000)])
    assert abs(got[0] - 8) < 0.01  # 255 frequencies learnt from 200,000 bytes cost 255 / (2 ln 2 200,000)


def test_discounts_are_chen_and_goodmans() -> None:
    counts = np.array([1] * 8 + [2] * 4 + [3] * 2 + [4] + [9])
    # n = 8, 4, 2, 1: Y = 1/2; D = 1 - 2 Y 4/8, 2 - 3 Y 2/4, 3 - 4 Y 1/2
    assert discounts(counts).tolist() == [0, 0.5, 1.25, 2.0]
    assert discounts(counts[:-2]).tolist() == [0, 0.5, 1, 1.5]


def test_progress_ends_at_one() -> None:
    told: list[float] = []
    Ngrams([b"abcabc"], 3, progress=told.append).bits_per_byte([b"ab"], progress=told.append)
    assert told.count(1.0) == 2
    assert all(0 < done <= 1 for done in told)


def test_refusals_name_the_argument() -> None:
    for order in (0, MAX_ORDER + 1):
        with pytest.raises(DataError, match=rf"order: must lie in 1\.\.8; got {order}"):
            Ngrams([b"a"], order)
    with pytest.raises(DataError, match=r"order: must lie in 1\.\.2; got 3"):
        Ngrams([b"a"], 2).distribution(b"a", 3)
    with pytest.raises(DataError, match="documents: must hold a byte to count; got 1 without any"):
        Ngrams([b""])
    with pytest.raises(DataError, match="documents: must hold a byte to predict; got 0 without any"):
        Ngrams([b"a"]).bits_per_byte([])
