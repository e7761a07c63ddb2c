"""Families of targets on real parts: states as transformers has them, and drafts that are trained and served."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.targets import STAGES, judge

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["Llama 3", "Phi-3", "Qwen3-MoE", "Qwen3-VL"])
def test_states_are_those_of_transformers(family: str, target_path: Path, tmp_path: Path) -> None:
    outcome = judge(family, tmp_path, stages=("plan", "capture"))
    assert outcome.stages == {"plan": "ok", "capture": "ok"}


@pytest.mark.parametrize(("family", "knobs"), [("Qwen2", ()), ("Qwen3", ("draft.window=320",))])
def test_a_draft_is_trained_and_served(family: str, knobs: tuple[str, ...], target_path: Path, tmp_path: Path) -> None:
    assert judge(family, tmp_path, knobs).stages == dict.fromkeys(STAGES, "ok")
