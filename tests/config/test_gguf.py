"""The keys of a file, whole, are in tests/convert/test_gguf.py."""

from dataclasses import replace

import pytest

from nemotron_h.config.gguf import MOST_LAYERS, to_gguf
from nemotron_h.config.model import ModelConfig
from nemotron_h.config.presets import PRESETS
from nemotron_h.errors import UnsupportedError
from tests.model.shapes import FAMILY, attention, mamba, scaled

BASE = FAMILY["8b"]


def test_a_layers_kind_is_in_two_lists() -> None:
    keys = to_gguf(PRESETS["8b"])
    pattern = PRESETS["8b"].pattern
    assert keys["nemotron_h.attention.head_count_kv"] == [8 if kind == "*" else 0 for kind in pattern]
    assert keys["nemotron_h.feed_forward_length"] == [21504 if kind == "-" else 0 for kind in pattern]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (FAMILY["ssm"], "layers: must hold Mamba and attention .*; got no attention layer in M-M-; "),
        (FAMILY["t-8b"], r"layers: must hold Mamba and attention .*; got no Mamba layer in \*-\*-; "),
        (
            scaled("M*", 64, mamba(4, 16, 16), replace(attention(2, 2, 16), rope_base=10_000.0), 64),
            "attention.rope_base: must be None .*; got 10000; llama.cpp cannot run this model$",
        ),
        (
            scaled("M*", 64, replace(mamba(4, 16, 16), time_step_limit=(0.0, 0.5)), attention(2, 2, 16), 64),
            r"mamba.time_step_limit: must be \(0, inf\) .*; got \(0.0, 0.5\); ",
        ),
        (
            scaled("M*", 64, replace(mamba(4, 16, 16), time_step_limit=(0.001, float("inf"))), attention(2, 2, 16), 64),
            r"mamba.time_step_limit: .*; got \(0.001, inf\); ",
        ),
        (replace(BASE, layers=BASE.layers[:1] * MOST_LAYERS + BASE.layers), "layers: must be at most 512 .*; got 519"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(config: ModelConfig, words: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^{words}"):
        to_gguf(config)
