"""The size of the inference pool, on simulated pipelines: one that follows, one that does not flutter."""

from __future__ import annotations

import pytest

from torchspec.config.load import parse_config
from torchspec.controller.inference_pool import (
    COOL_DOWN_SECONDS,
    MOST_OBSERVATIONS,
    InferencePool,
    Move,
    decide,
)


def simulate(pool: InferencePool, clock: list[float], needed: float, seconds: float) -> list[int]:
    """Sizes of the pool while training could use what ``needed`` workers produce."""
    sizes = [pool.wanted]
    workers = sorted(pool._active)
    end = clock[0] + seconds
    while clock[0] < end:
        while len(workers) < pool.wanted:
            workers.append(f"w{len(workers)}t{clock[0]}")
            pool.joined(workers[-1])
        while len(workers) > pool.wanted:
            pool.drain(workers.pop())
        n = len(workers)
        for look in range(20):
            starved = look / 20 < 1 - n / needed
            idle = [w for i, w in enumerate(workers) if (look + 0.5) / 20 < 1 - needed / n]
            pool._waiting = set(idle)
            pool.observe(starved, busy=lambda _: False)
        clock[0] += 10
        pool.autoscale(step=int(clock[0]))
        if pool.wanted != sizes[-1]:
            sizes.append(pool.wanted)
    return sizes


def make_pool(clock: list[float], running: int = 0, **inference) -> InferencePool:
    tree = {"target": {"path": "x"}, "inference": {"workers": "auto", "max_workers": 8, **inference}}
    return InferencePool(parse_config(tree), running, lambda: clock[0])


@pytest.mark.parametrize(("needed", "expected"), [(0.4, 1), (1.0, 1), (2.6, 3), (5.2, 6), (20.0, 8)])
def test_the_pool_grows_to_what_training_needs_and_stays(needed, expected):
    clock = [0.0]
    sizes = simulate(make_pool(clock), clock, needed, 3600)
    assert sizes[-1] == expected
    assert sizes == sorted(sizes)


def test_the_pool_follows_both_ways_and_does_not_flutter():
    clock = [0.0]
    pool = make_pool(clock)
    assert simulate(pool, clock, 4.5, 3600)[-1] == 5
    down = simulate(pool, clock, 1.5, 3600)
    assert down == [5, 4, 3, 2]
    assert simulate(pool, clock, 1.5, 3600) == [2]


def test_nothing_is_decided_while_a_move_settles():
    clock = [0.0]
    pool = make_pool(clock)
    simulate(pool, clock, 9.0, COOL_DOWN_SECONDS - 10)
    assert pool.wanted == 1
    simulate(pool, clock, 9.0, 20)
    assert pool.wanted == 2


def test_a_call_that_comes_late_brings_no_worker_back():
    """The pool would never have its size again, and so never another."""
    clock = [0.0]
    pool = make_pool(clock)
    for name in ("stays", "leaves"):
        pool.joined(name)
    pool.drain("leaves")
    pool.joined("leaves")
    clock[0] += COOL_DOWN_SECONDS
    for _ in range(MOST_OBSERVATIONS):
        pool.observe(True, busy=lambda _: True)
    assert pool.autoscale(1) == Move(2, "training waits for samples 100% of the time")


def test_what_is_too_little_to_tell_decides_nothing():
    """Of a long step, ten seconds are all waiting or none."""
    clock = [1000.0]
    pool = make_pool(clock, running=4)
    for name in "abcd":
        pool.joined(name)
    clock[0] += 100
    for step in (1, 2):
        assert pool.autoscale(step) is None, "nothing was seen"
    pool.begin_stretch(2)
    for look in range(MOST_OBSERVATIONS):
        assert pool.autoscale(3) is None
        pool.observe(look % 2 == 0, busy=lambda _: True)
    assert pool.autoscale(3) == Move(8, "training waits for samples 50% of the time")


def test_a_number_switches_it_off_and_auto_begins_where_it_is():
    clock = [0.0]
    pool = make_pool(clock)
    pool.ask_for(3)
    assert simulate(pool, clock, 9.0, 600) == [3]
    pool.ask_for("auto")
    assert pool.wanted == 3
    assert simulate(pool, clock, 9.0, 600)[-1] == 8


def test_a_new_controller_keeps_the_workers_that_are_there():
    assert make_pool([0.0], running=5).wanted == 5
    assert make_pool([0.0], running=5, max_workers=4).wanted == 4
    assert make_pool([0.0], running=5, workers=2).wanted == 2


@pytest.mark.parametrize(
    ("workers", "starvation", "backpressure", "expected"),
    [
        (4, 0.5, 0.0, 8),
        (4, 0.9, 0.0, 8),  # at most twice as many at a time
        (4, 0.12, 0.0, 5),
        (4, 0.05, 0.0, None),
        (4, 0.3, 0.6, None),  # both wait: more workers would wait, too
        (4, 0.0, 0.3, None),  # three would be just enough: too close
        (4, 0.0, 0.4, 3),
        (4, 0.05, 0.6, None),
        (1, 0.0, 1.0, None),
        (8, 0.9, 0.0, None),
    ],
)
def test_decisions(workers, starvation, backpressure, expected):
    move = decide(workers, starvation, backpressure, least=1, most=8)
    assert (move.workers if move else None) == expected
    assert move is None or "%" in move.reason
