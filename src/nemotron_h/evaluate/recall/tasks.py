"""What is asked of a long text: each task a function of a seed, of how much text there is, and of a depth.

    draft = task.build(Draw(seed, units=40, depth=0.5))     # 40 lines of filler, what is asked for in the middle
    task.score("The number is 4821377.", draft.answers)

Nothing is downloaded: texts are made of words of ours, and what is asked for stands in them exactly as often as the
task says. A task whose passages stand all over the text has no depth. Scoring is RULER's where the task is RULER's
(Hsieh et al. 2024, arXiv:2404.06654): the share of the answers that the reply holds, in any case of letters.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from random import Random
from typing import Any

from nemotron_h.evaluate.recall.words import ADJECTIVES, NOUNS, keys, names, numbers, sentences

HOPS = 4  # of a chain of variables
VALUES = 4  # of one key
COPIED_WORDS = 24
COMMON, COMMON_TIMES, UNCOMMON_TIMES = 10, 10, 1
FREQUENT, EXPONENT = 3, 2.0

Turn = dict[str, Any]  # a message, as chat templates take it


@dataclass(frozen=True)
class Draw:
    """What a draft depends on."""

    seed: str
    units: int  # lines of filler, or what there is of it in the task
    depth: float  # 0..1, how far into the filler the passage stands

    def rng(self, of: str) -> Random:
        """Numbers of their own for each part, so that more filler changes nothing else."""
        return Random(f"{self.seed}/{of}")

    def within(self, lines: Sequence[str], *passages: str) -> list[str]:
        """The lines with the passages among them, at the depth."""
        place = round(self.depth * len(lines))
        return [*lines[:place], *passages, *lines[place:]]

    def scattered(self, lines: Sequence[str], passages: Sequence[str]) -> list[str]:
        """The lines with the passages anywhere among them, in their order."""
        rng = self.rng("places")
        shares = sorted(rng.random() for _ in passages)
        found = list(lines)
        for share, passage in reversed(list(zip(shares, passages, strict=True))):
            found.insert(round(share * len(lines)), passage)
        return found


@dataclass(frozen=True)
class Draft:
    """A prompt as turns, the last one the question; `lead` begins the answer, for whoever only completes."""

    turns: tuple[Turn, ...]
    lead: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]  # what holds them: each stands in the turns once
    counts: tuple[int, ...]  # how often each answer stands in the turns


Score = Callable[[str, Sequence[str]], float]


@dataclass(frozen=True)
class Task:
    """One kind of question."""

    name: str
    build: Callable[[Draw], Draft]
    score: Score
    has_depth: bool
    max_tokens: int  # of the reply
    what: str  # in words, for tables and pages
    ruler: str | None = None  # RULER's name of it


def match_all(reply: str, answers: Sequence[str]) -> float:
    """RULER's string_match_all: the share of the answers that the reply holds."""
    return sum(answer.lower() in reply.lower() for answer in answers) / len(answers)


def match_any(reply: str, answers: Sequence[str]) -> float:
    """RULER's string_match_part: does the reply hold one of them?"""
    return float(any(answer.lower() in reply.lower() for answer in answers))


def copied(reply: str, answers: Sequence[str]) -> float:
    """The share of the first answer's words that the reply begins with."""
    want, got = answers[0].split(), reply.split()
    right = next((place for place, word in enumerate(want) if got[place : place + 1] != [word]), len(want))
    return right / len(want)


def asked(text: Sequence[str], opening: str, question: str, *, between: str = "\n") -> tuple[Turn, ...]:
    """One turn: what it is about, the text, the question."""
    return ({"role": "user", "content": f"{opening}\n\n{between.join(text)}\n\n{question}"},)


def filler(draw: Draw) -> list[str]:
    return list(islice(sentences(draw.rng("filler")), draw.units))


def needle(draw: Draw) -> Draft:
    """One number, noted once."""
    key, number = next(keys(draw.rng("keys"))), next(numbers(draw.rng("numbers")))
    passage = number_of(key, number)
    return Draft(
        asked(
            draw.within(filler(draw), passage), NOTED, f"Which number of the {key} is noted in the text?", between=" "
        ),
        f"The number of the {key} is",
        (number,),
        (passage,),
        (1,),
    )


NOTED = "Numbers are noted in the text below. You will be asked for one of them, so keep them in mind."


def number_of(key: str, number: str) -> str:
    return f"The number of the {key} is {number}."


