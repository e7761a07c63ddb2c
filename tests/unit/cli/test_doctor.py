"""The exit code of ``torchspec doctor``."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from tests.unit.cli.commands import run
from torchspec.cli import checks


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_the_command_exits_with_1_on_a_failure_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], level: str, code: int
) -> None:
    limits = {"ok": (1, 1), "warn": (1 << 60, 1), "fail": (1 << 60, 1 << 59)}[level]
    disk = partial(checks.check_disk, Path(), *limits)
    monkeypatch.setattr(checks, "CHECKS", {"python": checks.check_python, "disk": disk})
    assert run(monkeypatch, "doctor") == code
    out = capsys.readouterr().out
    assert run(monkeypatch, "doctor", "--json") == code
    known = json.loads(capsys.readouterr().out)
    assert list(known) == ["python", "disk"] and known["disk"]["level"] == level
    assert out.count("to fix:") == (level != "ok") and ("make room" in out) == (level != "ok")
