"""What a resume is told before anything starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from torchspec.config.load import parse_config
from torchspec.driver import prepare
from torchspec.training.schedule import Schedule


def told(monkeypatch: pytest.MonkeyPatch, step: int, steps: int) -> list[str]:
    """By a resume to ``steps`` from a checkpoint of a run that was to have 100."""
    info, messages = SimpleNamespace(step=step, schedule=Schedule(((0, 100),))), list[str]()
    monkeypatch.setattr(prepare, "read_info", lambda folder: info)
    config = parse_config({"target": {"path": "x"}, "optimizer": {"lr": 1.0, "schedule": "linear", "warmup_ratio": 0}})
    prepare._tell_schedule(Path("checkpoint"), steps, config, messages.append)
    return messages


def test_a_resume_says_what_becomes_of_the_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, step=60, steps=100) == told(monkeypatch, step=60, steps=60) == []
    assert told(monkeypatch, step=60, steps=1060) == [
        "1,060 steps instead of 100: the learning rate goes on with 4.10e-01, and what was left of its schedule is "
        "spread over the steps to come"
    ]
    with pytest.raises(
        ValueError, match=r"training\.epochs, training\.max_steps: the learning rate has come to its end"
    ):
        told(monkeypatch, step=100, steps=200)
