"""The race that a user runs."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]
SHORT = ("--prompt", 8, "--context", 8, "--runs", 1)


def test_bars_a_picture_and_a_peer_that_cannot_begin(
    command: Command, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture, kept = tmp_path / "speed.svg", tmp_path / "kept"
    peers = ("--llama", sys.executable, "--cache", kept)
    done = command("bench", checkpoint, *SHORT, "--precision", "int8", *peers, "--plot", picture)
    assert "llama does not take part in int8: " in caplog.text
    assert "No module named 'llama_cpp'" in caplog.text
    assert not list(kept.glob("*.gguf"))  # none is written for nobody
    lines = done.out.splitlines()
    assert lines[0].startswith(f"{checkpoint}, tokens/s on ")
    assert any(line.startswith("int8, prompt of 8 tokens, tokens/s") for line in lines)
    assert sum(line.startswith("  nemotron-h ") and "█" in line for line in lines) == 2
    assert "not in it: vllm: no Python that has it was named" in lines
    assert any(line.startswith("not in it: llama, int8: ") and "llama_cpp" in line for line in lines)
    assert lines[-1] == str(picture)
    assert picture.read_bytes().startswith(b"<?xml")


@pytest.mark.slow
def test_ours_beside_transformers(command: Command, checkpoint: Path) -> None:
    python = ("--transformers", sys.executable)
    options = ("--precision", "float32", "--precision", "int8", *python, "--at-once", 2, "--json")
    found = json.loads(command("bench", checkpoint, *SHORT, *options).out)
    names = ["prompt of 8 tokens", "decoding after 8 tokens", "2 requests of 512 tokens in, 128 out, at once"]
    assert [row["what"] for row in found["rows"]] == [f"{p}, {name}" for p in ("float32", "int8") for name in names]
    for row in found["rows"]:
        assert row["ours"] > 0
        if row["what"].startswith("float32"):
            assert row["peer_version"].startswith("transformers ")
            assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
        else:
            assert row["peer"] is None
    assert all(row["roof"] > 0 and row["of_roof"] == row["ours"] / row["roof"] for row in found["rows"])
    none = "no Python that has it was named"
    absent = {"llama": none, "vllm": none, "transformers, int8": "has nothing like it"}
    assert (found["model"], found["absent"]) == (str(checkpoint), absent)
    assert found["cores"] >= 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--prompt", 0), "nemotron-h: prompt: must be 1 or above; got 0"),
        (("--runs", 0), "nemotron-h: runs: must be 1 or above; got 0"),
        (("--at-once", 0), "nemotron-h: at_once: must be 1 or above; got 0"),
        (("--at-once", 17), "nemotron-h: at_once: must be 16 or below, which all contestants compute; got 17"),
        (("--plot", "speed.txt"), "nemotron-h: plot: must be a file of one of "),
        (("--precision", "int2"), "nemotron-h: precision: must be one of "),
    ],
)
def test_what_cannot_be_measured_is_refused(command: Command, checkpoint: Path, options: Any, line: str) -> None:
    done = command("bench", checkpoint, *options)
    assert done.code == 2
    assert done.err.startswith(line)
