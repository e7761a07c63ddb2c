"""``torchspec verify``: how far a run is proven."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.commands import run
from torchspec.config.load import load_config, save_config
from torchspec.data.order import epoch_order
from torchspec.files import JsonLines


def test_verify_says_how_far_a_run_is_proven_and_names_what_is_not(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(recipe.parent)
    folder = Path("runs/old")
    folder.mkdir(parents=True)
    save_config(load_config(recipe), folder / "config.yaml")
    assert run(monkeypatch, "verify", "old") == 1
    assert "the journal is empty" in capsys.readouterr().out
    (first, second, third), others = epoch_order(5, 0, 8)[:3].tolist(), {"max_steps": None, "epochs": 1}
    shape = {"dataset": "d", "prompts": 8, "batch_size": 2, "seed": 5}
    journal = JsonLines(folder / "ledger.jsonl")
    journal.write({"event": "started", **shape, **others})
    journal.write({"event": "trained", "step": 1, "end": 2, "samples": [[0, first], [0, second]]})
    assert run(monkeypatch, "verify", "old") == 0
    assert "proven, so far: 1 steps" in capsys.readouterr().out
    journal.write({"event": "trained", "step": 2, "end": 4, "samples": [[0, third], [0, second]]})
    assert run(monkeypatch, "verify", "old") == 1
    assert f"line 3: step 2 trains a second time e0p{second}" in capsys.readouterr().out
