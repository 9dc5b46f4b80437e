"""config.json: both dialects read, and either written so that other programs load what we save.

Keys that change the arithmetic are honoured or refused by name; keys that describe training or a program's habits are
passed over; a key we do not know is named in a warning. `Infinity` is read and written, as NVIDIA's own files have it.
"""

import json
import math
import warnings
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from nemotron_h.config.generation import STEERING
from nemotron_h.config.keys import Keys, as_number, read_object, short, shown
from nemotron_h.config.model import AttentionConfig, MambaConfig, MlpConfig, ModelConfig
from nemotron_h.config.pattern import ATTENTION, MAMBA, MLP, read_pattern
from nemotron_h.errors import ConfigError, UnsupportedError

T = TypeVar("T")

# A model with RoPE has a type of its own: a program that knows only the family would drop the rotation in silence.
MODEL_TYPE, ROPE_MODEL_TYPE = "nemotron_h", "nemotron_h_rope"


class Dialect(StrEnum):
    """Who writes a checkpoint so: the words of its config.json and the names of its tensors."""

    PUBLISHED = "published"  # NVIDIA's files: hybrid_override_pattern, backbone.*
    TRANSFORMERS = "transformers"  # transformers 5's own: layers_block_type, model.*


# What each key must say for our arithmetic to be the model's.
REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bias": (False,),
    "mamba_proj_bias": (False,),
    "use_conv_bias": (True,),
    "residual_in_fp32": (False,),
    "sliding_window": (None,),
    "rope_scaling": (None,),
    "attention_dropout": (0, 0.0),
    "hidden_dropout": (0, 0.0),
    "num_nextn_predict_layers": (0,),
    "mamba_ssm_cache_dtype": ("float32",),
}
# What steers training, other programs' kernels, or nothing at all in this family.
PASSED_OVER = {
    "architectures",
    "auto_map",
    "expand",
    "initializer_range",
    "num_hidden_layers",
    "num_logits_to_keep",
    "rescale_prenorm_residual",
    "time_step_floor",
    "time_step_max",
    "time_step_min",
    "time_step_rank",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "use_mamba_kernels",
    "rope_theta",
    "partial_rotary_factor",
    "quantization_config",  # of the weights beside the config: `quantization.py` reads it
    "head_dim",
    "attention_head_dim",
    "_name_or_path",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "output_router_logits",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "is_encoder_decoder",
    "problem_type",
    "mtp_hybrid_override_pattern",
    "mtp_layers_block_type",
    "n_routed_experts",
    "n_shared_experts",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "moe_shared_expert_overlap",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
    "norm_topk_prob",
}
KINDS = {
    "mamba": MAMBA,
    "linear_attention": MAMBA,
    "attention": ATTENTION,
    "full_attention": ATTENTION,
    "mlp": MLP,
    "moe": "E",
}
WORDS = {MAMBA: "linear_attention", ATTENTION: "full_attention", MLP: "mlp"}  # of transformers 5


