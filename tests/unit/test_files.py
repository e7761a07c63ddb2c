"""A file is complete or absent; a secret is its owner's; of a file that is appended to, a torn last line goes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from torchspec.files import JsonLines, ensure_secret, read_lines, write_atomically


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
