"""Reading a prompt and generating, against transformers, in one run: the 256 M model; and decoding at the 4B shape.

    python benchmarks/generate.py [--peer-python PYTHON] [--n 5] [--part 256m|4b|memory]

Decoding reads every weight once for each token, so its roof is the memory's rate over those bytes, measured here too.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from results import commit, write

from nemotron_h import PRESETS, machine
from nemotron_h.config import cost
from nemotron_h.evaluate.contestants.contest import Contestant, turns
from nemotron_h.evaluate.rows import Row, row
from nemotron_h.evaluate.speed import SCRIPTS, untrained

PROMPTS = (512, 2048, 8192)
DECODED = 64


def against_transformers(parent: Path, peer_python: str, n: int) -> list[Row]:
    folder = str(untrained("256m", parent))
    ours = Contestant(SCRIPTS / "run_ours.py", [folder, "bfloat16"])
    peer = Contestant(SCRIPTS / "run_transformers.py", [folder, "bfloat16"], peer_python)
    version = peer.about["version"]
    rows = []
    for length in PROMPTS:
        runs = turns([ours, peer], "prefill", n, length=length)
        rows.append(row(f"256 M, bfloat16, prompt of {length:,} tokens", "tokens/s", *runs, version, higher=True))
    runs = turns([ours, peer], "decode", n, length=DECODED, after=512)
    rows.append(row("256 M, bfloat16, decoding", "tokens/s", *runs, version, higher=True))
    roof = machine.bandwidth() / decoded_bytes("256m")
    rows.append(
        row("256 M, decoding, share of the memory's rate", "of 1", [run / roof for run in runs[0]], higher=True)
    )
    for contestant in (ours, peer):
        contestant.close()
    return rows


def memory(parent: Path, peer_python: str) -> list[Row]:
    """Peak memory by length of the prompt, each in a fresh process."""
    folder = str(untrained("256m", parent))
    rows = []
    for length in (2048, 32_768):
        peaks, version = [], None
        scripts = [("run_ours.py", sys.executable), ("run_transformers.py", peer_python)]
        for script, python in scripts[: 2 if length == 2048 else 1]:  # the peer takes many times as much: not at 32,768
            contestant = Contestant(SCRIPTS / script, [folder, "bfloat16"], python)
            peaks.append([contestant.ask("peak", length=length) / 2**20])
            version = contestant.about["version"]
            contestant.close()
        rows.append(
            row(
                f"256 M, peak memory at {length:,} tokens",
                "MiB",
                *peaks,
                version if len(peaks) > 1 else None,
                higher=False,
            )
        )
    return rows


def at_4b(parent: Path, n: int) -> list[Row]:
    folder = str(untrained("4b", parent))
    ours = Contestant(SCRIPTS / "run_ours.py", [folder, "bfloat16"])
    rates, shares = [], []
    for _ in range(n):
        bandwidth = machine.bandwidth()
        rates.append(ours.ask("decode", length=8, after=64))
        shares.append(rates[-1] * decoded_bytes("4b") / bandwidth)
    ours.close()
    return [
        row("4B shape, bfloat16, decoding", "tokens/s", rates, higher=True),
        row("4B shape, decoding, share of the memory's rate", "of 1", shares, higher=True),
    ]


def decoded_bytes(preset: str) -> int:
    """What one token reads: every weight but the embedding's other rows, and the state."""
    config = PRESETS[preset]
    table = 2 * config.vocab_size * config.hidden_size
    return sum(cost.weight_bytes(config, "bfloat16").values()) - table + sum(cost.state_bytes(config).values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--n", type=int, default=5)
    parser.add_argument("--part", choices=["256m", "memory", "4b"])
    given, checked_out = parser.parse_args(), commit()
    with tempfile.TemporaryDirectory() as scratch:
        parts = {
            "256m": lambda: against_transformers(Path(scratch), given.peer_python, given.n),
            "memory": lambda: memory(Path(scratch) / "memory", given.peer_python),
            "4b": lambda: at_4b(Path(scratch), given.n),
        }
        for name, part in parts.items():
            if given.part in (None, name):
                write(f"generate-{name}", part(), checked_out)
