"""A kernel: a function of a range of tasks, compiled at first use, whose tasks torch's own threads share.

One pool of threads serves torch and the kernels: a second one (numba's, or Python's) would take the cores from torch's
threads, which spin while they wait for the next operation. So a kernel is handed to the OpenMP runtime that torch has
loaded, through the entry point that compilers use.

Tasks differ in what they cost, as a prompt's portion does from the next tokens beside it, and so do cores that others
use too: a thread takes a few tasks at a time, until none are left. A task depends on nothing but its number: bits do
not depend on which thread took it.
"""

import ctypes
import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemotron_h.ops.jit.scalars import numba, said_once

ENTRY = "GOMP_parallel"
SHARES = 8  # times that a thread comes for tasks, or more, where there are enough of them


def kernel(least: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Of function(start, stop, ...), the tasks from start to before stop: a function of (count, ...), all tasks.

    Fewer than 2 * least tasks are not worth a second thread; of several, none takes more than `least` at a time.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        if numba is None:
            return function
        launch = launcher(function)

        @functools.wraps(function)
        def run(count: int, *rest: Any) -> None:
            if not SHARED:
                said_once(
                    "torch's threads are out of reach here (no OpenMP library of GNU's kind): kernels take one core"
                )
            threads = torch.get_num_threads() if SHARED and count >= 2 * least else 1
            some = count if threads == 1 else max(1, min(least, count // (SHARES * threads)))
            launch(count, threads, some, *rest)

        return run

    return decorate


def runtime() -> ctypes.CDLL | None:
    """Torch itself, where the OpenMP library that it has loaded has GNU's entry point: a name is looked up in what a
    library depends on too."""
    library = ctypes.CDLL(torch._C.__file__)
    return library if hasattr(library, ENTRY) else None


if numba is not None:
    import llvmlite.binding
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils, event
    from numba.extending import intrinsic

    SHARED = (library := runtime()) is not None
    if library is not None:
        llvmlite.binding.add_symbol(ENTRY, ctypes.cast(getattr(library, ENTRY), ctypes.c_void_p).value)

    class Compiling(event.Listener):  # type: ignore[misc]
        """Says once that kernels are being compiled: the wait is for the first use on a machine."""

        said = False

        def on_start(self, event: Any) -> None:
            ours = event.data["dispatcher"].py_func.__module__.startswith(__package__)
            if ours and not self.said:
                logging.getLogger("nemotron_h").info("compiling the CPU kernels, once on this machine")
            self.said = self.said or ours

        def on_end(self, event: Any) -> None:
            """Nothing."""

    event.register("numba:compile", Compiling())

    def launcher(function: Callable[..., None]) -> Any:
        """function(start, stop, ...) as compiled code of (count, threads, some, ...), kept on disk beside the kernel's
        file under a name that says which sources it was made from."""
        task = numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
        name = f"{function.__name__}_{sources()}"
        namespace: dict[str, Any] = {"__name__": function.__module__, "share": share, "task": task}
        source = f"def {name}(count, threads, some, *rest):\n    share(task, count, threads, some, rest)\n"
        exec(compile(source, function.__code__.co_filename, "exec"), namespace)
        compiled = functools.partial(numba.njit, error_model="numpy", nogil=True)
        try:
            return compiled(cache=True)(namespace[name])
        except RuntimeError:  # numba found no folder to write to
            said_once(
                "the CPU kernels cannot be kept on disk here, and are compiled anew each time; set NUMBA_CACHE_DIR"
            )
            return compiled()(namespace[name])

    @functools.cache
    def sources() -> str:
        """What the kernels are made from, in ten letters: numba's own cache watches one file of them."""
        texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
        return hashlib.sha256(b"".join(texts) + bytes([SHARED])).hexdigest()[:10]

    @intrinsic  # type: ignore[untyped-decorator]
    def share(typing, task, count, threads, some, rest):  # type: ignore[no-untyped-def]
        """task(start, stop, *rest) on so many threads, for `some` numbers of 0..count at a time."""
        of_task = task.get_call_type(typing, (types.int64, types.int64, *rest.types), {})
        word, number = ir.IntType(64), ir.IntType(32)

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            compiled = task.dispatcher.get_compile_result(of_task)
            context.active_code_library.add_linking_library(compiled.library)
            module = builder.module
            function = context.declare_function(module, compiled.fndesc)
            _, count, threads, some, rest = args
            values = [word(0), word(0), count, some, *cgutils.unpack_tuple(builder, rest)]

            # void part(data): what one thread does, data being whether a task failed, the first number that nobody has
            # taken, the count, how many to take, and the rest
            held = ir.LiteralStructType([value.type for value in values])
            part = ir.Function(module, ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t]), module.name + ".part")
            part.linkage = "internal"
            inside = ir.IRBuilder(part.append_basic_block())
            given = inside.bitcast(part.args[0], held.as_pointer())
            places = [cgutils.gep_inbounds(inside, given, 0, k) for k in range(len(values))]
            count, some, *rest = (inside.load(where) for where in places[2:])
            take, work, done = (part.append_basic_block(name) for name in ("take", "work", "done"))
            inside.branch(take)
            inside.position_at_end(take)
            start = inside.atomic_rmw("add", places[1], some, "monotonic")
            inside.cbranch(inside.icmp_signed("<", start, count), work, done)
            inside.position_at_end(work)
            beyond = inside.add(start, some)
            stop = inside.select(inside.icmp_signed("<", beyond, count), beyond, count)
            status, _ = context.call_conv.call_function(
                inside, function, types.none, of_task.args, [start, stop, *rest]
            )
            with inside.if_then(status.is_error):
                inside.store(word(1), places[0])
            inside.branch(take)
            inside.position_at_end(done)
            inside.ret_void()

            data = cgutils.alloca_once(builder, held)
            for index, value in enumerate(values):
                builder.store(value, cgutils.gep_inbounds(builder, data, 0, index))
            failed = cgutils.gep_inbounds(builder, data, 0, 0)
            data = builder.bitcast(data, cgutils.voidptr_t)
            alone = builder.icmp_signed("==", threads, word(1))
            with builder.if_else(alone) as (then, otherwise):
                with then:
                    builder.call(part, [data])
                with otherwise:
                    if SHARED:
                        kind = ir.FunctionType(ir.VoidType(), [part.type, cgutils.voidptr_t, number, number])
                        parallel = cgutils.get_or_insert_function(module, kind, ENTRY)
                        builder.call(parallel, [part, data, builder.trunc(threads, number), number(0)])
            with builder.if_then(builder.icmp_signed("!=", builder.load(failed), word(0))):
                message = ("a task of a kernel failed, most likely for lack of memory",)
                context.call_conv.return_user_exc(builder, MemoryError, message)
            return context.get_dummy_value()

        return types.void(task, types.int64, types.int64, types.int64, rest), generate
