"""The exit code of ``torchspec doctor``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from torchspec.cli import checks
from torchspec.cli.checks import Finding
from torchspec.cli.main import main


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_the_command_exits_with_1_on_a_failure_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], level: str, code: int
) -> None:
    def least(wanted: str) -> Finding:
        least = {"ok": (1, 1), "warn": (1 << 60, 1), "fail": (1 << 60, 1 << 59)}[wanted]
        return checks.check_disk(Path(), *least)

    monkeypatch.setattr(checks, "CHECKS", {"python": checks.check_python, "disk": lambda: least(level)})
    monkeypatch.setattr(sys, "argv", ["torchspec", "doctor"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert (exit_.value.code or 0) == code
    out = capsys.readouterr().out
    assert out.count("to fix:") == (level != "ok") and ("make room" in out) == (level != "ok")