def read_config(path: Path) -> ModelConfig:
    """The model that a config.json describes. Raises: ConfigError, UnsupportedError or CheckpointError, by key."""
    values = read_object(path)
    try:
        config = from_published(values)
    except (ConfigError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from None
    if values.get("auto_map") is not None:
        warnings.warn(f"{path}: auto_map names code in the folder, which is never run here", stacklevel=2)
    return config


def from_published(values: Mapping[str, Any]) -> ModelConfig:
    """The model that the keys of a config.json describe."""
    kind = values.get("model_type")
    if kind not in (MODEL_TYPE, ROPE_MODEL_TYPE):
        raise UnsupportedError(f"model_type: must be {MODEL_TYPE!r} or {ROPE_MODEL_TYPE!r}; got {short(kind)}")
    keys = Keys(values)
    pattern = pattern_of(keys)  # first: what a mixture of experts is refused for is its experts
    for key, allowed in REQUIRED_VALUES.items():
        if key in values and not any(type(values[key]) is type(one) and values[key] == one for one in allowed):
            raise UnsupportedError(f"{key}: must be {allowed[0]!r}; got {short(values[key])}")
    if keys.integer("num_hidden_layers", len(pattern)) != len(pattern):
        raise ConfigError(f"num_hidden_layers: must be the pattern's {len(pattern)}; got {values['num_hidden_layers']}")
    config = ModelConfig.from_pattern(
        pattern,
        hidden_size=keys.integer("hidden_size"),
        vocab_size=keys.integer("vocab_size"),
        mamba=mamba_of(keys) if MAMBA in pattern else None,
        attention=attention_of(keys, rope=kind == ROPE_MODEL_TYPE) if ATTENTION in pattern else None,
        mlp=MlpConfig(intermediate_size=keys.integer("intermediate_size")) if MLP in pattern else None,
        max_positions=keys.integer("max_position_embeddings", 8192),
        tied_embeddings=keys.boolean("tie_word_embeddings", default=False),
        norm_epsilon=epsilon_of(keys),
        **tokens_of(keys),
    )
    family = set(to_published(config)) | {"hybrid_override_pattern", "layers_block_type", "layer_types", "rms_norm_eps"}
    unknown = sorted(set(values) - keys.asked - set(REQUIRED_VALUES) - PASSED_OVER - family - SIZES - set(STEERING))
    if unknown:
        some = ", ".join(map(shown, unknown[:10])) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
        warnings.warn(f"config.json: keys that are not known here and steer nothing: {some}", stacklevel=2)
    return config


# Sizes of layers that a pattern may lack: present in every file, read only where a layer needs them.
SIZES = {
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "mamba_num_heads",
    "mamba_head_dim",
    "ssm_state_size",
    "n_groups",
    "conv_kernel",
    "chunk_size",
    "time_step_limit",
}


def pattern_of(keys: Keys) -> str:
    """Either dialect: a pattern string, or a list of kinds in the words of NVIDIA's or of transformers' configs."""
    found: dict[str, str] = {}
    for named in ("layers_block_type", "layer_types"):
        if named not in keys:
            continue
        kinds = keys.any(named)
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise ConfigError(f"{named}: must be a list of strings; got {short(kinds)}")
        for index, kind in enumerate(kinds):
            if kind not in KINDS:
                raise ConfigError(f"{named}: must be made of {', '.join(KINDS)}; got {short(kind)} at layer {index}")
        found[named] = read_pattern("".join(KINDS[kind] for kind in kinds))
    if "hybrid_override_pattern" in keys or not found:
        pattern = keys.any("hybrid_override_pattern")
        if not isinstance(pattern, str):
            raise ConfigError(f"hybrid_override_pattern: must be a string; got {short(pattern)}")
        found = {"hybrid_override_pattern": read_pattern(pattern)} | found
    (name, pattern), *others = found.items()
    for other, same in others:
        if same != pattern:
            raise ConfigError(f"{name}: must agree with {other}, which says {short(same)}; got {short(pattern)}")
    return pattern


def mamba_of(keys: Keys) -> MambaConfig:
    limit = keys.any("time_step_limit", [0.0, math.inf])
    low, high = map(as_number, limit) if isinstance(limit, list | tuple) and len(limit) == 2 else (None, None)
    if low is None or high is None:
        raise ConfigError(f"time_step_limit: must be two numbers; got {short(limit)}")
    return MambaConfig(
        num_heads=keys.integer("mamba_num_heads"),
        head_dim=keys.integer("mamba_head_dim"),
        state_size=keys.integer("ssm_state_size"),
        num_groups=keys.integer("n_groups"),
        conv_kernel=keys.integer("conv_kernel", 4),
        # Nemotron-3 Ultra writes 1e308 where strict JSON has no Infinity
        time_step_limit=(low, math.inf if high >= 1e308 else high),
        chunk_size=keys.integer("chunk_size", 128),
    )


def attention_of(keys: Keys, *, rope: bool) -> AttentionConfig:
    spelled = [key for key in ("attention_head_dim", "head_dim") if key in keys]
    if not spelled:
        raise ConfigError("head_dim: must be given, as head_dim or attention_head_dim; got nothing")
    widths = {keys.integer(key) for key in spelled}
    if len(widths) > 1:
        raise ConfigError(f"head_dim: must equal attention_head_dim; got {' and '.join(map(str, sorted(widths)))}")
    return AttentionConfig(
        num_heads=keys.integer("num_attention_heads"),
        num_kv_heads=keys.integer("num_key_value_heads"),
        head_dim=widths.pop(),
        rope_base=keys.number("rope_theta", 10_000.0) if rope else None,
        rope_fraction=keys.number("partial_rotary_factor", 1.0) if rope else 1.0,
    )


def epsilon_of(keys: Keys) -> float:
    spelled = {keys.number(key, 1e-5) for key in ("layer_norm_epsilon", "rms_norm_eps") if key in keys} or {1e-5}
    if len(spelled) > 1:
        raise ConfigError(f"layer_norm_epsilon: must equal rms_norm_eps; got {' and '.join(map(str, sorted(spelled)))}")
    return spelled.pop()


def tokens_of(keys: Keys) -> dict[str, Any]:
    if keys.values.get("bos_token_id", 0) is None:
        raise ConfigError("bos_token_id: must be an integer; got null; give the id that the tokenizer has")
    return {
        "bos_token_id": keys.integer("bos_token_id", 1),
        "eos_token_ids": keys.integers("eos_token_id"),
        "pad_token_id": None if keys.values.get("pad_token_id", 0) is None else keys.integer("pad_token_id", 0),
    }


def to_published(
    config: ModelConfig, *, dtype: str = "bfloat16", dialect: Dialect = Dialect.PUBLISHED
) -> dict[str, Any]:
    """The keys of a config.json. transformers and vLLM read either dialect.

    Raises: UnsupportedError where layers of one kind differ, the format having one size for all of them, and where
    transformers has no such model.
    """
    mamba = only(config, MambaConfig) or MambaConfig(num_heads=1, head_dim=1, state_size=1, num_groups=1)
    attention = only(config, AttentionConfig) or AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=1)
    mlp = only(config, MlpConfig) or MlpConfig(intermediate_size=1)
    rope = attention.rope_base is not None
    ends = config.eos_token_ids
    values = {
        "architectures": ["NemotronHRopeForCausalLM" if rope else "NemotronHForCausalLM"],
        "model_type": ROPE_MODEL_TYPE if rope else MODEL_TYPE,
        "hybrid_override_pattern": config.pattern,
        "num_hidden_layers": len(config.layers),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": config.max_positions,
        "layer_norm_epsilon": config.norm_epsilon,
        "rms_norm_eps": config.norm_epsilon,
        "mamba_num_heads": mamba.num_heads,
        "mamba_head_dim": mamba.head_dim,
        "ssm_state_size": mamba.state_size,
        "n_groups": mamba.num_groups,
        "conv_kernel": mamba.conv_kernel,
        "chunk_size": mamba.chunk_size,
        "time_step_limit": list(mamba.time_step_limit),
        "expand": max(1, round(mamba.inner_size / config.hidden_size)),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "attention_head_dim": attention.head_dim,
        "head_dim": attention.head_dim,
        "intermediate_size": mlp.intermediate_size,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
        **{key: allowed[0] for key, allowed in REQUIRED_VALUES.items() if allowed[0] is not None},
    }
    if rope:
        values |= {"rope_theta": attention.rope_base, "partial_rotary_factor": attention.rope_fraction}
    return values if dialect is Dialect.PUBLISHED else in_transformers_words(values)


