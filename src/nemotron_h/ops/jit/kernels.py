"""A kernel: a function of a range of tasks, compiled at first use, whose tasks torch's own threads share.

One pool of threads serves torch and the kernels: a second one (numba's, or Python's) would take the cores from torch's
threads, which spin while they wait for the next operation. So a kernel is handed to the OpenMP runtime that torch has
loaded, through the entry point that compilers use.

Tasks differ in what they cost, as a prompt's portion does from the next tokens beside it, and so do cores that others
use too: a thread takes a few tasks at a time, until none are left. A task depends on nothing but its number: bits do
not depend on which thread took it.

A launch is a piece of memory: which function, and what of. So launches can be recorded as they are made, and all of
them run again, on the same memory, in one go: a token of a small model takes a millisecond, and to launch its kernels
from Python takes ten.
"""

import ctypes
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron_h.ops.jit.compiler import numba, piece, said_once

ENTRY, BARRIER = "GOMP_parallel", "GOMP_barrier"
SHARES = 8  # times that a thread comes for tasks, or more, where there are enough of them
LAUNCH_BYTES = 4096  # that a launch may take


class Recording:
    """Launches in order, and all that they are of, which stays where it is."""

    def __init__(self) -> None:
        self.spoiled = ""  # the operation of torch that ran among them, and would not run again
        self._functions: list[int] = []
        self._launches: list[Any] = []
        self._kept: list[Any] = []
        self._tables: tuple[Any, Any] | None = None

    def add(self, launch: Any, count: int, threads: int, some: int, rest: tuple[Any, ...]) -> None:
        """Launch, and remember it."""
        place = np.empty(LAUNCH_BYTES, np.uint8)
        self._functions.append(launch(place.ctypes.data, count, threads, some, *rest))
        self._launches.append(place)
        self._kept.append(rest)

    def replay(self, which: slice = slice(None)) -> None:
        """Run all launches again, or those in `which`. Raises: MemoryError."""
        if self._tables is None:
            places = [place.ctypes.data for place in self._launches]
            self._tables = np.array(self._functions, np.int64), np.array(places, np.int64)
        functions, launches = self._tables
        if run_again(functions[which], launches[which], torch.get_num_threads() if SHARED else 1):
            raise MemoryError("a task of a kernel failed, most likely for lack of memory")


RECORDING: ContextVar[Recording | None] = ContextVar("RECORDING", default=None)


@contextmanager
def recording() -> Iterator[Recording]:
    """Launches that are made here, in this thread, are recorded; what torch computes meanwhile spoils it."""
    made = Recording()
    token = RECORDING.set(made)
    try:
        with Watch(made):
            yield made
    finally:
        RECORDING.reset(token)


class Watch(TorchDispatchMode):
    """Names an operation of torch that does more than look at memory in another way, or ask for some."""

    def __init__(self, made: Recording) -> None:
        super().__init__()
        self.made = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or func._schema.name in ("aten::empty", "aten::empty_like", "aten::detach")):
            self.made.spoiled = self.made.spoiled or func._schema.name
        return func(*args, **(kwargs or {}))


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
            made = RECORDING.get()
            if made is None:
                launch(0, count, threads, some, *rest)
            else:
                made.add(launch, count, threads, some, rest)

        return run

    return decorate


def runtime() -> ctypes.CDLL | None:
    """Torch itself, where the OpenMP library that it has loaded has GNU's entry points: a name is looked up in what a
    library depends on too."""
    library = ctypes.CDLL(torch._C.__file__)
    return library if hasattr(library, ENTRY) and hasattr(library, BARRIER) else None


