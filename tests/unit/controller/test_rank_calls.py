"""Whatever a rank says twice, because an answer was lost, is one call to the controller."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.controller_harness import make, member
from tests.reports import REPORT
from torchspec.contracts import Answer, SampleRef, WorkerReport
from torchspec.controller import objects
from torchspec.controller.controller import Controller
from torchspec.controller.steps import GroupEnded
from torchspec.files import read_lines
from torchspec.monitor.record import write_queue
from torchspec.run_folder import RunFolder
from torchspec.store.endpoint import StoreEndpoint


class Store:
    """Holds whatever is asked for."""

    def __init__(self, endpoint: StoreEndpoint):
        pass

    def remove(self, key: str, suffixes: Iterable[str]) -> None:
        pass

    def close(self) -> None:
        pass


Scene = Callable[[Controller], Coroutine[Any, Any, None]]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Scene], None]:
    """With two ranks and three held-out samples, and a worker that publishes at once."""
    monkeypatch.setattr(objects, "StoreClient", Store)

    def run(scene: Scene) -> None:
        async def whole() -> None:
            controller = make(StoreEndpoint("unused", metrics=""), tmp_path, heldout=3, training={"dp_size": 2})
            await controller.begin()
            pool = asyncio.create_task(work(controller))
            await controller.open_group()
            await scene(controller)
            pool.cancel()

        asyncio.run(asyncio.wait_for(whole(), 30))

    return run


async def work(controller: Controller) -> None:
    while leases := await controller.lease("w", 3, WorkerReport("w")):
        for lease in leases:
            ref = SampleRef(lease.sample, lease.key, 6, b"\xfc", {}, 100, "post_norm")
            answer = Answer(lease.sample.prompt, (7, 8, 9, 0), "text", "stop") if lease.max_new_tokens else None
            await controller.publish("w", ref, answer)


async def twice(method: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
    """The first answer is lost."""
    first, second = await method(*args), await method(*args)
    assert first == second
    return second


async def both(method: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> tuple[Any, ...]:
    """Both ranks, each twice."""
    return tuple(await asyncio.gather(*(twice(method, member(number), *args) for number in range(2))))


def test_a_run_in_which_every_call_of_a_rank_comes_twice(play, tmp_path: Path) -> None:
    async def scene(controller: Controller) -> None:
        parts = await both(controller.heldout_batches, 1)
        assert sum(len(micro) for part in parts for micro in part) == 3
        assert await both(controller.heldout_fetched, 1, 0, ()) == (True, True)
        assert await both(controller.heldout_batches, 2) == ((), ())
        steps = []
        while (batches := await both(controller.next_batch, len(steps) + 1)) != (None, None):
            step = batches[0].step
            steps.append(step)
            assert await both(controller.fetched, step, 0, ()) == (None, None)
            await both(controller.step_done, step, None)
            if batches[0].checkpoint:
                snapshot = await twice(controller.ledger_snapshot, member(0), step)
                assert f'"step": {step}' in snapshot or f'"step":{step}' in snapshot
                await twice(controller.committed, member(0), step, "folder", False, "")
        assert steps == [1, 2, 3, 4, 5]
        await controller.finish()

    play(scene)
    events = [(line["event"], line.get("step")) for line in read_lines(RunFolder(tmp_path).journal)]
    assert [step for event, step in events if event == "trained"] == [1, 2, 3, 4, 5]
    assert [step for event, step in events if event == "committed"] == [2, 4, 5]


def test_a_sample_that_is_lost_is_captured_once_more_although_its_rank_says_so_twice(play) -> None:
    async def scene(controller: Controller) -> None:
        first, _ = [await controller.next_batch(member(number), 1) for number in range(2)]
        lost = first.micro_batches[0][0]
        again, other = await asyncio.gather(
            twice(controller.fetched, member(0), 1, 0, (lost.sample,)), twice(controller.fetched, member(1), 1, 0, ())
        )
        refs = [ref for micro in again.micro_batches for ref in micro]
        assert lost.key not in {ref.key for ref in refs} and lost.sample in {ref.sample for ref in refs}
        assert other is not None, "all ranks fetch the step again"
        assert await both(controller.fetched, 1, 1, ()) == (None, None)
        assert await controller.next_batch(member(0), 1) is not None, "it may ask for it again, late"

    play(scene)


def test_a_report_that_comes_twice_is_written_once(play, tmp_path: Path) -> None:
    async def scene(controller: Controller) -> None:
        for number in range(2):
            await controller.next_batch(member(number), 1)
        await both(controller.fetched, 1, 0, ())
        await twice(controller.step_done, member(0), 1, REPORT)
        await twice(controller.step_done, member(1), 1, None)
        await twice(controller.step_done, member(0), 1, REPORT)
        assert controller.buffer.ledger.trained_step == 1
        await controller.observer.files.written()
        assert len(list(read_lines(RunFolder(tmp_path).steps))) == 1

    play(scene)


def test_ranks_that_stand_elsewhere_than_the_ledger_are_told(play) -> None:
    async def scene(controller: Controller) -> None:
        for step in (0, 2, 7):
            with pytest.raises(ValueError, match=rf"asks for step {step} where the ledger goes on with step 1: it has"):
                await controller.next_batch(member(0), step)

    play(scene)


def test_a_rank_of_an_earlier_generation_puts_nothing_in_place(play) -> None:
    async def scene(controller: Controller) -> None:
        await controller.require_current(member(0, 1))
        await controller.open_group()
        await controller.require_current(member(0, 2))
        with pytest.raises(GroupEnded):
            await controller.require_current(member(0, 1))

    play(scene)


def test_steps_are_made_while_the_disk_stalls_and_a_checkpoint_waits_for_it(play, tmp_path: Path) -> None:
    async def scene(controller: Controller) -> None:
        await controller.draft_vocab()
        goes_on = threading.Event()
        controller.observer.files.put(goes_on.wait)
        before = RunFolder(tmp_path).journal.read_bytes()
        for step in (1, 2):
            assert None not in await asyncio.gather(*(controller.next_batch(member(n), step) for n in range(2)))
            await asyncio.gather(*(controller.fetched(member(n), step, 0, ()) for n in range(2)))
            await asyncio.gather(*(controller.step_done(member(n), step, None) for n in range(2)))
        snapshot = asyncio.create_task(controller.ledger_snapshot(member(0), 2))
        await asyncio.sleep(0.1)
        assert not snapshot.done(), "it says that the journal is on the disk"
        assert RunFolder(tmp_path).journal.read_bytes() == before
        assert await controller.ping() and (await controller.status()).step == 2
        goes_on.set()
        assert json.loads(await snapshot)["step"] == 2
        lines = [line["step"] for line in read_lines(RunFolder(tmp_path).journal) if line["event"] == "trained"]
        assert lines == [1, 2]

    play(scene)


def test_nobody_makes_more_work_for_a_disk_that_is_too_far_behind(play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_queue, "MOST_WAITING", 3)

    async def scene(controller: Controller) -> None:
        goes_on = threading.Event()
        controller.observer.files.put(goes_on.wait)
        for _ in range(4):
            controller.observer.note("something happens")
        asking = asyncio.create_task(controller.lease("w2", 1, WorkerReport("w2")))
        waiting = asyncio.create_task(controller.next_batch(member(0), 1))
        await asyncio.sleep(0.1)
        assert not asking.done() and not waiting.done() and await controller.ping()
        goes_on.set()
        assert (await waiting).step == 1

    play(scene)
