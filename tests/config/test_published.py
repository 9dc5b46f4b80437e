import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_h.config.model import AttentionConfig, MambaConfig, MlpConfig, ModelConfig
from nemotron_h.config.presets import P56B, PRESETS
from nemotron_h.config.published import Dialect, from_published, read_config, to_published, write_config
from nemotron_h.errors import CheckpointError, ConfigError, UnsupportedError

# The keys of huggingface.co/nvidia/Nemotron-H-56B-Base-8K/blob/main/config.json, Infinity and all.
KEYS_56B = (
    """{
  "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "attention_bias": false,
  "attention_dropout": 0.0, "attention_head_dim": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
  "chunk_size": 128, "conv_kernel": 4, "expand": 2, "hidden_dropout": 0.0, "hidden_size": 8192,
  "initializer_range": 0.02, "intermediate_size": 32768, "layer_norm_epsilon": 1e-05, "rms_norm_eps": 1e-05,
  "mamba_head_dim": 64, "mamba_hidden_act": "silu", "mamba_num_heads": 256, "mamba_proj_bias": false,
  "max_position_embeddings": 8192, "mlp_bias": false, "mlp_hidden_act": "relu2", "n_groups": 8,
  "num_attention_heads": 64, "num_hidden_layers": 118, "num_key_value_heads": 8, "num_logits_to_keep": 1,
  "rescale_prenorm_residual": true, "residual_in_fp32": false, "sliding_window": null, "ssm_state_size": 256,
  "tie_word_embeddings": false, "time_step_floor": 0.0001, "time_step_limit": [0.0, Infinity], "time_step_max": 0.1,
  "time_step_min": 0.001, "time_step_rank": 512, "torch_dtype": "bfloat16", "transformers_version": "4.48.0.dev0",
  "use_bias": false, "use_cache": true, "use_conv_bias": true, "use_mamba_kernels": true, "vocab_size": 131072,
  "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
  "hybrid_override_pattern": \""""
    + P56B
    + '"}'
)
KINDS = {"M": "mamba", "*": "attention", "-": "mlp"}
NEW_KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}


def values(**changes: Any) -> dict[str, Any]:
    """The 56B's keys, some changed; None leaves one out."""
    merged = json.loads(KEYS_56B) | changes
    return {key: value for key, value in merged.items() if value is not None or key == "sliding_window"}


def test_the_56bs_own_file_is_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(KEYS_56B)
    with pytest.warns(UserWarning, match=rf"^{path}: auto_map names code in the folder, which is never run here$"):
        config = read_config(path)
    assert config == PRESETS["56b"]
    mamba = config.layers[0]
    assert isinstance(mamba, MambaConfig)
    assert mamba.time_step_limit == (0.0, math.inf)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "t-8b"])
