"""The laptop recipe as it stands: what is promised of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_it_beats_the_best_ngram(process: Callable[..., Any], tmp_path: Path) -> None:
    ended = process("run", "laptop", "--runs", tmp_path)
    assert ended.code == 0, ended.err
    result = json.loads((tmp_path / "laptop" / "result.json").read_text())
    assert result["bits_per_byte"] < min(bits for name, bits in result["baselines"].items() if "gram" in name)
