"""What an installed package has: every file that the code reads is in a wheel."""

from __future__ import annotations

import tomllib
from pathlib import Path

from torchspec.config.recipe import RECIPES
from torchspec.inference.sglang_patch import our_edits

ROOT = Path(__file__).parents[2]


def test_a_wheel_has_all_files_of_the_package_but_texts_about_them() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["torchspec"]
    package = ROOT / "torchspec"
    packed = {path for pattern in patterns for path in package.glob(pattern) if path.is_file()}
    there = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert {path.relative_to(package) for path in there - packed} == {Path("inference/patches/v0.5.23/README.md")}
    assert package in RECIPES.parents and (RECIPES / "quickstart.yaml") in packed
    assert our_edits(), "a check of no edits would always pass"
