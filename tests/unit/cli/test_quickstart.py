"""Every quickstart is a new run, of any kind of draft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.oracles import peagle_cases
from torchspec.cli import quickstart as command
from torchspec.cli.quickstart import quickstart, unused_name
from torchspec.config.load import parse_config
from torchspec.config.schema import Config
from torchspec.driver.run import RunSummary


def test_every_quickstart_is_a_new_run(tmp_path: Path) -> None:
    config = parse_config({"target": {"path": "x"}, "run": {"name": "quick", "dir": str(tmp_path)}})
    names = []
    for _ in range(3):
        names.append(unused_name(config))
        (tmp_path / names[-1]).mkdir()
        (tmp_path / names[-1] / "config.yaml").touch()
    assert names == ["quick", "quick-2", "quick-3"]


def test_a_draft_that_sglang_does_not_serve_is_trained_and_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: Config, resume: bool) -> RunSummary:
        assert config.draft.kind == "peagle"
        spec = peagle_cases.build(peagle_cases.Case()).draft.spec
        (tmp_path / "model.safetensors").touch()
        (tmp_path / "config.json").write_text(json.dumps(spec.hf_config("float32")))
        return RunSummary(tmp_path, 1, 1, 0, 1.0, False, None, tmp_path, None, None)

    monkeypatch.setattr(command, "run_training", train)
    quickstart([f"run.dir={tmp_path}"], kind="peagle")
    assert capsys.readouterr().out.startswith("not measured: SGLang cannot serve a P-EAGLE draft; vLLM can")