def test_transformers_words_are_read_back(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_config(PRESETS[name], path, dialect=Dialect.TRANSFORMERS)
    assert read_config(path) == PRESETS[name]
    written = json.loads(path.read_text(), parse_constant=pytest.fail)  # strict JSON: no Infinity
    assert "hybrid_override_pattern" not in written
    assert [NEW_KINDS[letter] for letter in PRESETS[name].pattern] == written["layers_block_type"]


def test_transformers_has_no_rope() -> None:
    with pytest.raises(UnsupportedError, match=r"^dialect: must be published for a model with RoPE.*got transformers$"):
        to_published(PRESETS["t-8b"], dialect=Dialect.TRANSFORMERS)


@pytest.mark.parity
def test_transformers_writes_the_same_words(tmp_path: Path) -> None:
    """Our config.json in its dialect has the keys and values of its own, but those that steer nothing here."""
    transformers: Any = pytest.importorskip("transformers")
    write_config(PRESETS["8b"], tmp_path / "config.json", dialect=Dialect.TRANSFORMERS)
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    ours = json.loads((tmp_path / "config.json").read_text())
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert {key: theirs.get(key) for key in ours} == ours
    assert read_config(tmp_path / "theirs" / "config.json") == PRESETS["8b"]


@pytest.mark.parametrize("name", PRESETS)
def test_written_then_read_is_the_same(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_config(PRESETS[name], path, dtype="float32")
    assert read_config(path) == PRESETS[name]
    written = json.loads(path.read_text())
    assert written["torch_dtype"] == "float32"
    assert written["num_hidden_layers"] == len(PRESETS[name].layers)
    assert written["model_type"] == ("nemotron_h_rope" if name == "t-8b" else "nemotron_h")


def test_every_shared_field_goes_there_and_back(tmp_path: Path) -> None:
    config = replace(
        PRESETS["3m"],
        tied_embeddings=True,
        norm_epsilon=1e-6,
        max_positions=1234,
        bos_token_id=5,
        eos_token_ids=(6, 7),
        pad_token_id=8,
        layers=tuple(
            replace(layer, time_step_limit=(0.001, 0.5), chunk_size=256, conv_kernel=3)
            if isinstance(layer, MambaConfig)
            else layer
            for layer in PRESETS["3m"].layers
        ),
    )
    write_config(config, tmp_path / "config.json")
    assert read_config(tmp_path / "config.json") == config


@pytest.mark.parametrize("words", [KINDS, NEW_KINDS])
@pytest.mark.parametrize("key", ["layers_block_type", "layer_types"])
def test_layers_as_a_list_of_kinds(key: str, words: dict[str, str]) -> None:
    kinds = [words[letter] for letter in P56B]
    assert from_published(values(hybrid_override_pattern=None, **{key: kinds})) == PRESETS["56b"]
    assert from_published(values(**{key: kinds})) == PRESETS["56b"]  # both, and they agree
    with pytest.raises(ConfigError, match=rf"^hybrid_override_pattern: must agree with {key}"):
        from_published(values(**{key: kinds[:-1]}))


def test_the_head_width_in_either_spelling() -> None:
    assert from_published(values(attention_head_dim=None, head_dim=128)) == PRESETS["56b"]
    assert from_published(values(head_dim=128)) == PRESETS["56b"]
    with pytest.raises(ConfigError, match=r"^head_dim: must equal attention_head_dim; got 64 and 128$"):
        from_published(values(head_dim=64))
    with pytest.raises(ConfigError, match=r"^head_dim: must be given, as head_dim or attention_head_dim; got nothing$"):
        from_published(values(attention_head_dim=None))


def test_a_large_number_stands_for_infinity() -> None:
    assert from_published(values(time_step_limit=[0.0, 1e308])) == PRESETS["56b"]


def test_rope_keys_steer_only_a_model_that_has_rope() -> None:
    assert from_published(values(rope_theta=10000, partial_rotary_factor=1.0)) == PRESETS["56b"]
    config = from_published(values(model_type="nemotron_h_rope", rope_theta=5e5, partial_rotary_factor=0.5))
    attention = config.layers[7]
    assert isinstance(attention, AttentionConfig)
    assert (attention.rope_base, attention.rope_fraction) == (5e5, 0.5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"model_type": "llama"},
            UnsupportedError,
            r"^model_type: must be 'nemotron_h' or 'nemotron_h_rope'; got 'llama'$",
        ),
        ({"model_type": None}, UnsupportedError, r"^model_type: must be .* got None$"),
        ({"mlp_hidden_act": "silu"}, UnsupportedError, r"^mlp_hidden_act: must be 'relu2'; got 'silu'$"),
        ({"attention_bias": True}, UnsupportedError, r"^attention_bias: must be False; got True$"),
        ({"use_conv_bias": False}, UnsupportedError, r"^use_conv_bias: must be True; got False$"),
        ({"use_conv_bias": 1}, UnsupportedError, r"^use_conv_bias: must be True; got 1$"),
        ({"num_nextn_predict_layers": False}, UnsupportedError, r"^num_nextn_predict_layers: must be 0; got False$"),
        ({"residual_in_fp32": True}, UnsupportedError, r"^residual_in_fp32: must be False; got True$"),
        ({"sliding_window": 4096}, UnsupportedError, r"^sliding_window: must be None; got 4096$"),
        ({"hybrid_override_pattern": "ME"}, UnsupportedError, r"^pattern: mixture-of-experts .* got 'E' at layer 1$"),
        (  # what else a mixture of experts has is not what it is refused for
            {"layers_block_type": ["moe"], "num_nextn_predict_layers": 1, "hybrid_override_pattern": None},
            UnsupportedError,
            r"^pattern: mixture-of-experts models \(Nemotron 3 Nano, .*\) are not supported; got 'E' at layer 0$",
        ),
        ({"hidden_size": 2**31}, ConfigError, r"^hidden_size: must be an integer of 32 bits; got 2147483648$"),
        ({"time_step_limit": [0, "1"]}, ConfigError, r"^time_step_limit: must be two numbers; got \[0, '1'\]$"),
        ({"time_step_limit": [0, {"__float__": "-Infinity"}]}, ConfigError, r"^mamba\.time_step_limit: must be 0 <="),
        ({"hybrid_override_pattern": "MQ"}, ConfigError, r"^pattern: must be made of .* got 'Q' at layer 1$"),
        ({"hybrid_override_pattern": ["M"]}, ConfigError, r"^hybrid_override_pattern: must be a string; got \['M'\]$"),
        ({"hybrid_override_pattern": None}, ConfigError, r"^hybrid_override_pattern: must be given; got nothing$"),
        (
            {
                "hybrid_override_pattern": None,
                "layers_block_type": ["mamba", "mlp"],
                "layer_types": ["mamba", "attention"],
            },
            ConfigError,
            r"^layers_block_type: must agree with layer_types, which says 'M\*'; got 'M-'$",
        ),
        ({"rope_scaling": {"factor": 8}}, UnsupportedError, r"^rope_scaling: must be None; got"),
        ({"layers_block_type": "M-"}, ConfigError, r"^layers_block_type: must be a list of strings; got 'M-'$"),
        (
            {"layers_block_type": ["mamba", "rnn"]},
            ConfigError,
            r"^layers_block_type: must be made of .* 'rnn' at layer 1$",
        ),
        ({"layers_block_type": ["moe"]}, UnsupportedError, r"got 'E' at layer 0$"),
        ({"hidden_size": "8192"}, ConfigError, r"^hidden_size: must be an integer; got '8192'$"),
        ({"hidden_size": True}, ConfigError, r"^hidden_size: must be an integer; got True$"),
        ({"hidden_size": None}, ConfigError, r"^hidden_size: must be given; got nothing$"),
        ({"n_groups": 7}, ConfigError, r"^mamba\.num_groups: must divide num_heads; got 7 and 256$"),
        ({"rms_norm_eps": 1e-6}, ConfigError, r"^layer_norm_epsilon: must equal rms_norm_eps; got 1e-06 and 1e-05$"),
        ({"rms_norm_eps": "small"}, ConfigError, r"^rms_norm_eps: must be a number; got 'small'$"),
        ({"time_step_limit": [0.0]}, ConfigError, r"^time_step_limit: must be two numbers; got \[0\.0\]$"),
        ({"eos_token_id": 131072}, ConfigError, r"^eos_token_ids: must lie in 0\.\.vocab_size-1 = 131071; got 131072$"),
    ],
)
def test_what_would_change_the_arithmetic_is_refused_by_its_key(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        from_published(values(**changes))


def test_a_null_is_not_taken_for_an_id() -> None:
    with pytest.raises(ConfigError, match=r"^bos_token_id: must be an integer; got null; give the id"):
        from_published(values() | {"bos_token_id": None})


@pytest.mark.parametrize("silent", [values() | {"eos_token_id": None}, values(eos_token_id=None)])
def test_no_end_token_is_invented(silent: dict[str, Any], tmp_path: Path) -> None:
    """Other files of a checkpoint may name it."""
    config = from_published(silent)
    assert config.eos_token_ids == ()
    write_config(config, tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] is None
    assert read_config(tmp_path / "config.json") == config


def test_no_padding_token_stays_none(tmp_path: Path) -> None:
    config = from_published(values() | {"pad_token_id": None})
    assert config.pad_token_id is None
    write_config(config, tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] is None
    assert read_config(tmp_path / "config.json") == config


def test_an_unknown_key_is_named_in_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"keys that are not known here and steer nothing: frobnication$"):
        assert from_published(values(frobnication=3)) == PRESETS["56b"]
    with pytest.warns(UserWarning, match=r"steer nothing: f0, f1, f10, .* and 40 more$"):
        from_published(values(**{f"f{i}": 1 for i in range(50)}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"config\.json: must be JSON; got"),
        (b"", r"config\.json: must be JSON; got"),
        (b"\xff\xfe", r"config\.json: must be JSON; got"),
        (b"[1, 2]", r"config\.json: must hold a JSON object; got list$"),
        (b"[" * 100_000, r"config\.json: must be JSON; got"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(path)
    assert "\n" not in str(caught.value)


def test_a_refusal_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: must exist; found no such file"):
        read_config(tmp_path / "config.json")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values(n_groups=7)))
    with pytest.raises(ConfigError, match=rf"^{path}: mamba\.num_groups: must divide"):
        read_config(path)
    path.write_text(json.dumps(values(model_type="qwen2")))
    with pytest.raises(UnsupportedError, match=rf"^{path}: model_type: must be"):
        read_config(path)


