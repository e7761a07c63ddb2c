"""Every kind of draft has the files that all have, an entry in the registry, and a place in the rules of imports."""

from __future__ import annotations

import tomllib
from pathlib import Path

from torchspec.drafts.registry import KINDS

ROOT = Path(__file__).parents[3]
FOLDERS = sorted(path.parent for path in ROOT.glob("torchspec/drafts/*/__init__.py"))


def test_the_registry_knows_every_folder_by_its_name() -> None:
    assert sorted(KINDS) == [folder.name for folder in FOLDERS]
    for name, spec in KINDS.items():
        assert spec.kind == name and spec.__module__ == f"torchspec.drafts.{name}.spec"


def test_every_kind_has_a_spec_and_a_model() -> None:
    assert all((folder / file).is_file() for folder in FOLDERS for file in ("spec.py", "model.py"))


def test_the_rules_of_imports_name_every_kind() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    kinds = [f"torchspec.drafts.{folder.name}" for folder in FOLDERS]
    (independent,) = (contract["modules"] for contract in contracts if contract["type"] == "independence")
    assert sorted(independent) == kinds
    assert kinds in [sorted(contract.get("protected_modules", [])) for contract in contracts]
