"""Training ranks that wait for room, seen from the driver, which has others to look after meanwhile."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from torchspec.config.load import parse_config
from torchspec.controller.steps import GroupPlan
from torchspec.driver.placement import RankSlots
from torchspec.driver.session import Session
from torchspec.driver.trainers import SLOT_SECONDS, RankLost, Trainers


class Waiting:
    """A generation of two ranks whose room is not there yet; actors and controller are played by this object."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("torchspec.driver.trainers.actor_pulse", lambda *_: SimpleNamespace(hangs=lambda _: False))
        monkeypatch.setattr("torchspec.driver.trainers.ray.kill", lambda _: None)
        monkeypatch.setattr("torchspec.driver.trainers.ray.wait", lambda *_, **__: None)
        config = parse_config({"target": {"path": "x"}, "training": {"dp_size": 2, "batch_size": 4}})
        self.plan = GroupPlan(1, config.training, None)
        self.slots: list[RankSlots] = []
        self.group = Trainers(self, self, config.recovery, SimpleNamespace(message=lambda _: None))
        self.group.vocabulary = SimpleNamespace()
        self.group.start()

    actor = None

    def ask(self, method: str) -> GroupPlan:
        assert method == "open_group"
        return self.plan

    def rank_slots(self, plan: GroupPlan) -> RankSlots:
        self.slots.append(RankSlots(object(), [], "2 training ranks"))
        return self.slots[-1]

    def trainers(self, *_: object) -> list[SimpleNamespace]:
        return [SimpleNamespace(run=SimpleNamespace(remote=lambda _, n=number: f"rank {n}")) for number in range(2)]

    def log_path(self, name: str) -> Path:
        return Path(name)


def test_ranks_start_when_there_is_room_and_not_before(monkeypatch):
    waiting = Waiting(monkeypatch)
    waiting.group.check(1.0)
    assert not waiting.group.at_work
    (meeting,) = waiting.group.futures
    assert meeting is waiting.slots[0].meeting
    assert waiting.group.done(meeting) is False
    assert waiting.group.at_work and waiting.group.futures == ["rank 0", "rank 1"]
    waiting.group.check(10 * SLOT_SECONDS)


def test_ranks_do_not_wait_for_room_for_ever_and_ask_again(monkeypatch):
    waiting = Waiting(monkeypatch)
    waiting.group.check(SLOT_SECONDS - 1)
    with pytest.raises(RankLost, match="no room for 2 training ranks in 120 s"):
        waiting.group.check(2.0)
    waiting.group.kill()
    assert waiting.group.futures == []
    waiting.group.start()
    waiting.group.check(SLOT_SECONDS - 1)
    assert waiting.group.futures == [waiting.slots[1].meeting]


def test_ranks_of_a_size_that_is_not_wanted_any_more_wait_no_longer(monkeypatch):
    waiting = Waiting(monkeypatch)
    for generation, closing in ((1, False), (0, True)):
        waiting.group.follow(SimpleNamespace(generation=generation, closing=closing))
    assert len(waiting.slots) == 1
    waiting.group.follow(SimpleNamespace(generation=1, closing=True))
    assert waiting.group.futures == [waiting.slots[1].meeting]
    waiting.group.done(waiting.slots[1].meeting)
    waiting.group.follow(SimpleNamespace(generation=1, closing=True))
    assert waiting.group.at_work and len(waiting.slots) == 2, "ranks at work end by themselves"


def test_a_run_that_is_stopped_while_no_rank_is_at_work_is_over():
    assert Session._turn(SimpleNamespace(stopping=True, trainers=SimpleNamespace(at_work=False), _revival=None)) is True
