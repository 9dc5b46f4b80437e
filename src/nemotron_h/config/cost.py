"""What a model costs, from its config alone: parameters, FLOPs of a token, bytes of weights and of what is remembered.

A figure of several parts comes as named terms, whose sum it is.

FLOPs: two a multiply-add, of every product and of the conv; norms, activations, softmax and RoPE are not in it, nor is
the padding to whole rows, chunks and blocks. Bytes: all that is kept between two calls; buffers of a step belong to the
program that computes, and are given by the caller. Keys and values stand in pages of BLOCK tokens.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from nemotron_h.config.model import AttentionConfig, LayerConfig, MambaConfig, MlpConfig, ModelConfig
from nemotron_h.config.pattern import NAMES
from nemotron_h.config.settings import nearest
from nemotron_h.errors import ConfigError
from nemotron_h.grid import AHEAD, BLOCK, CHUNK, round_up

Shape = tuple[int, int]  # rows (outputs), columns (inputs)


def matrices(layer: LayerConfig, hidden_size: int) -> list[Shape]:
    """The matrices of one layer: most of its parameters, and most of its products."""
    match layer:
        case MambaConfig():
            projected = layer.inner_size + layer.conv_channels + layer.num_heads  # z; x, B and C; dt
            return [(projected, hidden_size), (hidden_size, layer.inner_size)]
        case AttentionConfig():
            queries, keys = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
            return [(queries, hidden_size), (keys, hidden_size), (keys, hidden_size), (hidden_size, queries)]
        case MlpConfig():
            return [(layer.intermediate_size, hidden_size), (hidden_size, layer.intermediate_size)]


def layer_parameters(layer: LayerConfig, hidden_size: int) -> int:
    """Parameters of one layer, its norm included."""
    return sum(rows * columns for rows, columns in matrices(layer, hidden_size)) + sum(_vectors(layer, hidden_size))


def _vectors(layer: LayerConfig, hidden_size: int) -> tuple[int, int]:
    """Parameters that are in no matrix: gains and the conv; then A_log, D and dt_bias, which stay float32."""
    if isinstance(layer, MambaConfig):
        conv = layer.conv_channels * (layer.conv_kernel + 1)
        return hidden_size + conv + layer.inner_size, 3 * layer.num_heads
    return hidden_size, 0


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by kind."""
    counts: Counter[str] = Counter()
    for letter, layer in zip(config.pattern, config.layers, strict=True):
        counts[NAMES[letter]] += layer_parameters(layer, config.hidden_size)
    table = config.vocab_size * config.hidden_size
    counts["embedding"] = table
    counts["head"] = 0 if config.tied_embeddings else table
    counts["final norm"] = config.hidden_size
    return dict(counts)


def prefill_flops(config: ModelConfig, context_tokens: int, *, full_square: bool = False) -> dict[str, float]:
    """FLOPs by kind to read a prompt of context_tokens, a token of it on average. The head reads the last one alone.

    full_square: count attention as a product of all queries and all keys, as PyTorch's counter does, not its causal
    half.
    """
    _at_least("context_tokens", context_tokens, 1)
    flops = _layer_flops(config, context_tokens if full_square else (context_tokens + 1) / 2)
    return {**flops, "head": _head_flops(config) / context_tokens}


def decode_flops(config: ModelConfig, context_tokens: int) -> dict[str, float]:
    """FLOPs by kind to generate one token after context_tokens."""
    _at_least("context_tokens", context_tokens, 0)
    return {**_layer_flops(config, context_tokens + 1), "head": _head_flops(config)}


def training_flops(config: ModelConfig, context_tokens: int, *, full_square: bool = False) -> dict[str, float]:
    """FLOPs by kind to train on documents of context_tokens, a token on average: three times a forward pass.

    A product C = A B has two of its size behind it, the gradients of A and of B. What is computed a second time to save
    memory, and the optimizer, are not in it. full_square: as in `prefill_flops`.
    """
    _at_least("context_tokens", context_tokens, 1)
    forward = _layer_flops(config, context_tokens if full_square else (context_tokens + 1) / 2)
    return {kind: 3 * flops for kind, flops in {**forward, "head": _head_flops(config)}.items()}


def _layer_flops(config: ModelConfig, keys: float) -> dict[str, float]:
    """Of one token that attends to so many keys."""
    flops: defaultdict[str, float] = defaultdict(float)
    for letter, layer in zip(config.pattern, config.layers, strict=True):
        products = sum(rows * columns for rows, columns in matrices(layer, config.hidden_size))
        flops[NAMES[letter]] += 2 * products + _mixing_flops(layer, keys)
    return dict(flops)


