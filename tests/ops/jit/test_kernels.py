import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_h.ops.jit import kernels, scalars

pytest.importorskip("numba")


@kernels.kernel(2)
def visit(start: Any, stop: Any, visits: Any, ranges: Any) -> None:
    """Counts each task, and notes the length of the range that it came in."""
    for task in range(start, stop):
        visits[task] += 1
        ranges[task] = stop - start


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 64, 1001])
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_every_task_is_done_once_in_about_equal_parts(number: int, count: int, threads: Callable[[int], None]) -> None:
    threads(number)
    visits, ranges = np.zeros(count, np.int64), np.zeros(count, np.int64)
    visit(count, visits, ranges)
    assert (visits == 1).all()
    if kernels.SHARED and count >= 4:
        assert ranges.max() == -(-count // number)
        assert ranges.min() == max(1, count // number)
    else:
        assert (ranges == count).all()  # too few for a second thread


def test_torchs_own_threads_are_found_here() -> None:
    assert sys.platform.startswith("linux") == kernels.SHARED


def test_where_they_are_out_of_reach_one_thread_does_it_all_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SHARED", False)
    scalars.said_once.cache_clear()
    visits, ranges = np.zeros(64, np.int64), np.zeros(64, np.int64)
    with pytest.warns(UserWarning, match="torch's threads are out of reach"):
        visit(64, visits, ranges)
    assert (visits == 1).all()
    assert (ranges == 64).all()
    visit(64, visits, ranges)  # said once: a second warning would be an error here


def test_machine_code_is_kept_under_a_name_that_follows_its_sources(tmp_path: Path) -> None:
    """numba's cache watches a kernel's own file; a change in what it calls must not run the old code."""
    before = kernels.sources()
    assert len(before) == 10
    copy = tmp_path / "nemotron_h"
    subprocess.run(["cp", "-r", str(Path(kernels.__file__).parents[2]), str(copy)], check=True)
    scalars_copy = copy / "ops" / "jit" / "scalars.py"
    scalars_copy.write_text(scalars_copy.read_text() + "# changed\n")
    code = "from nemotron_h.ops.jit import kernels; print(kernels.sources())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.strip() != before


def test_kernels_leave_torchs_threads_alone(threads: Callable[[int], None]) -> None:
    threads(1)
    visit(64, np.zeros(64, np.int64), np.zeros(64, np.int64))
    assert torch.get_num_threads() == 1