def test_layers_of_one_kind_that_differ_cannot_be_written(tmp_path: Path) -> None:
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4)
    layers = (attention, MlpConfig(intermediate_size=8), MlpConfig(intermediate_size=16))
    config = ModelConfig(layers=layers, hidden_size=8, vocab_size=16)
    with pytest.raises(
        UnsupportedError, match=r"^config\.json: holds one size for all MlpConfig layers; got 2 different"
    ):
        write_config(config, tmp_path / "config.json")
    assert not (tmp_path / "config.json").exists()


def test_a_model_without_some_kind_of_layer(tmp_path: Path) -> None:
    for pattern in ("*", "*-", "M*"):
        config = ModelConfig.from_pattern(
            pattern,
            hidden_size=8,
            vocab_size=16,
            mamba=MambaConfig(num_heads=2, head_dim=4, state_size=4, num_groups=1),
            attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4),
            mlp=MlpConfig(intermediate_size=8),
        )
        assert from_published(to_published(config)) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [("tie_word_embeddings", "false"), ("num_hidden_layers", 3), ("time_step_limit", [True, 2])],
)
def test_a_value_of_the_wrong_kind_is_named(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: must be"):
        from_published(to_published(PRESETS["8b"]) | {key: value})


@pytest.mark.parametrize("pattern", ["M", "-", "M-", "*"])
def test_models_without_a_kind_of_layer_round_trip(pattern: str) -> None:
    whole = PRESETS["3m"]
    config = replace(whole, layers=tuple(whole.layers[whole.pattern.index(letter)] for letter in pattern))
    assert from_published(to_published(config)) == config