def many_keys(draw: Draw) -> Draft:
    """One number among as many others as the text has lines."""
    known, values = keys(draw.rng("keys")), numbers(draw.rng("numbers"))
    key, number = next(known), next(values)
    others = [number_of(next(known), next(values)) for _ in range(draw.units)]
    passage = number_of(key, number)
    return Draft(
        asked(draw.within(others, passage), NOTED, f"Which number of the {key} is noted in the text?"),
        f"The number of the {key} is",
        (number,),
        (passage,),
        (1,),
    )


def many_values(draw: Draw) -> Draft:
    """All numbers of one key, noted here and there."""
    key, values = next(keys(draw.rng("keys"))), tuple(islice(numbers(draw.rng("numbers")), VALUES))
    passages = tuple(f"A number of the {key} is {number}." for number in values)
    return Draft(
        asked(
            draw.scattered(filler(draw), passages),
            NOTED,
            f"Which {VALUES} numbers of the {key} are noted in the text? Name all of them.",
            between=" ",
        ),
        f"The numbers of the {key} are",
        values,
        passages,
        (1,) * VALUES,
    )


def variables(draw: Draw) -> Draft:
    """A value handed on from variable to variable, beside a second chain with another value."""
    known, values = (name.upper() for name in names(draw.rng("names"))), numbers(draw.rng("numbers"), digits=5)
    chain, decoys = (tuple(islice(known, HOPS + 1)) for _ in range(2))
    value, other = next(values), next(values)

    def steps(chain: Sequence[str], value: str) -> list[str]:
        return [f"VAR {chain[0]} = {value}", *(f"VAR {new} = VAR {old}" for old, new in pairwise(chain))]

    passages, beside = steps(chain, value), steps(decoys, other)
    merged = merged_by(draw.rng("order"), passages, beside)
    counts = (2,) * HOPS + (1,)  # the last is handed on to nobody
    return Draft(
        asked(
            draw.scattered(filler(draw), merged),
            "Variables are set in the text below, some to the value of another. Follow each value along.",
            f"Which {HOPS + 1} variables have the value {value}, directly or through others? Name all of them.",
        ),
        f"The variables that have the value {value} are",
        chain,
        tuple(passages),
        counts,
    )


def merged_by(rng: Random, *queues: Sequence[str]) -> list[str]:
    """The queues as one, each in its own order."""
    left = [list(reversed(queue)) for queue in queues]
    found = []
    while any(left):
        found.append(rng.choice([queue for queue in left if queue]).pop())
    return found


def hops(draw: Draw) -> Draft:
    """Two facts of different documents lead to a city, among documents that lead to others."""
    known, rng = names(draw.rng("names")), draw.rng("order")
    person, firm, city = next(known), next(known), next(known)
    passages = [f"{person} has worked for {firm} for many years.", f"The office of {firm} lies in {city}."]
    facts: list[str] = []
    for _ in range(draw.units):
        worker, other, place = next(known), next(known), next(known)
        facts += [f"{worker} has worked for {other} for many years.", f"The office of {other} lies in {place}."]
    rng.shuffle(facts)
    placed = draw.scattered(facts, merged_by(rng, passages[:1], passages[1:]))
    documents = [f"Document {number}: {fact}" for number, fact in enumerate(placed, 1)]
    return Draft(
        asked(documents, "Read the documents.", f"In which city is the office of the firm that {person} works for?"),
        f"The office of the firm that {person} works for lies in",
        (city,),
        tuple(passages),
        (1,),
    )


def common_words(draw: Draw) -> Draft:
    """The ten words of a list that come ten times, among words that come once."""
    known = single_words(draw.rng("words"))
    common = tuple(islice(known, COMMON))
    words = [word for word in common for _ in range(COMMON_TIMES)]
    words += [word for word in islice(known, draw.units) for _ in range(UNCOMMON_TIMES)]
    draw.rng("order").shuffle(words)
    lines = [f"{number}. {word}" for number, word in enumerate(words, 1)]
    return Draft(
        asked(
            lines,
            "Below is a numbered list of words. Some of them come more often than the others.",
            f"Which {COMMON} words come most often in the list?",
        ),
        f"The {COMMON} words that come most often are",
        common,
        (),
        (COMMON_TIMES,) * COMMON,
    )


def single_words(rng: Random) -> Iterator[str]:
    """Words of ours, none part of another in any case of letters, then coined ones; each once."""
    known = sorted({*ADJECTIVES, *NOUNS})
    whole = [word for word in known if len(word) > 3 and sum(word in other for other in known) == 1]
    rng.shuffle(whole)
    yield from whole
    for name in names(rng):
        if not any(word in name.lower() for word in whole):
            yield name.lower()


