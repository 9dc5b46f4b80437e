"""Which formats a folder's weights are in; others are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemotron_h.config.quantization import QUANT_FILE, read_quantization
from nemotron_h.errors import CheckpointError, UnsupportedError

# As NVIDIA's tool writes it into config.json, and into a file of its own.
INSIDE: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
            "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
            "targets": ["Linear"],
        }
    },
    "ignore": ["lm_head", "backbone.layers.0.mixer*"],
    "quant_algo": "FP8",
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "producer": {"name": "modelopt", "version": "0.33.0"},
    "quant_method": "modelopt",
}
BESIDE: dict[str, Any] = {
    "producer": {"name": "modelopt", "version": "0.33.0"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
}


def formats(tmp_path: Path, inside: Any = None, beside: Any = None) -> frozenset[str]:
    values = {"hidden_size": 1} | ({} if inside is None else {"quantization_config": inside})
    (tmp_path / "config.json").write_text(json.dumps(values))
    if beside is not None:
        (tmp_path / QUANT_FILE).write_text(json.dumps(beside))
    return read_quantization(tmp_path)


def algorithm(name: str | None) -> dict[str, Any]:
    return {"quantization": {"quant_algo": name}}


def test_either_file_says_it(tmp_path: Path) -> None:
    assert formats(tmp_path) == frozenset()
    assert formats(tmp_path, INSIDE) == {"FP8"}
    assert formats(tmp_path, {"quant_method": "modelopt_fp4", "quant_algo": "NVFP4"}) == {"NVFP4"}
    assert formats(tmp_path, {"quant_method": "modelopt", **BESIDE}) == {"FP8"}
    assert formats(tmp_path, INSIDE, BESIDE) == {"FP8"}
    assert formats(tmp_path, None, algorithm("NVFP4")) == {"NVFP4"}
    assert formats(tmp_path, None, algorithm(None)) == frozenset()  # the cache alone


def test_layers_of_different_formats(tmp_path: Path) -> None:
    layers = {"a.in_proj": {"quant_algo": "FP8"}, "b.up_proj": {"quant_algo": "NVFP4", "group_size": 16}}
    mixed = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
    assert formats(tmp_path, None, mixed) == {"FP8", "NVFP4"}
    layers["c"] = {"quant_algo": "W4A16_AWQ"}
    with pytest.raises(UnsupportedError, match=r"quant_algo must be FP8 or NVFP4; got 'W4A16_AWQ'"):
        formats(tmp_path, None, mixed)


@pytest.mark.parametrize("name", ["FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4_AWQ", "INT4_AWQ", "W4A8_AWQ", 8])
def test_other_formats_are_refused_by_name(name: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=rf"{QUANT_FILE}: quant_algo must be FP8 or NVFP4; got {name!r}; take"):
        formats(tmp_path, None, algorithm(name))


@pytest.mark.parametrize("method", ["compressed-tensors", "gptq", "awq", "bitsandbytes", "fp8", None])
def test_other_tools_are_refused_by_name(method: str | None, tmp_path: Path) -> None:
    message = rf"^{tmp_path / 'config.json'}: quantization_config: quant_method must be modelopt; got {method!r}; take"
    with pytest.raises(UnsupportedError, match=message):
        formats(tmp_path, {"quant_method": method, "quant_algo": "FP8"})


@pytest.mark.parametrize("table", [3, "FP8", [], {"quant_method": "modelopt", "quantization": []}])
def test_what_is_no_table_is_damage(table: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config: must hold a JSON object; got"):
        formats(tmp_path, table)


def test_both_files_agree(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"must agree with {tmp_path / QUANT_FILE}, which says NVFP4; got FP8$"):
        formats(tmp_path, INSIDE, algorithm("NVFP4"))


def test_an_unnamed_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"quant_algo must be FP8 or NVFP4; got None"):
        formats(tmp_path, {"quant_method": "modelopt", "config_groups": {}})
