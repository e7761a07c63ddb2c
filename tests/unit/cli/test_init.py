"""``torchspec init``: the recipe that it writes can be planned as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import hollow_checkpoint
from tests.unit.cli.commands import run
from torchspec.config.load import load_config
from torchspec.driver.prepare import make_plan_for


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my chats.jsonl"
    path.write_text('{"prompt": "Hi"}\n' * 200)
    return path


def test_the_recipe_for_a_small_target_is_planned(
    target_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "init", target_path, "--data", data.name, "--heldout", data.name, "-o", "mine.yaml") == 0
    assert capsys.readouterr().out == "wrote mine.yaml; next: torchspec plan mine.yaml\n"
    config = load_config("mine.yaml")
    assert config.run.name == target_path.name and config.data.train == config.evaluation.heldout == data.name
    plan, survey = make_plan_for(config)
    assert survey.rows == 200 and plan.store_samples >= config.data.vocab_prompts + config.evaluation.samples
    assert run(monkeypatch, "init", target_path, "-o", "mine.yaml") == 2
    assert capsys.readouterr().err == "error: mine.yaml exists already: choose another file with --out\n"


def test_a_recipe_for_a_large_target_plans(
    target_path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hollow_checkpoint(tmp_path / "Qwen3 8B (mine)", target_path)
    assert run(monkeypatch, "init", folder, "--data", data.name) == 0
    config = load_config("recipe.yaml")
    assert config.run.name == "Qwen3-8B-mine" and config.evaluation.heldout is None
    assert "8.2G parameters, 36 layers, 151,936 tokens, a context of 40,960" in Path("recipe.yaml").read_text()
    assert make_plan_for(config)[0].store_samples > config.training.batch_size


def test_what_cannot_be_run_is_said_and_the_recipe_is_there_to_mend(
    target_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "init", target_path, "--data", "absent.jsonl") == 1
    assert f"as it stands:\ndata.train {data.with_name('absent.jsonl')}: no such file" in capsys.readouterr().err
    assert load_config("recipe.yaml").data.train == "absent.jsonl"
    assert run(monkeypatch, "init", "absent", "-o", "other.yaml") == 2
    assert "target.path: there is no folder absent" in capsys.readouterr().err and not Path("other.yaml").exists()


def test_names_with_spaces_are_quoted(
    target_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "init", target_path, "--data", data.name, "-o", "my recipe.yaml") == 0
    assert capsys.readouterr().out == "wrote my recipe.yaml; next: torchspec plan 'my recipe.yaml'\n"
    assert "#   torchspec train 'my recipe.yaml' " in Path("my recipe.yaml").read_text()
