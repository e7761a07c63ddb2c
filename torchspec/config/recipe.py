"""A recipe's file as a plain tree: with the recipe that it builds on (``base:``) and the environment's ``${VAR}``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from torchspec.drafts.registry import kind_of

RECIPES = Path(__file__).with_name("recipes")
"""That we bring along: ``builtin:NAME`` is ``NAME.yaml`` there."""
VARIABLE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_]\w*)(:-[^}]*)?\})?")
"""``${VAR}``, ``${VAR:-default}``, ``$${`` for a ``${`` that stays; and a ``${`` that is none of these."""


def read_recipe(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The sections of ``path`` over those of its ``base``, a path relative to the file that names it.

    Both may be ``builtin:NAME``.

    A variable's value is text, and a number where its key takes one; a value that comes out empty is null. The values
    are what the run saves in its ``config.yaml`` and goes on with, so a secret does not belong into a recipe.

    Args:
        below: resolved paths of the recipes that build on this one.

    Raises:
        ValueError: a file is missing or not YAML, builds on itself, or names a variable that is not set.
    """
    if (name := str(path)).startswith("builtin:"):
        path = RECIPES / f"{name.removeprefix('builtin:')}.yaml"
        if not path.is_file():
            names = ", ".join(f"builtin:{there.stem}" for there in sorted(RECIPES.glob("*.yaml")))
            raise ValueError(f"no recipe {name}: there are {names}")
    tree = _filled(_read_yaml(path), path, "")
    base, here = tree.pop("base", None), (*below, path.resolve())
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ValueError(f"{path}: base: {base!r} does not fit; valid: path of another recipe, or builtin:NAME")
    other = Path(base) if base.startswith("builtin:") else path.parent / Path(base).expanduser()
    if other.resolve() in here:
        raise ValueError(f"{path}: base: {base} builds on this recipe itself")
    return _merged(read_recipe(other, here), tree)


def keep_variables(text: str) -> str:
    """``text`` so that it is read as it stands: what looks like a variable in it is none."""
    return text.replace("${", "$${")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"cannot read the config {path}: {error.strerror}") from None
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{path} is not valid YAML: nested too deeply") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold sections (run:, target:, data:, ...), not a {type(tree).__name__}")
    return tree


def _filled(value: Any, path: Path, key: str) -> Any:
    """``value`` with its variables' values."""
    if isinstance(value, dict):
        return {name: _filled(child, path, f"{key}.{name}" if key else str(name)) for name, child in value.items()}
    if isinstance(value, list):
        return [_filled(child, path, key) for child in value]
    if not isinstance(value, str) or "${" not in value:
        return value

    def value_of(variable: re.Match[str]) -> str:
        name, default = variable.groups()
        if variable[0] == "$${":
            return "${"
        if name is None:
            raise ValueError(
                f"{path}: {key}: {value!r} holds a ${{ that begins no variable; valid: ${{VAR}}, ${{VAR:-default}}, "
                "and $${ for the characters themselves"
            )
        if default is not None:
            return os.environ.get(name) or default.removeprefix(":-")
        if name not in os.environ:
            raise ValueError(
                f"{path}: {key}: the environment variable {name} is not set; set it, or write ${{{name}:-default}}"
            )
        return os.environ[name]

    return VARIABLE.sub(value_of, value) or None


def _merged(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """``tree`` over ``base``: mappings key by key, all else as a whole, and a draft of another kind, too."""
    merged = dict(base)
    for key, value in tree.items():
        under = base.get(key)
        if isinstance(under, dict) and isinstance(value, dict):
            kind = kind_of(under)
            if key != "draft" or value.get("kind", kind) == kind:
                value = _merged(under, value)
        merged[key] = value
    return merged
