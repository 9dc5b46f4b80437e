"""Against counts by hand, identities, what was published, and what models really hold."""

import gc
import json
import re
from dataclasses import replace
from pathlib import Path
from types import FunctionType, ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nemotron_h.checkpoint.save import save
from nemotron_h.config import cost
from nemotron_h.config.devices import DEVICES, Device, read_device
from nemotron_h.config.peers import PEERS, PUBLISHED, PUBLISHED_RATIOS, shape
from nemotron_h.config.plan import (
    Work,
    efficiency,
    fewest,
    needed,
    plan,
    predicted,
    prompt_flops,
    read_bytes,
    training_days,
)
from nemotron_h.config.presets import PRESETS
from nemotron_h.config.settings import to_mapping
from nemotron_h.errors import CapacityError, ConfigError, UnsupportedError
from nemotron_h.inference.load import load
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from tests.benchmarks import ROOT

SLOW = Device(name="slow", peaks={"bfloat16": 1e12}, bandwidth_bytes_per_second=1e10, memory_bytes=2 * 10**9)


def test_times_counted_by_hand() -> None:
    config, work = PRESETS["256m"], Work(input_tokens=1000, output_tokens=10, batch=3, memory_fraction=1)
    found = plan(config, SLOW, work)
    # products bound the prompts, memory the steps
    assert found.prompt_seconds == 3 * 1000 * prompt_flops(config, 1000) / 1e12
    weights = cost.weight_bytes(config, "bfloat16")
    state = cost.state_bytes(config)
    moved = sum(state.values()) - state["draft inputs"] + cost.token_bytes(config) * 1005
    assert found.step_seconds == (sum(weights.values()) - weights["embedding"] + 3 * moved) / 1e10
    assert (found.prompt_bound, found.step_bound) == ("products", "memory")
    assert found.output_tokens_per_second == 3 * 10 / (found.prompt_seconds + 10 * found.step_seconds)
    assert found.output_tokens_per_device_hour == 3600 * found.output_tokens_per_second


def test_a_program_that_writes_its_state_back_moves_it_twice() -> None:
    config = PRESETS["8b"]
    once, twice = (read_bytes(config, Work(program=name), 2, 100) for name in ("nemotron-h", "vllm"))
    assert twice - once == 2 * cost.state_bytes(config)["recurrent state"]


def test_a_prompt_needs_the_last_layers_for_its_last_token_alone() -> None:
    config = PRESETS["256m"]  # ends with a Mamba layer and an FFN: its output projection, and both of the FFN's
    spared = 2 * (1024 * 2048 + 2 * 1024 * 4096)
    whole = sum(cost.prefill_flops(config, 100).values())
    assert prompt_flops(config, 100) == pytest.approx(whole - spared * 99 / 100)
    assert prompt_flops(config, 1) == sum(cost.prefill_flops(config, 1).values())


def test_two_devices_are_one_that_is_twice_as_fast_and_as_large() -> None:
    double = Device(name="double", peaks={"bfloat16": 2e12}, bandwidth_bytes_per_second=2e10, memory_bytes=4 * 10**9)
    work = Work(input_tokens=500, output_tokens=100)
    two, one = plan(PRESETS["256m"], SLOW, work, devices=2), plan(PRESETS["256m"], double, work)
    assert (two.batch, two.prompt_seconds, two.step_seconds) == (one.batch, one.prompt_seconds, one.step_seconds)
    assert 2 * two.output_tokens_per_device_second == one.output_tokens_per_device_second


@given(
    name=st.sampled_from(["25m", "256m", "8b", "t-8b", "nano-9b-v2"]),
    context=st.integers(1, 200_000),
    weights=st.sampled_from(list(cost.WEIGHT_FORMATS)),
    fraction=st.floats(0.5, 1),
)
def test_the_largest_batch_and_context_fit_and_one_more_does_not(
    name: str, context: int, weights: str, fraction: float
) -> None:
    config, work = PRESETS[name], Work(input_tokens=context, weights=weights, memory_fraction=fraction)
    found = plan(config, DEVICES["h100"], work)
    length = context + work.output_tokens

    def total(batch: int, tokens: int) -> int:
        return sum(needed(config, work, batch, tokens).values())

    assert total(found.largest_batch, length) == sum(found.bytes.values()) <= found.limit_bytes
    assert total(found.largest_batch + 1, length) > found.limit_bytes
    assert (
        total(found.batch, found.longest_context) <= found.limit_bytes < total(found.batch, found.longest_context + 1)
    )


def test_what_does_not_fit_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        CapacityError, match=r"^1 sequences of 66,560 tokens: need \d[\d,]+ bytes; 1 x A10G give \d[\d,]+;"
    ):
        plan(PRESETS["56b"], DEVICES["a10g"], Work())
    fitting = plan(PRESETS["8b"], DEVICES["h100"], Work())
    with pytest.raises(CapacityError, match=f"^{fitting.batch + 1} sequences"):
        plan(PRESETS["8b"], DEVICES["h100"], Work(batch=fitting.batch + 1))


def test_a_model_without_attention_has_no_longest_context() -> None:
    config = replace(
        PRESETS["25m"], layers=tuple(one for one in PRESETS["25m"].layers if one != PRESETS["25m"].layers[5])
    )
    assert "*" not in config.pattern
    assert plan(config, SLOW, Work()).longest_context == 0


def test_whole_nodes_serve_what_one_device_cannot_hold() -> None:
    want = {"8b": 1, "llama-3.1-8b": 1, "47b": 8, "56b": 8, "qwen-2.5-72b": 8, "llama-3.1-405b": 16}
    assert {name: fewest(shape(name), DEVICES["h100"], Work()) for name in want} == want


