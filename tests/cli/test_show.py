"""What a model is, from a preset or a folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron_h.config.cost import memory, parameters
from nemotron_h.config.presets import PRESETS
from nemotron_h.model.hybrid import Hybrid


def test_json(command: Callable[..., Any]) -> None:
    shown = json.loads(command("show", "8b", "--json").out)
    config = PRESETS["8b"]
    assert shown["parameters"] == sum(p.numel() for p in Hybrid(config, device="meta").parameters())
    assert sum(shown["parameters_by_kind"].values()) == shown["parameters"]
    assert shown["parameters_by_kind"] == parameters(config)
    assert shown["pattern"] == config.pattern
    assert list(shown["bytes"]) == ["1024", "65536", "131072", "1048576"]
    for tokens, terms in shown["bytes"].items():
        assert terms.pop("total") == sum(terms.values())
        assert terms == memory(config, int(tokens))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_drawn(command: Callable[..., Any], name: str) -> None:
    ended = command("show", name)
    assert ended.code == 0
    assert f"{sum(parameters(PRESETS[name]).values()):,}" in ended.out
    assert "1,048,576" in ended.out


def test_a_checkpoint_and_a_config(command: Callable[..., Any], checkpoint: Path) -> None:
    of_folder = json.loads(command("show", checkpoint, "--json").out)
    of_file = json.loads(command("show", checkpoint / "config.json", "--json").out)
    assert of_folder["pattern"] == of_file["pattern"] == "M-*-"
    assert of_folder["parameters"] == of_file["parameters"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hybrid_override_pattern": "M-X-"}, ["'X'"]),
        ({"n_groups": 3}, ["mamba.num_groups: must divide num_heads; got 3 and 4"]),
        ({"model_type": "llama"}, ["model_type: must be 'nemotron_h'", "got 'llama'"]),
    ],
)
def test_a_config_that_is_none_is_one_line(
    command: Callable[..., Any], checkpoint: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads((checkpoint / "config.json").read_text()) | changes))
    line = command("show", path).line
    assert str(path) in line
    assert all(word in line for word in words), line
    shutil.copytree(checkpoint, tmp_path / "m")
    shutil.copy(path, tmp_path / "m" / "config.json")
    assert all(word in command("generate", tmp_path / "m", "x").line for word in words)


def test_an_unknown_preset_names_the_nearest(command: Callable[..., Any]) -> None:
    assert "did you mean nano-9b-v2?" in command("show", "nano-9b").line
