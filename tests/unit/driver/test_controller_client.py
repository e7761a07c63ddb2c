"""A call that waits for a disk is no sign of death, as long as there are signs of life."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from torchspec.driver import controller_client
from torchspec.driver.controller_client import ControllerClient, ControllerLost


class Call:
    """One that has an answer at the ``ready``-th look, or never."""

    def __init__(self, answer: Any, ready: float):
        self.answer, self.ready, self.looks = answer, ready, 0

    def future(self) -> Future[Any]:
        future: Future[Any] = Future()
        if self.ready < float("inf"):
            future.set_result(self.answer)
        return future


class Actor:
    """Whose ``finish`` takes ``looks`` looks of the driver."""

    def __init__(self, looks: float, alive: bool):
        self.finish = self._method(Call("ended", looks))
        self.ping = self._method(Call(True, 0 if alive else float("inf")))

    def _method(self, call: Call) -> Any:
        return type("Method", (), {"remote": staticmethod(lambda *args: call)})


@pytest.fixture(autouse=True)
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look takes a second."""

    def wait(refs: list[Call], timeout: float) -> tuple[list[Call], list[Call]]:
        refs[0].looks += 1
        done = refs[0].looks > refs[0].ready
        return (refs, []) if done else ([], refs)

    monkeypatch.setattr(controller_client.ray, "wait", wait)
    monkeypatch.setattr(controller_client.ray, "get", lambda ref: ref.answer)
    monkeypatch.setattr(controller_client.AwakeClock, "elapsed", lambda self: 1.0)


def test_a_call_may_take_long_while_its_actor_lives() -> None:
    assert ControllerClient(Actor(looks=200, alive=True), 15, 60).ask("finish") == "ended"


def test_an_actor_that_gives_no_sign_of_life_either_hangs() -> None:
    with pytest.raises(ControllerLost, match="hangs"):
        ControllerClient(Actor(looks=200, alive=False), 15, 60).ask("finish")
    assert ControllerClient(Actor(looks=10, alive=False), 15, 60).ask("finish") == "ended"
