from collections.abc import Callable

import pytest
import torch

from nemotron_h import machine
from nemotron_h.cli.process import settle


def test_a_containers_share_of_the_cores_is_taken(
    monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    threads(3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "cores", lambda: 8)
    settle()
    assert torch.get_num_threads() == 3  # never more than torch takes by itself
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    settle()
    assert torch.get_num_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    settle()
    assert torch.get_num_threads() == 2
