"""How a folder's weights are quantised: hf_quant_config.json, or quantization_config in config.json.

NVIDIA's tool (modelopt) writes either or both. FP8 with a scale a tensor and NVFP4 are read; others are refused.
Which tensors are quantised, the tensors themselves say: modules that were left out have plain weights. Our own int8
and int4 are in config.json, and all matrices are in them:

    {"quant_method": "nemotron_h", "precision": "int4", "version": 1}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron_h.config.keys import CONFIG_FILE, read_object, short
from nemotron_h.errors import CheckpointError, UnsupportedError

QUANT_FILE = "hf_quant_config.json"
FP8, NVFP4 = "FP8", "NVFP4"
INT8, INT4 = "int8", "int4"  # our own, of all matrices: `precision/weights.py`
OWN, VERSION = "nemotron_h", 1
METHODS = ("modelopt", "modelopt_fp4", "modelopt_mixed")
MIXED = "MIXED_PRECISION"


def read_quantization(folder: Path) -> frozenset[str]:
    """The formats that weights of the folder may be in: FP8 and NVFP4, or one of INT8 and INT4 alone; empty: none is
    quantised.

    Raises: UnsupportedError naming another format; CheckpointError where the files are damaged or disagree.
    """
    found: dict[str, frozenset[str]] = {}
    own = read_object(folder / CONFIG_FILE).get("quantization_config")
    if own is not None:
        where = f"{folder / CONFIG_FILE}: quantization_config"
        table = _table(own, where)
        found[where] = _own(table, where) if table.get("quant_method") == OWN else _formats(table, where, tool=True)
    if (folder / QUANT_FILE).exists():
        where = str(folder / QUANT_FILE)
        found[where] = _formats(read_object(folder / QUANT_FILE), where, tool=False)
    if len(set(found.values())) > 1:
        (one, formats), (other, others) = found.items()
        raise CheckpointError(f"{one}: must agree with {other}, which says {_listed(others)}; got {_listed(formats)}")
    return next(iter(found.values()), frozenset())


def own_quantization(precision: str) -> dict[str, Any]:
    """What config.json says of weights in INT8 or INT4."""
    return {"quant_method": OWN, "precision": precision, "version": VERSION}


def _own(table: Mapping[str, Any], where: str) -> frozenset[str]:
    for key, known in (("precision", (INT8, INT4)), ("version", (VERSION,))):
        if table.get(key) not in known:
            raise UnsupportedError(
                f"{where}: {key} must be {' or '.join(map(str, known))}; got {short(table.get(key))}; "
                "take a newer nemotron_h, or quantise the checkpoint again"
            )
    return frozenset([str(table["precision"])])


def _formats(values: Mapping[str, Any], where: str, *, tool: bool) -> frozenset[str]:
    """tool: whether the method must be named, as in config.json, where other tools write too."""
    method = values.get("quant_method")
    if (tool or method is not None) and method not in METHODS:
        raise UnsupportedError(
            f"{where}: quant_method must be {METHODS[0]}; got {short(method)}; take the checkpoint before quantisation"
        )
    inner = _table(values.get("quantization", values), where)
    algorithm = inner.get("quant_algo")
    if algorithm is None and "quant_algo" in inner:
        return frozenset()  # keys and values of the cache alone
    if algorithm != MIXED:
        return frozenset([_known(algorithm, where)])
    layers = _table(inner.get("quantized_layers"), where)
    return frozenset(_known(_table(layer, where).get("quant_algo"), where) for layer in layers.values())


def _known(algorithm: object, where: str) -> str:
    if algorithm not in (FP8, NVFP4):
        raise UnsupportedError(
            f"{where}: quant_algo must be {FP8} or {NVFP4}; got {short(algorithm)}; "
            "take the checkpoint before quantisation"
        )
    return str(algorithm)


def _table(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: must hold a JSON object; got {short(value)}")
    return value


def _listed(formats: frozenset[str]) -> str:
    return " and ".join(sorted(formats)) or "none"
