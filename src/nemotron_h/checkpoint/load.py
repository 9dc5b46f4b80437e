"""Read a checkpoint folder into a model: every tensor accounted for, nothing executed, the files mapped.

A weight that needs no conversion is never copied; the others are converted, or decoded, one at a time.
"""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_h.checkpoint.names import EMBEDDING, HEAD
from nemotron_h.checkpoint.save import FLOAT_NAMES, FLOATS, stored_dtype
from nemotron_h.checkpoint.weights import Weights
from nemotron_h.config.cost import parameters
from nemotron_h.config.keys import CONFIG_FILE, shown
from nemotron_h.config.model import ModelConfig
from nemotron_h.config.published import read_config
from nemotron_h.config.quantization import read_quantization
from nemotron_h.errors import CheckpointError
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.linear import ROW_BITS, QuantizedLinear
from nemotron_h.ops.quantized import LEVELS, Matrix
from nemotron_h.precision.modelopt import OF_ACTIVATIONS, OF_CACHE, PARTS, SCALE, SCALE_2, WEIGHT, decode, format_of
from nemotron_h.precision.weights import BITS, HEAD_BITS
from nemotron_h.precision.weights import HEAD as HEAD_MODULE

OF_INTEGERS = {*Matrix.shapes(4, (1, 1)), ROW_BITS}  # the last parts of the names of a matrix in integers


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Hybrid:
    """The model in a checkpoint folder, its weights converted to dtype (A_log, D and dt_bias to float32).

    Raises: CheckpointError naming the file or tensor; ConfigError or UnsupportedError naming the key of config.json.
    """
    source = open_source(checkpoint_folder(folder))
    model = skeleton(source.config, source.quantised, dtype=dtype, compute_dtype=compute_dtype)
    for name in source.names:
        put(model, name, source.read(name, stored_dtype(name, dtype)).to(device))
    source.check_head(dtype)
    return model.eval()


@dataclass(frozen=True)
class Source:
    """A checkpoint folder whose names and sizes are those that its config.json describes."""

    config: ModelConfig
    weights: Weights
    quantised: frozenset[str]  # formats that weights may be in
    wanted: Mapping[str, Tensor]  # the model's parameters by name, on the meta device

    @property
    def names(self) -> list[str]:
        """Of the model's parameters, in the order of the files."""
        return [name for name in self.weights.names if name in self.wanted]

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One parameter in dtype; mapped where it is stored so."""
        return read(self.weights, name, self.wanted[name], dtype, self.quantised)

    def check_head(self, dtype: torch.dtype) -> None:
        """Refuse a head stored beside the embedding that it is tied to, where they differ in dtype."""
        if not self.config.tied_embeddings or HEAD not in self.weights:
            return
        head = read(self.weights, HEAD, self.wanted[EMBEDDING], dtype, self.quantised)
        if not torch.equal(head, self.read(EMBEDDING, dtype)):
            raise CheckpointError(
                f"{HEAD}: must equal the embedding, tied to it by config.json; it differs in {self.weights.folder}"
            )


def open_source(folder: Path) -> Source:
    """What `load` reads, every header of it, before any weight. Raises: what `load` does."""
    config = read_config(folder / CONFIG_FILE)
    quantised = read_quantization(folder)
    weights = Weights(folder)
    check_size(config, weights)
    wanted = dict(skeleton(config, quantised).named_parameters())
    check_names(wanted, weights, tied=config.tied_embeddings, quantised=quantised)
    return Source(config, weights, quantised, wanted)


def skeleton(config: ModelConfig, quantised: Collection[str], **options: Any) -> Hybrid:
    """The model on the meta device, its matrices in integers where they are stored so."""
    model = Hybrid(config, device="meta", **options)
    for precision in BITS.keys() & set(quantised):
        shapes = {name: one.shape for name, one in model.matrices.items()}
        for name, shape in (shapes | {HEAD_MODULE: (config.vocab_size, config.hidden_size)}).items():
            bits = HEAD_BITS if name == HEAD_MODULE else BITS[precision]
            model.put(name, QuantizedLinear.empty(bits, shape, "meta"))
    return model


def checkpoint_folder(path: str | Path) -> Path:
    """The folder that a path given by a user means."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: must be a checkpoint folder; got no such folder")
    return folder


def refuse_integers(folder: Path) -> None:
    """Raises: CheckpointError where the matrices are in int8 or int4, of which nothing else is made."""
    if found := BITS.keys() & read_quantization(folder):
        raise CheckpointError(
            f"{folder}: must hold plain weights, FP8 or NVFP4; got {min(found)}, in which nemotron_h alone reads them; "
            "take the checkpoint that it was made from"
        )


def widest_dtype(folder: Path) -> torch.dtype:
    """The dtype that holds every weight of a folder as it is stored; quantised ones count as bfloat16."""
    weights = Weights(folder)
    stored = {weights.tensor(name).dtype for name in weights.names if name.endswith((".weight", ".bias"))}
    floats = {dtype if dtype in FLOATS else torch.bfloat16 for dtype in stored} or {torch.bfloat16}
    return reduce(torch.promote_types, floats)


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter by its dotted name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))


