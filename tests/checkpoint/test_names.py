"""Both name sets, there and back."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_h.checkpoint.load import load
from nemotron_h.checkpoint.names import WEIGHTS_FILE, published_names, stored_name
from nemotron_h.checkpoint.save import save
from nemotron_h.config.published import Dialect
from nemotron_h.errors import CheckpointError
from nemotron_h.model.hybrid import Hybrid


@pytest.mark.parametrize("dialect", Dialect)
def test_there_and_back(dialect: Dialect, build: Callable[..., Hybrid]) -> None:
    names = [*dict(build().named_parameters()), "backbone.model.x", "other.backbone.y"]
    stored = [stored_name(name, dialect) for name in names]
    assert published_names(stored) == dict(zip(names, stored, strict=True))
    prefix = {"published": "backbone.", "transformers": "model."}[dialect]
    assert stored[0] == f"{prefix}embeddings.weight"
    assert "lm_head.weight" in stored


def test_one_tensor_under_two_names_is_refused() -> None:
    message = r"^model\.norm_f\.weight: must be there once; got backbone\.norm_f\.weight beside it$"
    with pytest.raises(CheckpointError, match=message):
        published_names(["backbone.norm_f.weight", "model.norm_f.weight"])


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("shard_bytes", [4000, 10**9])
def test_what_is_saved_is_loaded(
    dialect: Dialect, shard_bytes: int, build: Callable[..., Hybrid], tmp_path: Path
) -> None:
    model = build()
    save(model, tmp_path / "m", dialect=dialect, dtype=torch.float32, shard_bytes=shard_bytes)
    loaded = load(tmp_path / "m", dtype=torch.float32)
    assert loaded.config == model.config
    for (name, want), got in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(got, want), name


def test_a_folder_may_mix_the_dialects(build: Callable[..., Hybrid], tmp_path: Path) -> None:
    """transformers writes its own config.json beside the published names, unless asked otherwise."""
    model = build()
    for dialect in Dialect:
        save(model, tmp_path / dialect, dialect=dialect, dtype=torch.float32)
    tensors = load_file(tmp_path / Dialect.PUBLISHED / WEIGHTS_FILE)
    save_file(tensors, tmp_path / Dialect.TRANSFORMERS / WEIGHTS_FILE)
    loaded = load(tmp_path / Dialect.TRANSFORMERS, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
