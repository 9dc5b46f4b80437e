"""Read a checkpoint folder: every key accounted for, nothing executed, the file mapped and not read twice."""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nemotron_h.checkpoint.save import CONFIG, FLOAT_NAMES, FLOATS, HEAD, INDEX, WEIGHTS, stored_dtype
from nemotron_h.config.published import read_config
from nemotron_h.errors import CheckpointError
from nemotron_h.model.hybrid import Hybrid

EMBEDDING = "backbone.embeddings.weight"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


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
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: must be a checkpoint folder; got no such folder")
    config = read_config(folder / CONFIG)
    model = Hybrid(config, dtype=dtype, compute_dtype=compute_dtype, device="meta")
    wanted = dict(model.named_parameters())
    files = weight_files(folder)
    check_names(wanted, files, folder, tied=config.tied_embeddings)
    head = None
    for name, tensor in read_tensors(folder, files):
        tied = name not in wanted  # a head beside the embedding that it is tied to
        check_tensor(name, tensor, wanted[EMBEDDING if tied else name], folder)
        if tied:
            head = tensor
        else:
            put(model, name, tensor.to(device, stored_dtype(name, dtype)))
    if head is not None and not torch.equal(head.to(device, dtype), model.head_weight):
        raise CheckpointError(f"{HEAD}: must equal the embedding, tied to it by config.json; it differs in {folder}")
    return model.eval()


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter by its dotted name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


def weight_files(folder: Path) -> dict[str, str]:
    """Which file of the folder holds each tensor."""
    if (folder / INDEX).exists():
        return _read_index(folder / INDEX)
    if not (folder / WEIGHTS).exists():
        others = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        hint = (
            f"{others[0]} is a pickle, which is never loaded; convert it" if others else "is this a checkpoint folder?"
        )
        raise CheckpointError(f"{folder}: must hold {WEIGHTS} or {INDEX}; got neither; {hint}")
    with opened(folder / WEIGHTS) as file:
        return dict.fromkeys(file.keys(), WEIGHTS)


def check_names(wanted: Mapping[str, Any], found: Mapping[str, Any], folder: Path, *, tied: bool) -> None:
    """Every tensor the model has, and no other."""
    extra = sorted(set(found) - set(wanted) - ({HEAD} if tied else set()))
    missing = [name for name in wanted if name not in found]
    if missing:
        have = len(wanted) - len(missing)
        raise CheckpointError(
            f"{missing[0]}: missing from {folder} (found {have} of {len(wanted)} tensors); was the last shard copied?"
        )
    if extra:
        raise CheckpointError(
            f"{extra[0]}: is not a tensor of the model that config.json describes ({len(extra)} such in {folder}); "
            "is config.json of this checkpoint?"
        )


def check_tensor(name: str, tensor: Tensor, expected: Tensor, folder: Path) -> None:
    """The shape that config.json gives, and a dtype whose numbers are the weights themselves."""
    if tensor.shape != expected.shape:
        raise CheckpointError(
            f"{name}: must have shape {tuple(expected.shape)} by config.json; got {tuple(tensor.shape)} in {folder}"
        )
    if tensor.dtype not in FLOATS:
        raise CheckpointError(f"{name}: must be one of {FLOAT_NAMES}; got {tensor.dtype} in {folder}")


def read_tensors(folder: Path, files: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor with its name, mapped from its file."""
    for file_name in dict.fromkeys(files.values()):
        with opened(folder / file_name) as file:
            held = set(file.keys())
            unlisted = sorted(held - {name for name, where in files.items() if where == file_name})
            if unlisted:
                raise CheckpointError(f"{unlisted[0]}: is in {folder / file_name} but not there by {INDEX}")
            for name, where in files.items():
                if where != file_name:
                    continue
                if name not in held:
                    raise CheckpointError(f"{name}: must be in {folder / file_name} by {INDEX}; it is not there")
                yield name, file.get_tensor(name)


def opened(path: Path) -> Any:
    """A safetensors file, its header checked. Raises: CheckpointError naming the file."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: must exist; found no such file; was the last shard copied?") from None
    except (SafetensorError, OSError, struct.error) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: must be a whole safetensors file; got {size:,} bytes that are not ({error}); copy it again"
        ) from None


def _read_index(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = content["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: must be JSON with a weight_map; got {type(error).__name__}: {error}") from None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError(f"{path}: weight_map must map tensors to file names; got {type(files).__name__}")
    for name, file_name in files.items():
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {name} must be in a .safetensors file of this folder; got {file_name!r}")
    return files
