"""`nemotron-h verify` on small folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_h.checkpoint import check as folders
from nemotron_h.checkpoint.save import save
from nemotron_h.inference.load import load, read
from nemotron_h.model.linear import Linear
from nemotron_h.ops.linear import linear
from tests.model.shapes import model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(model("nano"), tmp_path / "nano")
    return tmp_path / "nano"


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_every_line_has_its_number_and_holds(command: Callable[..., Any], folder: Path, precision: str) -> None:
    ended = command("verify", str(folder), "--precision", precision)
    assert ended.code == 0
    first, *lines = ended.out.splitlines()
    any_rows = load(folder, precision=precision).model.takes_any_rows
    assert first == f"{folder} in {precision} on cpu, rows in multiples of {1 if any_rows else 4}"
    assert len(lines) == 8
    assert all(line.startswith("holds  ") and any(letter.isdigit() for letter in line) for line in lines)
    assert lines[-1].startswith(f"holds  weights in {precision}, written again: 56 tensors, the same bits")


def test_what_does_not_hold_is_said_and_the_exit_code_is_1(
    command: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Linear, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.plain()) * (1 + 2**-10 * (len(x) < 48))

    monkeypatch.setattr(Linear, "forward", broken)
    ended = command("verify", str(folder), "--precision", "float32")
    assert ended.code == 1
    assert "FAILS  logits, one token at a time: " in ended.out
    assert "holds  config.json, written again: 2 dialects, the same model" in ended.out
    found = json.loads(command("verify", str(folder), "--precision", "float32", "--json").out)
    assert not found["holds"]
    assert {finding["holds"] for finding in found["findings"]} == {True, False}


def test_a_model_that_is_not_the_folders_is_found(folder: Path) -> None:
    loaded = read(folder, dtype=torch.bfloat16).model
    assert all(finding.holds for finding in folders.check_folder(folder, loaded))
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.norm_f.weight"] = tensors["backbone.norm_f.weight"] * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    *_, finding = folders.check_folder(folder, loaded)
    assert not finding.holds
    assert finding.number == "1 differ: backbone.norm_f.weight"
