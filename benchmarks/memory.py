"""Peak memory of reading a prompt, by its length, against transformers: the 256 M model, each in a fresh process.

    python benchmarks/memory.py [--peer-python PYTHON]

Transformers is not asked for the longest prompt, of which it takes many times as much.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from results import commit, write

from nemotron_h.evaluate.contestants.contest import Contestant
from nemotron_h.evaluate.rows import Row, row
from nemotron_h.evaluate.speed import SCRIPTS, untrained


def memory(parent: Path, peer_python: str) -> list[Row]:
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", default=sys.executable)
    given, checked_out = parser.parse_args(), commit()
    with tempfile.TemporaryDirectory() as scratch:
        write("memory", memory(Path(scratch), given.peer_python), checked_out)
