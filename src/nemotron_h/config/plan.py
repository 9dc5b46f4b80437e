"""What a model does on a device, from its config alone: what fits, and how fast at best. A roofline.

    prompts   max(FLOPs / peak, bytes of weights / bandwidth)
    step      max(FLOPs / peak, (bytes of weights + batch x (keys and values + state)) / bandwidth)
    rate      batch x output tokens / (time of prompts + time of steps)

A program reaches a share of that which is its own: one number for each, fitted to what was published of it, none for a
model. Several devices count as one that is so many times as fast and as large: what they tell each other is not in it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from nemotron_h.config import cost
from nemotron_h.config.devices import DEVICES, Device
from nemotron_h.config.model import MlpConfig, ModelConfig
from nemotron_h.config.peers import PUBLISHED, PUBLISHED_INPUT_TOKENS, PUBLISHED_OUTPUT_TOKENS, shape
from nemotron_h.config.settings import nearest, settings
from nemotron_h.errors import CapacityError, ConfigError

PORTION = 512  # rows that go through together, for the activations
NODE = 8  # devices that share a fast connection
DAY, HOUR = 86_400, 3600
# how often a step moves a sequence's recurrent state: ours reads it, the others read and write it
STATE_PASSES = {"nemotron-h": 1, "megatron-lm": 2, "vllm": 2}


@settings
class Work:
    """What a model is asked to do, and in which numbers it does it."""

    input_tokens: int = PUBLISHED_INPUT_TOKENS
    output_tokens: int = PUBLISHED_OUTPUT_TOKENS
    batch: int | None = None  # sequences at once; None: as many as fit
    weights: str = "bfloat16"  # of cost.WEIGHT_FORMATS
    keys_values_bits: int | None = None  # None: of the precision that the model computes in
    state_bits: int = 32
    memory_fraction: float = 0.9  # of the device's, that it may fill
    program: str = "nemotron-h"

    def __post_init__(self) -> None:
        for name, least in (("input_tokens", 1), ("output_tokens", 1), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}: must be at least {least}; got {value}")
        if self.weights not in cost.WEIGHT_FORMATS:
            known = list(cost.WEIGHT_FORMATS)
            raise ConfigError(f"weights: must be a known format; got {self.weights!r}; {nearest(self.weights, known)}")
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"memory_fraction: must lie above 0 and not above 1; got {self.memory_fraction}")
        if self.program not in STATE_PASSES:
            known = list(STATE_PASSES)
            raise ConfigError(f"program: must be a known one; got {self.program!r}; {nearest(self.program, known)}")

    @property
    def bits(self) -> int:
        """Of what is computed with."""
        return 32 if self.weights == "float32" else 16


@dataclass(frozen=True)
class Plan:
    """Of a model on devices at some work. Seconds and rates are the roofline's, unless `efficiency` says otherwise."""

    devices: int
    batch: int
    bytes: dict[str, int]  # at that batch, by term
    limit_bytes: int
    largest_batch: int
    longest_context: int  # tokens in and out of each sequence of that batch; of a model that keeps none: 0 has no limit
    prompt_seconds: float  # of all prompts of the batch
    step_seconds: float  # a token for each, in the middle of the output
    prompt_bound: str  # "products" or "memory"
    step_bound: str
    efficiency: float  # by which the rates are multiplied
    output_tokens_per_second: float  # of all devices
    output_tokens_per_device_second: float
    output_tokens_per_device_hour: float


def plan(config: ModelConfig, device: Device, work: Work, *, devices: int = 1, efficiency: float = 1.0) -> Plan:
    """What fits and how fast. Raises: CapacityError where not even one sequence fits."""
    if devices < 1:
        raise ConfigError(f"devices: must be at least 1; got {devices}")
    limit = int(work.memory_fraction * device.memory_bytes * devices)
    length = work.input_tokens + work.output_tokens

    def total(batch: int, context: int) -> int:
        return sum(needed(config, work, batch, context).values())

    largest = most(lambda batch: total(batch, length) <= limit)
    batch = work.batch or largest
    if total(max(1, batch), length) > limit:
        raise CapacityError(
            f"{max(1, batch)} sequences of {length:,} tokens: need {total(max(1, batch), length):,} bytes; "
            f"{devices} x {device.name} give {limit:,}; take more devices, fewer sequences, or a smaller format"
        )
    keeps = cost.token_bytes(config) > 0
    longest = most(lambda context: total(batch, context) <= limit) if keeps else 0
    peak, bandwidth = device.peak_for(work.weights) * devices, device.bandwidth_bytes_per_second * devices
    prompt, prompt_bound = slower(
        batch * work.input_tokens * prompt_flops(config, work.input_tokens) / peak,
        read_bytes(config, work, 0, 0) / bandwidth,
    )
    middle = work.input_tokens + work.output_tokens // 2
    step, step_bound = slower(
        batch * sum(cost.decode_flops(config, middle).values()) / peak,
        read_bytes(config, work, batch, middle) / bandwidth,
    )
    rate = efficiency * batch * work.output_tokens / (prompt + work.output_tokens * step)
    return Plan(
        devices=devices,
        batch=batch,
        bytes=needed(config, work, batch, length),
        limit_bytes=limit,
        largest_batch=largest,
        longest_context=longest,
        prompt_seconds=prompt / efficiency,
        step_seconds=step / efficiency,
        prompt_bound=prompt_bound,
        step_bound=step_bound,
        efficiency=efficiency,
        output_tokens_per_second=rate,
        output_tokens_per_device_second=rate / devices,
        output_tokens_per_device_hour=rate / devices * HOUR,
    )


