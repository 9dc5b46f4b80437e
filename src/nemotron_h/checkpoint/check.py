"""Does a folder come back as it is? What was loaded, written again and read again, against the files themselves.

One shard is on disk at a time, in the system's temporary folder: a folder larger than that is checked all the same.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from nemotron_h.checkpoint.files import writing
from nemotron_h.checkpoint.load import read
from nemotron_h.checkpoint.save import SHARD_BYTES, published_parameters, shards, stored_dtype, write_shard
from nemotron_h.checkpoint.weights import Weights, opened
from nemotron_h.config.keys import CONFIG_FILE
from nemotron_h.config.published import MODEL_TYPE, Dialect, from_published, read_config, to_published
from nemotron_h.config.quantization import read_quantization
from nemotron_h.model.check import Finding
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.linear import QuantizedLinear, plainly


def check_folder(folder: Path, model: Hybrid) -> Iterator[Finding]:
    """Of a folder and the model that was loaded from it."""
    yield config_again(folder)
    yield weights_again(folder, model)
    if model.quantized:
        yield sums_again(model)


def config_again(folder: Path) -> Finding:
    """config.json as this program writes it, in every dialect that has such a model."""
    config = read_config(folder / CONFIG_FILE)
    family = to_published(config)["model_type"] == MODEL_TYPE
    dialects = list(Dialect) if family else [Dialect.PUBLISHED]  # transformers has none with RoPE
    differ = [str(dialect) for dialect in dialects if from_published(to_published(config, dialect=dialect)) != config]
    count = "1 dialect" if len(dialects) == 1 else f"{len(dialects)} dialects"
    number = f"{count}, the same model" if not differ else f"another model as {' and '.join(differ)}"
    return Finding("config.json, written again", not differ, number)


def sums_again(model: Hybrid) -> Finding:
    """Of matrices in integers, the sums of each output's that are stored beside them, for kernels that need them."""
    found = {name: one.matrix for name, one in model.matrices.items() if isinstance(one, QuantizedLinear)}
    differ = []
    for name, matrix in found.items():
        sums = matrix.integers().sum(1, dtype=torch.int32)
        if not torch.equal(matrix.totals[: len(sums)], sums) or matrix.totals[len(sums) :].any():
            differ.append(name)
    number = f"{len(found):,} matrices, the same" if not differ else f"{len(differ):,} differ: {differ[0]}"
    return Finding("sums of integers, added again", not differ, number)


def weights_again(folder: Path, model: Hybrid) -> Finding:
    """Every tensor in the model's precision, from the model to a file and back, against the folder's own."""
    stored, quantised = Weights(folder), read_quantization(folder)
    parameters = {name: p for name, p in published_parameters(model).items() if name in stored}
    dtype = model.backbone.embeddings.weight.dtype
    plain = plainly(model)
    differ = []
    for shard in shards(parameters, dtype, SHARD_BYTES):
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / "shard.safetensors"
            with writing(path):
                write_shard(shard, plain, path, dtype)
            again = opened(path)
            for name, parameter in shard.items():
                want = read(stored, name, plain(parameter), stored_dtype(name, dtype), quantised)
                if not torch.equal(again.get_tensor(name), want):
                    differ.append(name)
    number = f"{len(parameters):,} tensors, the same bits" if not differ else f"{len(differ):,} differ: {differ[0]}"
    return Finding(f"weights in {str(dtype).removeprefix('torch.')}, written again", not differ, number)
