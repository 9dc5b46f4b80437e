"""What is compared with what, and against which roof."""

import sys
from pathlib import Path

import pytest

from nemotron_h.config import cost
from nemotron_h.config.presets import PRESETS
from nemotron_h.evaluate import speed
from nemotron_h.evaluate.rows import Row, row
from nemotron_h.evaluate.speed import MODULES, Race, installed


def test_rows() -> None:
    alone = row("reading", "tokens/s", [3.0, 1.0, 2.0], higher=True)
    assert alone == Row("reading", "tokens/s", 2.0, 3, 1.0)
    beside = row("reading", "tokens/s", [2.0, 2.0], [1.0, 1.5], "peer 1", higher=True)
    assert (beside.ratio, beside.peer, beside.spread, beside.peer_version) == (1.6, 1.25, 0.4, "peer 1")
    assert row("memory", "bytes", [2.0], [1.0], "peer 1", higher=False).ratio == 0.5


def test_peers_of_this_environment_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "MODULES", {"json": "json", "none": "nothing_of_this_name"})
    assert installed() == {"json": sys.executable}
    assert set(MODULES) == {"llama", "vllm", "transformers"}


@pytest.fixture
def race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Race:
    monkeypatch.setattr(speed, "read_config", lambda path: PRESETS["8b"])
    return Race(tmp_path / "m", tmp_path, {})


def test_roofs(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    """8.1 thousand million weights in 8 bits, at 30 GB/s."""
    monkeypatch.setattr(speed.machine, "bandwidth", lambda: 30e9)
    monkeypatch.setattr(speed.machine, "matmul_rates", lambda **sizes: {"bfloat16": 1e12, "float32": 1e11})
    assert race.decode_roof("int8", 128) == pytest.approx(30e9 / 7.7e9, rel=0.05)
    assert race.decode_roof("int4", 128) > 1.5 * race.decode_roof("int8", 128) > 1.5 * race.decode_roof("bfloat16", 128)
    assert race.decode_roof("int8", 10**6) < 0.7 * race.decode_roof("int8", 128)
    flops = sum(cost.prefill_flops(PRESETS["8b"], 512).values())
    assert race.prefill_roof("bfloat16", 512) == 1e12 / flops
    assert race.prefill_roof("float32", 512) == 1e11 / flops
