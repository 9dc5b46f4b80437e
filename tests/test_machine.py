import ctypes
import mmap
import os
import re
from dataclasses import fields
from pathlib import Path

import psutil
import pytest
import torch

from nemotron_h import PRESETS, machine
from nemotron_h.model.state import MambaState, State

GIB = 2**30


def written(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return root


def belonging(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "membership"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_without_a_container_it_is_the_machines(tmp_path: Path) -> None:
    found = machine.memory(tmp_path, tmp_path / "none")
    assert found.total_bytes == found.limit_bytes == psutil.virtual_memory().total
    assert abs(found.available_bytes - psutil.virtual_memory().available) < GIB
    assert 1 <= machine.cores(tmp_path, tmp_path / "none") <= os.cpu_count()


def test_a_containers_limit_counts_and_files_read_do_not(tmp_path: Path) -> None:
    stat = f"anon 5\ninactive_file {GIB // 8}\nactive_file {GIB // 8}"
    files = {"app/memory.max": str(GIB), "app/memory.current": str(GIB // 2), "app/memory.stat": stat}
    found = machine.memory(written(tmp_path, files), belonging(tmp_path, "0::/app"))
    assert found.limit_bytes == GIB
    assert found.available_bytes == min(GIB * 3 // 4, psutil.virtual_memory().available)
    assert found.total_bytes == psutil.virtual_memory().total


def test_the_tightest_of_the_groups_around_it_counts(tmp_path: Path) -> None:
    root = written(
        tmp_path,
        {
            "a/memory.max": str(GIB),
            "a/memory.current": str(GIB),
            "a/b/memory.max": "max",
            "a/b/memory.current": "7",
            "a/cpu.max": "150000 100000",
            "a/b/cpu.max": "max 100000",
        },
    )
    inside = belonging(tmp_path, "0::/a/b")
    assert machine.memory(root, inside).limit_bytes == GIB
    assert machine.memory(root, inside).available_bytes == 0
    assert machine.cores(root, inside) == min(2, machine.cores(tmp_path / "none", inside))


def test_a_container_that_sees_its_group_as_the_top(tmp_path: Path) -> None:
    root = written(tmp_path, {"memory.max": str(GIB), "memory.current": "0", "cpu.max": "50000 100000"})
    inside = belonging(tmp_path, "0::/docker/abc")
    assert machine.memory(root, inside).limit_bytes == GIB
    assert machine.cores(root, inside) == 1


def test_groups_of_the_first_version(tmp_path: Path) -> None:
    root = written(
        tmp_path,
        {
            "memory/x/memory.limit_in_bytes": str(GIB),
            "memory/x/memory.usage_in_bytes": str(GIB // 2),
            "memory/x/memory.stat": "total_inactive_file 1024",
            "cpu,cpuacct/x/cpu.cfs_quota_us": "-1",
            "cpu/x/cpu.cfs_quota_us": "100000",
            "cpu/x/cpu.cfs_period_us": "100000",
        },
    )
    inside = belonging(tmp_path, "4:memory:/x", "1:cpu:/x", "0::/")
    assert machine.memory(root, inside).limit_bytes == GIB
    assert machine.memory(root, inside).available_bytes == GIB // 2 + 1024
    assert machine.cores(root, inside) == 1


def test_no_limit_is_written_as_a_very_large_one(tmp_path: Path) -> None:
    root = written(tmp_path, {"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "5"})
    found = machine.memory(root, belonging(tmp_path, "4:memory:/x"))
    assert found.limit_bytes == found.total_bytes


@pytest.mark.parametrize(
    ("bfloat16", "float32", "want"), [(400.0, 170.0, "bfloat16"), (60.0, 170.0, "bfloat16"), (15.0, 170.0, "float32")]
)
def test_bfloat16_is_taken_where_it_is_not_three_times_slower(bfloat16: float, float32: float, want: str) -> None:
    assert machine.best_precision({"bfloat16": bfloat16, "float32": float32}) == want


def test_the_slower_call_is_found_to_be_slower() -> None:
    small, large = torch.randn(16, 16), torch.randn(600, 600)
    quick, slow = machine.timed([lambda: small @ small, lambda: large @ large], for_seconds=0.02)
    assert 0 < quick[0] < slow[0]
    assert quick == sorted(quick)
    assert len(quick) == len(slow)
    rates = machine.matmul_rates(size=64, rows=8)
    assert set(rates) == {"bfloat16", "float32"}
    assert all(rate > 1e6 for rate in rates.values())
    assert machine.bandwidth(2**20) > 1e6


def test_the_cpu_has_a_name_and_features_that_are_known() -> None:
    assert machine.cpu_name()
    assert set(machine.cpu_features()) <= set(machine.FEATURES)


def advised(address: int) -> list[str]:
    """What the kernel was told of the memory at an address, in two letters each."""
    inside = False
    smaps = Path("/proc/self/smaps")
    for line in smaps.read_text().splitlines() if smaps.exists() else []:
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            inside = begin <= address < end
        if inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


def advice_is_told() -> bool:
    """Whether this system says of memory what it was advised: some sandboxes have the files and leave that out."""
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return False
    with mmap.mmap(-1, 2**20) as memory:
        try:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        except OSError:
            return False
        view = ctypes.c_char.from_buffer(memory)
        told = "nh" in advised(ctypes.addressof(view))
        del view
        return told


tells_advice = pytest.mark.skipif(not advice_is_told(), reason="this system does not tell how memory was advised")


@tells_advice
def test_small_pages_are_those_of_the_tensor_and_of_nobody_beside_it() -> None:
    # fresh from the kernel: what an allocator hands out may have been advised for somebody before
    both = torch.frombuffer(mmap.mmap(-1, 2**25), dtype=torch.uint8).view(2, 2**24)
    machine.use_small_pages(both[1])
    assert "nh" in advised(both[1].data_ptr() + 2**23)
    assert "nh" not in advised(both[1].data_ptr() - 1)
    machine.use_small_pages(torch.empty(8))  # less than a page
    machine.use_small_pages(torch.empty(8, device="meta"))


def test_a_pools_snapshots_take_memory_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []
    monkeypatch.setattr("nemotron_h.model.state.use_small_pages", asked.append)
    state = State.pool(PRESETS["3m"], 8, 0, dtype=torch.bfloat16)
    state.use_small_pages(3)
    of_mamba = [layer for layer in state.layers if isinstance(layer, MambaState)]
    own = [getattr(layer, field.name)[3:] for layer in of_mamba for field in fields(layer)]
    assert [(one.data_ptr(), one.shape) for one in asked] == [(one.data_ptr(), one.shape) for one in own]
