"""The controller's hand in a store that is away."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

import pytest

from torchspec.controller import objects
from torchspec.controller.objects import StoredObjects
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.errors import StoreUnavailable


class Away:
    """A store that answers only when ``there``."""

    def __init__(self, endpoint: StoreEndpoint):
        self.there, self.calls, self.removed = False, 0, set[str]()
        self.stored = set[str]()

    def remove(self, key: str, suffixes: Iterable[str]) -> None:
        self.calls += 1
        if not self.there:
            raise StoreUnavailable("the store's master does not answer")
        self.removed |= {f"{key}_{suffix}" for suffix in suffixes}

    def names(self) -> set[str]:
        if not self.there:
            raise StoreUnavailable("the store's master does not answer")
        return set(self.stored)

    def remove_objects(self, names: list[str]) -> None:
        self.stored -= set(names)

    def close(self) -> None:
        self.there = False


@pytest.fixture(autouse=True)
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No store, and little patience."""
    monkeypatch.setattr(objects, "StoreClient", Away)
    monkeypatch.setattr(objects, "_ATTEMPTS", 2)
    monkeypatch.setattr(objects, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(objects, "_LONG_PAUSE_SECONDS", 0.1)
    return


async def connected() -> tuple[StoredObjects, Away]:
    hand = StoredObjects(StoreEndpoint("unused", metrics=""))
    hand.expect(("ids", "hidden"))
    await hand.connect()
    store = hand._store
    assert isinstance(store, Away)
    return hand, store


def test_what_is_removed_while_the_store_is_away_for_long_is_gone_once_it_is_back():
    """Credits are given back then, and not before: training would wait for them for ever."""

    async def scenario() -> None:
        hand, store = await connected()
        gone: list[str] = []
        hand.remove_soon(["a", "b"], lambda: gone.append("both"))
        async with asyncio.timeout(30):
            while store.calls < 6:  # several series of attempts
                assert gone == []
                await asyncio.sleep(0.01)
            store.there = True
            while not gone:
                await asyncio.sleep(0.01)
        assert gone == ["both"] and store.removed == {"a_ids", "a_hidden", "b_ids", "b_hidden"}
        await hand.close()

    asyncio.run(scenario())


def test_a_run_ends_although_the_store_is_away():
    async def scenario() -> None:
        hand, _ = await connected()
        gone: list[str] = []
        hand.remove_soon(["a"], lambda: gone.append("a"))
        await asyncio.wait_for(hand.close(), 5)
        assert gone == []

    asyncio.run(scenario())


def test_what_is_nobodys_twice_in_a_row_leaves_the_store():
    async def scenario() -> None:
        hand, store = await connected()
        ours = {"r/1/e0p0a1_ids", "r/1/e0p0a1_hidden", "r/1/e0p7a1_ids"}
        store.stored = ours | {"another/1/e0p0a1_ids"}
        assert await hand.sweep("r/", ["r/1/e0p0a1"]) == 0, "it is away"
        store.there = True
        assert await hand.sweep("r/", ["r/1/e0p0a1"]) == 0 and ours <= store.stored, "it may be on its way"
        assert await hand.sweep("r/", ["r/1/e0p0a1", "r/1/e0p7a1"]) == 0 and ours <= store.stored, "it was"
        late = "r/1/e0p7a1_ids"
        assert await hand.sweep("r/", ["r/1/e0p0a1"]) == 0 and await hand.sweep("r/", ["r/1/e0p0a1"]) == 1
        assert late not in store.stored and len(store.stored) == 3
        await hand.close()

    asyncio.run(scenario())


def test_a_second_removal_is_forgotten_once_it_was_made(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(objects, "_WORKER_ENDS_SECONDS", 0.05)

    async def scenario() -> None:
        hand, store = await connected()
        store.there = True
        hand.remove_twice(["a"])
        assert len(hand._repeats) == 1
        async with asyncio.timeout(30):
            while store.calls < 2:
                await asyncio.sleep(0.01)
        assert not hand._repeats
        await hand.close()

    asyncio.run(scenario())
