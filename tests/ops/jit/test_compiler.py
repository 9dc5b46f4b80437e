import pytest
import torch

from nemotron_h.ops.jit import compiler, floats, quantized
from tests.kernels import need_kernels

need_kernels()


@compiler.piece
def _halved(n):  # type: ignore[no-untyped-def]
    return n // 2


@compiler.numba.njit
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
    engine = caller.library._codegen._engine
    assert engine.is_symbol_defined(caller.fndesc.llvm_func_name)
    assert not engine.is_symbol_defined(name)


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


def test_no_two_pieces_have_one_name() -> None:
    """Machine code that is kept on disk names them so: of two of one name, a process would run the first it meets."""
    rooms = (floats.add_many, floats.add_few, floats.add_few_pairs, quantized.add_many, quantized.add_few)
    assert len({made.py_func.__qualname__ for made in rooms}) == len(rooms)