def needed(config: ModelConfig, work: Work, batch: int, context_tokens: int) -> dict[str, int]:
    """Bytes of weights, of what is kept of so many sequences, and of a step, by term."""
    rows = max(PORTION, batch)
    peak = cost.peak_bytes(
        config,
        context_tokens,
        batch=max(1, batch),
        weights=work.weights,
        keys_values_bits=work.keys_values_bits,
        state_bits=work.state_bits,
    )
    state = sum(size for term, size in peak.items() if term not in ("weights", "keys and values", "buffers"))
    kept = 1 if batch else 0
    return {
        "weights": peak["weights"],
        "keys and values": kept * peak["keys and values"],
        "states": kept * state,
        "activations": cost.activation_bytes(config, rows, max(1, batch), bits=work.bits),
    }


def read_bytes(config: ModelConfig, work: Work, batch: int, context_tokens: int) -> int:
    """What a step of one token for each of so many sequences moves: the weights it multiplies by, each sequence's keys
    and values, and its state as often as the program moves it."""
    parts = cost.weight_bytes(config, work.weights)
    state = cost.state_bytes(config, state_bits=work.state_bits, input_bits=work.bits)
    # a tied head reads the embedding, unless it is in integers and has weights of its own
    weights = parts["matrices"] + (parts["head"] or parts["embedding"]) + parts["vectors"]
    moved = STATE_PASSES[work.program] * state["recurrent state"] + state["chunk inputs"] + state["conv inputs"]
    keys_values = cost.token_bytes(config, work.keys_values_bits or work.bits) * context_tokens
    return weights + batch * (moved + keys_values)


def prompt_flops(config: ModelConfig, length: int) -> float:
    """Of a token of a prompt on average, up to the first new token: from the products on with which the last layer that
    mixes tokens ends, only the last token is needed."""
    last = max((place for place, layer in enumerate(config.layers) if not isinstance(layer, MlpConfig)), default=0)
    ends = cost.matrices(config.layers[last], config.hidden_size)[-1:]
    ends += [shape for layer in config.layers[last + 1 :] for shape in cost.matrices(layer, config.hidden_size)]
    spared = 2 * sum(rows * columns for rows, columns in ends) * (1 - 1 / length)
    return sum(cost.prefill_flops(config, length).values()) - spared


def fewest(config: ModelConfig, device: Device, work: Work) -> int:
    """Devices that the work asks for: one where it fits, else as few whole nodes as hold it."""
    sequences, length = work.batch or 1, work.input_tokens + work.output_tokens
    size = sum(needed(config, work, sequences, length).values()) / work.memory_fraction
    return 1 if size <= device.memory_bytes else NODE * math.ceil(size / (NODE * device.memory_bytes))


@cache
def efficiency(program: str) -> float:
    """The share of the roofline that a program reached in what was published of it: the geometric mean over its models
    (`peers.PUBLISHED`), those that no roofline can match left out. Of ours nothing is published: 1, the roofline."""
    held = {name: one.tokens_per_second for name, one in PUBLISHED.items() if one.program == program and one.held}
    shares = [rate / predicted(name) for name, rate in held.items()]
    return math.prod(shares) ** (1 / len(shares)) if shares else 1.0


def predicted(name: str) -> float:
    """Output tokens per second and H100 by the roofline alone, for what was published of that model: bfloat16, the
    largest batch that fits, on one device or whole nodes."""
    config, device = shape(name), DEVICES["h100"]
    work = Work(program=PUBLISHED[name].program)
    return plan(config, device, work, devices=fewest(config, device, work)).output_tokens_per_device_second


def training_days(
    config: ModelConfig,
    tokens: float,
    device: Device,
    *,
    devices: int,
    sequence_tokens: int = 8192,
    precision: str = "bfloat16",
    utilisation: float = 0.4,
) -> float:
    """Days to train on so many tokens. utilisation: the share of the peak that it reaches, an assumption."""
    if not 0 < utilisation <= 1:
        raise ConfigError(f"utilisation: must lie above 0 and not above 1; got {utilisation}")
    flops = tokens * sum(cost.training_flops(config, sequence_tokens).values())
    return flops / (devices * device.peak(precision) * utilisation) / DAY


def slower(products: float, memory: float) -> tuple[float, str]:
    """The longer of two times, and whose it is."""
    return (products, "products") if products >= memory else (memory, "memory")


def most(fits: Callable[[int], bool]) -> int:
    """The largest count that fits, 0 where not even 1 does."""
    if not fits(1):
        return 0
    high = 2
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
