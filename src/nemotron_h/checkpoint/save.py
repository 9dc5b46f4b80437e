"""Write a model as its family is published: config.json, safetensors under the names of either dialect, and companions.

Whole or not at all; what other programs read of it is in `published.py` and `companions.py`.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nemotron_h.checkpoint.companions import Companions, write_companions
from nemotron_h.checkpoint.files import new_folder
from nemotron_h.checkpoint.names import HEAD, INDEX_FILE, WEIGHTS_FILE, stored_name
from nemotron_h.config.keys import CONFIG_FILE
from nemotron_h.config.published import Dialect, write_config
from nemotron_h.config.quantization import own_quantization
from nemotron_h.errors import CheckpointError
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.linear import QuantizedLinear, plainly
from nemotron_h.precision.weights import HEAD as HEAD_MODULE
from nemotron_h.precision.weights import HEAD_BITS
from nemotron_h.text.tokenizer import Tokenizer, check_fits

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FLOAT_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
KEPT = dict.fromkeys(("A_log", "D", "dt_bias", "scale"), torch.float32)  # by the last part of a parameter's name
KEPT |= dict.fromkeys(("words", "totals", "row_bits"), torch.int32) | {"groups": torch.uint8}
SHARD_BYTES = 5 * 10**9
NO_COMPANIONS = Companions()


def save(
    model: Hybrid,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    companions: Companions = NO_COMPANIONS,
    made_by: str = "nemotron_h.save",
    dialect: Dialect = Dialect.PUBLISHED,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a new checkpoint folder, whole or not at all. dtype: of the weights, one of FLOATS; the Mamba layers'
    A_log, D and dt_bias stay float32, as the model computes with them.

    companions: of the checkpoint that the model was made from; made_by: what the model card says made it.
    Raises: CheckpointError where the folder exists or dtype is another, CapacityError where the disk is too small.
    """
    with new_folder(Path(folder), need_bytes=size_bytes(model, dtype)) as partial:
        write_model(
            model,
            partial,
            tokenizer=tokenizer,
            companions=companions,
            made_by=made_by,
            dialect=dialect,
            dtype=dtype,
            shard_bytes=shard_bytes,
        )


def write_model(
    model: Hybrid,
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    companions: Companions = NO_COMPANIONS,
    made_by: str = "nemotron_h.save",
    dialect: Dialect = Dialect.PUBLISHED,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """The same into a folder that is there: for those who add files of their own before it is renamed."""
    parameters = published_parameters(model)
    if model.config.tied_embeddings and HEAD in parameters:
        parameters[HEAD] = parameters[HEAD].clone()  # safetensors refuses memory with two names
    files = shards({stored_name(name, dialect): p for name, p in parameters.items()}, dtype, shard_bytes)
    refuse_half_quantised(model)
    if model.quantized and dialect != Dialect.PUBLISHED:
        raise CheckpointError(f"dialect: must be {Dialect.PUBLISHED} for a quantised model; got {dialect}")
    integers = model.precision if model.quantized else None
    write_config(
        model.config,
        folder / CONFIG_FILE,
        dtype=str(dtype).removeprefix("torch."),
        dialect=dialect,
        quantization=own_quantization(integers) if integers is not None else None,
    )
    if tokenizer is not None:
        check_fits(tokenizer, model.config.vocab_size)
        tokenizer.save(folder)
    write_companions(companions, folder, config=model.config, tokenizer=tokenizer, made_by=made_by, integers=integers)
    plain = plainly(model)
    if len(files) == 1:
        write_shard(files[0], plain, folder / WEIGHTS_FILE, dtype)
        return
    index: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        size += write_shard(shard, plain, folder / name, dtype)
        index |= dict.fromkeys(shard, name)
    content = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def refuse_half_quantised(model: Hybrid) -> None:
    """All matrices are plain, or all are in the integers of one precision: else no folder says what they are."""
    bits = {name: one.bits if isinstance(one, QuantizedLinear) else None for name, one in model.matrices.items()}
    of_layers = next(iter(bits.values()))
    wanted = {name: HEAD_BITS if name == HEAD_MODULE and of_layers is not None else of_layers for name in bits}
    if of_layers is not None and model.lm_head is None:
        wanted[HEAD_MODULE] = HEAD_BITS
    other = next((name for name, own in wanted.items() if bits.get(name) != own), None)
    if other is not None:
        raise CheckpointError(
            f"{other}: must be plain or in integers as {next(iter(bits))} is; got another format; load the model anew, "
            "and quantise all of it"
        )


def size_bytes(model: Hybrid, dtype: torch.dtype) -> int:
    """Of all weights in a checkpoint of that dtype."""
    return sum(p.numel() * stored_dtype(name, dtype).itemsize for name, p in published_parameters(model).items())


def published_parameters(model: Hybrid) -> dict[str, Tensor]:
    """By published name. A tied head is one of them: transformers does not tie it by itself."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    return parameters if model.quantized else parameters | {HEAD: model.head_weight}


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a parameter of that name is stored in, when the checkpoint is in dtype.

    Raises: CheckpointError where dtype is none of FLOATS: others hold no weights, or not as the numbers they are.
    """
    if dtype not in FLOATS:
        raise CheckpointError(f"dtype: must be one of {FLOAT_NAMES}; got {dtype}")
    return KEPT.get(name.rpartition(".")[2], dtype)


def shards(parameters: Mapping[str, Tensor], dtype: torch.dtype, limit: int) -> list[dict[str, Tensor]]:
    """Parameters in order, cut where a file would pass the limit."""
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, parameter in parameters.items():
        size = parameter.numel() * stored_dtype(name, dtype).itemsize
        if shards[-1] and used + size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = parameter
        used += size
    return shards


def write_shard(shard: Mapping[str, Tensor], plain: Callable[[Tensor], Tensor], path: Path, dtype: torch.dtype) -> int:
    """One file; its tensors' bytes. plain: of a matrix that is laid out for reading, as it is written."""
    tensors = {name: plain(p).to("cpu", stored_dtype(name, dtype)).contiguous() for name, p in shard.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())
