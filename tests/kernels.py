"""Tests of compiled kernels are not run where none can be, and say why."""

import pytest

from nemotron_h.ops.jit.compiler import MISSING

REASON = f"kernels cannot run: {MISSING}"
needs_kernels = pytest.mark.skipif(bool(MISSING), reason=REASON)


def need_kernels() -> None:
    """For a fixture, or all of a module, before it compiles its own."""
    if MISSING:
        pytest.skip(REASON, allow_module_level=True)