def frequent_words(draw: Draw) -> Draft:
    """The three most frequent words of a text of coined ones, word number k coming k^-2 as often as the first."""
    known = list(islice(names(draw.rng("names")), max(FREQUENT, draw.units // 4)))
    total = sum((place + 1) ** -EXPONENT for place in range(len(known)))
    words = [
        name.lower()
        for place, name in enumerate(known)
        for _ in range(max(1, round(draw.units * (place + 1) ** -EXPONENT / total)))
    ]
    draw.rng("order").shuffle(words)
    most = Counter(words).most_common(FREQUENT)
    return Draft(
        asked(
            [" ".join(words)],
            "Below is a text in an unknown language. Count how often each word comes.",
            f"Which {FREQUENT} words come most often in the text?",
        ),
        f"The {FREQUENT} words that come most often are",
        tuple(word for word, _ in most),
        (),
        tuple(count for _, count in most),
    )


def copying(draw: Draw) -> Draft:
    """A passage of random words, word for word, among others of the kind."""
    known, rng = names(draw.rng("names")), draw.rng("words")

    def passage(name: str) -> tuple[str, str]:
        words = " ".join(rng.choice(NOUNS) for _ in range(COPIED_WORDS))
        return f"Passage {name}: {words}.", words

    title = next(known)
    line, words = passage(title)
    others = [passage(next(known))[0] for _ in range(draw.units)]
    return Draft(
        asked(
            draw.within(others, line),
            "Below are passages of words, each with a name.",
            f"Repeat passage {title} word for word, and nothing else.",
        ),
        f"Passage {title}:",
        (words,),
        (line,),
        (1,),
    )


def association(draw: Draw) -> Draft:
    """Pairs of coined words without an instruction: the first of one, and the second is to follow."""
    known = names(draw.rng("names"))
    first, second = next(known), next(known)
    pairs = [f"{next(known)} -> {next(known)}" for _ in range(draw.units)]
    passage = f"{first} -> {second}"
    return Draft(
        ({"role": "user", "content": "\n".join(draw.within(pairs, passage))},),
        f"{first} ->",
        (second,),
        (passage,),
        (1,),
    )


def tool_result(draw: Draw) -> Draft:
    """One field of one record of what a tool gave back."""
    known, values = names(draw.rng("names")), numbers(draw.rng("numbers"))

    def record(name: str, number: str) -> str:
        return f'{{"customer": "{name}", "order": {number}, "state": "shipped"}}'

    customer, order = next(known), next(values)
    passage = record(customer, order)
    others = [record(next(known), next(values)) for _ in range(draw.units)]
    result = "[\n" + ",\n".join(draw.within(others, passage)) + "\n]"
    call = {"type": "function", "function": {"name": "list_orders", "arguments": {"state": "shipped"}}}
    turns: tuple[Turn, ...] = (
        {"role": "user", "content": "List the orders that were shipped."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": "Here they are. What do you want to know about them?"},
        {"role": "user", "content": f"What is the number of {customer}'s order?"},
    )
    return Draft(turns, f"The number of {customer}'s order is", (order,), (passage,), (1,))


def password(draw: Draw) -> Draft:
    """A word said in one turn, asked for in the next, text before and after it."""
    word = next(names(draw.rng("names")))
    lines = filler(draw)
    place = round(draw.depth * len(lines))
    passage = f"The password is {word}. I shall ask you for it later; until then do not name it."
    before, after = " ".join(lines[:place]), " ".join(lines[place:])
    turns: tuple[Turn, ...] = (
        {"role": "user", "content": f"{before} {passage}".strip()},
        {"role": "assistant", "content": "I will keep it in mind."},
        {"role": "user", "content": f"{after} Now: what is the password?".strip()},
    )
    return Draft(turns, "The password is", (word,), (passage,), (1,))


TASKS = {
    task.name: task
    for task in (
        Task("needle", needle, match_all, True, 32, "one number in a text", "niah_single"),
        Task("many-keys", many_keys, match_all, True, 32, "one number among many", "niah_multikey"),
        Task("many-values", many_values, match_all, False, 64, "all numbers of one key", "niah_multivalue"),
        Task("variables", variables, match_all, False, 64, "a value handed on", "vt"),
        Task("hops", hops, match_any, False, 32, "two facts of two documents", "qa"),
        Task("common-words", common_words, match_all, False, 96, "the words that come ten times", "cwe"),
        Task("frequent-words", frequent_words, match_all, False, 48, "the most frequent words", "fwe"),
        Task("copy", copying, copied, True, 96, "a passage word for word"),
        Task("association", association, match_all, True, 16, "pairs, without an instruction"),
        Task("tool-result", tool_result, match_all, True, 32, "a field of what a tool gave"),
        Task("password", password, match_all, True, 24, "a word of an earlier turn"),
    )
}
