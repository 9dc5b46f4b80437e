"""A conversation as a file: its tokens, snapshots of the state on their way, keys and values, and how it was drawn.

    ids                           all tokens, int64
    snapshots.N.LAYER.conv ...    of snapshot N, as `State.saved` names it
    snapshots.N.logits            after its last token, where an answer can begin there
    pages.LAYER.keys, values      of the deepest snapshot, which are those of all

The file is safetensors, with a header of ours in its metadata. The header has a digest of every tensor, and its own
stands beside it: one flipped bit anywhere is refused. It has the fingerprints of weights, tokenizer, precision and
arithmetic too: what is restored is what would be read again, to the bit, or it is refused. Where the arithmetic alone
differs (another machine), `inexact=True` restores it, marks it, and keeps it apart from what others reuse.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemotron_h.config.settings import first_difference
from nemotron_h.errors import CapacityError, DataError
from nemotron_h.files import replacing

FORMAT = "nemotron_h session 2"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a session file says of itself, beside its tensors."""

    snapshots: list[tuple[int, str]]  # (position, kind), the deepest last
    prompt_tokens: int  # of the ids; those after it were drawn
    sampling: dict[str, Any] | None  # how, where an answer is under way
    model: dict[str, Any]  # fingerprints that must agree
    arithmetic: dict[str, Any]  # and those that may differ, where the session is marked
    inexact: bool  # it was restored under another arithmetic before
    extra: dict[str, Any]  # the caller's own
    digests: dict[str, str] = field(default_factory=dict)  # of each tensor
    format: str = FORMAT


def write(path: Path, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Write a file, whole or not at all. Raises: CapacityError where the disk is too small or does not take it."""
    digests = {name: digest(tensor) for name, tensor in tensors.items()}
    text = json.dumps(asdict(header) | {"digests": digests})
    metadata = {"session": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    needed = sum(tensor.nbytes for tensor in tensors.values()) + 2 * len(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(path.parent).free) < needed:
            raise CapacityError(
                f"{path}: needs {needed:,} bytes of disk; {free:,} are free; free some or save elsewhere"
            )
        with replacing(path) as file:
            save_file(dict(tensors), file.name, metadata)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CapacityError(f"{path}: could not be written: {reason}; what was there is untouched") from error


def read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """A file's header and tensors, each checked against its digest. Raises: DataError, naming what is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            header = checked_header(path, file.metadata() or {})
            names = set(file.keys())
            if names != header.digests.keys():
                raise DataError(f"{path}: must hold the tensors its header names; it does not; it is damaged")
            tensors = {name: file.get_tensor(name) for name in sorted(names)}
    except FileNotFoundError:
        raise DataError(f"{path}: no such session; name one that was saved") from None
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DataError(f"{path}: must be a whole session file; got {reason}") from None
    for name, tensor in tensors.items():
        if digest(tensor) != header.digests[name]:
            raise DataError(f"{path}: {name} is damaged, its digest differs; take an older copy")
    return header, tensors


def read_header(path: Path) -> tuple[Header, Tensor]:
    """The header alone, checked, and the ids. Raises: DataError."""
    try:
        with safe_open(path, framework="pt") as file:
            header = checked_header(path, file.metadata() or {})
            ids = file.get_tensor("ids")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: must be a whole session file; got {str(error).splitlines()[0]}") from None
    if digest(ids) != header.digests.get("ids"):
        raise DataError(f"{path}: ids are damaged, their digest differs; take an older copy")
    return header, ids


def checked_header(path: Path, metadata: Mapping[str, str]) -> Header:
    text = metadata.get("session", "")
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("sha256") or len(metadata) != 2:
        raise DataError(f"{path}: the header is damaged, or none of a session; take an older copy")
    found = "fields that are not of it"
    with suppress(ValidationError):
        header = TypeAdapter(Header).validate_json(text)
        if header.format == FORMAT:
            return header
        found = repr(header.format)
    raise DataError(f"{path}: must be {FORMAT!r}; got {found}; go on with it in the version that saved it")


def check_agrees(
    path: Path, header: Header, model: Mapping[str, Any], arithmetic: Mapping[str, Any], *, inexact: bool
) -> bool:
    """Refuse a session of another model, or, unless inexact, of another arithmetic; whether it is exact here.

    Raises: DataError with the first thing that differs.
    """
    if (different := first_difference(header.model, model)) is not None:
        name, there, here = different
        raise DataError(f"{path}: must be of the model that restores it; {name} is {there} there, {here} here")
    different = first_difference(header.arithmetic, arithmetic)
    if different is None and not header.inexact:
        return True
    if not inexact:
        rule = "must have been computed by this machine's arithmetic"
        name, there, here = different or ("inexact", True, False)
        raise DataError(
            f"{path}: {rule}; {name} is {there} there, {here} here; --inexact (inexact=True) takes it all the same, "
            "and its answers may differ from those read anew"
        )
    return False


def digest(tensor: Tensor) -> str:
    """Of a tensor's dtype, shape and bits."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
