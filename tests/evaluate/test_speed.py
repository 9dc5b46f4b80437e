"""What is compared with what, and against which roof."""

import sys
from pathlib import Path
from typing import Any

import pytest

from nemotron_h.config import cost
from nemotron_h.config.presets import PRESETS
from nemotron_h.errors import CapacityError, RequestError
from nemotron_h.evaluate import speed
from nemotron_h.evaluate.contestants.contest import Failed
from nemotron_h.evaluate.rows import Row, row
from nemotron_h.evaluate.speed import MODULES, Race, check_has, installed, untrained
from nemotron_h.machine import Memory


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
    assert race.decode_roof("float32", 128) == pytest.approx(race.decode_roof("bfloat16", 128) / 2, rel=0.05)
    assert race.decode_roof("int8", 10**6) < 0.7 * race.decode_roof("int8", 128)
    flops = sum(cost.prefill_flops(PRESETS["8b"], 512).values())
    assert race.prefill_roof("bfloat16", 512) == 1e12 / flops
    assert race.prefill_roof("float32", 512) == 1e11 / flops
    monkeypatch.setattr(speed.machine, "matmul_rates", lambda **sizes: {"bfloat16": 1e10, "float32": 1e11})
    assert race.prefill_roof("bfloat16", 512) == 1e11 / flops  # widened


class Told:
    """A contestant that was started with these arguments."""

    def __init__(self, script: Path, arguments: list[str], python: str = "") -> None:
        self.started = script.stem, arguments[1]

    def close(self) -> None:
        """Nothing."""


@pytest.mark.parametrize("has_products", [False, True])
def test_where_bfloat16_is_slow_peers_take_part_in_float32_too(
    race: Race, monkeypatch: pytest.MonkeyPatch, *, has_products: bool
) -> None:
    race.peers = {"transformers": "python", "vllm": "python"}
    monkeypatch.setattr(speed, "Contestant", Told)
    monkeypatch.setattr(speed, "PRODUCTS", has_products)
    with race.contestants("bfloat16") as some:
        started = {name: one.started for name, one in some.items()}  # type: ignore[attr-defined]
    wide = {} if has_products else {f"{name} float32": (f"run_{name}", "float32") for name in race.peers}
    narrow = {name: (f"run_{name}", "bfloat16") for name in race.peers}
    assert started == {"bfloat16": ("run_ours", "bfloat16")} | narrow | wide
    with race.contestants("float32") as some:
        assert set(some) == {"float32", *race.peers}


class Dying:
    """A contestant that answers so often, and then ends."""

    def __init__(self, answers: int, rate: float) -> None:
        self.left, self.rate, self.ended = answers, rate, False
        self.about = {"version": "peer 1", "answers": ["decode"]}

    def ask(self, question: str, **details: object) -> float:
        if not self.left:
            self.ended = True
            raise Failed("peer", "out of memory")
        self.left -= 1
        return self.rate


def test_one_that_ends_in_the_race_is_left_out_and_the_others_go_on(race: Race) -> None:
    some: Any = {"int8": Dying(99, 4.0), "llama": Dying(2, 1.0), "vllm": Dying(99, 2.0)}
    (left,) = race.decode(some, 8)
    assert (left.ratio, left.peer_version) == (2.0, "peer 1")
    assert race.absent == {"llama, int8": "peer: out of memory"}
    (still,) = race.decode(some, 8)
    assert still.ratio == 2.0
    with pytest.raises(RequestError, match=r"^int8, decoding after 8 tokens: out of memory$"):
        race.decode({"int8": Dying(0, 1.0)}, 8)  # type: ignore[dict-item]


def test_who_cannot_be_started_is_named(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"No module named 'nothing_of_this_name'$"):
        check_has(sys.executable, "nothing_of_this_name")
    with pytest.raises(OSError, match="no-such-python"):
        check_has(str(tmp_path / "no-such-python"), "json")
    check_has(sys.executable, "json")


def test_random_weights_are_written_once_and_only_where_they_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = untrained("3m", tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert untrained("3m", tmp_path) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    (tmp_path / "25m").symlink_to(folder)
    with pytest.raises(RequestError, match=r"25m: must be what the preset 25m is; it is another model; remove it$"):
        untrained("25m", tmp_path)
    monkeypatch.setattr(speed.machine, "memory", lambda: Memory(10**12, 10**12, 10**9))
    with pytest.raises(CapacityError, match=r"^56b: its random weights need 1\d\d,.* 1,000,000,000 are free; "):
        untrained("56b", tmp_path)
