"""A container may have less memory than its machine."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from torchspec import hardware
from torchspec.hardware import usable_memory


@pytest.mark.parametrize(("limit", "usable"), [("1048576\n", 1 << 20), ("max\n", None), (f"{1 << 62}\n", None)])
def test_the_containers_limit_counts(limit: str, usable: int | None, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(hardware, "CGROUP_LIMITS", (tmp_path / "memory.max", tmp_path / "absent"))
    assert usable_memory() == (usable or psutil.virtual_memory().total)
