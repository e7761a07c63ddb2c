"""Nothing of a resolved config is left open, and what was said stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchspec.config.load import parse_config
from torchspec.driver import resolve as driver_resolve
from torchspec.driver.resolve import resolve


def test_what_is_open_is_filled_in_and_a_resolved_config_stays_as_it_is(
    target_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = {"target": {"path": str(target_path)}, "data": {"max_seq_length": 64}, "inference": {"max_concurrency": 6}}
    resolved = resolve(parse_config(tree))
    config, sample = resolved.config, resolved.geometry.stored_bytes(64)
    assert config.inference.buffer_bytes == resolved.found["inference.buffer_bytes"] == 8 * sample
    assert config.inference.max_concurrency == 6 and "inference.max_concurrency" not in resolved.found
    assert None not in (config.store.segment_bytes, config.training.buffer_bytes, config.training.loss_chunk_tokens)
    assert config.training.dtype == config.target.dtype == resolved.geometry.dtype != "auto"
    assert config.run_dir.parent == tmp_path / "runs" and config.data.cache_dir.is_absolute()
    again = resolve(config)
    assert again == resolved and not again.found


def test_a_resume_from_another_folder_finds_every_file_again(
    target_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"train": "data/*.jsonl", "chat_template": "mine.jinja"}
    tree = {"target": {"path": str(target_path)}, "data": data, "evaluation": {"heldout": "~/heldout.jsonl"}}
    config = resolve(parse_config(tree)).config
    here = [config.data.train, config.data.chat_template]
    assert here == [str(tmp_path / "data/*.jsonl"), str(tmp_path / "mine.jinja")]
    assert config.evaluation.heldout == str(Path("~/heldout.jsonl").expanduser())
    tree |= {"data": {"train": "hub:owner/name", "chat_template": "{{ messages }}"}, "evaluation": {"heldout": None}}
    config = resolve(parse_config(tree)).config
    assert (config.data.train, config.data.chat_template) == ("hub:owner/name", "{{ messages }}")
    assert config.evaluation.heldout is None


def test_what_was_said_stays(target_path: Path) -> None:
    tree = {
        "target": {"path": str(target_path), "dtype": "float32"},
        "training": {"dtype": "float32"},
        "inference": {"buffer_bytes": 123 << 20},
    }
    config = resolve(parse_config(tree)).config
    assert (config.target.dtype, config.training.dtype, config.inference.buffer_bytes) == (
        "float32",
        "float32",
        123 << 20,
    )


def test_answers_that_are_not_there_are_named(target_path: Path, tmp_path: Path) -> None:
    config = parse_config({"target": {"path": str(target_path)}, "answer": {"reuse": str(tmp_path / "absent.jsonl")}})
    with pytest.raises(ValueError, match=r"answer\.reuse: there is no file .*absent\.jsonl"):
        resolve(config)


def test_a_model_of_the_hub_is_its_copy_here(target_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_resolve, "find_checkpoint", lambda name: {"owner/model": target_path}[name])
    resolved = resolve(parse_config({"target": {"path": "owner/model"}}))
    assert (resolved.config.target.path, resolved.target.path) == (str(target_path), target_path)


def test_what_breaks_capture_is_refused(target_path: Path) -> None:
    target = {"path": str(target_path)}
    with pytest.raises(ValueError, match=r"inference\.engine_args\.dp_size=2"):
        resolve(parse_config({"target": target, "inference": {"engine_args": {"dp_size": 2}}}))
