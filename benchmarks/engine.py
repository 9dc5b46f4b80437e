"""The engine: what reuse saves, what a session costs, memory, where snapshots are placed. The 256 M model, bfloat16.

    python benchmarks/engine.py [--n 5] [--part reuse|memory|placement]

Each part is a file of results.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from results import ROOT, commit, write

from nemotron_h import PRESETS
from nemotron_h.config import cost
from nemotron_h.evaluate.contestants.contest import Contestant
from nemotron_h.evaluate.rows import Row, row
from nemotron_h.evaluate.speed import untrained

HERE = Path(__file__).parent
PREFIX = 8192
LONG = 32_768


def reuse(folder: str, n: int) -> list[Row]:
    ours = Contestant(HERE / "run_engine.py", [folder, "bfloat16"])
    found = [ours.ask("turns", length=PREFIX) for _ in range(n + 1)][1:]
    held = [ours.ask("session", length=PREFIX) for _ in range(n + 1)][1:]
    ours.close()

    def column(runs: Sequence[Mapping[str, float]], name: str) -> list[float]:
        return [run[name] for run in runs]

    cold = column(found, "cold")
    kept = [run["save"] + run["restore"] for run in held]
    return [
        row("to the first token, next turn on 8,192 tokens", "s", column(found, "turn"), cold, "cold", higher=False),
        row("to the first token, the same 8,192 tokens", "s", column(found, "same"), cold, "cold", higher=False),
        row("one step of one sequence, for comparison", "s", column(found, "step"), higher=False),
        row("session of 8,192 tokens, saved and restored", "s", kept, column(held, "read"), "cold", higher=False),
        row("its file", "MiB", [run["bytes"] / 2**20 for run in held], higher=False),
    ]


def memory(folder: str) -> list[Row]:
    ours = Contestant(HERE / "run_engine.py", [folder, "bfloat16"])
    above = ours.ask("memory", length=LONG) / 2**20
    ours.close()
    config = PRESETS["256m"]
    roof = (cost.token_bytes(config) * LONG + sum(cost.state_bytes(config).values())) / 2**20
    return [
        row("memory for 32,768 tokens, snapshots included", "MiB", [above], higher=False),
        row("of it keys and values, and one state", "MiB", [roof], higher=False),
    ]


def placement() -> list[Row]:
    """Tokens reused on made conversations, with room for a tenth of all candidates."""
    sys.path.insert(0, str(ROOT))
    from tests.inference import trace  # noqa: PLC0415 - the tests judge by it too

    calls = trace.conversations()
    slots = len(trace.ours(calls, 100_000)[1].snapshots) // 10
    ours = [float(trace.ours(calls, slots)[0])]
    what = f"reused of {sum(len(call.prompt) for call in calls):,} tokens, {slots} snapshots"
    return [
        row(what, "tokens", ours, [float(trace.least_recently_used(calls, slots))], "LRU", higher=True),
        row(what, "tokens", ours, [float(trace.oracle(calls, slots))], "oracle", higher=True),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=5)
    parser.add_argument("--part", choices=["reuse", "memory", "placement"])
    given, checked_out = parser.parse_args(), commit()
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(untrained("256m", Path(scratch)))
        parts = {
            "reuse": lambda: reuse(folder, given.n),
            "memory": lambda: memory(folder),
            "placement": placement,
        }
        for name, part in parts.items():
            if given.part in (None, name):
                write("placement" if name == "placement" else f"engine-{name}", part(), checked_out)