if numba is not None:
    import llvmlite.binding
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils, event
    from numba.extending import intrinsic

    SHARED = (library := runtime()) is not None
    if library is not None:
        for entry in (ENTRY, BARRIER):
            llvmlite.binding.add_symbol(entry, ctypes.cast(getattr(library, entry), ctypes.c_void_p).value)

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
        """function(start, stop, ...) as compiled code of (keep, count, threads, some, ...), kept on disk beside the
        kernel's file under a name that says which sources it was made from. keep: an address that gets the launch, to
        be run again, or 0; it returns that of what runs one."""
        name = f"{function.__name__}_{sources()}"
        namespace: dict[str, Any] = {"__name__": function.__module__, "share": share, "task": piece(function)}
        given = "keep, count, threads, some, "
        source = f"def {name}({given}*rest):\n    return share(task, {given}rest)\n"
        exec(compile(source, function.__code__.co_filename, "exec"), namespace)
        return kept_on_disk(namespace[name])

    def kept_on_disk(function: Callable[..., Any]) -> Any:
        compiled = functools.partial(numba.njit, error_model="numpy", nogil=True, no_cfunc_wrapper=True)
        try:
            return compiled(cache=True)(function)
        except RuntimeError:  # numba found no folder to write to
            said_once(
                "the CPU kernels cannot be kept on disk here, and are compiled anew each time; set NUMBA_CACHE_DIR"
            )
            return compiled()(function)

    @functools.cache
    def sources() -> str:
        """What the kernels are made from, in ten letters: numba's own cache watches one file of them."""
        texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
        return hashlib.sha256(b"".join(texts) + bytes([SHARED])).hexdigest()[:10]

    def borrowed(context: Any, builder: Any, kind: Any, value: Any) -> Any:
        """An array without the counter of who uses it, which is numba's own and of one call: Python keeps the array."""
        if not isinstance(kind, types.Array):
            return value
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = array.parent = cgutils.get_null_value(array.meminfo.type)
        return array._getvalue()

    def on_threads(builder: Any, function: Any, data: Any, threads: Any) -> None:
        """function(data) on each of so many threads, on this one where it is one."""
        number = ir.IntType(32)
        data = builder.bitcast(data, cgutils.voidptr_t)
        with builder.if_else(builder.icmp_signed("==", threads, threads.type(1))) as (then, otherwise):
            with then:
                builder.call(function, [data])
            with otherwise:
                if SHARED:
                    kind = ir.FunctionType(ir.VoidType(), [function.type, cgutils.voidptr_t, number, number])
                    parallel = cgutils.get_or_insert_function(builder.module, kind, ENTRY)
                    builder.call(parallel, [function, data, builder.trunc(threads, number), number(0)])

    @intrinsic  # type: ignore[untyped-decorator]
    def address_as_pointer(typing, address):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return builder.inttoptr(args[0], ir.IntType(64).as_pointer())

        return types.CPointer(types.int64)(address), generate

    @intrinsic  # type: ignore[untyped-decorator]
    def share(typing, task, keep, count, threads, some, rest):  # type: ignore[no-untyped-def]
        """task(start, stop, *rest) on so many threads, for `some` numbers of 0..count at a time."""
        kinds = rest
        of_task = task.get_call_type(typing, (types.int64, types.int64, *kinds.types), {})
        word = ir.IntType(64)

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            compiled = task.dispatcher.get_compile_result(of_task)
            context.active_code_library.add_linking_library(compiled.library)
            module = builder.module
            function = context.declare_function(module, compiled.fndesc)
            _, keep, count, threads, some, rest = args
            given = zip(kinds.types, cgutils.unpack_tuple(builder, rest), strict=True)
            values = [word(0), word(0), count, some, *(borrowed(context, builder, *one) for one in given)]

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
            if context.get_abi_sizeof(held) > LAUNCH_BYTES:
                raise TypeError("a launch takes more than LAUNCH_BYTES")
            with builder.if_then(builder.icmp_signed("!=", keep, word(0))):
                builder.store(builder.load(data), builder.inttoptr(keep, held.as_pointer()))
            on_threads(builder, part, data, threads)
            with builder.if_then(builder.icmp_signed("!=", builder.load(failed), word(0))):
                message = ("a task of a kernel failed, most likely for lack of memory",)
                context.call_conv.return_user_exc(builder, MemoryError, message)
            return builder.ptrtoint(part, word)

        return types.int64(task, types.int64, types.int64, types.int64, types.int64, rest), generate

    @intrinsic  # type: ignore[untyped-decorator]
    def in_turn(typing, functions, launches, count, threads):  # type: ignore[no-untyped-def]
        """Each function of its launch, both by address: all threads at one until it is done."""
        word = ir.IntType(64)

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            module = builder.module
            held = ir.LiteralStructType([word] * 4)  # args
            all_of = ir.Function(module, ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t]), module.name + ".all")
            all_of.linkage = "internal"
            inside = ir.IRBuilder(all_of.append_basic_block())
            given = inside.bitcast(all_of.args[0], held.as_pointer())
            functions, launches, count, threads = (
                inside.load(cgutils.gep_inbounds(inside, given, 0, place)) for place in range(4)
            )
            with cgutils.for_range(inside, count) as loop:
                where = (inside.inttoptr(table, word.as_pointer()) for table in (functions, launches))
                function, launch = (inside.load(inside.gep(table, [loop.index])) for table in where)
                function = inside.inttoptr(function, all_of.type)
                inside.call(function, [inside.inttoptr(launch, cgutils.voidptr_t)])
                if SHARED:
                    kind = ir.FunctionType(ir.VoidType(), [])
                    with inside.if_then(inside.icmp_signed(">", threads, word(1))):
                        inside.call(cgutils.get_or_insert_function(module, kind, BARRIER), [])
            inside.ret_void()

            data = cgutils.alloca_once(builder, held)
            for index, value in enumerate(args):
                builder.store(value, cgutils.gep_inbounds(builder, data, 0, index))
            on_threads(builder, all_of, data, args[3])
            return context.get_dummy_value()

        return types.void(functions, launches, count, threads), generate

    @kept_on_disk
    def run_again(functions, launches, threads):  # type: ignore[no-untyped-def]
        """Launches by address, from their first task on. Returns whether one failed."""
        for place in launches:
            words = numba.carray(address_as_pointer(place), 2)
            words[0] = words[1] = 0
        in_turn(functions.ctypes.data, launches.ctypes.data, len(functions), threads)
        failed = 0
        for place in launches:
            failed |= numba.carray(address_as_pointer(place), 2)[0]
        return failed
