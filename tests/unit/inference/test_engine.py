"""What a request waits for: bytes of the plugin's buffer, its turn, and the engine while it lives."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from torchspec.config.schema import Config
from torchspec.contracts import Lease, SampleId
from torchspec.inference.capture.protocol import Captured
from torchspec.inference.engine import (
    CAPTURES_WHILE_ANSWERING,
    Answered,
    EngineKilled,
    Sampling,
    TargetEngine,
    _Budget,
    _Turns,
)
from torchspec.inference.source import SourceFailed
from torchspec.target.checkpoint import TargetCheckpoint


class Held:
    """Requests that hold something until they are told to let go; ``order`` names those that have got it."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, name: str, holding: AbstractAsyncContextManager[None]) -> None:
        self._ends[name] = asyncio.Event()

        async def hold() -> None:
            async with holding:
                self.order.append(name)
                await self._ends[name].wait()

        self._tasks[name] = asyncio.create_task(hold())
        await settled()

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self._tasks[name]
        await settled()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def run(scenario: Callable[[Held], Awaitable[None]]) -> None:
    async def go() -> None:
        await scenario(Held())

    asyncio.run(go())


def test_captures_wait_while_answers_are_under_way_and_answers_never() -> None:
    async def scenario(held: Held) -> None:
        turns, few = _Turns(), CAPTURES_WHILE_ANSWERING
        await held.ask("answer0", turns.taken("answers"))
        for i in range(few + 2):
            await held.ask(f"capture{i}", turns.taken("captures"))
        assert held.order == ["answer0", *(f"capture{i}" for i in range(few))]
        await held.ask("answer1", turns.taken("answers"))
        assert held.order[-1] == "answer1"
        await held.end("capture0")
        assert held.order[-1] == f"capture{few}"
        await held.end("answer0")
        assert held.order[-1] == f"capture{few}", "answer1 is still under way"
        await held.end("answer1")
        assert held.order[-1] == f"capture{few + 1}"

    run(scenario)


def test_without_answers_captures_do_not_wait() -> None:
    async def scenario(held: Held) -> None:
        turns = _Turns()
        for i in range(9):
            await held.ask(f"{i}", turns.taken("captures"))
        assert len(held.order) == 9

    run(scenario)


def test_bytes_are_given_out_in_order_and_a_large_request_is_not_overtaken() -> None:
    async def scenario(held: Held) -> None:
        budget = _Budget(10)
        await held.ask("first", budget.taken(6))
        await held.ask("large", budget.taken(9))
        await held.ask("small", budget.taken(1))
        assert held.order == ["first"]
        await held.end("first")
        assert held.order == ["first", "large", "small"]
        with pytest.raises(SourceFailed, match=r"11 bytes .* inference\.buffer_bytes=10") as failed:
            async with budget.taken(11):
                pass
        assert failed.value.kind == "final"

    run(scenario)


@pytest.mark.parametrize("how", ["dies", "answers", "is given up"])
def test_who_waits_for_an_engine_hears_of_its_death_and_leaves_nothing_behind(how: str) -> None:
    async def scenario(_held: Held) -> None:
        engine, ended = TargetEngine.__new__(TargetEngine), asyncio.Event()
        engine._death = asyncio.get_running_loop().create_future()

        async def work() -> str:
            try:
                await asyncio.sleep(0 if how == "answers" else 600)
                return "answered"
            finally:
                ended.set()

        waiting = asyncio.create_task(engine._or_death(work()))
        await settled()
        if how == "answers":
            assert await waiting == "answered"
        elif how == "dies":
            engine._declare_dead(EngineKilled("killed"))
            with pytest.raises(EngineKilled, match="killed"):
                await waiting
        else:
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        await settled()
        assert ended.is_set()

    run(scenario)


def test_an_answer_ends_where_the_target_ends_one(target_path: Path) -> None:
    """SGLang knows the end tokens of the configs alone: it is started without a tokenizer."""
    asked: list[Sampling] = []

    async def answer(key: str, input_ids: Sequence[int], sampling: Sampling, sharding: None) -> Answered:
        asked.append(sampling)
        return Answered([4093, 2], "stop", Captured({}, 0, 0.0))

    engine = TargetEngine.__new__(TargetEngine)
    engine._config = Config.model_validate({"target": {"path": str(target_path)}})
    engine._target = TargetCheckpoint(target_path)
    engine.answer = answer  # type: ignore[method-assign,assignment]
    lease = Lease(SampleId(0, 0), "key", b"", b"", 16, 7, 0)
    asyncio.run(engine._answer_lease(lease, [1]))
    assert asked[0]["stop_token_ids"] == [2]
