"""A GGUF file is read back with gguf's own reader: every key, and every tensor against the checkpoint's."""

import json
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron_h.checkpoint.load import open_source
from nemotron_h.checkpoint.names import HEAD, WEIGHTS_FILE
from nemotron_h.config.gguf import GgufType
from nemotron_h.config.model import ModelConfig
from nemotron_h.convert import gguf as convert
from nemotron_h.convert.gguf import write_gguf
from nemotron_h.errors import CapacityError, CheckpointError, MissingExtraError, UnsupportedError
from nemotron_h.model.hybrid import Hybrid
from tests.convert.checkpoints import CONFIG, checkpoint_of, model_of, tokenizer_of
from tests.full_disk import full_disk

MATRICES = {  # of CONFIG's pattern M-*M: the file's names, and the checkpoint's
    "token_embd.weight": "backbone.embeddings.weight",
    "output.weight": "lm_head.weight",
    "blk.0.ssm_in.weight": "backbone.layers.0.mixer.in_proj.weight",
    "blk.0.ssm_out.weight": "backbone.layers.0.mixer.out_proj.weight",
    "blk.1.ffn_up.weight": "backbone.layers.1.mixer.up_proj.weight",
    "blk.1.ffn_down.weight": "backbone.layers.1.mixer.down_proj.weight",
    "blk.2.attn_q.weight": "backbone.layers.2.mixer.q_proj.weight",
    "blk.2.attn_k.weight": "backbone.layers.2.mixer.k_proj.weight",
    "blk.2.attn_v.weight": "backbone.layers.2.mixer.v_proj.weight",
    "blk.2.attn_output.weight": "backbone.layers.2.mixer.o_proj.weight",
    "blk.3.ssm_in.weight": "backbone.layers.3.mixer.in_proj.weight",
    "blk.3.ssm_out.weight": "backbone.layers.3.mixer.out_proj.weight",
}
AS_THEY_ARE = {
    "output_norm.weight": "backbone.norm_f.weight",
    **{f"blk.{i}.attn_norm.weight": f"backbone.layers.{i}.norm.weight" for i in range(4)},
    **{f"blk.{i}.ssm_conv1d.bias": f"backbone.layers.{i}.mixer.conv1d.bias" for i in (0, 3)},
    **{f"blk.{i}.ssm_dt.bias": f"backbone.layers.{i}.mixer.dt_bias" for i in (0, 3)},
}


def small_tensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """All that is float32 in every type, in the shapes that llama.cpp asks for."""
    want = {name: weights[source].float() for name, source in AS_THEY_ARE.items()}
    for i in (0, 3):
        mixer = f"backbone.layers.{i}.mixer"
        want[f"blk.{i}.ssm_a"] = -torch.exp(weights[f"{mixer}.A_log"].double()).float()[:, None]
        want[f"blk.{i}.ssm_d"] = weights[f"{mixer}.D"].float()[:, None]
        want[f"blk.{i}.ssm_conv1d.weight"] = weights[f"{mixer}.conv1d.weight"].float()[:, 0]
        want[f"blk.{i}.ssm_norm.weight"] = weights[f"{mixer}.norm.weight"].float().view(2, 64)
    return want


def tensors_of(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def keys_of(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def decoded(blocks: np.ndarray[Any, Any], format: str) -> tuple[Tensor, Tensor]:
    """(rows, columns) float64 of a quantised tensor's bytes, and each one's scale. Format: ggml's `ggml-common.h`."""
    size = {"Q8_0": 34, "Q4_0": 18}[format]
    blocks = blocks.reshape(len(blocks), -1, size)
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float64)  # (rows, blocks, 1)
    codes = blocks[..., 2:]
    if format == "Q8_0":
        values = codes.view(np.int8).astype(np.float64)
    else:  # a byte holds the weight of its own place low, and the one of 16 places on high
        values = np.concatenate([codes & 15, codes >> 4], axis=-1).astype(np.float64) - 8
    whole = np.broadcast_to(scale, values.shape)
    return torch.from_numpy((values * scale).reshape(len(blocks), -1)), torch.from_numpy(whole.reshape(len(blocks), -1))


def quantised_as(got: Any, want: Tensor, format: str) -> None:
    """Within half a step of 8 bits, and within one of 4 bits, whose last step above zero is missing."""
    assert got.tensor_type.name == format
    values, scale = decoded(got.data, format)
    assert values.shape == want.shape
    step, far = scale.abs(), (values - want.double()).abs()
    rounded = 2**-11 * step * {"Q8_0": 127, "Q4_0": 8}[format]  # the scale is a float16
    most = {"Q8_0": 0.5, "Q4_0": 1.0}[format]
    assert (far <= most * step + rounded + 1e-9).all(), (far / step).max()
    assert (far / step).square().mean().sqrt() < 0.33  # even errors within half a step give 0.29


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "small"
    return checkpoint_of(folder, model_of(), tokenizer_of(), torch.bfloat16)


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS_FILE)


