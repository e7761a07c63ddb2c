"""The watch goes on while something is repaired: who is looked after meanwhile, and what is done when it is back."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from torchspec.driver.controller_client import ControllerLost
from torchspec.driver.session import Session
from torchspec.driver.supervise import AwakeClock, Restarts, RunFailed


class Parts:
    """All that a session watches, played by this object; ``calls``: what it did, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, looks: int):
        monkeypatch.setattr("torchspec.driver.session.require_node", lambda: None)
        monkeypatch.setattr("torchspec.driver.session.time.sleep", lambda _: None)
        monkeypatch.setattr("torchspec.driver.session.ray.wait", lambda *_, **__: ([], []))
        self.calls: list[str] = []
        self.looks, self.fault, self.signals = looks, "", 0
        self.session = Session.__new__(Session)
        vars(self.session).update(
            controller=self,
            store=self,
            workers=SimpleNamespace(
                check=lambda _: self.calls.append("workers"), reconnect=lambda: None, futures=[], __len__=lambda _: 1
            ),
            trainers=SimpleNamespace(
                kill=lambda: self.calls.append("ranks killed"), check=lambda _: None, at_work=True, futures=[]
            ),
            trackers=SimpleNamespace(steps_seen=5),
            interrupts=SimpleNamespace(heard=lambda: self.signals > 0),
            view=SimpleNamespace(message=self.calls.append),
            stopping=False,
            _patience=15.0,
            _restarts=Restarts(3),
            _clock=AwakeClock(),
            _revival=None,
            _messages_seen=["old"],
            _status=None,
            _store_away=False,
            _vocabulary=None,
            _wanted=None,
            _pulse=SimpleNamespace(hangs=lambda _: False, answer=None),
        )

    # ---- the store ----

    def check(self, elapsed: float) -> None:
        self.calls.append("store")

    # ---- the controller ----

    def revive(self, lost: ControllerLost, ready: Any, running: Any) -> Iterator[None]:
        for _ in range(self.looks):
            yield
        while not ready():
            yield
        self.calls.append("begins")

    def send(self, method: str, *args: Any) -> Any:
        return SimpleNamespace(future=lambda: SimpleNamespace(done=lambda: False))

    def ask(self, method: str, *args: Any) -> None:
        self.calls.append(method)

    def lose_controller(self) -> None:
        self.session._restart_controller(ControllerLost("died"))


def test_everybody_is_watched_while_the_controller_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(monkeypatch, looks=3)
    parts.lose_controller()
    parts.calls.clear()
    for _ in range(4):
        assert parts.session._turn() is False
    assert parts.calls == ["store", "workers"] * 4 + ["begins"]
    assert parts.session._revival is None and parts.session.trackers.steps_seen == 0
    parts.session._turn()
    assert parts.calls[-2:] == ["store", "workers"], "and as ever from then on"


def test_a_controller_begins_when_the_store_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(monkeypatch, looks=1)
    parts.fault = "the store's node died"
    parts.lose_controller()
    for _ in range(20):
        parts.session._turn()
    assert "begins" not in parts.calls
    parts.fault = ""
    parts.session._turn()
    assert parts.calls[-1] == "begins", "and it is told nothing of a store that it finds there"


def test_a_wish_to_stop_is_heard_while_the_controller_is_away_and_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(monkeypatch, looks=2)
    parts.lose_controller()
    parts.signals = 1
    parts.session._turn()
    assert parts.session.stopping
    parts.session.trainers.at_work = False
    for _ in range(2):
        assert parts.session._turn() is False, "what was trained is still to be told"
    assert parts.calls[-1] == "request_stop"
    assert parts.session._turn() is True


def test_the_controller_is_told_of_the_store_once_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(monkeypatch, looks=0)
    for parts.fault in ("", "the store's node died", "the store's node died", "", ""):
        parts.session._check(0.5)
    assert [call for call in parts.calls if call.startswith("store_")] == ["store_away", "store_back"]
    assert parts.calls.count("workers") == 5, "and the others are watched all the time"


def test_a_controller_that_is_lost_again_and_again_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(monkeypatch, looks=0)
    for _ in range(3):
        parts.lose_controller()
    with pytest.raises(RunFailed, match="the controller died; 3 restarts"):
        parts.lose_controller()
