import os
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


ADVISED = """
import torch
from nemotron_h import machine
machine.tune_memory()
held = torch.ones(2**26)
flags, inside = "", False
for line in open("/proc/self/smaps"):
    first = line.split()[0]
    if "-" in first:
        start, _, stop = first.partition("-")
        inside = int(start, 16) <= held.data_ptr() + 2**25 < int(stop, 16)
    elif inside and first == "VmFlags:":
        flags = line
print("hg" in flags.split())  # large pages were asked for; whether there are any is the system's
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's pages")
def test_large_pages_are_asked_for_large_tensors() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("this system has none")
    alone = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}

    def asked(program: str) -> str:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=alone)
        return done.stdout.strip()

    assert asked(ADVISED) == "True"
    assert asked(ADVISED.replace("machine.tune_memory()", "")) == "False"
