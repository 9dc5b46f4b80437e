"""From the command to the first token of the laptop's model: with the kernels compiled before, and the first time ever.

    python benchmarks/startup.py [--n 5]

The first time, kernels are compiled and this machine's arithmetic is looked at: both are kept in folders, which are
empty ones then.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from results import commit, write

from nemotron_h import PRESETS, Hybrid, save
from nemotron_h.config.tokenizer import TokenizerConfig
from nemotron_h.evaluate.rows import row
from nemotron_h.model.init import initialise
from nemotron_h.text.bpe import train

COMMAND = [sys.executable, "-m", "nemotron_h"]


def seconds(*arguments: str, **environment: str) -> float:
    """Of a command that writes one token and leaves."""
    began = time.perf_counter()
    subprocess.run([*COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL, env=os.environ | environment)
    return time.perf_counter() - began


def first_ever(*arguments: str) -> float:
    """The same on a machine that has not seen us."""
    with tempfile.TemporaryDirectory() as home:
        return seconds(*arguments, HOME=home, NUMBA_CACHE_DIR=home)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=5)
    given, checked_out = parser.parse_args(), commit()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "3m"
        model = Hybrid(PRESETS["3m"], dtype=torch.bfloat16)
        initialise(model, seed=0)
        text = Path(subprocess.__file__).read_text(encoding="utf-8")
        save(model, folder, tokenizer=train([text], TokenizerConfig(vocab_size=400)))
        ask = ("generate", str(folder), "def", "--max-tokens", "1", "--ignore-end")
        seconds(*ask)
        runs = {
            "command to first token, 3 M": lambda: seconds(*ask),
            "command to first token, 3 M, the first time ever": lambda: first_ever(*ask),
            "nemotron-h --help": lambda: seconds("--help"),
        }
        rows = [row(what, "s", [run() for _ in range(given.n)], higher=False) for what, run in runs.items()]
        write("startup", rows, checked_out)
