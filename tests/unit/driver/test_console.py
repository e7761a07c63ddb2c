"""What a person is told, once each, and what a run hears of signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from torchspec.driver.console import Interrupts, new_messages


def test_messages_of_a_sliding_window():
    assert new_messages([], ("a", "b")) == ["a", "b"]
    assert new_messages(["a", "b"], ("b", "c")) == ["c"]
    assert new_messages(["a", "b"], ("c",)) == ["c"]


@pytest.fixture(autouse=True)
def hangups() -> Iterator[None]:
    """Tests may have been started with nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_heard_and_said_once_and_not_in_its_handler(first: signal.Signals) -> None:
    told: list[str] = []
    with Interrupts(told.append) as interrupts:
        assert not interrupts.heard()
        os.kill(os.getpid(), first)
        assert told == [], "a handler may have interrupted whoever holds the output"
        assert interrupts.heard() and interrupts.heard()
        assert told == ["interrupted: stopping with a checkpoint; press Ctrl-C again to stop at once"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_terminal_that_closes_says_so_more_than_once() -> None:
    """The kernel tells its jobs, and so does the shell."""
    with Interrupts(lambda _: None) as interrupts:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupts.heard() and interrupts.count == 1
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_nohup_stays_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupts(lambda _: None) as interrupts:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interrupts.heard()
