import pytest
import torch

from nemotron_h.ops.jit import compiler

numba = pytest.importorskip("numba")


@compiler.piece
def _halved(n):  # type: ignore[no-untyped-def]
    return n // 2


@numba.njit
def _halvings(n):  # type: ignore[no-untyped-def]
    count = 0
    while n > 1:
        n, count = _halved(n), count + 1
    return count


def test_a_piece_is_machine_code_only_within_what_calls_it() -> None:
    assert _halvings(1024) == 10
    (made,) = _halved.overloads.values()
    (caller,) = _halvings.overloads.values()
    name = made.fndesc.llvm_func_name
    assert not made.library.codegen._codegen._engine.is_symbol_defined(name)
    assert caller.library.get_pointer_to_function(caller.fndesc.llvm_cpython_wrapper_name)


def test_kernels_run_on_cpu_floats_and_say_once_when_they_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    float32, bfloat16 = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert compiler.runs(float32, bfloat16)
    assert not compiler.runs(float32, float32.double())
    assert not compiler.runs(float32.to("meta"))
    monkeypatch.setattr(compiler, "numba", None)
    monkeypatch.setattr(compiler, "MISSING", "numba is not installed")
    compiler.said_once.cache_clear()
    with pytest.warns(UserWarning, match="numba is not installed: the torch definitions run"):
        assert not compiler.runs(float32)
    assert not compiler.runs(float32)  # said once: a second warning would be an error here
