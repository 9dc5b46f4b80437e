"""The race: this project at each precision against llama.cpp, vLLM and transformers, taking turns in one run.

    python benchmarks/race.py [--llama PYTHON] [--vllm PYTHON] [--transformers PYTHON] [--n 5] [--part PART]

Each part is a file of results, written when it is measured; run again, parts that this commit has measured are left
out. `peers.sh` makes the environments of the peers; one that is not given is not in the table. All are given the same
weights, llama.cpp as bf16, Q8_0 and Q4_0, whose head and embedding are Q8_0. They are random: nothing here says what a
format costs in accuracy.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from results import FOLDER, commit, write

from nemotron_h.evaluate.rows import Row, row
from nemotron_h.evaluate.speed import MODULES, TYPES, Race, untrained

NAMES = {"256m": "256 M", "4b": "4B", "8b": "8B"}
START = Callable[[str], Race]


def named(preset: str, rows: Iterable[Row]) -> list[Row]:
    return [replace(own, what=f"{NAMES[preset]}, {own.what}") for own in rows]


def prefill(start: START, preset: str, length: int, precisions: Sequence[str] = ("bfloat16",)) -> list[Row]:
    race, found = start(preset), []
    for precision in precisions:
        with race.contestants(precision) as some:
            mine = race.prefill(some, length)
        found += mine
        if precision == "bfloat16":
            share = mine[0].ours / race.prefill_roof(precision, length)
            found.append(row(f"{mine[0].what}, share of the rate of products", "of 1", [share], higher=True))
    return named(preset, found)


def decode(start: START, preset: str, after: int, precisions: Sequence[str] = tuple(TYPES)) -> list[Row]:
    race, found = start(preset), []
    for precision in precisions:
        with race.contestants(precision) as some:
            mine = race.decode(some, after)
        share = mine[0].ours / race.decode_roof(precision, after)
        found += [*mine, row(f"{mine[0].what}, share of the memory's rate", "of 1", [share], higher=True)]
    return named(preset, found)


def together(start: START) -> list[Row]:
    race, found = start("256m"), []
    for precision in TYPES:
        with race.contestants(precision) as some:
            found += race.together(some, count=16, length=512, new=128)
    return named("256m", found)


PARTS: dict[str, Callable[[START], list[Row]]] = {
    "256m-prefill-512": lambda start: prefill(start, "256m", 512),
    "256m-prefill-2048": lambda start: prefill(start, "256m", 2048, tuple(TYPES)),
    "256m-prefill-8192": lambda start: prefill(start, "256m", 8192),
    "256m-prefill-32768": lambda start: prefill(start, "256m", 32_768),
    "256m-decode": lambda start: decode(start, "256m", 512),
    "256m-long": lambda start: decode(start, "256m", 32_768),
    "256m-together": together,
    "4b-prefill": lambda start: prefill(start, "4b", 512, tuple(TYPES)),
    "4b-decode": lambda start: decode(start, "4b", 128),
    "8b-prefill": lambda start: prefill(start, "8b", 512, ("int8", "int4")),
    "8b-decode": lambda start: decode(start, "8b", 128, ("int8", "int4")),
}


def measured(name: str, at: str) -> bool:
    path = FOLDER / f"race-{name}.json"
    return path.exists() and json.loads(path.read_text())["commit"] == at


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for peer in MODULES:
        parser.add_argument(f"--{peer}", help="the Python that has it")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "nemotron_h" / "race")
    parser.add_argument("--n", type=int, default=5)
    parser.add_argument("--part", choices=[*PARTS], action="append")
    given, checked_out = parser.parse_args(), commit()
    given.cache.mkdir(parents=True, exist_ok=True)
    peers = {name: python for name in MODULES if (python := getattr(given, name)) is not None}

    def start(preset: str) -> Race:
        return Race(untrained(preset, given.cache), given.cache, peers, given.n)

    for name, part in PARTS.items():
        if (given.part is None or name in given.part) and not measured(name, checked_out):
            write(f"race-{name}", part(start), checked_out)
