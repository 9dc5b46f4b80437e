"""When kernels can be compiled here, and what a function within one is.

A function within a kernel is compiled with the kernel: numba by itself would optimise it and make machine code of it
alone too, once more in each function that calls it, and a first use took half as long again.
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
except ImportError:
    MISSING = "numba is not installed"
if MISSING:  # the torch definitions run; said once, by `runs`
    numba, FEATURES = None, {}


@cache
def said_once(reason: str) -> None:
    warnings.warn(reason, stacklevel=3)


def runs(*tensors: Tensor) -> bool:
    """Can kernels take these tensors? On the CPU, in float32 or bfloat16, where numba can compile for it."""
    if any(t.device.type != "cpu" or t.dtype not in (torch.float32, torch.bfloat16) for t in tensors):
        return False
    if numba is None:
        said_once(f"{MISSING}: the torch definitions run instead of the CPU kernels, slower")
        return False
    return True


def inline(function: Callable[..., Any]) -> Any:
    """A formula within a kernel."""
    return function if numba is None else numba.njit(inline="always", error_model="numpy")(function)


def piece(function: Callable[..., Any]) -> Any:
    """A function that kernels call."""
    if numba is None:
        return function
    return numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, pipeline_class=Piece)(
        function
    )


def compile_once() -> None:
    """Said in a piece: callers call it, instead of each compiling a copy of its own, which takes seconds."""


if numba is not None:

    class Code(JITCodeLibrary):  # type: ignore[misc]
        """What numba made of a piece, as LLVM was given it: callers link it, and nothing runs it by itself."""

        def _optimize_functions(self, module: Any) -> None:
            module.data_layout = self._codegen._data_layout

        def _optimize_final_module(self) -> None:
            """Nothing."""

        def _finalize_final_module(self) -> None:
            self._finalize_dynamic_globals()
            self._finalized = True

        def get_pointer_to_function(self, name: str) -> int:
            return 0  # none

        @property
        def codegen(self) -> "Code":
            return self  # of which numba asks:

        def set_env(self, name: str, env: Any) -> None:
            """Nothing: only code that runs has Python objects."""

    class Piece(Compiler):  # type: ignore[misc]
        def __init__(self, typing: Any, target: Any, library: Any, *rest: Any) -> None:
            super().__init__(typing, target, Code(target.codegen(), "piece"), *rest)

    @intrinsic  # type: ignore[untyped-decorator]
    def _alone(typing):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            builder.function.attributes.add("noinline")
            return context.get_dummy_value()

        return numba.types.void(), generate

    @overload(compile_once, inline="always")  # type: ignore[untyped-decorator]
    def _compile_once():  # type: ignore[no-untyped-def]
        def call():  # type: ignore[no-untyped-def]
            _alone()

        return call