def read(weights: Weights, name: str, expected: Tensor, dtype: torch.dtype, quantised: Collection[str] = ()) -> Tensor:
    """One weight in dtype, of the expected shape; decoded where it is stored in one of the quantised formats."""
    tensor = weights.tensor(name)
    if name.rpartition(".")[2] in OF_INTEGERS:
        return check_integers(name, tensor, expected, weights.folder)
    stem = name.removesuffix(WEIGHT)
    scales = [part for part in (SCALE, SCALE_2) if stem + part in weights]
    if format_of(tensor) not in quantised:
        check_tensor(name, tensor, expected, weights.folder)
        if scales:
            raise CheckpointError(f"{stem}{scales[0]}: must scale a quantised weight; got {name} in {tensor.dtype}")
        return tensor.to(dtype)
    parts = {part: weights.tensor(stem + part) for part in scales}
    try:
        return decode(name, {WEIGHT: tensor, **parts}, expected.shape, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; in {weights.folder}") from None


def check_size(config: ModelConfig, weights: Weights) -> None:
    """Refuse a config.json that describes far more than the files hold, before anything of that size is made."""
    count, names = sum(parameters(config).values()), len(weights.names)
    if len(config.layers) > names:
        raise CheckpointError(
            f"{weights.folder / CONFIG_FILE}: describes {len(config.layers):,} layers; got {names} tensors"
        )
    if count > 2 * weights.size_bytes:  # no format takes less than half a byte a weight
        raise CheckpointError(
            f"{weights.folder / CONFIG_FILE}: describes {count:,} weights; the files have {weights.size_bytes:,} "
            "bytes, too few for them; was the last shard copied?"
        )


def check_names(wanted: Collection[str], weights: Weights, *, tied: bool, quantised: Collection[str] = ()) -> None:
    """Every tensor the model has, and no other but the scales of quantised ones."""
    missing = [name for name in wanted if name not in weights]
    if missing:
        have = len(wanted) - len(missing)
        raise CheckpointError(
            f"{missing[0]}: missing from {weights.folder} (found {have} of {len(wanted)} tensors); "
            "was the last shard copied?"
        )
    known = set(wanted) | ({HEAD} if tied else set())
    extra = [name for name in weights.names if name not in known]
    modules = {module for name in known for module in accumulate(name.split("."), "{}.{}".format)}
    kinds = {*OF_CACHE, *OF_ACTIVATIONS} if quantised else {*OF_CACHE}  # a cache is quantised with weights or alone
    passed_over = [name for name in extra if name.rpartition(".")[0] in modules and name.rpartition(".")[2] in kinds]
    matrices = [name.removesuffix(WEIGHT) for name in known if name.endswith(WEIGHT)] if quantised else []
    scales = {stem + part for stem in matrices for part in PARTS}
    strange = sorted(set(extra) - set(passed_over) - scales)
    if strange:
        raise CheckpointError(
            f"{shown(strange[0])}: is not a tensor of the model that config.json describes "
            f"({len(strange)} such in {weights.folder}); is config.json of this checkpoint?"
        )
    if passed_over:
        found = ", ".join(sorted({name.rpartition(".")[2] for name in passed_over}))
        warnings.warn(
            f"{weights.folder}: {len(passed_over)} tensors of {found} are passed over: "
            "activations and caches are not quantised here",
            stacklevel=4,
        )


def check_integers(name: str, tensor: Tensor, expected: Tensor, folder: Path) -> Tensor:
    """One of the tensors of a matrix in integers, as it has to be."""
    if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
        raise CheckpointError(
            f"{name}: must be {expected.dtype} of shape {tuple(expected.shape)} by config.json; got {tensor.dtype} of "
            f"shape {tuple(tensor.shape)} in {folder}"
        )
    if name.endswith(f".{ROW_BITS}") and int(tensor) not in LEVELS:
        raise CheckpointError(f"{name}: must be {' or '.join(map(str, LEVELS))}; got {int(tensor)} in {folder}")
    if tensor.is_floating_point() and not (tensor.isfinite().all() and (tensor >= 0).all()):
        raise CheckpointError(f"{name}: must be finite and not negative; it holds other numbers in {folder}")
    return tensor


def check_tensor(name: str, tensor: Tensor, expected: Tensor, folder: Path) -> None:
    """The shape that config.json gives, and a dtype whose numbers are the weights themselves."""
    if tensor.shape != expected.shape:
        raise CheckpointError(
            f"{name}: must have shape {tuple(expected.shape)} by config.json; got {tuple(tensor.shape)} in {folder}"
        )
    if tensor.dtype not in FLOATS:
        raise CheckpointError(f"{name}: must be one of {FLOAT_NAMES}; got {tensor.dtype} in {folder}")
