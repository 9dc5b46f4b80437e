"""An engine for asyncio: one thread of its own steps it, and everybody may ask at once.

    async with AsyncEngine(engine) as serving:
        async for update in serving.stream(request): ...

The engine belongs to the thread from then on: what else is to be done with it goes through `call`.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any, Self, TypeVar

from nemotron_h.inference.engine import Engine
from nemotron_h.inference.request import Answer, News, Request, Update

LOG = logging.getLogger(__name__)
T = TypeVar("T")


class AsyncEngine:
    """Streams of many coroutines, served together."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: BaseException | None = None  # why the thread has ended, if it was not asked to
        self._asked: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()  # None: end
        self._streams: dict[Callable[[Update | None], None], News] = {}  # who is told of what
        self._absent: str | None = "has not begun: it does in `async with`"  # why nobody does what is asked
        self._thread = threading.Thread(target=self._serve, name="nemotron-h engine", daemon=True)

    async def __aenter__(self) -> Self:
        self._absent = None
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends what is under way, and the engine."""
        self._asked.put(None)
        await asyncio.to_thread(self._thread.join)

    async def stream(self, request: Request) -> AsyncIterator[Update]:
        """As `Engine.stream`. A stream that is closed, or whose task is cancelled, cancels its request."""
        loop = asyncio.get_running_loop()
        updates: asyncio.Queue[Update | None] = asyncio.Queue()

        def tell(update: Update | None) -> None:
            if not loop.is_closed():  # else nobody is left to hear it
                loop.call_soon_threadsafe(updates.put_nowait, update)

        def add() -> tuple[Answer, ...]:
            answers = self.engine.add(request)
            self._streams[tell] = News(answers)
            return answers

        adding = self._ask(add)
        going = request.n
        try:
            await asyncio.wrap_future(adding)
            while going:
                update = await updates.get()
                if update is None:
                    raise self._ended()
                going -= update.token is None
                yield update
        finally:
            self._streams.pop(tell, None)
            if going:  # closed early; also while it was being added
                adding.add_done_callback(lambda added: self._forget(added, tell))

    async def call(self, function: Callable[[], T]) -> T:
        """The function's result, called by the engine's thread between two steps; streams hear nothing meanwhile."""
        return await asyncio.wrap_future(self._ask(function))

    def _ask(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._asked.put((function, future))
        if self._absent is not None:
            self._refuse_all()
        return future

    def _refuse_all(self) -> None:
        """Nobody will do what is asked."""
        while True:
            try:
                asked = self._asked.get_nowait()
            except queue.Empty:
                return
            if asked is not None and asked[1].set_running_or_notify_cancel():
                asked[1].set_exception(self._ended())

    def _ended(self) -> RuntimeError:
        error = RuntimeError(f"the engine's thread {self._absent}")
        error.__cause__ = self.error
        return error

    def _forget(self, added: Future[tuple[Answer, ...]], tell: Callable[[Update | None], None]) -> None:
        """End the answers of a request that was added, if it was."""

        def end() -> None:
            self._streams.pop(tell, None)  # who was cancelled first may have been added since
            for answer in added.result():
                self.engine.cancel(answer)

        if not added.cancelled() and added.exception() is None:
            self._ask(end)

    def _serve(self) -> None:
        """Step while there is something to do; between steps, and while there is not, do what is asked."""
        try:
            while True:
                while not (self.engine.busy and self._asked.empty()):
                    asked = self._asked.get()
                    if asked is None:
                        return
                    self._do(*asked)
                    self._tell()  # it may have stepped, or cancelled
                self.engine.step()
                self._tell()
        except BaseException as error:  # the outermost loop of a thread: whoever waits is told
            self._fail(error)
        finally:
            try:
                self.engine.close()
            except BaseException as error:
                self._fail(error)
            self._absent = "has ended"  # before the last look: what is asked later, its asker refuses
            self._tell(last=True)
            self._refuse_all()

    def _tell(self, *, last: bool = False) -> None:
        """Every stream, what is new of its answers. last: nothing comes after."""
        for tell, news in list(self._streams.items()):
            for update in news.take():
                tell(update)
            if last:
                tell(None)

    def _fail(self, error: BaseException) -> None:
        """Streams end with it."""
        self.error, self._absent = error, "has ended"
        LOG.error("the engine's thread has ended", exc_info=error)
        self._tell(last=True)

    def _do(self, function: Callable[[], T], future: Future[T]) -> None:
        if not future.set_running_or_notify_cancel():
            return  # the asker has gone
        try:
            future.set_result(function())
        except Exception as error:  # the asker's own, who gets it
            future.set_exception(error)
