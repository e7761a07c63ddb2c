"""Fixtures of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchspec.config.load import load_config, save_config


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("target:\n  path: ./models/absent\n")
    return path


@pytest.fixture
def old_run(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that is over, as ``runs/old`` of the folder that commands run in."""
    monkeypatch.chdir(recipe.parent)
    folder = Path("runs/old")
    folder.mkdir(parents=True)
    save_config(load_config(recipe, ["run.name=original"]), folder / "config.yaml")
    return folder
