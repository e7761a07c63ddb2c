"""A file is complete or absent; a secret is its owner's; of a file that is appended to, a torn last line goes."""

from __future__ import annotations

import errno
import os
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from torchspec.files import Damage, JsonLines, LineFile, ensure_secret, read_lines, write_atomically


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "new" / "file.bin"
    write_atomically(path, lambda file: file.write(b"first"))

    def fail(file):
        file.write(b"half of the sec")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


def test_whoever_else_writes_has_a_scratch_file_of_his_own(tmp_path):
    path = tmp_path / "file.bin"

    def write(file):  # a process on another machine may even have our number
        file.write(b"outer, ")
        write_atomically(path, lambda inner: inner.write(b"inner"))
        assert path.read_bytes() == b"inner"
        file.write(b"whole")

    write_atomically(path, write)
    assert path.read_bytes() == b"outer, whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_torn_last_line_is_dropped_and_written_over(tmp_path):
    path = tmp_path / "x.jsonl"
    JsonLines(path).write({"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2, "b"')
    assert list(read_lines(path)) == [{"a": 1}]
    JsonLines(path).write({"a": 3})
    assert list(read_lines(path)) == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize("size", [0, 1, (1 << 16) - 1, 1 << 16, 200_000])
@pytest.mark.parametrize("whole", ["", '{"a": 1}\n'])
def test_a_torn_line_of_any_size_goes(tmp_path, whole, size):
    path = tmp_path / "x.jsonl"
    path.write_text(whole + "x" * size)
    JsonLines(path).close()
    assert path.read_text() == whole


def test_a_secret_is_its_owners_and_stays_the_same(tmp_path):
    before = os.umask(0)
    try:
        path = tmp_path / "token"
        with ThreadPoolExecutor(8) as threads:
            secrets = set(threads.map(lambda _: ensure_secret(path), range(8)))
    finally:
        os.umask(before)
    assert secrets == {path.read_text()} and len(path.read_text()) == 64
    assert path.stat().st_mode & 0o777 == 0o600 and list(tmp_path.iterdir()) == [path]
    path.chmod(0o644)
    assert ensure_secret(path) in secrets and path.stat().st_mode & 0o777 == 0o600
    path.write_text("")
    assert len(ensure_secret(path)) == 64


def test_what_a_full_disk_does_not_take_names_the_file_and_leaves_no_part_of_a_line(tmp_path):
    path = tmp_path / "x.jsonl"
    file = JsonLines(path)
    file.write({"a": 1})
    with full_disk(path.stat().st_size + 3), pytest.raises(OSError, match="File too large") as caught:
        file.write({"a": 2})
    assert caught.value.filename == str(path)
    file.write({"a": 3})
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match=str(full)) as caught:
        LineFile(full).append(b"{}\n")
    assert caught.value.errno == errno.ENOSPC
    with full_disk(3), pytest.raises(OSError, match=r"whole\.json"):
        write_atomically(tmp_path / "whole.json", lambda file: file.write(b"12345"))


@contextmanager
def full_disk(size):
    """No file of this process may grow beyond ``size``."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_the_calls_that_touch_the_disk_can_be_made_later(tmp_path):
    calls = []
    file = JsonLines(tmp_path / "x.jsonl", lambda *call: calls.append(call))
    size = file.write({"ä": 1})
    file.sync()
    file.close()
    assert (tmp_path / "x.jsonl").read_bytes() == b""
    for call, *args in calls:
        call(*args)
    assert (tmp_path / "x.jsonl").read_text() == '{"ä": 1}\n' and (tmp_path / "x.jsonl").stat().st_size == size == 10


@pytest.mark.parametrize("damage", [b"\0" * 40, b'{"a": 1, "b"{"a": 2}', b"7", b'{"a": "\xff"}', b"", b"[" * 100_000])
def test_a_damaged_line_costs_itself_alone_and_is_told_of_once(tmp_path, damage, caplog):
    path, told = tmp_path / "x.jsonl", list[Damage]()
    caplog.set_level("WARNING")  # an engine in this process has made it a higher one, maybe
    path.write_bytes(b'{"a": 1}\n' + damage + b'\n{"a": "\xc3\xa4"}\n' + damage + b'\n{"a": 3')
    assert list(read_lines(path, told.append)) == [{"a": 1}, {"a": "ä"}]
    assert told == [Damage(str(path), (2, 4))]
    assert str(told[0]) == f"{path}: damaged and passed over: line 2, 4"
    assert len(list(read_lines(path))) == 2 and caplog.messages == [str(told[0])], "or it is in the log"
    assert str(Damage("x", tuple(range(1, 2000)))) == "x: damaged and passed over: line 1, 2, 3, 4, 5 and 1,994 others"
