"""Recipes that build on others, and what they read of the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchspec.config.load import load_config, save_config
from torchspec.config.recipe import read_recipe


def write(folder: Path, **recipes: str) -> Path:
    """Recipes by name; returns the first."""
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(recipes))}.yaml"


def error_of(path: Path) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_recipe_stands_over_its_base_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write(
        tmp_path / "below", ground="inference: {engine_args: {a: 1, b: [2, 3]}}\ntraining: {batch_size: 4, epochs: 3}"
    )
    write(tmp_path / "below", middle="base: ground.yaml\ntarget: {path: x}\ntraining: {epochs: 5}\ndata: {limit: 7}")
    path = write(tmp_path, top="base: below/middle.yaml\ninference: {engine_args: {b: [4]}}\ndata:\n")
    config = load_config(path, ["training.epochs=6"])
    assert (config.target.path, config.training.batch_size, config.training.epochs) == ("x", 4, 6)
    assert config.inference.engine_args == {"a": 1, "b": [4]} and config.data.limit is None


def test_a_draft_of_another_kind_has_none_of_the_bases_knobs(tmp_path: Path) -> None:
    path = write(tmp_path, top="base: ground.yaml\ndraft: {kind: dflash}", ground="draft: {ttt_length: 3}")
    assert read_recipe(path)["draft"] == {"kind": "dflash"}
    path = write(tmp_path, top="base: ground.yaml\ndraft: {block_size: 8}", ground="draft: {kind: dflash, gamma: 4}")
    assert read_recipe(path)["draft"] == {"kind": "dflash", "gamma": 4, "block_size": 8}
    path = write(
        tmp_path, top="base: ground.yaml\ndraft: {kind: eagle3, init: target}", ground="draft: {ttt_length: 3}"
    )
    assert read_recipe(path)["draft"] == {"kind": "eagle3", "init": "target", "ttt_length": 3}


def test_a_base_may_be_one_that_comes_along(tmp_path: Path) -> None:
    path = write(tmp_path, top="base: builtin:quickstart\nrun: {name: mine}")
    assert load_config(path, ["run.name=quickstart"]) == load_config("builtin:quickstart")
    assert error_of(Path("builtin:quickstrat")).startswith(
        "no recipe builtin:quickstrat: there are builtin:quickstart, "
    )


def test_a_base_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, top="base: middle.yaml", middle="base: ./top.yaml")
    assert error_of(path) == f"{tmp_path}/middle.yaml: base: ./top.yaml builds on this recipe itself"
    assert error_of(write(tmp_path, top="base: top.yaml")).endswith("base: top.yaml builds on this recipe itself")
    assert error_of(write(tmp_path, top="base: absent.yaml")).startswith(
        f"cannot read the config {tmp_path}/absent.yaml"
    )
    assert error_of(write(tmp_path, top="base: [a]")).endswith(
        "does not fit; valid: path of another recipe, or builtin:NAME"
    )
    assert error_of(write(tmp_path, top="target: {path: x}\nbsae: y")).startswith("unknown key bsae")


def test_values_read_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", "/models: [1]")
    monkeypatch.setenv("EPOCHS", "4")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("ABSENT", raising=False)
    path = write(
        tmp_path,
        top="""
target: {path: "${MODELS}/${ABSENT:-tiny}"}
run: {name: "${EPOCHS}"}
training: {epochs: "${EPOCHS}", threads: "${ABSENT:-auto}", compile: "${ABSENT:-true}"}
optimizer: {lr: "${ABSENT:-2e-3}", betas: ["${ABSENT:-0.5}", 0.9]}
evaluation: {heldout: "${EMPTY:-}", samples: "${EMPTY:-7}"}
inference: {engine_args: {note: "$${MODELS} ${EMPTY}$5"}}
""",
    )
    config = load_config(path)
    assert config.target.path == "/models: [1]/tiny" and config.run.name == "4" and config.training.epochs == 4
    assert config.training.threads == "auto" and config.training.compile is True
    assert config.optimizer.lr == 2e-3 and config.optimizer.betas == (0.5, 0.9)
    assert config.evaluation.heldout is None and config.evaluation.samples == 7
    assert config.inference.engine_args == {"note": "${MODELS} $5"}
    save_config(config, tmp_path / "saved.yaml")
    monkeypatch.setenv("MODELS", "elsewhere")
    assert load_config(tmp_path / "saved.yaml") == config, "what it was when the run began"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("${ABSENT}", "the environment variable ABSENT is not set; set it, or write ${ABSENT:-default}"),
        ("a${ABSENT-b}", "'a${ABSENT-b}' holds a ${ that begins no variable; valid: ${VAR}, ${VAR:-default}, and $${"),
        ("${1}", "'${1}' holds a ${ that begins no variable"),
        ("${OPEN", "'${OPEN' holds a ${ that begins no variable"),
    ],
)
def test_a_variable_that_is_none_is_named_with_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    monkeypatch.delenv("ABSENT", raising=False)
    path = write(tmp_path, top=f"target: {{path: '{value}'}}")
    assert error_of(path).startswith(f"{path}: target.path: {message}")
