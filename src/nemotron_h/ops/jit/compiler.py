"""When kernels can be compiled here, and what a function within one is.

A piece of a kernel is compiled with the kernel. numba by itself would optimise each piece alone and make machine code
of it, which nothing runs, and then once more in each function that calls it: a first use would take longer.
"""

import platform
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

FEATURES: dict[str, bool] = {}  # of this CPU, those that code made by numba may use
MISSING = ""  # what keeps kernels from running here
try:
    import llvmlite.binding
    import numba
    from numba.core.codegen import JITCodeLibrary
    from numba.core.compiler import Compiler
    from numba.extending import intrinsic, overload

    # told to compile for another CPU than this one, or without AVX, LLVM ends the process over what that has not
    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:
        named = (numba.config.CPU_FEATURES or "").split(",")
        FEATURES = {name.removeprefix("+"): True for name in named if name.startswith("+")}
    elif numba.config.ENABLE_AVX:
        FEATURES = dict(llvmlite.binding.get_host_cpu_features())
    if numba.config.DISABLE_JIT:
        MISSING = "NUMBA_DISABLE_JIT is set"
    elif platform.machine() in ("x86_64", "AMD64") and not llvmlite.binding.get_host_cpu_features().get("fma"):
        MISSING = "this CPU has no fused multiply-add"  # without it a kernel is slower than torch
except ModuleNotFoundError as error:
    MISSING = f"{error.name} is not installed"
except ImportError as error:  # a numba that cannot be used beside this numpy says so
    MISSING = f"numba cannot be imported ({' '.join(str(error).split()):.200})"
if MISSING:  # the torch definitions run; said once, by `runs`
    numba, FEATURES = None, {}


@cache
def said_once(reason: str) -> None:
    warnings.warn(reason, stacklevel=3)


def runs(*tensors: Tensor) -> bool:
    """Can kernels take these tensors? On the CPU, in float32 or bfloat16, where numba can compile for it."""
    for t in tensors:  # no generator: this is asked hundreds of times a token
        if not t.is_cpu or t.dtype not in (torch.bfloat16, torch.float32):
            return False
    if numba is None:
        said_once(f"{MISSING}: the torch definitions run instead of the CPU kernels, slower")
        return False
    return True


def inline(function: Callable[..., Any]) -> Any:
    """A formula within a kernel."""
    return function if numba is None else numba.njit(inline="always", error_model="numpy")(function)


def piece(function: Callable[..., Any]) -> Any:
    """A function that kernels call, and nothing else does: it is no code by itself."""
    if numba is None:
        return function
    within = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": PieceCompiler}
    return numba.njit(error_model="numpy", **within)(function)


def one_copy() -> None:
    """Said in a piece: its calls within a kernel share one copy; in each call's place, it would take seconds more."""


if numba is not None:

    class Unfinished(JITCodeLibrary):  # type: ignore[misc]
        """What numba made of a piece, as LLVM was given it: its callers link it, and optimise it with themselves."""

        def _optimize_functions(self, module: Any) -> None:
            module.data_layout = self._codegen._data_layout

        def _optimize_final_module(self) -> None:
            """Nothing."""

        def _finalize_final_module(self) -> None:
            self._finalize_dynamic_globals()
            self._finalized = True

        def get_pointer_to_function(self, name: str) -> int:
            return 0  # it has none

        @property
        def codegen(self) -> "Unfinished":
            """What numba gives the Python objects of a function to, by `set_env`."""
            return self

        def set_env(self, name: str, env: Any) -> None:
            """Nothing: only code that runs has some."""

    class PieceCompiler(Compiler):  # type: ignore[misc]
        def __init__(self, typing: Any, target: Any, library: Any, *rest: Any) -> None:
            super().__init__(typing, target, Unfinished(target.codegen(), "piece"), *rest)

    @intrinsic  # type: ignore[untyped-decorator]
    def _alone(typing):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            builder.function.attributes.add("noinline")
            return context.get_dummy_value()

        return numba.types.void(), generate

    @overload(one_copy, inline="always")  # type: ignore[untyped-decorator]
    def _one_copy():  # type: ignore[no-untyped-def]
        def call():  # type: ignore[no-untyped-def]
            _alone()

        return call