@pytest.fixture(autouse=True)
def known_difference() -> None:
    """What is said of every tokenizer of the family."""
    warnings.filterwarnings("ignore", "tokenizer.json: llama.cpp cuts words at combining marks")


@pytest.mark.parametrize("type", GgufType)
def test_every_tensor(type: GgufType, folder: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    write_gguf(folder, tmp_path / "m.gguf", matrices=type)
    got = tensors_of(tmp_path / "m.gguf")
    small = small_tensors(weights)
    assert got.keys() == MATRICES.keys() | small.keys()
    for name, want in small.items():
        assert got[name].tensor_type.name == "F32", name
        assert torch.equal(torch.from_numpy(got[name].data.copy()), want), name
    for name, source in MATRICES.items():
        want = weights[source]
        assert got[name].shape.tolist() == list(reversed(want.shape)), name
        if type == GgufType.BF16:
            assert got[name].tensor_type.name == "BF16"
            assert torch.equal(torch.from_numpy(got[name].data.copy()).view(torch.bfloat16), want), name
        else:
            quantised_as(got[name], want, "Q8_0" if name in ("token_embd.weight", "output.weight") else type.upper())


@pytest.mark.parametrize("type", GgufType)
def test_every_key(type: GgufType, folder: Path, tmp_path: Path) -> None:
    write_gguf(folder, tmp_path / "m.gguf", matrices=type)
    got = keys_of(tmp_path / "m.gguf")
    tokens = [got.pop(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges")]
    assert [len(tokens[0]), len(tokens[1])] == [704, 704]  # what they hold: test_gguf_vocabulary.py
    assert got == {
        "general.architecture": "nemotron_h",
        "general.type": "model",
        "general.name": "small",
        "general.file_type": {GgufType.BF16: 32, GgufType.Q8_0: 7, GgufType.Q4_0: 2}[type],
        "general.quantization_version": 2,
        "nemotron_h.block_count": 4,
        "nemotron_h.context_length": 4096,
        "nemotron_h.embedding_length": 64,
        "nemotron_h.vocab_size": 704,
        "nemotron_h.feed_forward_length": [0, 96, 0, 0],
        "nemotron_h.attention.head_count": 4,
        "nemotron_h.attention.head_count_kv": [0, 0, 2, 0],
        "nemotron_h.attention.key_length": 32,
        "nemotron_h.attention.value_length": 32,
        "nemotron_h.attention.layer_norm_epsilon": pytest.approx(1e-4),
        "nemotron_h.attention.layer_norm_rms_epsilon": pytest.approx(1e-4),
        "nemotron_h.ssm.conv_kernel": 4,
        "nemotron_h.ssm.inner_size": 128,
        "nemotron_h.ssm.state_size": 16,
        "nemotron_h.ssm.time_step_rank": 4,
        "nemotron_h.ssm.group_count": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "tekken",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


def test_what_lies_beside_the_weights(folder: Path, tmp_path: Path) -> None:
    """Licence, how tokens are drawn, several ends, a chat template; files that bind are named, not held."""
    source = checkpoint_of(tmp_path / "m", model_of(), tokenizer_of(), torch.bfloat16)
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: open\nlicense_link: https://a/b\n---\n")
    (source / "NOTICE").write_text("a notice")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text(
        '{"eos_token_id": [2, 3], "do_sample": true, "temperature": 0.5, "top_k": 7, "top_p": 0.75, '
        '"min_p": 0.25, "repetition_penalty": 1.5}'
    )
    with pytest.warns(UserWarning, match="NOTICE: binds this file too and is not in it"):
        write_gguf(source, tmp_path / "m.gguf")
    got = keys_of(tmp_path / "m.gguf")
    assert {
        "general.license": "other",
        "general.license.name": "open",
        "general.license.link": "https://a/b",
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 7,
        "general.sampling.top_p": 0.75,
        "general.sampling.min_p": 0.25,
        "general.sampling.penalty_repeat": 1.5,
        "general.sampling.penalty_last_n": -1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }.items() <= got.items()


@pytest.mark.parametrize(
    ("stated", "want"),
    [
        ({}, {}),
        ({"temperature": 0.5}, {}),  # without do_sample it does not count
        ({"do_sample": True}, {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}),
        ({"repetition_penalty": 1.5}, {"temp": 0.0, "penalty_repeat": 1.5, "penalty_last_n": -1}),
    ],
)
def test_what_the_checkpoint_leaves_open_is_drawn_as_here(
    tmp_path: Path, stated: dict[str, Any], want: dict[str, Any]
) -> None:
    source = checkpoint_of(tmp_path / "m", model_of(), tokenizer_of(), torch.bfloat16)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **stated}))
    write_gguf(source, tmp_path / "m.gguf")
    start = "general.sampling."
    got = {
        key.removeprefix(start): value for key, value in keys_of(tmp_path / "m.gguf").items() if key.startswith(start)
    }
    assert got == want


def test_defaults_without_a_key_are_named(tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "m", model_of(), tokenizer_of(), torch.bfloat16)
    stated = {"eos_token_id": 2, "do_sample": True, "presence_penalty": 0.5, "num_beams": 4, "made_up": 1}
    (source / "generation_config.json").write_text(json.dumps(stated))
    with pytest.warns(
        UserWarning, match=r"^generation_config\.json: presence_penalty, num_beams: has no key in a GGUF"
    ):
        write_gguf(source, tmp_path / "m.gguf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_wider_weights_are_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint_of(tmp_path / "m", model_of(dtype=torch.float32), tokenizer_of(), dtype)
    weights = load_file(tmp_path / "m" / WEIGHTS_FILE)
    for type in (GgufType.BF16, GgufType.Q8_0):
        write_gguf(tmp_path / "m", tmp_path / type, matrices=type)
    rounded, quantised = tensors_of(tmp_path / GgufType.BF16), tensors_of(tmp_path / GgufType.Q8_0)
    for name, source in MATRICES.items():
        got = torch.from_numpy(rounded[name].data.copy()).view(torch.bfloat16)
        assert torch.equal(got, weights[source].bfloat16()), name
        quantised_as(quantised[name], weights[source], "Q8_0")
    for name, want in small_tensors(weights).items():
        assert torch.equal(torch.from_numpy(rounded[name].data.copy()), want), name


def test_fp8_weights_are_written_as_what_they_stand_for(folder: Path, tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "m", model_of(), None, torch.bfloat16)
    tensors, name = load_file(source / WEIGHTS_FILE), "backbone.layers.1.mixer.up_proj"
    codes = tensors[f"{name}.weight"].float().to(torch.float8_e4m3fn)
    tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": torch.tensor(1.7)}
    save_file(tensors, source / WEIGHTS_FILE)
    (source / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    want = codes.double() * torch.tensor(1.7).double()
    for type in GgufType:
        with pytest.warns(UserWarning, match=r"m: has no tokenizer\.json; the file takes and gives token ids alone"):
            write_gguf(source, tmp_path / type, matrices=type)
    got = tensors_of(tmp_path / GgufType.BF16)["blk.1.ffn_up.weight"]
    bits = torch.from_numpy(got.data.copy()).view(torch.bfloat16).double()
    assert ((bits - want).abs() <= 2**-8 * want.abs() + 1e-30).all()
    for type in (GgufType.Q8_0, GgufType.Q4_0):
        quantised_as(tensors_of(tmp_path / type)["blk.1.ffn_up.weight"], want, type.upper())


def test_rows_that_no_block_fits_stay_in_bfloat16(tmp_path: Path) -> None:
    mlp = replace(CONFIG.layers[1], intermediate_size=77)
    config = replace(CONFIG, layers=(CONFIG.layers[0], mlp, *CONFIG.layers[2:]))
    checkpoint_of(tmp_path / "m", model_of(config), tokenizer_of(), torch.bfloat16)
    said = r"blk\.1\.ffn_down\.weight: stays in bfloat16, as 1 matrices do whose rows .* this one's are 77 long"
    with pytest.warns(UserWarning, match=said):
        write_gguf(tmp_path / "m", tmp_path / "m.gguf", matrices=GgufType.Q4_0)
    got = tensors_of(tmp_path / "m.gguf")
    assert got["blk.1.ffn_up.weight"].tensor_type.name == "Q4_0"
    want = load_file(tmp_path / "m" / WEIGHTS_FILE)["backbone.layers.1.mixer.down_proj.weight"]
    assert torch.equal(torch.from_numpy(got["blk.1.ffn_down.weight"].data.copy()).view(torch.bfloat16), want)


def test_a_tied_head_is_in_the_file_once(tmp_path: Path) -> None:
    source = checkpoint_of(
        tmp_path / "m", model_of(replace(CONFIG, tied_embeddings=True)), tokenizer_of(), torch.bfloat16
    )
    write_gguf(source, tmp_path / "m.gguf")
    assert "output.weight" not in tensors_of(tmp_path / "m.gguf")
    weights = load_file(source / WEIGHTS_FILE)
    save_file(weights | {HEAD: weights[HEAD] + 1}, source / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"lm_head.weight: must equal the embedding"):
        write_gguf(source, tmp_path / "n.gguf")


def test_a_file_does_not_depend_on_how_it_was_cut(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Portions of one row and of all rows give the same bytes; what is done grows to the whole."""
    write_gguf(folder, tmp_path / "whole", matrices=GgufType.Q4_0)
    monkeypatch.setattr(convert, "AT_ONCE", 7)
    told: list[tuple[float, str]] = []
    write_gguf(folder, tmp_path / "cut", matrices=GgufType.Q4_0, progress=lambda *done: told.append(done))
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "cut").read_bytes()
    assert len(told) > 704
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == 1
    assert {name for _, name in told} == tensors_of(tmp_path / "cut").keys()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            replace(CONFIG, layers=CONFIG.layers[:2]),
            "layers: must hold Mamba and attention .* no attention layer in M-",
        ),
        (replace(CONFIG, layers=CONFIG.layers[1:3]), r"layers: must hold Mamba and attention .* no Mamba layer in -\*"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(config: ModelConfig, words: str, tmp_path: Path) -> None:
    checkpoint_of(tmp_path / "m", Hybrid(config), tokenizer_of(), torch.bfloat16)
    with pytest.raises(UnsupportedError, match=words):
        write_gguf(tmp_path / "m", tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_part_of_a_matrix_is_refused(folder: Path) -> None:
    """As checkpoints have it that are quantised in a way which is not decoded here."""
    source = open_source(folder)
    name = "backbone.layers.1.mixer.up_proj.codes"
    source = replace(source, wanted={**source.wanted, name: torch.empty(96, 64, dtype=torch.int8, device="meta")})
    with pytest.raises(
        UnsupportedError, match=f"^{name}: must be a plain weight for a GGUF file, .* before quantisation"
    ):
        convert.stored(gguf, name, source, GgufType.BF16)


def test_without_the_package_the_extra_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"found no such package; pip install nemotron-h\[gguf\]$"):
        write_gguf(folder, tmp_path / "m.gguf")


def test_nothing_is_written_over(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("old")
    with pytest.raises(CheckpointError, match="must not exist, nothing is written over; name another file"):
        write_gguf(folder, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "old"


def test_a_disk_that_takes_no_more_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with full_disk(100_000), pytest.raises(CapacityError, match=r"m\.gguf: could not be written: "):
        write_gguf(folder, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CapacityError, match=r"m\.gguf: needs [\d,]{7,} bytes of disk; 1,000 are free"):
        write_gguf(folder, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    def interrupt(done: float, name: str) -> None:
        if done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(folder, tmp_path / "m.gguf", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_write_leaves_no_file_and_the_next_is_whole(folder: Path, tmp_path: Path) -> None:
    killed = (
        "import os, signal, sys; from nemotron_h.convert.gguf import write_gguf\n"
        "kill = lambda done, name: done > 0.5 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_gguf(sys.argv[1], sys.argv[2], progress=kill)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", killed, folder, tmp_path / "m.gguf"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".m.gguf.partial"]
    write_gguf(folder, tmp_path / "m.gguf")
    write_gguf(folder, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "again").read_bytes()
