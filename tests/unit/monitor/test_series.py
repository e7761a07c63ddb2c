"""Time series in files: bounded, whole after a crash, exact in their rates, followed across rewriting."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from torchspec.monitor.series import Follower, Series, read_series, tail, thin


def line(time: float, count: int = 0) -> bytes:
    return json.dumps({"time": time, "count": count}).encode() + b"\n"


def times(records: list[dict]) -> list[float]:
    return [record["time"] for record in records]


def test_a_series_stays_small_keeps_its_ends_and_lies_evenly(tmp_path: Path) -> None:
    series = Series(tmp_path / "s.jsonl", max_lines=400, recent=50)
    for i in range(5000):
        series.append(line(float(i), 3 * i))
    records = read_series(tmp_path / "s.jsonl")
    assert 200 <= len(records) < 400
    assert times(records)[0] == 0 and times(records)[-1] == 4999
    assert times(records)[-50:] == [float(i) for i in range(4950, 5000)], "the newest lines stay as they are"
    old = [time for time in times(records) if time < 4500]
    gaps = [b - a for a, b in pairwise(old)]
    assert max(gaps) <= 3 * sum(gaps) / len(gaps), "no hole, however often it was thinned"
    assert all((b["count"] - a["count"]) / (b["time"] - a["time"]) == 3 for a, b in pairwise(records)), "exact rates"


def test_thinning_keeps_at_most_so_many() -> None:
    lines = [line(float(t)) for t in (*range(100), *range(1000, 1100))]
    for most in (2, 3, 10, 57, 199, 200, 500):
        kept = thin(lines, most, 1)
        assert len(kept) <= most and kept[-1] == lines[-1] and kept[0] == lines[0]


def test_a_torn_line_is_dropped_and_never_read(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(line(1) + line(2) + b'{"time": 3, "cou')
    assert times(read_series(path)) == times(tail(path, 0)) == times(Follower(path, 9).read()) == [1, 2]
    Series(path, 100, 10).append(line(4))
    assert times(read_series(path)) == [1, 2, 4]


@pytest.mark.parametrize(
    "damage", [b"\0" * 30 + b"\n", line(2)[:-5] + line(2), line(2)[4:], line(2)[:9] + b"\n", b"\n"]
)
def test_a_damaged_line_costs_itself_alone(tmp_path: Path, damage: bytes) -> None:
    """It ended the controller at the next thinning, and every view before that."""
    path = tmp_path / "s.jsonl"
    path.write_bytes(line(1) + damage + line(3))
    assert times(read_series(path)) == times(tail(path, 0)) == times(Follower(path, 9).read()) == [1, 3]
    series, follower = Series(path, 40, 10), Follower(path, 99)
    follower.read()
    for time in range(4, 60):
        series.append(line(time))
    with path.open("ab") as file:
        file.write(damage + line(60))
    assert times(follower.read())[-2:] == [59, 60] and times(tail(path, 58)) == [59, 60]


@pytest.mark.parametrize("count", [1, 7, 3000])
def test_the_tail_is_what_reading_all_would_give(tmp_path: Path, count: int) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"".join(line(float(i)) for i in range(count)))
    for start in (-1.0, 0.0, count / 2, count - 1.0, count + 5.0):
        newer = [t for t in map(float, range(count)) if t > start]
        assert times(tail(path, start)) == times(read_series(path, start)) == newer
        assert times(tail(path, start, before=True)) == [float(t) for t in range(count)][-len(newer) - 1 :]
    assert tail(tmp_path / "absent", 0) == read_series(tmp_path / "absent") == []


def test_a_follower_sees_every_record_once_also_when_the_file_is_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    whole, newest = Follower(path, 1000), Follower(path, 10)
    assert whole.read() == []
    series = Series(path, max_lines=60, recent=20)
    for i in range(500):
        series.append(line(float(i)))
        if i % 7 == 0:
            whole.read()
    assert times(whole.read()) == [float(i) for i in range(500)]
    assert times(newest.read()) == [float(i) for i in range(490, 500)]
