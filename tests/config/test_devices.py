"""Against NVIDIA's data sheets and the budgets that the papers state."""

import re

import pytest

from nemotron_h.config.devices import DEVICES, device
from nemotron_h.errors import ConfigError, UnsupportedError

# TFLOP/s in bfloat16 and FP8, dense; TB/s; GB
SHEETS = {
    "h100": (989, 1979, 3.35, 80),
    "h200": (989, 1979, 4.8, 141),
    "a10g": (70, None, 0.6, 23.687),  # 22.06 GiB, what it leaves to a program
    "rtx5090": (210, 419, 1.79, 34.36),  # 32 GiB
}


def test_figures_are_those_of_the_sheets() -> None:
    assert list(DEVICES) == list(SHEETS)
    for name, (bfloat16, fp8, bandwidth, memory) in SHEETS.items():
        found = device(name)
        want = {"bfloat16": bfloat16 * 1e12} | ({"fp8": fp8 * 1e12} if fp8 else {})
        assert found.peaks == {precision: found.peak(precision) for precision in want} == want
        assert found.bandwidth_bytes_per_second == bandwidth * 1e12
        assert found.memory_bytes / 1e9 == pytest.approx(memory, abs=0.001)


def test_what_a_device_does_not_do_is_refused() -> None:
    message = "precision: must be one that the A10G multiplies in, bfloat16; got 'fp8'"
    with pytest.raises(UnsupportedError, match=f"^{re.escape(message)}$"):
        device("a10g").peak("fp8")


def test_an_unknown_device_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^device: must be one that is listed; got 'h10'; did you mean h100\?$"):
        device("h10")
