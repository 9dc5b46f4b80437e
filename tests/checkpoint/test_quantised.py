"""Folders as NVIDIA's tool quantises them load as what their formats say."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron_h.checkpoint.load import load, widest_dtype
from nemotron_h.checkpoint.names import WEIGHTS_FILE
from nemotron_h.checkpoint.save import save
from nemotron_h.config.model import MlpConfig, ModelConfig
from nemotron_h.config.quantization import QUANT_FILE
from nemotron_h.errors import CheckpointError, UnsupportedError
from nemotron_h.model.hybrid import Hybrid
from tests.precision.test_modelopt import e2m1, e4m3, nearest

Build = Callable[..., Hybrid]
UP, QUERY = "backbone.layers.1.mixer.up_proj.weight", "backbone.layers.2.mixer.q_proj.weight"
BYTES = torch.tensor([e4m3(code) for code in range(256)], dtype=torch.float64)
NIBBLES = torch.tensor([e2m1(code) for code in range(16)], dtype=torch.float64)


def fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A weight's parts in FP8, and the float64 that they stand for."""
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5)}
    return parts, BYTES[codes.view(torch.uint8).int()] * scale.double()


def nvfp4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A weight's parts in NVFP4 with codes at random, and the float64 that they stand for."""
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(rows)
    packed = torch.randint(256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(1, 127, (rows, columns // 16), generator=generator, dtype=torch.uint8)
    scale = weight.abs().max() / 448 / 6
    codes = torch.stack((packed % 16, packed // 16), dim=-1).flatten(1)
    values = NIBBLES[codes.int()] * BYTES[scales.int()].repeat_interleave(16, dim=1) * scale.double()
    parts = {"weight": packed, "weight_scale": scales.view(torch.float8_e4m3fn), "weight_scale_2": scale}
    return parts | {"input_scale": torch.tensor(0.5)}, values


def quantise(folder: Path, formats: dict[str, Callable[[Tensor], Any]], algorithm: str = "FP8") -> dict[str, Tensor]:
    """Store weights of a float32 folder in those formats; the float64 values by name."""
    tensors = load_file(folder / WEIGHTS_FILE)
    values = {}
    for name, form in formats.items():
        parts, values[name] = form(tensors.pop(name))
        tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / QUANT_FILE).write_text(json.dumps({"quantization": {"quant_algo": algorithm}}))
    return values


def matrices(folder: Path) -> list[str]:
    """What the tool quantises by default: every linear layer but the head."""
    return [
        name for name, t in load_file(folder / WEIGHTS_FILE).items() if name.endswith("proj.weight") and t.ndim == 2
    ]


@pytest.fixture
def folder(build: Build, config: ModelConfig, tmp_path: Path) -> Path:
    save(build(config), tmp_path / "m", dtype=torch.float32)
    return tmp_path / "m"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("form", "algorithm"), [(fp8, "FP8"), (nvfp4, "NVFP4")])
def test_it_loads_as_the_float64_decode(
    form: Callable[[Tensor], Any], algorithm: str, dtype: torch.dtype, folder: Path
) -> None:
    plain = load(folder, dtype=dtype)
    values = quantise(folder, dict.fromkeys(matrices(folder), form), algorithm)
    with pytest.warns(UserWarning, match=rf"^{folder}: 10 tensors of input_scale are passed over: activations and"):
        model = load(folder, dtype=dtype)
    assert len(values) == 10
    for (name, got), before in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert got.dtype == before.dtype
        if name in values:
            want = [nearest(value, dtype) for value in values[name].flatten().tolist()]
            assert torch.equal(got.double().flatten(), torch.tensor(want, dtype=torch.float64)), name
        else:
            assert torch.equal(got, before), name


def test_layers_of_both_formats_and_of_none(folder: Path) -> None:
    layers = {"quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4"}}}
    values = quantise(folder, {UP: fp8, QUERY: nvfp4})
    (folder / QUANT_FILE).write_text(json.dumps({"quantization": {"quant_algo": "MIXED_PRECISION"} | layers}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parameters = dict(load(folder, dtype=torch.float32).named_parameters())
    for name in (UP, QUERY):
        assert torch.equal(parameters[name], values[name].float()), name


def edit(folder: Path, **tensors: Tensor | None) -> None:
    held = {**load_file(folder / WEIGHTS_FILE), **tensors}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, folder / WEIGHTS_FILE)


def refusal(folder: Path) -> str:
    with warnings.catch_warnings(), pytest.raises((CheckpointError, UnsupportedError)) as caught:
        warnings.simplefilter("ignore")
        load(folder)
    return str(caught.value)


def test_what_does_not_fit_the_format_is_named(folder: Path) -> None:
    quantise(folder, {UP: fp8})
    stem = UP.removesuffix("weight")
    held = load_file(folder / WEIGHTS_FILE)
    edit(folder, **{f"{stem}weight_scale": None})
    assert refusal(folder).startswith(f"{stem}weight_scale: missing; {UP} is stored in FP8")
    edit(folder, **{f"{stem}weight_scale": held[f"{stem}weight_scale"], UP: torch.zeros(48, 32)})
    assert refusal(folder) == f"{stem}weight_scale: must scale a quantised weight; got {UP} in torch.float32"
    edit(folder, **{UP: held[UP], f"{stem}pre_quant_scale": torch.ones(32)})
    assert refusal(folder).startswith(f"{stem}pre_quant_scale: is not a tensor of the model")
    edit(folder, **{f"{stem}pre_quant_scale": None, "elsewhere.k_scale": torch.ones(())})
    assert refusal(folder).startswith("elsewhere.k_scale: is not a tensor of the model")
    edit(folder, **{"elsewhere.k_scale": None, UP: held[UP].view(torch.uint8)})
    assert refusal(folder).startswith(f"{UP}: must be one of bfloat16, float16, float32, float64; got torch.uint8")
    edit(folder, **{UP: held[UP]})
    (folder / QUANT_FILE).unlink()
    assert refusal(folder).startswith(f"{stem}input_scale: is not a tensor of the model")


def test_scales_of_the_cache_are_said(folder: Path) -> None:
    quantise(folder, {UP: fp8})
    edit(folder, **{f"backbone.layers.2.mixer.{x}_proj.{x}_scale": torch.ones(()) for x in "kv"})
    with pytest.warns(UserWarning, match=r": 3 tensors of input_scale, k_scale, v_scale are passed over"):
        load(folder)


def test_its_dtype_is_that_of_the_plain_weights(folder: Path, build: Build, tmp_path: Path) -> None:
    assert widest_dtype(folder) == torch.float32
    save(build(), tmp_path / "narrow")
    assert widest_dtype(tmp_path / "narrow") == torch.bfloat16
    quantise(tmp_path / "narrow", {UP: lambda weight: fp8(weight.float())})
    assert widest_dtype(tmp_path / "narrow") == torch.bfloat16


def test_without_a_weight_the_dtype_is_the_narrowest(tmp_path: Path) -> None:
    save_file({"step": torch.ones(1)}, tmp_path / WEIGHTS_FILE)
    assert widest_dtype(tmp_path) == torch.bfloat16


def test_a_cache_may_be_quantised_alone(folder: Path) -> None:
    (folder / QUANT_FILE).write_text('{"quantization": {"quant_algo": null, "kv_cache_quant_algo": "FP8"}}')
    edit(folder, **{f"backbone.layers.2.mixer.{x}_proj.{x}_scale": torch.ones(()) for x in "kv"})
    with pytest.warns(UserWarning, match=r": 2 tensors of k_scale, v_scale are passed over"):
        load(folder)


@pytest.mark.parametrize("name", ["mixer.xk_scale", "mixer.A_logweight_scale", "mixer.A_logweight"])
def test_what_ends_like_a_scale_is_none(name: str, folder: Path) -> None:
    quantise(folder, {UP: fp8})
    edit(folder, **{f"backbone.layers.0.{name}": torch.ones(())})
    assert refusal(folder).startswith(f"backbone.layers.0.{name}: is not a tensor of the model")


LOADER = """
import json, resource, sys, torch
from nemotron_h.checkpoint.load import load
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load(sys.argv[1], dtype=torch.bfloat16)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_decoding_needs_little_more_than_the_weights(build: Build, config: ModelConfig, tmp_path: Path) -> None:
    """One matrix of 17 M weights: 17 MB stored, 34 MB in bfloat16; its float64 values would take 134 MB, some times."""
    layers = [
        replace(layer, intermediate_size=2**19) if isinstance(layer, MlpConfig) else layer for layer in config.layers
    ]
    folder = tmp_path / "large"
    save(build(replace(config, layers=tuple(layers[:2]))), folder)
    quantise(folder, {UP: lambda weight: fp8(weight.float())})
    tensors = load_file(folder / WEIGHTS_FILE)
    stored = sum(tensor.nbytes for tensor in tensors.values())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADER, str(folder)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < stored + 2 * tensors[UP].numel() + 150e6
