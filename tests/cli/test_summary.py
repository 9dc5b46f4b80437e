"""What a run's end tells."""

import shlex
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nemotron_h.cli.summary import printable, show_baselines, show_summary


def test_what_would_steer_a_terminal_is_shown() -> None:
    assert printable("a\x1b[31mb\r\x07c\n\tdé🙂\u202e") == "a\ufffd[31mb\ufffd\ufffdc\n\tdé🙂\ufffd"


def test_the_model_beside_the_best_ngram() -> None:
    console = Console(record=True, width=100)
    bits = {"byte 1-gram": 5.0, "byte 2-gram": 4.0, "xz": 3.0}
    records = {"baselines": {"bits_per_byte": bits, "best_ngram": 4.0}, "train": {"bits_per_byte": 3.0}}
    show_baselines(records, console)
    records["train"]["bits_per_byte"] = 5.0
    show_baselines(records, console)
    text = console.export_text()
    assert "this model takes 25.0 % fewer bits than the best n-gram" in text
    assert "this model takes 25.0 % more bits than the best n-gram" in text
    assert "it has not learnt to predict" in text


@pytest.mark.parametrize(
    ("place", "typed"),
    [
        (".venv/bin/nemotron-h", ".venv/bin/nemotron-h"),
        ("{here}/my tools/nemotron-h", "my tools/nemotron-h"),
        ("nemotron-h", "./nemotron-h"),
        ("/opt/its own/bin/nemotron-h", "/opt/its own/bin/nemotron-h"),
    ],
)
def test_the_next_command_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, typed: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "argv", [place.format(here=tmp_path), "run", "laptop"])
    checkpoint = "runs/it's mine/step-1"
    records = {"train": {"bits_per_byte": 3.0, "checkpoint": checkpoint}}

    def following() -> list[str]:
        console = Console(record=True, width=40)
        show_summary(records, tmp_path, console)
        [line] = [line for line in console.export_text().splitlines() if line.startswith("next:")]
        return shlex.split(line.removeprefix("next:"))

    rest = ["generate", checkpoint, "def", "--temperature", "0.7"]
    assert following() == [typed, *rest]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nemotron-h").touch(0o755)
    assert following() == ["nemotron-h", *rest]
