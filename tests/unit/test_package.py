"""What an installed package has: every file that the code reads is in a wheel."""

from __future__ import annotations

import tomllib
from pathlib import Path

from torchspec.config.recipe import RECIPES
from torchspec.inference.sglang_patch import our_edits

ROOT = Path(__file__).parents[2]


def test_a_wheel_has_all_files_of_the_package_and_what_lies_beside_it() -> None:
    """``configs/`` and ``patches/sglang/`` are linked from the package; a wheel has the files themselves."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["torchspec"]
    package = ROOT / "torchspec"
    packed = {path for pattern in patterns for path in package.glob(pattern) if path.is_file()}
    there = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert there <= packed
    assert package in RECIPES.parents and (RECIPES / "quickstart.yaml") in packed
    assert set(ROOT.glob("patches/sglang/*/*.patch")) == {path.resolve() for path in packed if path.suffix == ".patch"}
    assert our_edits(), "a check of no edits would always pass"
