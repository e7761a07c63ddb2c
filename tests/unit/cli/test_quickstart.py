"""Every quickstart is a new run."""

from __future__ import annotations

from pathlib import Path

from torchspec.cli.quickstart import unused_name
from torchspec.config.load import parse_config


def test_every_quickstart_is_a_new_run(tmp_path: Path) -> None:
    config = parse_config({"target": {"path": "x"}, "run": {"name": "quick", "dir": str(tmp_path)}})
    names = []
    for _ in range(3):
        names.append(unused_name(config))
        (tmp_path / names[-1]).mkdir()
        (tmp_path / names[-1] / "config.yaml").touch()
    assert names == ["quick", "quick-2", "quick-3"]
