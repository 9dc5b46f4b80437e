import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_h.ops.jit import compiler, kernels
from tests.kernels import need_kernels

need_kernels()


@kernels.kernel(2)
def visit(start: Any, stop: Any, visits: Any, ranges: Any) -> None:
    """Counts each task, and notes the length of the range that it came in."""
    for task in range(start, stop):
        visits[task] += 1
        ranges[task] = stop - start


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 64, 1001])
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_every_task_is_done_once_a_few_at_a_time(number: int, count: int, threads: Callable[[int], None]) -> None:
    threads(number)
    visits, ranges = np.zeros(count, np.int64), np.zeros(count, np.int64)
    visit(count, visits, ranges)
    assert (visits == 1).all()
    if kernels.SHARED and count >= 4 and number > 1:
        assert ranges.max() == max(1, min(2, count // (kernels.SHARES * number)))
    else:
        assert (ranges == count).all()  # too few for a second thread


@kernels.kernel(1)
def wait_at_first(start: Any, stop: Any, done: Any, patience: Any, spent: Any) -> None:
    """The first task waits until all others are done."""
    for task in range(start, stop):
        while task == 0 and done.sum() < len(done) - 1 and spent[0] < patience:
            spent[0] += 1
        done[task] = 1


@pytest.mark.skipif(not kernels.SHARED, reason="one thread does it all")
def test_while_one_task_takes_long_other_threads_do_all_the_others(threads: Callable[[int], None]) -> None:
    threads(2)
    done, spent = np.zeros(64), np.zeros(1, np.int64)
    wait_at_first(64, done, 10**9, spent)
    assert done.all()
    assert spent[0] < 10**9


def test_torchs_own_threads_are_found_here() -> None:
    assert sys.platform.startswith("linux") == kernels.SHARED


def test_where_they_are_out_of_reach_one_thread_does_it_all_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SHARED", False)
    compiler.said_once.cache_clear()
    visits, ranges = np.zeros(64, np.int64), np.zeros(64, np.int64)
    with pytest.warns(UserWarning, match="torch's threads are out of reach"):
        visit(64, visits, ranges)
    assert (visits == 1).all()
    assert (ranges == 64).all()
    visit(64, visits, ranges)  # said once: a second warning would be an error here


@kernels.kernel(1)
def fail_at(start: Any, stop: Any, place: Any, done: Any) -> None:
    for task in range(start, stop):
        if task == place:
            raise ValueError("a task that fails")
        done[task] = 1


@pytest.mark.parametrize("number", [1, 3])
def test_a_task_that_fails_is_an_error_and_not_a_result(number: int, threads: Callable[[int], None]) -> None:
    threads(number)
    for place in (0, 40, 63):
        with pytest.raises(MemoryError, match="a task of a kernel failed"):
            fail_at(64, place, np.zeros(64))
    done = np.zeros(64)
    fail_at(64, -1, done)
    assert done.all()


def sources_of(package: Path) -> str:
    code = "from nemotron_h.ops.jit import kernels; print(kernels.sources())"
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_machine_code_is_kept_under_a_name_that_follows_its_sources(tmp_path: Path) -> None:
    """numba's cache watches a kernel's own file; a change in what it calls must not run the old code. And a folder with
    a space in its name is a folder like any other."""
    package = tmp_path / "a copy" / "nemotron_h"
    shutil.copytree(Path(kernels.__file__).parents[2], package, ignore=shutil.ignore_patterns("__pycache__"))
    before = kernels.sources()
    assert sources_of(package) == f"{before}\n"
    path = package / "ops" / "jit" / "scalars.py"
    path.write_text(path.read_text() + "# changed\n")
    assert sources_of(package) != f"{before}\n"
    assert kernels.launcher(visit.__wrapped__).__name__ == f"visit_{before}"


def test_without_a_folder_to_write_to_kernels_are_compiled_all_the_same_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = kernels.numba.njit

    def nowhere(*functions: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(*functions, **options)

    monkeypatch.setattr(kernels.numba, "njit", nowhere)
    compiler.said_once.cache_clear()
    with pytest.warns(UserWarning, match="cannot be kept on disk here"):
        launch = kernels.launcher(visit.__wrapped__)
    visits, ranges = np.zeros(8, np.int64), np.zeros(8, np.int64)
    launch(0, 8, 1, 8, visits, ranges)
    assert (visits == 1).all()


def test_only_our_kernels_are_said_to_be_compiled(caplog: pytest.LogCaptureFixture) -> None:
    kernels.numba.njit(lambda: 1)()
    assert not caplog.records


def test_kernels_leave_torchs_threads_alone(threads: Callable[[int], None]) -> None:
    threads(1)
    visit(64, np.zeros(64, np.int64), np.zeros(64, np.int64))
    assert torch.get_num_threads() == 1


@kernels.kernel(1)
def add_up(start: Any, stop: Any, numbers: Any, sums: Any) -> None:
    """sums[task] += all numbers so far."""
    for task in range(start, stop):
        for place in range(len(numbers)):
            sums[task] += numbers[place]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_recorded_launches_run_again_in_order_on_the_same_memory(number: int, threads: Callable[[int], None]) -> None:
    """Each launch reads what the one before wrote, all of it."""
    threads(number)
    arrays = [np.ones(50, np.int64), *(np.zeros(50, np.int64) for _ in range(6))]
    with kernels.recording() as made:
        for before, after in pairwise(arrays):
            add_up(50, before, after)
    assert not made.spoiled
    assert [array[7] for array in arrays] == [50**k for k in range(7)]
    given, last = arrays[0], arrays[-1]
    for array in arrays[1:]:
        array[:] = 0
    given[:] = 2
    del arrays, array, before, after  # what launches are of stays where it is
    for _ in range(5):
        gc.collect()
        made.replay()
    assert (last > 0).all()
    assert len(set(last.tolist())) == 1
    visits, ranges = np.zeros(9, np.int64), np.zeros(9, np.int64)
    with kernels.recording() as made:
        visit(9, visits, ranges)
    visit(9, visits, ranges)  # is none of it
    made.replay()
    assert (visits == 3).all()


def test_what_torch_computes_spoils_a_recording() -> None:
    x = torch.ones(4, 4)
    with kernels.recording() as made:
        torch.empty(3)
        x.view(16)[2:].numpy()
    assert not made.spoiled
    with kernels.recording() as made:
        x + 1
    assert made.spoiled == "aten::add"


@kernels.kernel(1)
def too_much(start: Any, stop: Any, size: Any) -> None:
    for _ in range(start, stop):
        np.empty(size[0], np.float64)[0] = 1


def test_a_launch_that_fails_when_it_is_run_again_is_told() -> None:
    size = np.ones(1, np.int64)
    with kernels.recording() as made:
        too_much(1, size)
    made.replay()
    size[0] = 2**50
    with pytest.raises(MemoryError, match="a task of a kernel failed"):
        made.replay()
    size[0] = 1
    made.replay()
