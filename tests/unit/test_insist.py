"""A call whose answer is lost is made again, until there is one or nobody to ask."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from torchspec import insist as module
from torchspec.insist import insist, insist_and_wait


class Method:
    """Of an actor that carries out each call, and whose first ``lost`` answers do not arrive."""

    def __init__(self, lost: int, end: Exception | None = None, loss: Exception | None = None):
        self.lost, self.end, self.loss = lost, end, loss or ActorUnavailableError("the connection is gone", None)
        self.calls: list[tuple[Any, ...]] = []

    def remote(self, *args: Any) -> Coroutine[Any, Any, int]:
        self.calls.append(args)

        async def answer() -> int:
            if len(self.calls) <= self.lost:
                raise self.loss
            if self.end is not None:
                raise self.end
            return len(self.calls)

        return answer()


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.001)


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_it_is_asked_again_with_the_same_words(lost: int) -> None:
    method = Method(lost)
    assert asyncio.run(insist(method, "rank", 7)) == lost + 1
    assert method.calls == [("rank", 7)] * (lost + 1)
    assert insist_and_wait(Method(lost), 1) == lost + 1


def test_a_call_that_dies_with_a_process_is_made_again_for_there_may_be_another() -> None:
    method = Method(3, loss=ActorDiedError())
    assert asyncio.run(insist(method)) == 4


def test_who_is_gone_for_good_and_what_it_raises_is_told() -> None:
    method = Method(1, ActorDiedError())
    with pytest.raises(ActorDiedError):
        insist_and_wait(method)
    assert len(method.calls) == 11
    method = Method(1, ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        insist_and_wait(method)
    assert len(method.calls) == 2
