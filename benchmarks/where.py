"""Where the time goes, by kind of work: a prompt, a token of one sequence, and of 16 at once, in each precision.

    python benchmarks/where.py [PRESET] [--length 2048] [--n 5]

Each launch of a kernel is timed by itself, and told as a share of the whole. A step runs all of them in one go, which
is faster: its shares may add up to more than the whole. A token stands in the middle of a chunk of the scan: one in
CHUNK begins the next one and takes longer, since it moves the state on.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from results import PART, commit, write

from nemotron_h.evaluate.rows import Row, row
from nemotron_h.evaluate.speed import TYPES, untrained
from nemotron_h.grid import CHUNK
from nemotron_h.inference import naive
from nemotron_h.inference.load import load
from nemotron_h.machine import tune_memory
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.state import Paging
from nemotron_h.ops.jit import kernels

# By the kernel's file and name; others are `OTHER`.
KINDS = {
    "linear": "products",
    "floats": "products",
    "quantized": "products",
    "quantized.round_rows": "rounding of rows",
    "floats.in_order": "laying out of rows",
    "ssd": "scan",
    "attention": "attention",
    "conv": "convolution",
    "norm": "norms",
}
OTHER, BETWEEN = "other kernels", "between kernels: torch and Python"


def kind(launch: object) -> str:
    """Of a compiled kernel, whose name ends in a digest."""
    function = launch.py_func  # type: ignore[attr-defined]
    name = function.__name__.rpartition("_")[0]
    room = function.__module__.rpartition(".")[2]
    return KINDS.get(f"{room}.{name}", KINDS.get(room, OTHER))


class Timed(kernels.Recording):
    """Times each launch, by kind, and remembers none: what a launch was of is free for the next one, as always."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()

    def add(self, launch: object, count: int, threads: int, some: int, rest: tuple[object, ...]) -> None:
        began = time.perf_counter()
        launch(0, count, threads, some, *rest)  # type: ignore[operator]
        self.seconds[kind(launch)] += time.perf_counter() - began


class Named(kernels.Recording):
    """A recording that knows the kind of each launch."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[str] = []

    def add(self, launch: object, count: int, threads: int, some: int, rest: tuple[object, ...]) -> None:
        super().add(launch, count, threads, some, rest)
        self.kinds.append(kind(launch))

    def one_by_one(self) -> Counter[str]:
        """Seconds of another run of each, by kind."""
        seconds: Counter[str] = Counter()
        for index, name in enumerate(self.kinds):
            began = time.perf_counter()
            self.replay(slice(index, index + 1))
            seconds[name] += time.perf_counter() - began
        return seconds


R = TypeVar("R", bound=kernels.Recording)


def of_call(call: Callable[[], object], made: R) -> R:
    """What a call of the model takes."""
    token = kernels.RECORDING.set(made)
    try:
        call()
    finally:
        kernels.RECORDING.reset(token)
    return made


def shares(what: str, runs: list[Counter[str]], wholes: list[float]) -> list[Row]:
    """Each kind's part of the whole, the largest first."""
    median = {name: statistics.median(run[name] for run in runs) for name in sorted(set().union(*runs))}
    whole = statistics.median(wholes)
    rows = [row(what, "ms", [1e3 * seconds for seconds in wholes], higher=False)]
    for name, seconds in sorted(median.items(), key=lambda item: -item[1]):
        rows.append(row(f"{what}: {name}", PART, [100 * seconds / whole], higher=False))
    return rows


@torch.no_grad()
def prompt(model: Hybrid, what: str, length: int, n: int) -> list[Row]:
    runs, wholes = list[Counter[str]](), list[float]()
    for _ in range(1 + n):  # the first one compiles
        read = partial(naive.next_logits, model, [0] * length, model.empty_state(1))
        began = time.perf_counter()
        seconds = of_call(read, Timed()).seconds
        wholes.append(time.perf_counter() - began)
        seconds[BETWEEN] = wholes[-1] - seconds.total()
        runs.append(seconds)
    return shares(what, runs[1:], wholes[1:])


@torch.no_grad()
def step(model: Hybrid, what: str, sequences: int, length: int, n: int) -> list[Row]:
    """One more token of each sequence."""
    state = model.empty_state(sequences)
    tokens = torch.zeros(sequences, length + CHUNK // 2, dtype=torch.int64)
    model.hidden(tokens.flatten(), model.segments(tokens, state), state)
    segments = model.segments(tokens[:, :1], state)
    state.enter()
    ids, paging = torch.zeros(segments.rows, dtype=torch.int64), Paging.of(state.tables, segments)
    launches = Named()
    with kernels.Watch(launches):
        of_call(lambda: model.head(model.through(ids, segments, state, paging)), launches)
    if launches.spoiled:
        raise SystemExit(
            f"{what}: must be kernels alone; got {launches.spoiled}, which is torch's; its time would be left out"
        )
    wholes = []
    for _ in range(20 * n):
        began = time.perf_counter()
        launches.replay()
        wholes.append(time.perf_counter() - began)
    return shares(what, [launches.one_by_one() for _ in range(20 * n)], wholes)


def measured(folder: Path, precision: str, length: int, n: int) -> list[Row]:
    model = load(folder, precision=precision).model
    if model.takes_any_rows:
        model.row_multiple = 1
    return [
        *prompt(model, f"{precision}, prompt of {length:,} tokens", length, n),
        *step(model, f"{precision}, token after about {length:,}", 1, length, n),
        *step(model, f"{precision}, tokens of 16 after about 512 each", 16, 512, n),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", nargs="?", default="256m")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--n", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "nemotron_h" / "race")
    given, checked_out = parser.parse_args(), commit()
    tune_memory()
    given.cache.mkdir(parents=True, exist_ok=True)
    folder = untrained(given.preset, given.cache)
    rows = [one for precision in TYPES for one in measured(folder, precision, given.length, given.n)]
    write(f"where-{given.preset}", rows, checked_out)
