"""Fingerprints: of the weights, of the model's shape, and of the arithmetic that computes with them.

What was computed under one set of fingerprints is what would be computed again under the same set, to the bit. So a
state, or the result of a check, is used again only where they agree.
"""

import hashlib
import json
import operator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from nemotron_h import machine, ops
from nemotron_h.config.model import ModelConfig
from nemotron_h.config.settings import to_mapping
from nemotron_h.grid import BLOCK, CHUNK, DEPTH
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.linear import Linear, QuantizedLinear, plainly
from nemotron_h.ops.jit import compiler, pairs, quads, scalars
from nemotron_h.ops.jit import linear as few_rows
from nemotron_h.ops.linear import Blocks, FewRows

WORDS = 2**15  # of 32 bits, in one sum
SUMS = 16  # at a time: their products, 4 MiB, stay in cache


@torch.no_grad()
def weights(model: Hybrid) -> str:
    """Digest of all weights: names, shapes, dtypes and every bit, at the rate at which memory gives them.

    Packed matrices, and taps laid out for reading, have the digest of the plain ones. Memory: one matrix, where it is
    packed. A tensor's words of 32 bits are added up in runs of WORDS, each times an odd number of its place, modulo
    2^64. Always noticed: any change within one word of each run, such as a flipped bit, and two values that have
    changed places. Any other change escapes once in some 2^64 times, unless it was made to escape: the digest tells
    weights apart, it does not tell whom they are from.
    """
    digest = hashlib.sha256()
    plainly_of = plainly(model)
    for name, parameter in model.named_parameters():
        plain = plainly_of(parameter)
        digest.update(json.dumps([name, list(plain.shape), str(plain.dtype)]).encode())
        digest.update(run_sums(plain).cpu().numpy().tobytes())
    return digest.hexdigest()


