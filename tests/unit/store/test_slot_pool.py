"""The allocator of the registered host buffers."""

from __future__ import annotations

import random
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchspec.store.slot_pool import ALIGNMENT, SlotPool, align


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 900), st.booleans(), st.integers(0, 99)), max_size=60))
def test_slots_never_overlap_and_all_room_comes_back(requests: list[tuple[int, bool, int]]) -> None:
    pool = SlotPool(4096)
    slots: dict[int, int] = {}
    for size, free_one, which in requests:
        try:
            offset = pool.allocate(size, timeout=0)
        except TimeoutError:
            pass
        else:
            assert offset % ALIGNMENT == 0
            assert offset + size <= 4096
            assert all(offset + size <= o or o + s <= offset for o, s in slots.items())
            slots[offset] = size
        if free_one and slots:
            offset = sorted(slots)[which % len(slots)]
            pool.release(offset)
            del slots[offset]
        assert sum(hole for _, hole in pool._holes) == 4096 - sum(align(size) for size in slots.values())
    for offset in slots:
        pool.release(offset)
    assert pool.allocate(4096, timeout=0) == 0


def test_a_waiting_request_gets_the_room_that_is_released() -> None:
    pool = SlotPool(1024)
    first, second = pool.allocate(512), pool.allocate(512)
    got: list[int] = []
    waiter = threading.Thread(target=lambda: got.append(pool.allocate(1024, timeout=30)))
    waiter.start()
    pool.release(first)
    assert waiter.is_alive()
    pool.release(second)
    waiter.join(30)
    assert got == [0]


def test_small_requests_do_not_overtake_a_large_one() -> None:
    pool = SlotPool(1024)
    held = pool.allocate(512)
    order: list[str] = []

    def take(name: str, size: int) -> None:
        pool.release(pool.allocate(size, timeout=30))
        order.append(name)

    large = threading.Thread(target=take, args=("large", 1024))
    large.start()
    while not pool._turn.locked():
        time.sleep(0.001)
    small = threading.Thread(target=take, args=("small", 64))  # would fit right now
    small.start()
    small.join(0.1)
    assert order == []
    pool.release(held)
    large.join(30)
    small.join(30)
    assert set(order) == {"large", "small"}


def test_no_room_in_time() -> None:
    pool = SlotPool(1024)
    pool.allocate(1000)
    with pytest.raises(TimeoutError):
        pool.allocate(64, timeout=0.01)


def test_many_threads() -> None:
    pool = SlotPool(8192)
    owner = bytearray(8192)
    clashes: list[int] = []

    def work(me: int) -> None:
        rng = random.Random(me)
        for _ in range(200):
            size = rng.randint(1, 3000)
            offset = pool.allocate(size, timeout=30)
            owner[offset : offset + size] = bytes([me]) * size
            time.sleep(0)
            if owner[offset : offset + size] != bytes([me]) * size:
                clashes.append(me)
            pool.release(offset)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clashes == []
    assert pool._holes == [(0, 8192)]
