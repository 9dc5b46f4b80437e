"""Every key accounted for: what a damaged folder is refused with."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron_h.checkpoint.load import load
from nemotron_h.checkpoint.names import INDEX_FILE, WEIGHTS_FILE
from nemotron_h.checkpoint.save import save
from nemotron_h.config.model import ModelConfig
from nemotron_h.errors import CheckpointError, ConfigError, NemotronError, UnsupportedError
from nemotron_h.model.hybrid import Hybrid

Tensors = dict[str, Tensor]
NAME = "backbone.layers.0.mixer.conv1d.weight"


@pytest.fixture
def folder(build: Callable[..., Hybrid], tmp_path: Path) -> Path:
    save(build(), tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(build: Callable[..., Hybrid], tmp_path: Path) -> Path:
    save(build(), tmp_path / "s", shard_bytes=4000)
    return tmp_path / "s"


def change(folder: Path, edit: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def refusal(folder: Path) -> str:
    with pytest.raises(NemotronError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def set_to(tensor: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({NAME: tensor(tensors[NAME]).contiguous()})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda tensors: tensors.pop(NAME), [f"{NAME}: missing from", "(found 22 of 23 tensors)"]),
        (lambda tensors: tensors.update({"lm_head.bias": torch.zeros(3)}), ["lm_head.bias: is not a tensor of"]),
        (set_to(lambda t: t.squeeze(1)), [f"{NAME}: must have shape (128, 1, 4)", "got (128, 4)"]),
        (set_to(lambda t: t.to(torch.int8)), [f"{NAME}: must be one of bfloat16", "got torch.int8"]),
        (set_to(lambda t: t.to(torch.float8_e4m3fn)), [f"{NAME}: must be one of bfloat16", "got torch.float8"]),
    ],
    ids=["missing", "extra", "shape", "integers", "float8"],
)
def test_a_tensor_is_refused_by_name(folder: Path, edit: Callable[[Tensors], None], words: list[str]) -> None:
    change(folder, edit)
    message = refusal(folder)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_floats_are_converted(folder: Path, dtype: torch.dtype) -> None:
    before = load(folder)
    change(folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    for (name, old), new in zip(before.named_parameters(), load(folder).parameters(), strict=True):
        assert new.dtype == old.dtype
        assert torch.equal(new, old.to(dtype).to(old.dtype)), name


def test_the_file_is_mapped(folder: Path) -> None:
    model = load(folder)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    start = model.backbone.embeddings.weight.data_ptr()
    for line in maps.read_text().splitlines():
        low, _, high = line.split()[0].partition("-")
        if int(low, 16) <= start < int(high, 16):
            assert line.endswith(WEIGHTS_FILE), line
            return
    pytest.fail("the weights are nowhere")


def test_writing_to_a_loaded_weight_leaves_the_file(folder: Path) -> None:
    before = (folder / WEIGHTS_FILE).read_bytes()
    model = load(folder)
    with torch.no_grad():
        model.backbone.embeddings.weight.zero_()
    assert (folder / WEIGHTS_FILE).read_bytes() == before


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, -1])
def test_a_truncated_file_is_named(folder: Path, kept_bytes: int) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[:kept_bytes])
    message = refusal(folder)
    assert message.startswith(f"{folder / WEIGHTS_FILE}: must be a whole safetensors file; got "), message


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])
    assert refusal(sharded).startswith(f"{path}: must be a whole safetensors file")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[-1]
    path.unlink()
    assert refusal(sharded).startswith(f"{path}: must exist; found no such file")


@pytest.mark.parametrize("target", ["../m/model.safetensors", "/etc/passwd", "other.bin", "a/b.safetensors"])
def test_an_index_stays_in_its_folder(sharded: Path, target: str) -> None:
    index = json.loads((sharded / INDEX_FILE).read_text())
    index["weight_map"][NAME] = target
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    message = refusal(sharded)
    assert NAME in message
    assert target in message


def test_index_and_shards_agree(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_FILE).read_text())
    names = index["weight_map"]
    first, last = (next(iter(names)), list(names)[-1])
    names[first], names[last] = names[last], names[first]
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    assert INDEX_FILE in refusal(sharded)
    assert any(name in refusal(sharded) for name in (first, last))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "\ud800"])
def test_a_damaged_index_is_named(sharded: Path, content: str) -> None:
    (sharded / INDEX_FILE).write_bytes(content.encode(errors="surrogatepass"))
    assert refusal(sharded).startswith(str(sharded / INDEX_FILE))


class Trap:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused_and_never_read(
    folder: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / WEIGHTS_FILE).unlink()
    (folder / name).write_bytes(pickle.dumps(Trap()))
    assert f"{name} is a pickle" in refusal(folder)
    (folder / WEIGHTS_FILE).write_bytes(pickle.dumps(Trap()))
    assert "must be a whole safetensors file" in refusal(folder)
    assert not (tmp_path / "sprung").exists()


def test_folders_that_are_none(tmp_path: Path, folder: Path) -> None:
    assert "must be a checkpoint folder" in refusal(tmp_path / "nothing")
    assert "must be a checkpoint folder" in refusal(folder / WEIGHTS_FILE)
    (folder / "config.json").unlink()
    assert "config.json: must exist" in refusal(folder)


def test_leftovers_are_not_read(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / ".model.safetensors.partial")
    assert f"must hold {WEIGHTS_FILE}" in refusal(folder)


def edit_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def test_a_config_of_another_family_or_shape(folder: Path) -> None:
    edit_config(folder, hidden_size=48)
    assert "must have shape" in refusal(folder)
    edit_config(folder, hidden_size=32, n_groups=3)
    with pytest.raises(ConfigError, match=r"mamba.num_groups: must divide num_heads; got 3 and 4"):
        load(folder)
    edit_config(folder, n_groups=2, model_type="llama")
    with pytest.raises(UnsupportedError, match=r"model_type: must be 'nemotron_h'.*got 'llama'"):
        load(folder)


def test_a_tied_head_may_stand_there_when_it_is_the_embedding(
    build: Callable[..., Hybrid], config: ModelConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "tied"
    save(build(replace(config, tied_embeddings=True)), folder)
    weight = load_file(folder / WEIGHTS_FILE)["backbone.embeddings.weight"]
    change(folder, lambda tensors: tensors.update({"lm_head.weight": weight.clone()}))
    assert torch.equal(load(folder).head_weight, weight)
    change(folder, lambda tensors: tensors.update({"lm_head.weight": weight + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight: must equal the embedding"):
        load(folder)