def run_sums(tensor: Tensor) -> Tensor:
    """(runs,) int64: for each run of WORDS words, the sum of word times multiplier. tensor: float32 or bfloat16."""
    flat = tensor.reshape(-1)
    if len(flat) * flat.element_size() % 4 or flat.storage_offset() * flat.element_size() % 4:
        flat = F.pad(flat, (0, -len(flat) % 2))  # a copy, which begins and ends with a whole word
    words, numbers = flat.view(torch.int32), multipliers().to(flat.device)
    sums = []
    for part in words.split(SUMS * WORDS):
        whole, rest = part.split([len(part) // WORDS * WORDS, len(part) % WORDS])
        sums.append((whole.view(-1, WORDS).long() * numbers).sum(-1))
        if len(rest):
            sums.append((rest.long() * numbers[: len(rest)]).sum(-1, keepdim=True))
    return torch.cat(sums)


@cache
def multipliers() -> Tensor:
    """(WORDS,) int64, odd: no two agree in their lower halves, and the upper ones are random."""
    # PCG64's own stream, which numpy promises to keep: digests are compared across versions
    upper = np.random.PCG64(0).random_raw(WORDS) >> np.uint64(32) << np.uint64(32)
    return torch.from_numpy((upper | np.arange(1, 2 * WORDS, 2, dtype=np.uint64)).view(np.int64))


class Versions:
    """Which objects a model's parameters are, and how often each was written, as of now.

    Compared with how they are later, it tells that weights were replaced or changed in place; what is written through
    `.data`, or to weights made under `torch.inference_mode`, torch does not count. It is asked for before each token,
    when everything else has just been driven out of the caches: so it looks at counters alone, and walks through the
    model only where some model, anywhere, was given a parameter or a module.
    """

    def __init__(self, model: Hybrid) -> None:
        self._model, self._registered = model, REGISTERED.count
        self._parameters = tuple(model.parameters())
        self._counted = [p for p in self._parameters if not p.is_inference()]
        self._writes = list(map(WRITES, self._counted))

    @property
    def hold(self) -> bool:
        """Are they what they were?"""
        if self._registered != REGISTERED.count:
            registered, now = REGISTERED.count, tuple(self._model.parameters())
            if len(now) != len(self._parameters) or any(a is not b for a, b in zip(now, self._parameters, strict=True)):
                return False
            self._registered = registered
        return list(map(WRITES, self._counted)) == self._writes


class Registered:
    """How many parameters and modules were given to modules in this process."""

    count = 0

    def note(self, *_: object) -> None:
        self.count += 1


WRITES = operator.attrgetter("_version")
REGISTERED = Registered()
register_module_parameter_registration_hook(REGISTERED.note)
register_module_module_registration_hook(REGISTERED.note)


def shape(config: ModelConfig) -> str:
    """Digest of a model's config."""
    return digest_of(to_mapping(config))


def arithmetic(model: Hybrid) -> dict[str, Any]:
    """All that a model's bits depend on besides its weights and config, as plain values, nested by subject.

    `config.settings.first_difference` names the first in which two of them differ.
    """
    return basis(model) | {"row_multiple": model.row_multiple}


def basis(model: Hybrid) -> dict[str, Any]:
    """The arithmetic without the row multiple, which is found out on top of it."""
    device = model.device
    return {
        "torch": {"version": torch.__version__, "commit": torch.version.git_version, "onednn": onednn()},
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "cpu": machine.cpu_name(),
            "features": list(machine.cpu_features()),
            "torch_uses": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "grid": {"chunk": CHUNK, "block": BLOCK, "depth": DEPTH},
        "kernels": {
            "missing": compiler.MISSING,
            **{name: None if compiler.MISSING else version(name) for name in ("numba", "llvmlite")},
            "lanes": scalars.LANES,
            "pairs": pairs.ADDS_PAIRS,
            "quads": quads.ADDS_QUADS,
            "few_rows": few_rows.RUNS,
        },
        "code": code(),
        "compute_dtype": str(model.compute_dtype).removeprefix("torch."),
        "keys_values": keys_values(model),
        "matrices": matrices(model),
        "products": products(device),
    }


def onednn() -> str:
    """The line of torch's own description that tells oneDNN's version."""
    lines = torch.__config__.show().splitlines()
    return next((line.strip(" -") for line in lines if "MKL-DNN" in line or "oneDNN" in line), "none")


def code() -> str:
    """Digest of the sources that compute: ops and model."""
    folders = (Path(ops.__file__).parent, Path(__file__).parent)
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def keys_values(model: Hybrid) -> str:
    """What they are kept in."""
    return "as computed" if model.keys_values is None else str(model.keys_values).removeprefix("torch.")


def matrices(model: Hybrid) -> dict[str, str]:
    """How the matrices of each shape (outputs x inputs) are read."""
    found: dict[str, str] = {}
    for module in model.matrices.values():
        found.setdefault(" x ".join(map(str, module.shape)), how(module))
    return found


def how(module: Linear | QuantizedLinear) -> str:
    if isinstance(module, QuantizedLinear):
        return f"{module.bits} bits, rows in {module.rounded_to}"
    match module.kernel:
        case Blocks():
            return "in blocks"
        case FewRows(depth=depth):
            return f"packed, few rows in chains of {depth}"
        case _:
            return "packed" if module.weight.is_mkldnn else "plain"


def products(device: torch.device) -> str:
    """Digest of a product in float32 and in bfloat16. Its bits tell what nothing else does: the instructions and the
    precision that the libraries were told to use (ONEDNN_MAX_CPU_ISA, MKL_CBWR and the like)."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-999, 1000, (rows, 1000), generator=generator) / 999 for rows in (16, 1024))
    bits = [F.linear(x.to(device, d), weight.to(device, d)).float().cpu() for d in (torch.float32, torch.bfloat16)]
    return hashlib.sha256(torch.cat(bits).numpy().tobytes()).hexdigest()


def digest_of(values: object) -> str:
    """Digest of plain values, as JSON has them, whatever the order of names."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
