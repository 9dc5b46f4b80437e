"""What is saved is what is loaded, and what is served."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import nemotron_h
from nemotron_h.checkpoint.load import load
from nemotron_h.checkpoint.names import INDEX_FILE, WEIGHTS_FILE
from nemotron_h.checkpoint.save import KEPT, published_parameters, save, write_model
from nemotron_h.config.model import ModelConfig
from nemotron_h.config.published import read_config
from nemotron_h.errors import CheckpointError
from nemotron_h.model.hybrid import Hybrid

Build = Callable[..., Hybrid]
TOKENS = torch.randint(0, 96, (2, 70), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: Hybrid) -> torch.Tensor:
    return model(TOKENS)  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_gives_the_same_logits(build: Build, config: ModelConfig, tmp_path: Path, tied: bool) -> None:
    model = build(replace(config, tied_embeddings=tied))
    save(model, tmp_path / "m", dtype=torch.float32)
    loaded = load(tmp_path / "m", dtype=torch.float32)
    assert loaded.config == model.config
    assert torch.equal(logits(loaded), logits(model))
    with safe_open(tmp_path / "m" / WEIGHTS_FILE, framework="pt") as file:
        head = file.get_tensor("lm_head.weight")  # a tied one too: not every program ties it
    assert torch.equal(head, model.head_weight)


def test_trained_is_served(build: Build, tmp_path: Path) -> None:
    """float32 master weights with bfloat16 products: the bits of the bfloat16 checkpoint."""
    master = build(compute_dtype=torch.bfloat16)
    save(master, tmp_path / "m")
    assert torch.equal(logits(load(tmp_path / "m")), logits(master))


def test_the_scan_parameters_stay_float32(build: Build, tmp_path: Path) -> None:
    model = build()
    save(model, tmp_path / "m")
    with safe_open(tmp_path / "m" / WEIGHTS_FILE, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    for name, parameter in model.named_parameters():
        kept = name.rpartition(".")[2] in KEPT
        assert stored[name].dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(stored[name], parameter.to(stored[name].dtype)), name


def test_shards_hold_every_tensor_once(build: Build, tmp_path: Path) -> None:
    model = build()
    save(model, tmp_path / "whole")
    save(model, tmp_path / "cut", shard_bytes=4000)
    index = json.loads((tmp_path / "cut" / INDEX_FILE).read_text())
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 3
    assert files == sorted(set(index["weight_map"].values()))
    found = []
    for name in files:
        with safe_open(tmp_path / "cut" / name, framework="pt") as file:
            names = list(file.keys())
            sizes = [file.get_tensor(key).nbytes for key in names]
        assert sum(sizes) <= 4000 or len(sizes) == 1
        assert {index["weight_map"][key] for key in names} == {name}
        found += list(zip(names, sizes, strict=True))
    assert sorted(name for name, _ in found) == sorted(name for name, _ in model.named_parameters())
    assert index["metadata"]["total_size"] == sum(size for _, size in found)
    assert torch.equal(logits(load(tmp_path / "cut")), logits(load(tmp_path / "whole")))


def test_through_the_public_names(build: Build, tmp_path: Path) -> None:
    model = build()
    nemotron_h.save(model, tmp_path / "m", dtype=torch.float32)
    text = nemotron_h.load(tmp_path / "m", precision="float32")
    assert text.tokenizer is None
    model.pack()
    assert torch.equal(logits(text.model), logits(model))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, "float32"])
def test_other_dtypes_are_refused_before_anything_is_written(build: Build, tmp_path: Path, dtype: torch.dtype) -> None:
    message = rf"dtype: must be one of bfloat16, float16, float32, float64; got {dtype}"
    with pytest.raises(CheckpointError, match=message):
        save(build(), tmp_path / "m", dtype=dtype)
    with pytest.raises(CheckpointError, match=message):
        write_model(build(), tmp_path, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_tied_head_is_counted_without_a_copy(build: Build, config: ModelConfig) -> None:
    model = build(replace(config, tied_embeddings=True))
    assert published_parameters(model)["lm_head.weight"] is model.head_weight


def test_an_existing_folder_is_refused(build: Build, tmp_path: Path) -> None:
    save(build(), tmp_path / "m", dtype=torch.float32)
    with pytest.raises(CheckpointError, match="must not exist"):
        save(build(seed=9), tmp_path / "m", dtype=torch.float32)
    assert torch.equal(logits(load(tmp_path / "m", dtype=torch.float32)), logits(build()))


FULL_DISK = """
import resource, sys
from pathlib import Path
from nemotron_h.checkpoint.load import load
from nemotron_h.checkpoint.save import save
from nemotron_h.errors import CapacityError
folder = Path(sys.argv[1])
model = load(folder / "old")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    save(model, folder / "new")
except CapacityError as error:
    print(error)
"""


@pytest.mark.parametrize("limit_bytes", [100, 5000])  # inside config.json, inside the weights
def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(build: Build, tmp_path: Path, limit_bytes: int) -> None:
    save(build(), tmp_path / "old")
    before = logits(load(tmp_path / "old"))
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    [line] = done.stdout.splitlines()
    assert line.startswith(f"{tmp_path / 'new'}: could not be written: "), line
    assert "arge" in line  # File too large
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert torch.equal(logits(load(tmp_path / "old")), before)


@pytest.mark.parity
def test_transformers_reads_the_config(build: Build, config: ModelConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save(build(), tmp_path / "m")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    assert type(theirs).__name__ == "NemotronHConfig"
    ours = read_config(tmp_path / "m" / "config.json")
    assert ours == config
    mamba, attention, mlp = config.layers[0], config.layers[2], config.layers[1]
    expected = {
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "mamba_num_heads": mamba.num_heads,
        "mamba_head_dim": mamba.head_dim,
        "ssm_state_size": mamba.state_size,
        "n_groups": mamba.num_groups,
        "conv_kernel": mamba.conv_kernel,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": mlp.intermediate_size,
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": False,
    }
    assert {key: getattr(theirs, key) for key in expected} == expected
    first, second, third, fourth = theirs.layers_block_type  # M-*-, in words that change with its version
    assert second == fourth == "mlp"
    assert first in ("mamba", "linear_attention")
    assert third in ("attention", "full_attention")