def _mixing_flops(layer: LayerConfig, keys: float) -> float:
    """Of one token's products with other tokens: the scan, read or generated, takes the same ones (`ops/ssd.py`)."""
    match layer:
        case MambaConfig():
            conv = layer.conv_kernel * layer.conv_channels
            scores = layer.num_groups * CHUNK * layer.state_size
            mixed = layer.inner_size * CHUNK
            read_and_write = 2 * layer.inner_size * layer.state_size  # each chunk of tokens writes once for all of them
            return 2 * (conv + scores + mixed + read_and_write)
        case AttentionConfig():
            return 2 * 2 * layer.num_heads * layer.head_dim * keys  # with keys, with values
        case MlpConfig():
            return 0


def _head_flops(config: ModelConfig) -> int:
    return 2 * config.vocab_size * config.hidden_size


@dataclass(frozen=True)
class WeightFormat:
    """How weights are stored: the bytes of a matrix, of the head, and of one other number (embedding, gains, conv)."""

    matrix: Callable[[int, int], int]
    head: Callable[[int, int], int]
    other_bits: float
    recurrence_bits: float = 32  # A_log, D and dt_bias


def plain(bits: float) -> Callable[[int, int], int]:
    """So many bits a weight."""
    return lambda rows, columns: _bytes(rows * columns, bits)


def scaled_tensor(rows: int, columns: int) -> int:
    """A byte a weight and one float32 scale."""
    return rows * columns + 4


def scaled_rows(rows: int, columns: int) -> int:
    """A byte a weight; for each row a scale and the sum of its integers, of four bytes each."""
    return rows * (columns + 8)


