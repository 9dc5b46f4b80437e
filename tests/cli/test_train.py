"""`nemotron-h train`: by the preset or the folder, ended and gone on with."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron_h.data.shards import HEADER, MAGIC, VERSION, ShardWriter
from nemotron_h.inference.load import load
from nemotron_h.training.metrics import rows

Command = Callable[..., Any]
SETTINGS = ["steps=300", "sequence_length=32", "batch_size=1", "learning_rate=1e-3", "precision=float32"]
COMMAND = "import torch; torch.set_num_threads(1)\nfrom nemotron_h.cli.app import main; main()"


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "shard", vocab_size=300) as writer:
        for start in range(1, 40):
            writer.add_document([(start * step) % 300 for step in range(1, 60)])
    return tmp_path / "shard"


def started(*arguments: object, before: str = "") -> subprocess.Popen[str]:
    line = [sys.executable, "-c", before + COMMAND, *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def signalled(number: signal.Signals, out: Path, *arguments: object) -> tuple[int, str, str]:
    """Start it, send the signal once it has done a few steps, and wait."""
    metrics, limit = out / "metrics.jsonl", time.monotonic() + 120
    metrics.unlink(missing_ok=True)  # a run that goes on begins another
    with started(*arguments) as running:
        while len(rows(metrics)) < 3 and running.poll() is None and time.monotonic() < limit:
            time.sleep(0.005)
        running.send_signal(number)
        printed, complained = running.communicate()
    return running.returncode, printed, complained


def weights(out: Path) -> str:
    return hashlib.sha256((out / "checkpoints" / "step-00000300" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_stopped_by_signals_and_a_full_disk_it_ends_in_the_same_bits(
    command: Command, checkpoint: Path, shard: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = ["--validation", shard, "--tokenizer", checkpoint / "tokenizer.json"]
    ended = command("train", checkpoint, shard, *SETTINGS, "checkpoint_every_steps=500", *options, "--out", whole)
    assert ended.code == 0, ended.err
    assert "about" in ended.out
    assert f"checkpoint {whole / 'checkpoints' / 'step-00000300'}" in ended.out

    arguments = ["train", checkpoint, shard, *SETTINGS, "checkpoint_every_steps=500", *options, "--out", out]
    code, printed, complained = signalled(signal.SIGTERM, out, *arguments)
    assert code == 143, complained
    assert "saved; the same command goes on from there" in printed
    [first] = (out / "checkpoints").iterdir()

    limit = "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (90_000,) * 2)\n"
    with started(*arguments, before=limit) as full:  # the log fits, a checkpoint does not
        _, complained = full.communicate()
    assert full.returncode == 2
    last = complained.splitlines()[-1]
    assert last.startswith(f"nemotron-h: {out / 'checkpoints'}"), complained
    assert "could not be written" in last
    assert list((out / "checkpoints").iterdir()) == [first]
    assert load(first).generate("def", max_tokens=2, ignore_end=True) is not None

    code, _, complained = signalled(signal.SIGINT, out, *arguments)
    assert code == 130, complained

    ended = command(*arguments)
    assert ended.code == 0, ended.err
    assert weights(out) == weights(whole)


def test_an_empty_held_out_shard_is_refused(command: Command, checkpoint: Path, shard: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.bin").touch()
    (tmp_path / "empty.idx").write_bytes(HEADER.pack(MAGIC, VERSION, 8, 0, 1) + bytes(8))
    arguments = ["train", checkpoint, shard, "steps=1", "sequence_length=32", "--out", tmp_path / "out"]
    line = command(*arguments, "--validation", tmp_path / "empty").line
    assert line == f"{tmp_path / 'empty'}: must hold two tokens or more; got 0; add documents"


def test_refusals(command: Command, checkpoint: Path, shard: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    small = ["steps=1", "sequence_length=32", "batch_size=1"]
    assert command("train", checkpoint, shard, "stepz=3", *out).line == "stepz: unknown setting; did you mean steps?"
    assert command("train", checkpoint, shard, *out).line == "steps: must be given; got nothing"
    assert command("train", checkpoint, shard, "steps=1.5", *out).line.startswith("steps: must be a valid integer")
    assert command("train", checkpoint, shard, "steps", *out).line.startswith("override: must read table.key=value")
    assert command("train", "3mm", shard, *small, *out).line.startswith("preset: must be one that exists; got '3mm'")
    missing = command("train", checkpoint, tmp_path / "none", *small, *out).line
    assert missing.startswith(f"{tmp_path / 'none.bin'}: must be a file of a shard")
    assert not (tmp_path / "out").exists()

    assert command("train", checkpoint, shard, *small, *out).code == 0
    changed = command("train", checkpoint, shard, *small, "learning_rate=1e-4", *out).line
    assert changed.startswith("learning_rate: must be 0.0008 to go on from")


def test_a_tokenizer_or_a_shard_of_another_model(
    command: Command, checkpoint: Path, shard: Path, tmp_path: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    arguments = ["train", tmp_path / "config.json", shard, "steps=2", "sequence_length=32", "--out", tmp_path / "out"]
    line = command(*arguments, "--tokenizer", checkpoint).line
    assert line.startswith("tokenizer.json: has 300 ids; the model's vocabulary is 200")
    line = command(*arguments).line
    assert line.startswith("tokens: must lie in 0..199; got 2")
