"""A training step against transformers, in one run: same model, same batch, float32 weights, AdamW, clipping.

    python benchmarks/train_step.py [--peer-python PYTHON] [--n 5]

In bfloat16 our products are bfloat16 (weights stay float32); transformers runs under torch's autocast.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from results import commit, write

from nemotron_h import PRESETS, Hybrid, save
from nemotron_h.evaluate.contestants.contest import Contestant, turns
from nemotron_h.evaluate.rows import Row, row
from nemotron_h.model.init import initialise

HERE = Path(__file__).parent
BATCH, LENGTH = 4, 512


def measured(folder: str, precision: str, peer_python: str, n: int) -> list[Row]:
    contestants = [
        Contestant(HERE / "step_ours.py", [folder, precision]),
        Contestant(HERE / "step_transformers.py", [folder, precision], peer_python),
    ]
    version = contestants[1].about["version"]
    runs = turns(contestants, "step", n, batch=BATCH, length=LENGTH)
    peaks = [[contestant.ask("peak") / 2**20] for contestant in contestants]
    for contestant in contestants:
        contestant.close()
    what = f"25 M, {precision} products, {BATCH} x {LENGTH} tokens"
    return [
        row(f"{what}, a step", "tokens/s", *runs, version, higher=True),
        row(f"{what}, peak memory", "MiB", *peaks, version, higher=False),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--n", type=int, default=5)
    given, checked_out = parser.parse_args(), commit()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "25m"
        model = Hybrid(PRESETS["25m"], dtype=torch.float32)
        initialise(model, seed=0)
        save(model, folder, dtype=torch.float32)
        rows = [
            entry
            for precision in ("float32", "bfloat16")
            for entry in measured(str(folder), precision, given.peer_python, given.n)
        ]
    write("train-step", rows, checked_out)
