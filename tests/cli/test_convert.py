"""`nemotron-h convert`: the same weights in other words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_h.checkpoint.load import load as load_model
from nemotron_h.checkpoint.names import WEIGHTS_FILE
from nemotron_h.checkpoint.save import save
from nemotron_h.cli.convert import Target
from nemotron_h.config.published import Dialect
from tests.checkpoint.stub_hub import Model, connected

Command = Callable[..., Any]


def test_there_and_back(command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder goes to the other dialect, and what comes back is the folder, byte for byte but for its card."""
    monkeypatch.chdir(tmp_path)
    assert command("convert", checkpoint, "--to", "transformers").out == "tiny-transformers\n"
    there = tmp_path / "tiny-transformers"
    assert "model.embeddings.weight" in load_file(there / WEIGHTS_FILE)
    assert "layers_block_type" in json.loads((there / "config.json").read_text())
    assert command("convert", there, "--to", "published", "--out", "back").out == "back\n"
    names = sorted(path.name for path in checkpoint.iterdir())
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == names
    for name in names:
        if name != "README.md":
            assert (tmp_path / "back" / name).read_bytes() == (checkpoint / name).read_bytes(), name
    assert "- Made by `nemotron-h convert " in (there / "README.md").read_text()
    assert f"- Made from {there.name}.\n" in (tmp_path / "back" / "README.md").read_text()


def test_a_model_of_the_hub_is_written_under_its_own_name(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with connected(tmp_path / "home", monkeypatch) as hub:
        hub.models["org/small"] = Model({path.name: path.read_bytes() for path in checkpoint.iterdir()})
        assert command("convert", "org/small", "--to", "transformers").out == "small-transformers\n"
    assert "base_model: org/small\n" in (tmp_path / "small-transformers" / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_keep_their_dtype(dtype: torch.dtype, command: Command, checkpoint: Path, tmp_path: Path) -> None:
    save(load_model(checkpoint, dtype=torch.float32), tmp_path / "m", dtype=dtype)
    assert command("convert", tmp_path / "m", "--to", "transformers", "--out", tmp_path / "out").code == 0
    before, after = load_file(tmp_path / "m" / WEIGHTS_FILE), load_file(tmp_path / "out" / WEIGHTS_FILE)
    for name, tensor in before.items():
        stored = after[name.replace("backbone.", "model.")]
        assert stored.dtype == tensor.dtype, name
        assert torch.equal(stored, tensor), name


def test_a_dtype_of_ones_own(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    save(load_model(checkpoint, dtype=torch.float32), wide, dtype=torch.float64)
    refused = command("convert", wide, "--to", "published", "--out", tmp_path / "a").line
    assert refused == f"precision: must be given; the weights in {wide} are float64, which is not kept"
    options = ["--to", "published", "--precision", "bfloat16", "--out", tmp_path / "a"]
    assert command("convert", wide, *options).code == 0
    assert load_file(tmp_path / "a" / WEIGHTS_FILE)["lm_head.weight"].dtype == torch.bfloat16


def test_quantised_weights_are_written_as_what_they_stand_for(
    command: Command, checkpoint: Path, tmp_path: Path
) -> None:
    save(load_model(checkpoint), tmp_path / "m")
    tensors, name = load_file(tmp_path / "m" / WEIGHTS_FILE), "backbone.layers.1.mixer.up_proj"
    codes = tensors[f"{name}.weight"].float().to(torch.float8_e4m3fn)
    tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "m" / WEIGHTS_FILE)
    (tmp_path / "m" / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert command("convert", tmp_path / "m", "--to", "published", "--out", tmp_path / "out").code == 0
    got = load_file(tmp_path / "out" / WEIGHTS_FILE)[f"{name}.weight"]
    assert torch.equal(got, (2 * codes.float()).bfloat16())
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "onnx"], "Invalid value for '--to': "),
        ([], "Missing option '--to'"),
        (["--to", "gguf", "--type", "q5_0"], "Invalid value for '--type': "),
        (["--to", "gguf", "--precision", "float32"], "precision: must not be given with --to gguf; got 'float32'"),
        (["--to", "published", "--type", "bf16"], "type: must be given with --to gguf only; got --to published"),
        (
            ["--to", "transformers", "--no-tokenizer"],
            "no-tokenizer: must be given with --to gguf only",
        ),
        (["--to", "gguf"], "tokenizer.json: pre_tokenizer must cut text as "),
        (["--to", "published", "--precision", "int4"], "precision: must be one of bfloat16, float32; got 'int4'"),
    ],
)
def test_what_cannot_be_honoured_is_one_line(
    command: Command, checkpoint: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    assert command("convert", checkpoint, "--out", tmp_path / "out", *options).line.startswith(words)
    assert not (tmp_path / "out").exists()


def test_a_gguf_file(command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name says what it holds; notes say what it has not."""
    monkeypatch.chdir(tmp_path)
    done = command("convert", checkpoint, "--to", "gguf", "--no-tokenizer")
    assert (done.out, done.err) == ("tiny-bf16.gguf\n", "")
    done = command("convert", checkpoint, "--to", "gguf", "--type", "q4_0", "--no-tokenizer", "--out", "a/b.gguf")
    assert done.out == "a/b.gguf\n"
    [note] = done.err.splitlines()
    assert note.startswith("note: blk.1.ffn_down.weight: stays in bfloat16, as 2 matrices do")
    fields = gguf.GGUFReader(tmp_path / "a" / "b.gguf").fields
    assert fields["general.file_type"].contents() == 2
    assert fields["tokenizer.ggml.model"].contents() == "none"
    line = command("convert", checkpoint, "--to", "gguf", "--no-tokenizer").line
    assert line == "tiny-bf16.gguf: must not exist, nothing is written over; name another file"


def test_every_dialect_can_be_asked_for() -> None:
    assert [*Target] == [*Dialect, "gguf"]


def test_nothing_is_written_over(command: Command, checkpoint: Path) -> None:
    line = command("convert", checkpoint, "--to", "published", "--out", checkpoint).line
    assert line == f"{checkpoint}: must not exist, nothing is written over; name another folder"
    assert command("convert", "none", "--to", "published").line.startswith("none: must be a checkpoint folder")
