"""FLOPs of the config against PyTorch's counter, on the torch definitions: what each kind of layer really multiplies.

The meta device computes shapes alone and has no kernels, so members of the published sizes are counted in no time.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nemotron_h.config import cost
from nemotron_h.config.model import ModelConfig
from nemotron_h.config.pattern import NAMES
from nemotron_h.config.presets import PRESETS
from nemotron_h.grid import BLOCK, round_up
from nemotron_h.model.hybrid import Hybrid

TOKENS = 2048  # whole chunks, blocks and rows: nothing is padded
META = torch.device("meta")
# PyTorch counts products alone; the conv is an element-wise sum in ours, and 0.6 % of the smallest preset's layer
CLOSE = 0.01


def counted(config: ModelConfig, *, whole_attention: bool = True, backward: bool = False) -> float:
    """FLOPs of a token up to the head, as the counter sees them."""
    # where a gradient is wanted, attention is one call over the whole segment, not one for each block
    net = Hybrid(config, dtype=torch.bfloat16, device=META).requires_grad_(whole_attention)
    tokens = torch.zeros(TOKENS, dtype=torch.int64, device=META)
    with FlopCounterMode(display=False) as counter:
        hidden = net.hidden(tokens, net.segments(tokens[None]))
        if backward:
            hidden.sum().backward()  # type: ignore[no-untyped-call]
    return counter.get_total_flops() / TOKENS


def one_layer(name: str, kind: str) -> ModelConfig:
    """The preset's first layer of a kind, alone."""
    config = PRESETS[name]
    return replace(config, layers=(config.layers[config.pattern.index(kind)],))


KINDS = [(name, kind) for name, config in PRESETS.items() for kind in NAMES if kind in config.pattern]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_prompt_and_a_training_step_are_what_torch_counts(name: str, kind: str) -> None:
    config = one_layer(name, kind)
    read = cost.prefill_flops(config, TOKENS, full_square=True)[NAMES[kind]]
    assert counted(config) == pytest.approx(read, rel=CLOSE)
    trained = cost.training_flops(config, TOKENS, full_square=True)[NAMES[kind]]
    assert counted(config, backward=True) == pytest.approx(trained, rel=CLOSE)


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_is_its_layers(name: str) -> None:
    config, whole = PRESETS[name], cost.decode_flops(PRESETS[name], 1000)
    for kind in filter(config.pattern.count, NAMES):
        alone = cost.decode_flops(one_layer(name, kind), 1000)
        assert whole[NAMES[kind]] == config.pattern.count(kind) * alone[NAMES[kind]]
        assert whole["head"] == alone["head"]


@pytest.mark.parametrize("name", ["8b", "256m"])
def test_attention_by_blocks_costs_half_a_block_more_than_the_causal_half(name: str) -> None:
    config = one_layer(name, "*")
    got = counted(config, whole_attention=False)
    by_key = cost.decode_flops(config, 1)["attention"] - cost.decode_flops(config, 0)["attention"]
    rounded = sum(round_up(place + 1, BLOCK) - (place + 1) for place in range(TOKENS)) / TOKENS
    assert rounded == (BLOCK - 1) / 2
    assert got == cost.prefill_flops(config, TOKENS)["attention"] + by_key * rounded


def test_the_head_reads_one_token_of_a_prompt_and_all_of_a_document() -> None:
    config = PRESETS["256m"]
    net = Hybrid(config, dtype=torch.bfloat16, device=META)
    hidden = torch.zeros(TOKENS, config.hidden_size, dtype=torch.bfloat16, device=META, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        net.logits(hidden.detach()[-1:])
    assert counter.get_total_flops() == TOKENS * cost.prefill_flops(config, TOKENS)["head"]
    assert counter.get_total_flops() == cost.decode_flops(config, TOKENS)["head"]
    with FlopCounterMode(display=False) as counter:
        net.logits(hidden).sum().backward()  # type: ignore[no-untyped-call]
    assert counter.get_total_flops() == TOKENS * cost.training_flops(config, TOKENS)["head"]
