"""Calls are made in order, errors are the asker's, and a call that hangs keeps nobody."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from torchspec.call_thread import CallThread


def test_calls_are_made_in_order_and_what_they_raise_comes_with_their_future() -> None:
    thread, made = CallThread("t"), list[int]()
    futures = [thread.submit(made.append, i) for i in range(100)]
    bad = thread.submit(int, "x")
    assert futures[-1].result(10) is None and made == list(range(100))
    with pytest.raises(ValueError, match="invalid literal"):
        bad.result(10)
    assert thread.submit(int, "7").result(10) == 7, "it goes on"
    assert thread.close(10)


def test_what_waits_can_be_counted_and_taken_back() -> None:
    thread, goes_on = CallThread("t"), threading.Event()
    assert thread.busy_seconds == 0
    began = threading.Event()
    first = thread.submit(lambda: (began.set(), goes_on.wait()))
    made: list[int] = []
    waiting = [thread.submit(made.append, i) for i in range(3)]
    assert began.wait(10) and thread.waiting == 3 and thread.busy_seconds > 0
    assert waiting[1].cancel() and not first.cancel()
    assert not thread.close(0.01), "it is at work"
    goes_on.set()
    assert waiting[2].result(10) is None and made == [0, 2] and thread.waiting == 0


def test_a_call_that_never_returns_keeps_no_process_from_ending() -> None:
    code = (
        "import threading; from torchspec.call_thread import CallThread\n"
        "thread = CallThread('t'); thread.submit(threading.Event().wait); print(thread.close(0.1))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (0, "False\n")
