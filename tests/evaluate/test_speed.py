"""What is compared with what, and against which roof."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_h.config.model import AttentionConfig, MambaConfig, MlpConfig
from nemotron_h.config.plan import prompt_flops
from nemotron_h.config.presets import PRESETS
from nemotron_h.errors import CapacityError, RequestError
from nemotron_h.evaluate import speed
from nemotron_h.evaluate.contestants.contest import Failed
from nemotron_h.evaluate.rows import Row, row
from nemotron_h.evaluate.speed import (
    MODULES,
    Question,
    Race,
    Roof,
    check_has,
    decode,
    installed,
    prefill,
    together,
    untrained,
)
from nemotron_h.machine import Memory

SIZES: Any = {
    "hidden_size": 64,
    "vocab_size": 96,
    "mamba": MambaConfig(num_heads=4, head_dim=16, state_size=16, num_groups=2),
    "attention": AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16),
    "mlp": MlpConfig(intermediate_size=48),
}


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


def roof(question: Question, **details: int) -> float:
    return Roof(PRESETS["8b"], question).ask(question.kind, **{**question.details, **details})


def test_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """8.1 thousand million weights in 8 bits, at 30 GB/s."""
    monkeypatch.setattr(speed.machine, "bandwidth", lambda: 30e9)
    monkeypatch.setattr(speed.machine, "matmul_rates", lambda **sizes: {"bfloat16": 1e12, "float32": 1e11})
    wide, half, eight, four = (roof(decode(name, 128)) for name in ("float32", "bfloat16", "int8", "int4"))
    assert eight == pytest.approx(30e9 / 7.7e9, rel=0.05)
    assert four > 1.5 * eight > 1.5 * half
    assert wide == pytest.approx(half / 2, rel=0.05)
    assert roof(decode("int8", 10**6)) < 0.7 * eight
    flops = prompt_flops(PRESETS["8b"], 512)
    assert roof(prefill("bfloat16", 512)) == 1e12 / flops
    assert roof(prefill("float32", 512)) == 1e11 / flops
    assert roof(prefill("int4", 512)) in (2e11 / flops, 4e11 / flops)
    # each as if it came alone, but that weights are read once for all
    serving = roof(together("int8", 16, 512, 128))
    alone = roof(together("int8", 1, 512, 128))
    assert alone < serving < 16 * alone
    assert alone == pytest.approx(128 / (512 / roof(prefill("int8", 512)) + 127 / eight), rel=0.02)
    monkeypatch.setattr(speed.machine, "matmul_rates", lambda **sizes: {"bfloat16": 1e10, "float32": 1e11})
    assert roof(prefill("bfloat16", 512)) == 1e11 / flops  # widened


class Told:
    """A contestant that was started with these arguments."""

    def __init__(self, script: Path, arguments: list[str], python: str, environment: dict[str, str]) -> None:
        self.started = script.stem, arguments[1]
        assert environment == {"OMP_NUM_THREADS": str(torch.get_num_threads())}

    def close(self) -> None:
        """Nothing."""


@pytest.mark.parametrize("has_products", [False, True])
def test_where_bfloat16_is_slow_peers_take_part_in_float32_too(
    race: Race, monkeypatch: pytest.MonkeyPatch, *, has_products: bool
) -> None:
    race.peers = {"transformers": "python", "vllm": "python"}
    monkeypatch.setattr(speed, "Contestant", Told)
    monkeypatch.setattr(speed, "PRODUCTS", has_products)
    monkeypatch.setattr(speed, "check_has", lambda python, module: None)
    monkeypatch.setattr(speed.machine, "memory", lambda: Memory(10**12, 10**12, 10**12))
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


def test_one_that_ends_in_the_race_is_left_out_and_the_others_go_on(
    race: Race, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed.machine, "bandwidth", lambda: 30e9)
    race.absent.clear()
    question = decode("int8", 8)
    some: Any = {"int8": Dying(99, 4.0), "llama": Dying(2, 1.0), "vllm": Dying(99, 2.0)}
    (left,) = race.answers(question, some)
    assert (left.ratio, left.peer_version) == (2.0, "peer 1")
    assert left.roof == roof(question)
    assert race.absent == {"llama, int8, decoding after 8 tokens": "out of memory"}
    (still,) = race.answers(question, some)
    assert still.ratio == 2.0
    with pytest.raises(
        RequestError, match=r"^int8, decoding after 8 tokens: must be measured here first; got out of memory$"
    ):
        race.answers(question, {"int8": Dying(0, 1.0)})  # type: ignore[dict-item]


def test_whoever_is_not_asked_is_named(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed.machine, "matmul_rates", lambda **sizes: {"bfloat16": 1e10, "float32": 1e11})
    assert race.absent == dict.fromkeys(MODULES, "no Python that has it was named")
    race.absent.clear()
    ours = Dying(99, 4.0)
    ours.about = {"answers": ["prefill"]}
    some: Any = {"int8": ours, "vllm": Dying(99, 2.0)}
    (row,) = race.answers(prefill("int8", 8), some)
    assert row.peer is None
    assert race.absent == {"vllm, int8, prompt of 8 tokens": "cannot be asked this"}
    race.peers = dict.fromkeys(MODULES, sys.executable)
    race.absent.clear()
    monkeypatch.setattr(speed, "Contestant", Told)
    monkeypatch.setattr(speed, "check_has", lambda python, module: None)
    monkeypatch.setattr(speed.machine, "memory", lambda: Memory(10**12, 10**12, 10**9))
    with race.contestants("int8") as alone:
        assert list(alone) == ["int8"]
    few = r"its weights need [\d,]+ bytes of memory; 1,000,000,000 are free"
    assert re.fullmatch(few, race.absent.pop("llama, int8"))
    assert race.absent == dict.fromkeys(("vllm, int8", "transformers, int8"), "has nothing like it")


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
