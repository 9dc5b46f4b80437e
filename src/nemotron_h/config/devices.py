"""Machines that the papers measure on or aim at, by what bounds a model's speed and size.

Source: NVIDIA's data sheets, for dense products that add up in float32. What the A10G leaves to a program is the budget
of arXiv:2508.14444; the RTX 5090's memory is that of arXiv:2504.03624, section 4.
"""

import json
import tomllib
from pathlib import Path

from nemotron_h.config.settings import from_mapping, nearest, settings
from nemotron_h.errors import ConfigError, UnsupportedError

TERA, GIB = 10**12, 2**30


@settings
class Device:
    """One accelerator. peaks: FLOP/s of dense products, by precision; one that it has no products for is not in it."""

    name: str
    peaks: dict[str, float]
    bandwidth_bytes_per_second: float
    memory_bytes: int

    def peak(self, precision: str) -> float:
        """FLOP/s of dense products in that precision. Raises: UnsupportedError where it has none."""
        if precision not in self.peaks:
            raise UnsupportedError(
                f"precision: must be one that the {self.name} multiplies in, {', '.join(self.peaks)}; got {precision!r}"
            )
        return self.peaks[precision]

    def peak_for(self, weights: str) -> float:
        """FLOP/s of products by weights stored so: in their own format where it multiplies in that, else in the widest
        of fewer bits than they are unpacked to, bfloat16 or float32."""
        for precision in (weights, "bfloat16", "float32"):
            if precision in self.peaks:
                return self.peaks[precision]
        raise UnsupportedError(f"peaks: must have {weights}, bfloat16 or float32; got {', '.join(self.peaks)}")


DEVICES = {
    "h100": Device(
        name="H100 SXM",
        peaks={"bfloat16": 989 * TERA, "fp8": 1979 * TERA},
        bandwidth_bytes_per_second=3.35 * TERA,
        memory_bytes=80 * 10**9,
    ),
    "h200": Device(
        name="H200",
        peaks={"bfloat16": 989 * TERA, "fp8": 1979 * TERA},
        bandwidth_bytes_per_second=4.8 * TERA,
        memory_bytes=141 * 10**9,
    ),
    "a10g": Device(
        name="A10G",
        peaks={"bfloat16": 70 * TERA},
        bandwidth_bytes_per_second=0.6 * TERA,
        memory_bytes=round(22.06 * GIB),
    ),
    "rtx5090": Device(
        name="RTX 5090",
        peaks={"bfloat16": 210 * TERA, "fp8": 419 * TERA},
        bandwidth_bytes_per_second=1.79 * TERA,
        memory_bytes=32 * GIB,
    ),
}


def read_device(path: Path) -> Device:
    """The device that a file describes, TOML or JSON: the fields of Device. Raises: ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: must be a readable file; got {error.strerror}") from None
    except ValueError as error:  # no UTF-8, no JSON, no TOML
        raise ConfigError(f"{path}: must be TOML or JSON; got {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: must be a table of name, peaks, bandwidth_bytes_per_second, memory_bytes; got a value"
        )
    return from_mapping(Device, values, f"{path}: ")


def device(name: str) -> Device:
    """The device of that name. Raises: ConfigError with the nearest name."""
    if name not in DEVICES:
        raise ConfigError(f"device: must be one that is listed; got {name!r}; {nearest(name, list(DEVICES))}")
    return DEVICES[name]
