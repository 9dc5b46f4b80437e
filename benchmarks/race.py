"""The race: this project at each precision against llama.cpp, vLLM and transformers, taking turns in one run.

    python benchmarks/race.py [--llama PYTHON] [--vllm PYTHON] [--transformers PYTHON] [--n 5] [--part PART]
        [--named MACHINE]

Each part is a file of results, written anew whenever one more of its rows is measured; run again with the same peers,
rows that this code has measured are left out. `peers.sh` makes the environments of the peers. All are given the same
weights, llama.cpp as bf16, Q8_0 and Q4_0, whose head and embedding are Q8_0. They are random: what a format costs in
accuracy is measured of a trained model (`loss.py`), and said under each table. A second machine's results stand beside
the first one's, in files with its name.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from results import commit, measured, sources, write

from nemotron_h import machine
from nemotron_h.evaluate.speed import MODULES, TYPES, Question, Race, decode, prefill, together, untrained

NAMES = {"256m": "256 M", "4b": "4B", "8b": "8B"}
FEW_BITS = ("int8", "int4")


@dataclass(frozen=True)
class Part:
    """What is asked of a preset."""

    preset: str
    questions: Sequence[Question]

    def named(self, what: str) -> str:
        return f"{NAMES[self.preset]}, {what}"


PARTS = {
    "256m-prefill-512": Part("256m", [prefill("bfloat16", 512)]),
    "256m-prefill-2048": Part("256m", [prefill(precision, 2048) for precision in TYPES]),
    "256m-prefill-8192": Part("256m", [prefill("bfloat16", 8192)]),
    "256m-prefill-32768": Part("256m", [prefill("bfloat16", 32_768)]),
    "256m-decode": Part("256m", [decode(precision, 512) for precision in TYPES]),
    "256m-long": Part("256m", [decode("int4", 32_768)]),
    "256m-together": Part("256m", [together(precision, 16, 512, 128) for precision in TYPES]),
    "4b-prefill": Part("4b", [prefill(precision, 512) for precision in TYPES]),
    "4b-decode": Part("4b", [decode(precision, 128) for precision in TYPES]),
    "8b-prefill": Part("8b", [prefill(precision, 512) for precision in FEW_BITS]),
    "8b-decode": Part("8b", [decode(precision, 128) for precision in FEW_BITS]),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for peer in MODULES:
        parser.add_argument(f"--{peer}", help="the Python that has it")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "nemotron_h" / "race")
    parser.add_argument("--n", type=int, default=5)
    parser.add_argument("--part", choices=[*PARTS], action="append")
    parser.add_argument("--named", metavar="MACHINE", help="results go to race-PART-MACHINE.json")
    given, checked_out = parser.parse_args(), commit()
    given.cache.mkdir(parents=True, exist_ok=True)
    peers = {name: python for name in MODULES if (python := getattr(given, name)) is not None}
    # what a row depends on
    basis = {"sources": sources(), "n": given.n, "peers": sorted(peers), "cpu": machine.cpu_name()}

    for name, part in PARTS.items():
        if given.part is not None and name not in given.part:
            continue
        file = f"race-{name}" + (f"-{given.named}" if given.named else "")
        rows, absent = measured(file, basis)
        known = {row.what for row in rows}
        left = [question for question in part.questions if part.named(question.what) not in known]
        if not left:
            continue
        race = Race(untrained(part.preset, given.cache), given.cache, peers, given.n)
        for _, found in race.run(left):
            rows += [replace(row, what=part.named(row.what)) for row in found]
            write(file, rows, checked_out, basis=basis, absent=absent | race.absent)