def two_levels(rows: int, columns: int) -> int:
    """Four bits a weight, four for the integer scale of each group of 16; for each row as in `scaled_rows`."""
    return rows * (_bytes(columns, 4) + _bytes(-(-columns // 16), 4) + 8)


WEIGHT_FORMATS = {
    "float32": WeightFormat(plain(32), plain(32), 32),
    "bfloat16": WeightFormat(plain(16), plain(16), 16),
    "fp8": WeightFormat(scaled_tensor, plain(16), 16),
    "int8": WeightFormat(scaled_rows, scaled_rows, 16),
    "int4": WeightFormat(two_levels, scaled_rows, 16),
    # arXiv:2504.03624 counts codes of 4 bits and a byte for each 16 of them, on everything: 29.5 GiB for the 56B
    "nvfp4": WeightFormat(plain(4.5), plain(4.5), 4.5, 4.5),
}


def weight_bytes(config: ModelConfig, weights: str) -> dict[str, int]:
    """Bytes of the weights, as stored in one format of WEIGHT_FORMATS.

    float32, bfloat16   everything; what a model loaded in that precision holds
    fp8                 the layers' matrices, E4M3 with a scale each; the rest bfloat16
    int8                the layers' matrices and the head, scales by row; the rest bfloat16
    int4                the layers' matrices in two levels; the head int8; the rest bfloat16
    nvfp4               everything in 4.5 bits, as the papers count

    A_log, D and dt_bias are float32 but in nvfp4. A head tied to the embedding is stored once, as the embedding, but
    for int8 and int4, where it is in integers and the embedding is not.
    """
    if weights not in WEIGHT_FORMATS:
        raise ConfigError(f"weights: must be a known format; got {weights!r}; {nearest(weights, list(WEIGHT_FORMATS))}")
    stored = WEIGHT_FORMATS[weights]
    table = config.vocab_size, config.hidden_size
    shapes = [shape for layer in config.layers for shape in matrices(layer, config.hidden_size)]
    others, recurrences = (
        sum(counts) for counts in zip(*(_vectors(layer, config.hidden_size) for layer in config.layers), strict=True)
    )
    return {
        "matrices": sum(stored.matrix(*shape) for shape in shapes),
        "head": 0 if config.tied_embeddings and weights not in ("int8", "int4") else stored.head(*table),
        "embedding": _bytes(table[0] * table[1], stored.other_bits),
        "vectors": _bytes(others + config.hidden_size, stored.other_bits) + _bytes(recurrences, stored.recurrence_bits),
    }


def token_bytes(config: ModelConfig, bits: int = 16) -> int:
    """Bytes of one token's keys and values, 32, 16, 8 or 4 bits each. Scales of 8 and 4 bits are not in it."""
    _one_of("keys_values_bits", bits, (32, 16, 8, 4))
    attention = (layer for layer in config.layers if isinstance(layer, AttentionConfig))
    return _bytes(sum(2 * layer.num_kv_heads * layer.head_dim for layer in attention), bits)


def state_bytes(config: ModelConfig, *, state_bits: int = 32, input_bits: int = 16) -> dict[str, int]:
    """Bytes that the Mamba layers remember of one sequence, however long it is.

    recurrent state: at the last chunk boundary, 32 or 16 bits a number. chunk inputs: x and B of the chunk at hand in
    the model's dtype, dt in float32. conv inputs: the last columns that the conv reads, in the model's dtype; draft
    inputs: as many before them as it may have to go back.
    input_bits: of the model's dtype, 32 or 16.
    """
    _one_of("state_bits", state_bits, (32, 16))
    _one_of("input_bits", input_bits, (32, 16))
    layers = [layer for layer in config.layers if isinstance(layer, MambaConfig)]
    inputs = sum(CHUNK * (layer.inner_size + layer.num_groups * layer.state_size) for layer in layers)
    steps = sum(CHUNK * layer.num_heads for layer in layers)
    return {
        "recurrent state": _bytes(sum(layer.inner_size * layer.state_size for layer in layers), state_bits),
        "chunk inputs": _bytes(inputs, input_bits) + _bytes(steps, 32),
        "conv inputs": _bytes(sum((layer.conv_kernel - 1) * layer.conv_channels for layer in layers), input_bits),
        "draft inputs": _bytes(sum(AHEAD * layer.conv_channels for layer in layers), input_bits),
    }


def activation_bytes(config: ModelConfig, rows: int, drawn: int = 1, *, bits: int = 16) -> int:
    """Bytes of what a step holds besides, about: rows of tokens that go through together, the head reading `drawn`.

    The stream and its norm, the widest layer's numbers in between, in the model's dtype, 32 or 16 bits; logits in
    float32. A scan's or a softmax's own small tables are not in it.
    """
    _at_least("rows", rows, 1)
    _at_least("drawn", drawn, 0)
    _one_of("bits", bits, (32, 16))
    widest = max(_inner_width(layer) for layer in config.layers)
    return rows * _bytes(2 * config.hidden_size + widest, bits) + drawn * _bytes(config.vocab_size, 32)


def _inner_width(layer: LayerConfig) -> int:
    """Numbers of a token between a layer's norm and its output."""
    match layer:
        case MambaConfig():  # z; x, B and C before the conv and after it; dt; y
            return 2 * layer.inner_size + 2 * layer.conv_channels + layer.num_heads
        case AttentionConfig():  # queries, keys, values, and what is attended
            return 2 * (layer.num_heads + layer.num_kv_heads) * layer.head_dim
        case MlpConfig():
            return layer.intermediate_size


def peak_bytes(
    config: ModelConfig,
    context_tokens: int,
    *,
    batch: int = 1,
    weights: str = "bfloat16",
    keys_values_bits: int | None = None,
    state_bits: int = 32,
    buffers_bytes: int = 0,
) -> dict[str, int]:
    """Bytes to serve batch sequences of context_tokens each: weights, keys and values, the state's terms, buffers.

    weights: as in `weight_bytes`; a model with float32 weights computes in float32, every other one in bfloat16.
    keys_values_bits: None for the precision that the model computes in. buffers_bytes: of a step, whatever the program
    that runs it needs.
    """
    for name, count in (("context_tokens", context_tokens), ("buffers_bytes", buffers_bytes)):
        _at_least(name, count, 0)
    _at_least("batch", batch, 1)
    weights_total = sum(weight_bytes(config, weights).values())
    compute_bits = 32 if weights == "float32" else 16
    keys_values = token_bytes(config, compute_bits if keys_values_bits is None else keys_values_bits)
    state = state_bytes(config, state_bits=state_bits, input_bits=compute_bits)
    return {
        "weights": weights_total,
        "keys and values": batch * keys_values * round_up(context_tokens, BLOCK),
        **{term: batch * size for term, size in state.items()},
        "buffers": buffers_bytes,
    }


def _bytes(count: int, bits: float) -> int:
    """Whole bytes that hold count numbers."""
    return -int(-count * bits // 8)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}: must be at least {least}; got {value}")


def _one_of(name: str, value: int, known: tuple[int, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}: must be one of {', '.join(map(str, known))}; got {value}")
