"""Figures as people read them."""

from __future__ import annotations

from torchspec.cli.units import human_bytes, human_count, human_rate, human_seconds


def test_figures_as_people_read_them() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1536, 100 << 20, 1 << 30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "100 MiB",
        "1.0 GiB",
    ]
    assert [human_seconds(s) for s in (0, 59.6, 75, 7500, 200_000)] == ["0s", "1m00s", "1m15s", "2h05m", "2d07h"]
    assert [human_count(n) for n in (0, 12_345, 12_345_678, 2e9)] == ["0", "12,345", "12.3M", "2.0G"]
    assert [human_rate(r) for r in (0, 0.1234, 4.567, 78.91, 1234.5)] == ["0", "0.123", "4.57", "78.9", "1,234"]
