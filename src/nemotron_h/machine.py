"""What this machine has and can do: cores, memory, the container's limits, and rates measured when asked.

Facts come from the operating system, limits from the control groups that the process is in (a container's memory is
less than the machine's). Rates are measured, never looked up: a laptop without the instructions multiplies bfloat16
tens of times slower than float32, and says nothing of it.
"""

import ctypes
import math
import mmap
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# What decides which kernels run, in the words of the compiler that makes ours.
FEATURES = ("fma", "avx2", "avx512f", "avx512vnni", "avx512bf16", "amx-tile", "amx-bf16", "neon", "bf16", "sve")
CANDIDATES = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # in the order of what they cost in memory
WORTH = 1 / 3  # of float32's rate: what bfloat16 may lose in prefill, for half the bytes that each new token reads


@dataclass(frozen=True)
class Memory:
    """Bytes. limit_bytes: what this process may have at all; available_bytes: what is left of it now."""

    total_bytes: int  # of the machine
    limit_bytes: int  # the smaller of that and the container's
    available_bytes: int


def memory(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Memory:
    """The machine's memory and the container's limit on it, where there is one."""
    machine = psutil.virtual_memory()
    limit, available = machine.total, machine.available
    for group in groups("memory", cgroups, membership):
        most = number(group / "memory.max", group / "memory.limit_in_bytes")
        used = number(group / "memory.current", group / "memory.usage_in_bytes")
        if most is None or used is None or most >= machine.total:
            continue
        # files that were read, once or often, lie in memory only until it is needed
        stat = dict(line.split() for line in text(group / "memory.stat").splitlines() if len(line.split()) == 2)
        cached = sum(int(stat.get(kind, stat.get(f"total_{kind}", 0))) for kind in ("inactive_file", "active_file"))
        limit, available = min(limit, most), min(available, max(0, most - used + cached))
    return Memory(machine.total, limit, available)


def cores(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Cores that this process may use: the machine's, those it is bound to, and the container's share of time."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in groups("cpu", cgroups, membership):
        quota, _, period = text(group / "cpu.max").partition(" ")
        quota, period = quota or text(group / "cpu.cfs_quota_us"), period or text(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            count = min(count, max(1, math.ceil(int(quota) / int(period))))
    return count


def groups(controller: str, cgroups: Path, membership: Path) -> list[Path]:
    """Folders of the control groups that this process is in, innermost first, of either version."""
    found = []
    for line in text(membership).splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = cgroups / controller if controllers else cgroups
        # in a namespace of its own, a container sees its group as the top
        path = Path(inside.lstrip("/"))
        found += [top / part for part in (path, *path.parents)]
    return list(dict.fromkeys(found))


def text(path: Path) -> str:
    """A small file's text, nothing where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def number(*paths: Path) -> int | None:
    """The one number in the first of these files that has one: some are not there, some say "max"."""
    return next((int(content) for path in paths if (content := text(path)).isdigit()), None)


def cache_folder() -> Path:
    """Where what was measured on this machine is kept, where the caller names no other folder."""
    return Path.home() / ".cache" / "nemotron_h"


def tune_memory() -> None:
    """Let this process keep what torch frees, up to a gigabyte, and have large tensors in large pages.

    glibc gives freed memory back, and to get fresh pages for each temporary costs a training step time; weights in
    pages of 4 KiB are read slower than memory gives them. The command does this before torch takes its first memory; a
    program of your own may.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's own switch
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # of malloc.h
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**25)  # the largest that every glibc takes


def use_small_pages(tensor: Tensor) -> None:
    """Have a contiguous CPU tensor's memory taken from the machine in its smallest pages as it is written, whatever
    `tune_memory` asked for. A large page is cleared whole, and free memory may have to be moved out of its way first:
    for what is written in pieces here and there, and seldom read, that can take longer than writing it.

    The advice is of addresses: of a tensor that its allocator does not give back to the machine, it stays for the next
    one there.
    """
    linux = sys.platform == "linux" and hasattr(mmap, "MADV_NOHUGEPAGE")
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if linux else None
    if madvise is None or tensor.device.type != "cpu":
        return
    page = mmap.PAGESIZE
    begin, end = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
    if begin < end:
        # advice: a kernel without large pages answers that it knows none
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_NOHUGEPAGE)


def cpu_name() -> str:
    for line in text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """Those of FEATURES that this CPU has."""
    try:
        from llvmlite.binding import get_host_cpu_features  # noqa: PLC0415 - the kernels' compiler, which may be absent
    except ImportError:
        return ()
    features = get_host_cpu_features()
    return tuple(name for name in FEATURES if features.get(name))


def timed(calls: Sequence[Callable[[], object]], for_seconds: float) -> list[list[float]]:
    """Seconds of each run of each call, shortest first. They take turns, so that other programs slow them alike."""
    runs: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + for_seconds
    while time.perf_counter() < end or not runs[-1]:
        for call, own in zip(calls, runs, strict=True):
            began = time.perf_counter()
            call()
            own.append(time.perf_counter() - began)
    return [sorted(own) for own in runs]


def matmul_rates(device: torch.device | str = "cpu", size: int = 512, rows: int = 128) -> dict[str, float]:
    """Operations per second of one product (rows, size) x (size, size) in each of CANDIDATES, a multiplication and an
    addition being two."""

    def product(dtype: torch.dtype) -> Callable[[], object]:
        x, weight = (torch.ones(n, size, dtype=dtype, device=device) for n in (rows, size))

        def call() -> float:
            return F.linear(x, weight)[0, 0].item()  # item: a GPU computes after the product has returned

        return call

    runs = timed([product(dtype) for dtype in CANDIDATES.values()], for_seconds=0.1)
    # the shortest: other programs can only make a run longer
    return {name: 2 * rows * size * size / own[0] for name, own in zip(CANDIDATES, runs, strict=True)}


def bandwidth(size_bytes: int = 2**28) -> float:
    """Bytes per second at which all threads together read memory that no cache holds: by a sum or by a product, which
    read it at fewer and at more places at once, the faster one."""
    values = torch.ones(size_bytes // 2**14, 2**12)
    ones = torch.ones(values.shape[1])
    ways = timed([values.sum, lambda: torch.mv(values, ones)], for_seconds=0.6)
    # medians: memory is other machines' too, and some runs have it alone
    return size_bytes / min(runs[len(runs) // 2] for runs in ways)


def best_precision(rates: Mapping[str, float]) -> str:
    """bfloat16, or float32 where bfloat16 is slower than it is worth. rates: of `matmul_rates`."""
    return "bfloat16" if rates["bfloat16"] >= WORTH * rates["float32"] else "float32"
