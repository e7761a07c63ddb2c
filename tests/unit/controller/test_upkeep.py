"""What the controller does by itself: what fails is said and starts again, what cannot be done without ends the run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.integration.controller_harness import make
from torchspec.controller import objects, upkeep
from torchspec.controller.controller import Controller
from torchspec.monitor.record.write_queue import WriteFailed
from torchspec.store.endpoint import StoreEndpoint


class Store:
    """Holds nothing."""

    def __init__(self, endpoint: StoreEndpoint):
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Controller], Any]], None]:
    monkeypatch.setattr(objects, "StoreClient", Store)
    monkeypatch.setattr(upkeep, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(upkeep, "AUTOSCALE_SECONDS", 0.2)
    monkeypatch.setattr(upkeep, "FILES_SECONDS", 0.02)

    def run(scene: Callable[[Controller], Coroutine[Any, Any, None]]) -> None:
        async def whole() -> None:
            controller = make(StoreEndpoint("unused", metrics=""), tmp_path)
            await scene(controller)

        asyncio.run(asyncio.wait_for(whole(), 30))

    return run


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_a_task_that_fails_is_an_event_and_starts_again(play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(controller: Controller) -> None:
        unparked, parked = [], controller.buffer.unpark

        def unpark() -> None:
            unparked.append(len(unparked))
            if len(unparked) == 1:
                raise OSError(28, "No space left on device", "events.jsonl")
            parked()

        monkeypatch.setattr(controller.buffer, "unpark", unpark)
        await controller.begin()
        await until(lambda: len(unparked) > 2)
        (message,) = controller.observer.messages
        assert message.startswith("following the pools failed in the controller, and starts again: OSError")
        await controller.finish()
        made = len(unparked)
        await asyncio.sleep(0.3)
        assert len(unparked) == made, "it has ended with the run"

    play(scene)


def test_a_journal_that_cannot_be_written_ends_the_run_with_one_line(play, tmp_path: Path) -> None:
    async def scene(controller: Controller) -> None:
        controller.buffer._journal._file._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        with pytest.raises(WriteFailed, match=rf"^cannot write {tmp_path}/ledger.jsonl: No space left on device"):
            await controller.begin()

    play(scene)


def test_the_call_that_the_driver_has_open_tells_what_ends_the_run(play) -> None:
    async def scene(controller: Controller) -> None:
        await controller.begin()
        waiting = asyncio.create_task(controller.wanted(controller.pool.wanted))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        controller.observer.files.put(Path("/proc/answers.jsonl").write_text, "no")
        with pytest.raises(WriteFailed, match=r"cannot write /proc/answers\.jsonl"):
            await waiting
        with pytest.raises(WriteFailed):
            await controller.wanted(None)
        assert await controller.ping()

    play(scene)


def test_a_mistake_in_a_task_that_nobody_waits_for_is_an_event(play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(controller: Controller) -> None:
        await controller.begin()
        controller.buffer._objects.remove_soon([], lambda: 1 // 0)
        await until(lambda: bool(controller.observer.messages))
        assert controller.observer.messages[-1].startswith("a mistake in the controller: ZeroDivisionError(")

    play(scene)
