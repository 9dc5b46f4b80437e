"""What a model is, from a preset or a folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemotron_h.cli.show import integers
from nemotron_h.config import cost
from nemotron_h.config.presets import PRESETS
from nemotron_h.model.hybrid import Hybrid


def test_json(command: Callable[..., Any]) -> None:
    shown = json.loads(command("show", "8b", "--json").out)
    config = PRESETS["8b"]
    assert shown["parameters"] == sum(p.numel() for p in Hybrid(config, device="meta").parameters())
    assert shown["parameters_by_kind"] == cost.parameters(config)
    assert shown["pattern"] == config.pattern
    formats, contexts = list(cost.WEIGHT_FORMATS), ["1024", "65536", "131072", "1048576"]
    assert list(shown["weight_bytes"]) == list(shown["bytes"]) == formats
    for weights in formats:
        terms = cost.weight_bytes(config, weights)
        assert shown["weight_bytes"][weights] == terms | {"total": sum(terms.values())}
        assert list(shown["bytes"][weights]) == contexts
        for tokens, peak in shown["bytes"][weights].items():
            terms = cost.peak_bytes(config, int(tokens), weights=weights)
            assert peak == terms | {"total": sum(terms.values())}
    assert list(shown["token_flops"]) == contexts
    for tokens, work in shown["token_flops"].items():
        for name, asked in (
            ("prefill", cost.prefill_flops),
            ("decode", cost.decode_flops),
            ("training", cost.training_flops),
        ):
            kinds = asked(config, int(tokens))
            assert work[name] == kinds | {"total": sum(kinds.values())}


def test_the_papers_figures_are_on_the_screen(command: Callable[..., Any]) -> None:
    """arXiv:2504.03624: 29.5 GiB of FP4 weights; with a million tokens' keys and values and the state, what fits."""
    lines = [" ".join(line.split()) for line in command("show", "56b").out.splitlines()]
    assert "nvfp4 29.5 GiB 30.5 GiB 33.0 GiB 35.5 GiB 70.5 GiB" in lines
    assert "131,072 5.00 GiB 131B 154B 399B" in lines
    assert "864 MiB recurrent state" in lines


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_drawn_on_a_terminal_of_80_columns(
    command: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = command("show", name)
    monkeypatch.setenv("COLUMNS", "80")
    assert command("show", name).out == wide.out  # nothing is wrapped or cut
    assert f"{sum(cost.parameters(PRESETS[name]).values()):,}" in wide.out
    assert "1,048,576" in wide.out
    assert ("recurrent state" in wide.out) == ("M" in PRESETS[name].pattern)


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


def test_the_machine_is_shown_and_measured(command: Callable[..., Any]) -> None:
    facts = json.loads(command("show", "--machine", "--json").out)["machine"]
    assert facts["precision"] in facts["matmul"]
    assert 0 < facts["available_bytes"] <= facts["limit_bytes"] <= facts["memory_bytes"]
    assert facts["bandwidth"] > 1e8
    out = command("show", "--machine").out
    for words in (
        "cores that may be used",
        "reads memory at",
        "precision=auto takes",
        "multiplies bfloat16 at",
        facts["integers"],
    ):
        assert words in out, words
    both = command("show", "3m", "--machine").out
    assert "3m: 3.06M parameters" in both
    assert "this machine" in both


def test_what_multiplies_integers_is_told() -> None:
    """Of the CPU's features and of the form that the kernel takes by them."""
    with_it, without = SimpleNamespace(ADDS_QUADS=True, LANES=16), SimpleNamespace(ADDS_QUADS=False, LANES=8)
    assert integers(with_it, {"avx2": True}) == "VNNI, 16 sums at a time"
    assert integers(without, {"avx2": True}) == "AVX2, pairs at a time"
    assert integers(without, {"neon": True}) == "one by one"
    assert integers(without, {}) == "torch, in float64"


def test_the_picture_in_the_docs_is_what_it_shows(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    drawn = page.split("$ nemotron-h show 8b\n")[1].split("```")[0]
    monkeypatch.setenv("COLUMNS", "80")

    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in text.splitlines() if line.strip()]

    assert lines(command("show", "8b").out) == lines(drawn)
