import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemotron_h import machine
from nemotron_h.cli.process import settle


def test_a_containers_share_of_the_cores_is_taken(
    monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    threads(3)
    monkeypatch.setattr(machine, "tune_memory", lambda: None)  # it would last for the tests to come
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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_is_freed_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(machine, "tune_memory", lambda: asked.append(True))
    settle()
    assert asked == [True]
    done = subprocess.run([sys.executable, "-c", TAKEN], capture_output=True, text=True, check=True)
    assert done.stdout == "[1, 1]\n"  # glibc took both settings


TAKEN = """
import ctypes
from types import SimpleNamespace
from nemotron_h import machine
real, taken = ctypes.CDLL(None).mallopt, []
machine.ctypes = SimpleNamespace(CDLL=lambda _: SimpleNamespace(mallopt=lambda *given: taken.append(real(*given))))
machine.tune_memory()
print(taken)
"""


LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TAKEN_LARGE = """
import torch
from nemotron_h import machine
machine.tune_memory()
held = torch.ones(2**26)
print(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""


@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[madvise]" not in LARGE_PAGES.read_text(),
    reason="the system gives none for the asking",
)
def test_large_tensors_lie_in_large_pages() -> None:
    def kilobytes(program: str) -> int:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert kilobytes(TAKEN_LARGE) > 200_000
    assert kilobytes(TAKEN_LARGE.replace("machine.tune_memory()", "")) < 100_000
