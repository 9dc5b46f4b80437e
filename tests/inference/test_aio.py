"""Coroutines are served together, each as if it were alone."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nemotron_h.config.sampling import Sampling
from nemotron_h.errors import RequestError
from nemotron_h.inference.aio import AsyncEngine
from nemotron_h.inference.engine import Engine
from nemotron_h.inference.request import Answer, Finish, Request
from nemotron_h.model.hybrid import Hybrid
from tests.inference.serving import check_alone, check_conserved
from tests.inference.test_engine import SMALL, ids

Build = Callable[..., Hybrid]


async def streamed(serving: AsyncEngine, request: Request) -> list[Answer]:
    """The request's answers, whose tokens came as they say."""
    tokens: dict[Answer, list[int]] = {}
    async for update in serving.stream(request):
        own = tokens.setdefault(update.answer, [])
        if update.token is not None:
            own.append(update.token)
    assert all(answer.ids == own for answer, own in tokens.items())
    return list(tokens)


def test_many_coroutines_are_each_alone(build: Build) -> None:
    model = build()

    async def main() -> list[list[Answer]]:
        async with AsyncEngine(Engine(model, config=SMALL)) as serving:
            requests = [
                Request(ids=ids(30 + seed, seed=seed), max_tokens=8, n=1 + seed % 2, sampling=Sampling(temperature=1.0))
                for seed in range(7)
            ]
            return await asyncio.gather(*(streamed(serving, request) for request in requests))

    answers = [answer for some in asyncio.run(main()) for answer in some]
    assert len(answers) == 10
    check_alone(model, *answers)


def test_a_cancelled_task_cancels_its_request_and_nobody_elses(build: Build) -> None:
    engine = Engine(build(), config=SMALL)

    async def main() -> tuple[Answer, Answer]:
        async with AsyncEngine(engine) as serving:
            other = asyncio.create_task(streamed(serving, Request(ids=ids(20), max_tokens=60)))
            async for update in serving.stream(Request(ids=ids(30, seed=1), max_tokens=300)):
                gone = update.answer
                if len(gone.ids) > 3:
                    break
            (answer,) = await other
            await serving.call(lambda: check_conserved(engine))
            assert not engine.busy
            return gone, answer

    async def closed() -> tuple[Answer, Answer]:
        found = await main()
        await asyncio.sleep(0)
        return found

    gone, answer = asyncio.run(closed())
    assert gone.finish is Finish.CANCELLED
    assert answer.finish is Finish.LENGTH
    check_alone(engine.model, gone, answer)


def test_a_task_cancelled_while_its_request_is_added_leaves_nothing(build: Build) -> None:
    engine = Engine(build(), config=SMALL)

    async def main() -> None:
        async with AsyncEngine(engine) as serving:
            for turns in range(6):
                task = asyncio.create_task(streamed(serving, Request(ids=ids(20, seed=turns), max_tokens=2000)))
                for _ in range(turns):
                    await asyncio.sleep(0.001)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            while await serving.call(lambda: engine.busy):
                await asyncio.sleep(0.001)
            assert not serving._streams

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_refusal_comes_to_the_one_who_asked(build: Build) -> None:
    async def main() -> None:
        async with AsyncEngine(Engine(build(), config=SMALL)) as serving:
            with pytest.raises(RequestError, match=r"^ids: must hold at least one token"):
                await streamed(serving, Request(ids=[]))
            assert await streamed(serving, Request(ids=[1], max_tokens=1))

    asyncio.run(main())


def test_an_engine_that_breaks_tells_everybody(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()

    def broken(*args: Any, **options: Any) -> torch.Tensor:
        raise MemoryError("no more")

    async def main() -> None:
        async with AsyncEngine(Engine(model, config=SMALL)) as serving:
            (known,) = await streamed(serving, Request(ids=ids(5), max_tokens=2))
            monkeypatch.setattr(model, "hidden", broken)
            hit = serving.stream(Request(ids=ids(5), max_tokens=2))
            assert (await anext(hit)).token == known.ids[0]  # drawn by the step that broke
            with pytest.raises(RuntimeError, match=r"the engine's thread has ended"):
                await anext(hit)
            for _ in range(2):
                with pytest.raises(RuntimeError, match=r"the engine's thread has ended") as caught:
                    await streamed(serving, Request(ids=ids(5, seed=2), max_tokens=2))
                assert isinstance(caught.value.__cause__, MemoryError)

    asyncio.run(main())


def test_leaving_ends_what_is_under_way(build: Build) -> None:
    async def main() -> list[Answer]:
        async with AsyncEngine(Engine(build(), config=SMALL)) as serving:
            long = asyncio.create_task(streamed(serving, Request(ids=ids(20), max_tokens=3000)))
            await streamed(serving, Request(ids=ids(20, seed=1), max_tokens=4))
        return await long

    (answer,) = asyncio.run(main())
    assert answer.finish is Finish.CANCELLED


def test_what_others_do_to_an_answer_comes_to_who_streams_it(build: Build) -> None:
    """Cancelled through `call`, and stepped by somebody else's stream there."""
    engine = Engine(build(), config=SMALL)

    async def main() -> None:
        async with AsyncEngine(engine) as serving:
            begun = asyncio.Event()

            async def watched() -> list[int | None]:
                tokens = []
                async for update in serving.stream(Request(ids=ids(20), max_tokens=3000)):
                    tokens.append(update.token)
                    begun.set()
                return tokens

            streaming = asyncio.create_task(watched())
            await begun.wait()
            await serving.call(lambda: list(engine.stream(Request(ids=ids(9), max_tokens=20))))
            (answer,) = await serving.call(lambda: [one.answer for one in engine.scheduler.running])
            await serving.call(lambda: engine.cancel(answer))
            assert await asyncio.wait_for(streaming, 10) == [*answer.ids, None]
            assert len(answer.ids) >= 20

    asyncio.run(main())


def test_outside_of_its_block_nobody_answers_and_that_is_said(build: Build) -> None:
    async def main() -> None:
        serving = AsyncEngine(Engine(build(), config=SMALL))
        with pytest.raises(RuntimeError, match="the engine's thread has not begun: it does in `async with`"):
            await asyncio.wait_for(serving.call(lambda: 1), 5)
        async with serving:
            assert await serving.call(lambda: 1) == 1
        with pytest.raises(RuntimeError, match="the engine's thread has ended"):
            await asyncio.wait_for(serving.call(lambda: 1), 5)

    asyncio.run(main())
