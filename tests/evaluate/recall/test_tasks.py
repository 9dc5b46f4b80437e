"""What is asked for stands in a text exactly as often as its task says, at the depth and of the length that were asked
for, whatever the seed."""

import re
from itertools import islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_h.errors import RequestError
from nemotron_h.evaluate.recall.items import Asker, fitted, plain
from nemotron_h.evaluate.recall.tasks import COMMON, TASKS, Draw, copied, match_all, match_any
from nemotron_h.evaluate.recall.words import keys, names, numbers, sentences

draws = st.builds(
    Draw, seed=st.integers(0, 10**6).map(str), units=st.integers(1, 60), depth=st.sampled_from([0.0, 0.25, 0.5, 1.0])
)


@pytest.mark.parametrize("name", TASKS)
@given(draw=draws)
@settings(max_examples=30, deadline=None)
def test_answers_stand_in_the_text_as_often_as_stated(name: str, draw: Draw) -> None:
    task = TASKS[name]
    draft = task.build(draw)
    text = plain(draft.turns, "")
    for answer, count in zip(draft.answers, draft.counts, strict=True):
        assert text.lower().count(answer.lower()) == count, answer
        assert answer.lower() not in draft.lead.lower()
    for passage in draft.passages:
        assert text.count(passage) == 1
    assert len(draft.answers) == len(set(draft.answers))


@pytest.mark.parametrize("name", TASKS)
@given(draw=draws)
@settings(max_examples=10, deadline=None)
def test_more_filler_asks_the_same(name: str, draw: Draw) -> None:
    """A question is the seed's; how much text stands around it changes nothing but, of frequent words, how often they
    come."""
    task = TASKS[name]
    less, more = task.build(draw), task.build(Draw(draw.seed, draw.units + 7, draw.depth))
    assert (less.lead, less.passages) == (more.lead, more.passages)
    if name != "frequent-words":
        assert (less.answers, less.counts) == (more.answers, more.counts)
    assert task.build(draw) == less
    other = task.build(Draw(draw.seed + "x", draw.units, draw.depth))
    assert other.answers != less.answers


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [900, 1001, 2048])
def test_prompts_are_of_the_length_and_passages_at_the_depth(name: str, length: int, asker: Asker) -> None:
    task = TASKS[name]
    for depth in (0.0, 0.3, 0.5, 1.0) if task.has_depth else (None,):
        item = fitted(task, asker, length=length, depth=depth, seed=1, index=0)
        draft_of = [task.build(Draw(f"1/{name}/{length}/{depth}/0", units, depth or 0.0)) for units in (1, 2)]
        unit = abs(len(asker.ids(draft_of[1])) - len(asker.ids(draft_of[0])))
        assert length - max(3 * unit, 40) < len(item.ids) <= length
        for passage, words in zip(item.passages, draft_of[0].passages, strict=True):
            assert words in asker.tokenizer.decode([item.ids[place] for place in passage])
        if depth is not None:
            (passage,) = item.passages
            # of the filler, which the task's own words stand around
            around = len(asker.ids(draft_of[0])) / length
            assert abs(passage.start / len(item.ids) - depth) < around + 0.05


def test_a_deeper_passage_stands_deeper(asker: Asker) -> None:
    for name, task in TASKS.items():
        if task.has_depth:
            items = [fitted(task, asker, length=1500, depth=k / 4, seed=0, index=0) for k in range(5)]
            starts = [item.passages[0].start for item in items]
            assert starts == sorted(starts), name
            assert starts[-1] - starts[0] > 1000, name


def test_a_length_that_holds_no_question_is_refused(asker: Asker) -> None:
    with pytest.raises(RequestError, match=r"^length: must hold the task common-words, which has \d+ tokens; got 100$"):
        fitted(TASKS["common-words"], asker, length=100, depth=None, seed=0, index=0)


def test_a_passage_that_is_not_there_once_is_refused(asker: Asker) -> None:
    ids = asker.tokenizer.encode("one two one")
    assert asker.tokenizer.decode([ids[place] for place in asker.places(ids, "two")]).strip() == "two"
    for words, times in (("one", "more than once"), ("three", "never")):
        with pytest.raises(RequestError, match=f"^passage: must stand in the prompt once; got it {times}: '{words}'"):
            asker.places(ids, words)


def test_scores() -> None:
    assert match_all("It is 12 and THREE.", ["12", "three", "4"]) == pytest.approx(2 / 3)
    assert match_any("It is 12.", ["three", "12"]) == 1
    assert match_any("It is 1.", ["three", "12"]) == 0
    assert copied(" a b x d", ["a b c d"]) == 0.5
    assert copied("a b c d. And so on", ["a b c d"]) == 0.75  # the last word has a point
    assert copied("x a b c d", ["a b c d"]) == 0


def test_coined_names_are_no_part_of_each_other() -> None:
    found = list(islice(names(Random(0)), 20_000))
    assert len(set(found)) == 20_000
    assert {len(name) for name in found} == {7}
    assert all(re.fullmatch("[A-Z][a-z]{6}", name) for name in found[:100])


def test_keys_and_numbers_come_once() -> None:
    found = list(islice(keys(Random(0)), 40_000))
    assert len(set(found)) == len(found)
    assert len(set(islice(numbers(Random(0), digits=3), 1000))) == 900


def test_filler_has_no_digit_and_no_coined_name() -> None:
    text = " ".join(islice(sentences(Random(0)), 500))
    assert not re.search(r"\d", text)
    assert not re.search(r"[a-z][A-Z]|\b[A-Z][a-z]{6}\b(?<!The)", text.replace("The ", ""))


def test_common_words_are_as_many_as_stated() -> None:
    draft = TASKS["common-words"].build(Draw("0", 100, 0))
    words = [line.split(". ")[1] for line in draft.turns[0]["content"].splitlines() if re.match(r"\d+\. ", line)]
    counts = {word: words.count(word) for word in words}
    assert sorted(counts.values())[-COMMON:] == [10] * COMMON
    assert len(counts) == 110
    assert {word for word, count in counts.items() if count == 10} == set(draft.answers)
