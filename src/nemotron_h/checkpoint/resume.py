"""Checkpoints of a run: the model in the published format, and beside it what training needs to go on to the same bits.

step-00000400/   config.json model.safetensors tokenizer.json ...  the model, for anyone
                 training.safetensors                              master weights and optimizer moments, float32
                 training.json                                     step, place in the data, what they were made with
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nemotron_h.checkpoint.files import new_folder, remove, remove_leftovers
from nemotron_h.checkpoint.save import size_bytes, write_model
from nemotron_h.checkpoint.weights import opened
from nemotron_h.errors import CheckpointError
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.text.tokenizer import Tokenizer

TENSORS, VALUES = "training.safetensors", "training.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})")
KEYS = ("step", "place", "settings")


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in the folder of all of them."""
    return folder / f"step-{step:08d}"


def save_step(
    folder: Path,
    step: int,
    model: Hybrid,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    *,
    tokenizer: Tokenizer | None,
    keep: int,
) -> Path:
    """Write step-N, whole or not at all; then remove all but the newest `keep`. values: KEYS, as JSON has them."""
    path = step_folder(folder, step)
    size = sum(t.nbytes for t in tensors.values()) + size_bytes(model, torch.bfloat16)
    with new_folder(path, need_bytes=size) as partial:
        write_model(model, partial, tokenizer=tokenizer, made_by="nemotron_h training")
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial / TENSORS)
        (partial / VALUES).write_text(json.dumps(dict(values), indent=2) + "\n", encoding="utf-8")
    for old in steps(folder)[:-keep]:
        remove(old)
    return path


def steps(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    numbers = {path: int(match[1]) for path in found if (match := STEP_FOLDER.fullmatch(path.name))}
    return sorted(numbers, key=numbers.__getitem__)


def newest_step(folder: Path) -> Path | None:
    """The checkpoint to go on from; what a killed writer left is removed."""
    if not folder.is_dir():
        return None
    remove_leftovers(folder)
    found = steps(folder)
    return found[-1] if found else None


def read_step(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and values of a checkpoint of a run. Raises: CheckpointError naming the file."""
    with opened(path / TENSORS) as file:
        tensors = {name: torch.clone(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
    try:
        values = json.loads((path / VALUES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / VALUES}: must be readable JSON; got {error}") from None
    if not isinstance(values, dict) or sorted(values) != sorted(KEYS):
        got = ", ".join(values) if isinstance(values, dict) else type(values).__name__
        raise CheckpointError(f"{path / VALUES}: must hold {', '.join(KEYS)}; got {got}")
    return tensors, values
