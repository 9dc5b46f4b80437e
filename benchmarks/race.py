"""The race: this project at each precision against llama.cpp, vLLM and transformers, taking turns in one run.

    python benchmarks/race.py [--llama PYTHON] [--vllm PYTHON] [--transformers PYTHON] [--n 5] [--part PART]

Each part is a file of results, written when it is measured; run again, parts that this commit has measured are left
out. `peers.sh` makes the environments of the peers; one that is not given is not in the table. All are given the same
weights, llama.cpp as bf16, Q8_0 and Q4_0, whose head and embedding are Q8_0. They are random: nothing here says what a
format costs in accuracy.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from contest import Contestant, turns
from generate import folder_of
from results import FOLDER, Row, commit, row, write

from nemotron_h import PRESETS, machine
from nemotron_h.config import cost
from nemotron_h.config.gguf import GgufType
from nemotron_h.convert.gguf import write_gguf

HERE = Path(__file__).parent
# of a number of bits: our precision, and llama.cpp's type
KINDS = {"bfloat16": "bf16", "int8": "q8_0", "int4": "q4_0"}
NAMES = {"256m": "256 M", "4b": "4B", "8b": "8B"}
DECODED = 64


class Race:
    """Folders and files of the contestants, and how each is started."""

    def __init__(self, cache: Path, pythons: Mapping[str, str | None], n: int) -> None:
        self.cache, self.pythons, self.n = cache, pythons, n

    def folder(self, preset: str) -> Path:
        path = self.cache / preset
        return path if path.exists() else folder_of(preset, self.cache)

    def gguf(self, preset: str, kind: str) -> Path:
        path = self.cache / f"{preset}-{kind}.gguf"
        if not path.exists():
            write_gguf(self.folder(preset), path, matrices=GgufType(kind))
        return path

    @contextmanager
    def contestants(
        self, preset: str, precisions: Sequence[str], others: Sequence[str] = ()
    ) -> Iterator[dict[str, Contestant]]:
        """By name: ours and llama.cpp's in each precision, and other peers in bfloat16."""
        with ExitStack() as stack:
            found: dict[str, Contestant] = {}

            def start(name: str, script: str, arguments: Sequence[str], python: str | None) -> None:
                if python is not None:
                    found[name] = Contestant(HERE / script, arguments, python)
                    stack.callback(found[name].close)

            threads = str(machine.cores())
            for precision in precisions:
                start(precision, "run_ours.py", [str(self.folder(preset)), precision], sys.executable)
                kind = KINDS[precision]
                start(kind, "run_llama.py", [str(self.gguf(preset, kind)), threads], self.pythons["llama"])
            for name in others:
                start(name, f"run_{name}.py", [str(self.folder(preset)), "bfloat16"], self.pythons[name])
            yield found

    def rows(
        self, what: str, contestants: Mapping[str, Contestant], ours: str, question: str, **details: int
    ) -> list[Row]:
        """Ours against each of the others, in turns."""
        names = [ours, *(name for name in contestants if name not in PRECISIONS)]
        runs = turns([contestants[name] for name in names], question, self.n, **details)
        found = []
        for name, own in zip(names[1:], runs[1:], strict=True):
            version = contestants[name].about["version"] + (f" {name}" if name in KINDS.values() else "")
            found.append(row(what, "tokens/s", runs[0], own, version, higher=True))
        return found or [row(what, "tokens/s", runs[0], higher=True)]


PRECISIONS = tuple(KINDS)


def prefill(race: Race, preset: str, lengths: Sequence[int]) -> list[Row]:
    found = []
    others = ("vllm", "transformers") if preset == "256m" else ()
    with race.contestants(preset, ["bfloat16"], others) as wide:
        for length in lengths:
            what = f"{NAMES[preset]}, bfloat16, prompt of {length:,} tokens"
            found += race.rows(what, wide, "bfloat16", "prefill", length=length)
    with race.contestants(preset, ["int8", "int4"]) as narrow:
        for precision in ("int8", "int4"):
            what = f"{NAMES[preset]}, {precision}, prompt of {lengths[-1]:,} tokens"
            found += race.rows(what, narrow, precision, "prefill", length=lengths[-1])
    rate = machine.matmul_rates(size=1024, rows=512)["bfloat16"]
    flops = sum(cost.prefill_flops(PRESETS[preset], lengths[-1]).values())
    roof = rate / flops
    best = max(entry.ours for entry in found if f"bfloat16, prompt of {lengths[-1]:,}" in entry.what)
    what = f"{NAMES[preset]}, bfloat16, share of the rate of matrix products"
    return [*found, row(what, "of 1", [best / roof], higher=True)]


def decode(race: Race, preset: str, after: int) -> list[Row]:
    found = []
    bandwidth = machine.bandwidth()
    for precision in PRECISIONS:
        others = ("transformers",) if precision == "bfloat16" and preset == "256m" else ()
        with race.contestants(preset, [precision], others) as both:
            what = f"{NAMES[preset]}, {precision}, decoding after {after:,} tokens"
            mine = race.rows(what, both, precision, "decode", length=DECODED, after=after)
        parts = cost.weight_bytes(PRESETS[preset], precision)
        state = sum(cost.state_bytes(PRESETS[preset]).values())
        read = parts["matrices"] + parts["head"] + parts["vectors"] + state + cost.token_bytes(PRESETS[preset]) * after
        share = mine[0].ours * read / bandwidth
        found += [*mine, row(f"{what}, share of the memory's rate", "of 1", [share], higher=True)]
    return found


def together(race: Race) -> list[Row]:
    """Output tokens per second of 16 requests of 512 in, 128 out, prompts counted in the time."""
    what = "256 M, 16 requests of 512 tokens in, 128 out, at once"
    found = []
    for precision in PRECISIONS:
        others = ("vllm",) if precision == "bfloat16" else ()
        with race.contestants("256m", [precision], others) as all_of:
            found += race.rows(f"{what}, {precision}", all_of, precision, "serving", count=16, length=512, new=128)
    return found


PARTS: dict[str, Callable[[Race], list[Row]]] = {
    "256m-prefill": lambda race: prefill(race, "256m", (512, 8192, 32_768, 2048)),
    "256m-decode": lambda race: decode(race, "256m", 512),
    "256m-long": lambda race: decode(race, "256m", 32_768),
    "256m-together": together,
    "4b-prefill": lambda race: prefill(race, "4b", (512,)),
    "4b-decode": lambda race: decode(race, "4b", 128),
}


def measured(name: str, at: str) -> bool:
    path = FOLDER / f"race-{name}.json"
    return path.exists() and json.loads(path.read_text())["commit"] == at


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for peer in ("llama", "vllm", "transformers"):
        parser.add_argument(f"--{peer}", help="the Python that has it")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "nemotron_h" / "race")
    parser.add_argument("--n", type=int, default=5)
    parser.add_argument("--part", choices=[*PARTS], action="append")
    given, checked_out = parser.parse_args(), commit()
    given.cache.mkdir(parents=True, exist_ok=True)
    race = Race(given.cache, {name: getattr(given, name) for name in ("llama", "vllm", "transformers")}, given.n)
    for name, part in PARTS.items():
        if (given.part is None or name in given.part) and not measured(name, checked_out):
            write(f"race-{name}", part(race), checked_out)