def test_peers_have_the_parameters_that_are_published() -> None:
    """Of the models' own cards, in thousand millions; a gated FFN's are those of ours half as wide again."""
    want = {"8b": 8.03, "70b": 70.6, "405b": 405.9, "2.5-7b": 7.62, "2.5-72b": 72.7}
    for name, count in want.items():
        (config,) = (config for peer, config in PEERS.items() if peer.endswith(name))
        assert sum(cost.parameters(config).values()) / 1e9 == pytest.approx(count, rel=0.002), name
    # arXiv:2504.03624, section 4; bytes of a token's keys and values
    assert cost.token_bytes(PEERS["llama-3.1-8b"]) == 131_072
    assert cost.token_bytes(PEERS["qwen-2.5-7b"]) == 57_344
    assert cost.token_bytes(PEERS["llama-3.1-70b"]) == cost.token_bytes(PEERS["qwen-2.5-72b"]) == 327_680


@pytest.mark.parametrize(
    ("first", "second"), [pair for pair in PUBLISHED_RATIOS if all(PUBLISHED[n].held for n in pair)]
)
def test_published_ratios_are_predicted(first: str, second: str) -> None:
    """Within a quarter, with one constant for each program and none for a model."""
    published = PUBLISHED[first].tokens_per_second / PUBLISHED[second].tokens_per_second
    got, other = (efficiency(PUBLISHED[name].program) * predicted(name) for name in (first, second))
    assert got / other == pytest.approx(published, rel=0.25)


def test_what_no_roofline_can_match() -> None:
    """Two shapes of one cost whose published rates differ by more than a third."""
    assert predicted("t-8b") == pytest.approx(predicted("llama-3.1-8b"), rel=0.01)
    assert PUBLISHED["t-8b"].tokens_per_second / PUBLISHED["llama-3.1-8b"].tokens_per_second > 4 / 3


def test_the_page_has_these_predictions() -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) / (\S+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 6
    for first, second, *figures in rows:
        names = first.lower(), second.lower()
        published = PUBLISHED[names[0]].tokens_per_second / PUBLISHED[names[1]].tokens_per_second
        got, other = (efficiency(PUBLISHED[name].program) * predicted(name) for name in names)
        for figure, value in zip(figures, (published, got / other), strict=True):
            assert float(figure) == pytest.approx(value, rel=0.01), (first, second)


def test_days_of_training_counted_by_hand() -> None:
    config, h100 = PRESETS["8b"], DEVICES["h100"]
    flops = 15e12 * sum(cost.training_flops(config, 8192).values())
    days = training_days(config, 15e12, h100, devices=6144, utilisation=0.5)
    assert days == pytest.approx(flops / (6144 * 0.5 * 989e12) / 86_400)
    with pytest.raises(ConfigError, match=r"^utilisation: must lie above 0 and not above 1; got 2$"):
        training_days(config, 1e12, h100, devices=1, utilisation=2)


def test_a_device_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(to_mapping(SLOW)))
    assert read_device(path) == SLOW
    (tmp_path / "mine.toml").write_text('name = "slow"\nmemory_bytes = 1\nbandwidth_bytes_per_second = 1.0\n')
    with pytest.raises(ConfigError, match=r"mine\.toml: peaks: must be given; got nothing$"):
        read_device(tmp_path / "mine.toml")
    with pytest.raises(ConfigError, match=r"none\.toml: must be a readable file; got No such file"):
        read_device(tmp_path / "none.toml")


def test_weights_are_multiplied_in_what_the_device_has() -> None:
    h100 = DEVICES["h100"]
    assert h100.peak_for("fp8") == 1979e12
    assert h100.peak_for("int4") == h100.peak_for("bfloat16") == 989e12
    with pytest.raises(UnsupportedError, match=r"^peaks: must have int4, bfloat16 or float32; got fp8$"):
        replace(h100, peaks={"fp8": 1e12}).peak_for("int4")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_tokens": 0}, r"^input_tokens: must be at least 1; got 0$"),
        ({"weights": "int5"}, r"^weights: must be a known format; got 'int5'; did you mean int8\?$"),
        ({"memory_fraction": 1.5}, r"^memory_fraction: must lie above 0 and not above 1; got 1.5$"),
        ({"program": "vlm"}, r"^program: must be a known one; got 'vlm'; did you mean vllm\?$"),
    ],
)
def test_work_that_cannot_be_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Work(**settings)  # type: ignore[arg-type]


def held_bytes(*roots: object) -> int:
    """Of every tensor and array that these reach."""
    seen: set[int] = set()
    sizes: dict[int, int] = {}
    left = list(roots)
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, type | ModuleType | FunctionType):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            if one.is_mkldnn:  # packed, without a storage to look at
                sizes[id(one)] = one.numel() * one.element_size()
            else:
                sizes[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, np.ndarray) and one.base is None:
            sizes[one.ctypes.data] = one.nbytes
        else:
            left += gc.get_referents(one)
    return sum(sizes.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["3m", "25m"])
@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
def test_bytes_are_those_that_a_laptop_model_holds(name: str, precision: str, tmp_path: Path) -> None:
    config = PRESETS[name]
    model = Hybrid(config, dtype=torch.bfloat16)
    initialise(model, seed=0)
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m", precision=precision).model
    state = loaded.empty_state(3)
    with torch.no_grad():
        for _ in range(2):
            loaded(torch.zeros(3, 256, dtype=torch.int64), state)
    want = needed(config, Work(weights=precision), 3, 512)
    assert held_bytes(loaded) == pytest.approx(want["weights"], rel=0.03)
    assert held_bytes(state) == pytest.approx(want["keys and values"] + want["states"], rel=0.03)
