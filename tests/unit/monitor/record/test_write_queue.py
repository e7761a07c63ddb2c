"""A file server that stalls holds nobody up; a disk that is full costs views a gap, and the run a clear end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from torchspec.files import JsonLines, LineFile
from torchspec.monitor.record import write_queue
from torchspec.monitor.record.observer import Observer
from torchspec.monitor.record.write_queue import WriteFailed, WriteQueue


@pytest.fixture
def queue(tmp_path: Path) -> WriteQueue:
    return WriteQueue(tmp_path)


def play(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 30))


def full(tmp_path: Path) -> Path:
    """A file on a disk that is full."""
    path = tmp_path / "ledger.jsonl"
    path.symlink_to("/dev/full")
    return path


def test_nobody_waits_for_a_stalled_disk_but_who_wants_what_is_written(queue: WriteQueue, tmp_path: Path) -> None:
    async def scene() -> None:
        goes_on = threading.Event()
        queue.put(goes_on.wait)
        journal = JsonLines(tmp_path / "x.jsonl", queue.put)
        started = time.monotonic()
        for step in range(1000):
            journal.write({"step": step})
        journal.sync()
        assert time.monotonic() - started < 5 and (tmp_path / "x.jsonl").read_bytes() == b""
        written = asyncio.create_task(queue.written())
        await asyncio.sleep(0.05)
        assert not written.done()
        goes_on.set()
        await written
        lines = (tmp_path / "x.jsonl").read_text().splitlines()
        assert lines == [f'{{"step": {step}}}' for step in range(1000)], "in order"
        await queue.close()

    play(scene)


def test_who_makes_more_waits_for_room(queue: WriteQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_queue, "MOST_WAITING", 5)

    async def scene() -> None:
        goes_on = threading.Event()
        queue.put(goes_on.wait)
        await queue.room()
        for _ in range(6):
            queue.put(lambda: None)
        waiting = asyncio.create_task(queue.room())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        goes_on.set()
        await waiting

    play(scene)


def test_a_stall_is_said_once_and_so_is_its_end(queue: WriteQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_queue, "STALL_SECONDS", 0.05)

    async def scene() -> None:
        assert list(queue.news()) == []
        goes_on = threading.Event()
        queue.put(goes_on.wait)
        await asyncio.sleep(0.1)
        ((kind, line),) = queue.news()
        assert kind == "trouble" and "has taken no write for 0 s; training goes on" in line
        assert list(queue.news()) == []
        goes_on.set()
        await queue.written()
        ((kind, line),) = queue.news()
        assert kind == "note" and line.endswith("takes writes again")

    play(scene)


def test_what_the_run_needs_ends_it_with_the_name_of_the_file_and_leaves_no_hole(
    queue: WriteQueue, tmp_path: Path
) -> None:
    async def scene() -> None:
        path, other = full(tmp_path), LineFile(tmp_path / "answers.jsonl")
        journal = JsonLines(path, queue.put)
        journal.write({"step": 1})
        queue.put(other.append, b"{}\n")
        reason = f"cannot write {path}: No space left on device; make room there, or mend its disk"
        with pytest.raises(WriteFailed) as caught:
            await queue.written()
        assert str(caught.value) == queue.failure == reason
        assert (tmp_path / "answers.jsonl").read_bytes() == b"", "nothing comes after what is missing"
        assert list(queue.news()) == []

    play(scene)


def test_what_is_only_looked_at_has_a_gap_which_is_said_once_a_minute(queue: WriteQueue, tmp_path: Path) -> None:
    async def scene() -> None:
        file = LineFile(full(tmp_path))
        for _ in range(3):
            await asyncio.wrap_future(queue.put_for_views(file.append, b"{}\n"))
        ((kind, line),) = queue.news()
        assert kind == "trouble" and f"{tmp_path}/ledger.jsonl: No space left on device" in line
        assert line.endswith("What views show has a gap; training goes on")
        await asyncio.wrap_future(queue.put_for_views(file.append, b"{}\n"))
        assert list(queue.news()) == [] and queue.failure == ""
        await queue.written()

    play(scene)


def test_a_mistake_of_ours_in_a_write_is_said_too(queue: WriteQueue) -> None:
    async def scene() -> None:
        queue.put(int, "x")
        with pytest.raises(WriteFailed, match="a file cannot be written: ValueError: invalid literal"):
            await queue.written()

    play(scene)


def test_an_observer_goes_on_while_its_disk_stalls(tmp_path: Path) -> None:
    async def scene() -> None:
        observer, goes_on = Observer(tmp_path, 0), threading.Event()
        observer.files.put(goes_on.wait)
        observer.note("something happens", "trouble")
        assert observer.messages == ["something happens"] and observer.news.is_set()
        assert (tmp_path / "metrics" / "events.jsonl").read_bytes() == b""
        goes_on.set()
        await observer.close()
        assert b'"kind":"trouble","message":"something happens"' in (tmp_path / "metrics" / "events.jsonl").read_bytes()

    play(scene)
