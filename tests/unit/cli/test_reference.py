"""``torchspec config``: the generated reference names everything, and is a recipe itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.unit.cli.commands import run
from torchspec.cli.reference import reference_lines
from torchspec.config.describe import describe_type, section_of
from torchspec.config.load import load_config, parse_config
from torchspec.config.schema import Config


def test_the_reference_is_a_recipe_of_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "reference.yaml"
    path.write_text("\n".join(reference_lines(Config)))
    assert load_config(path, ["target.path=x"]) == parse_config({"target": {"path": "x"}})


def test_every_key_stands_there_with_its_meaning() -> None:
    text = "\n".join(reference_lines(Config))
    unwrapped = " ".join(line.strip().removeprefix("# ") for line in text.splitlines())
    for section in Config.model_fields.values():
        assert isinstance(section.annotation, type) and issubclass(section.annotation, BaseModel)
        for name, field in section.annotation.model_fields.items():
            assert f"\n  {name}:" in text
            assert field.description, f"{name} has no docstring"
            assert field.description.replace("``", "`").replace("\n", " ") in unwrapped


def test_types_as_people_say_them() -> None:
    def described(section: str, name: str) -> str:
        model = section_of(Config.model_fields[section])
        assert model is not None
        return describe_type(model.model_fields[name])

    assert described("run", "name").startswith("text, matching ^[A-Z")
    assert described("target", "path") == "text, required"
    assert described("training", "threads") == "integer > 0 | auto"
    assert described("draft", "ttt_length") == "integer, >= 1, <= 16"
    assert described("optimizer", "schedule") == "cosine | linear | constant | wsd"
    assert described("optimizer", "betas") == "[number, number]"
    assert described("data", "limit") == "integer | null, >= 1"
    assert described("inference", "engine_args") == "mapping"


def test_config_prints_the_resolved_recipe(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "config", recipe, "optimizer.lr=2e-3") == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(recipe, ["optimizer.lr=2e-3"])