def in_transformers_words(values: Mapping[str, Any]) -> dict[str, Any]:
    """The published keys as transformers 5 writes them, in strict JSON."""
    if values["model_type"] != MODEL_TYPE:
        raise UnsupportedError(
            f"dialect: must be {Dialect.PUBLISHED} for a model with RoPE, which transformers has not; "
            f"got {Dialect.TRANSFORMERS}"
        )
    renamed = dict(values)
    for key in ("num_hidden_layers", "attention_head_dim", "rms_norm_eps"):
        del renamed[key]
    renamed["layers_block_type"] = [WORDS[letter] for letter in renamed.pop("hybrid_override_pattern")]
    renamed["dtype"] = renamed.pop("torch_dtype")
    renamed["time_step_limit"] = [
        {"__float__": "Infinity"} if math.isinf(bound) else bound for bound in values["time_step_limit"]
    ]
    return renamed


def only(config: ModelConfig, kind: type[T]) -> T | None:
    """The one config that all layers of a kind share, or None where there is no such layer."""
    found = {layer for layer in config.layers if isinstance(layer, kind)}
    if len(found) > 1:
        raise UnsupportedError(
            f"config.json: holds one size for all {kind.__name__} layers; got {len(found)} different ones"
        )
    return next(iter(found), None)


def write_config(
    config: ModelConfig,
    path: Path,
    *,
    dtype: str = "bfloat16",
    dialect: Dialect = Dialect.PUBLISHED,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json. dtype: of the weights beside it, for other programs; quantization: its quantization_config."""
    values = to_published(config, dtype=dtype, dialect=dialect)
    if quantization is not None:
        values["quantization_config"] = dict(quantization)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
