"""Prompts of an evaluation: what they are read from, and where they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchspec.data.tokenize import ChatTokenizer
from torchspec.evaluation.prompts import load_prompts


def test_prompts_end_where_the_target_goes_on(target_path: Path, tmp_path: Path) -> None:
    lines = [
        {"id": "open", "category": "chat", "messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    opened, answered = load_prompts(str(tmp_path / "p.jsonl"), ChatTokenizer(target_path), tmp_path)
    assert (opened.id, opened.category) == ("open", "chat")
    assert answered.category is None
    assert answered.input_ids == opened.input_ids
    assert len(opened.input_ids) > 5


def test_the_heldout_prompts_have_categories(target_path: Path, tmp_path: Path) -> None:
    prompts = load_prompts("builtin:heldout", ChatTokenizer(target_path), tmp_path, limit=10)
    assert len(prompts) == 10
    assert all(prompt.category for prompt in prompts)


def test_bad_prompts_are_refused_by_line(target_path: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "fine", "category": "chat"}\n{"prompt": 7}\nno JSON\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: content is not text: prompt\[0\]"):
        load_prompts(str(tmp_path / "bad.jsonl"), ChatTokenizer(target_path), tmp_path)
    (fine,) = load_prompts(str(tmp_path / "bad.jsonl"), ChatTokenizer(target_path), tmp_path, limit=1)
    assert fine.category == "chat", "what lies behind the limit is not read"
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no conversation"):
        load_prompts(str(tmp_path / "empty.jsonl"), ChatTokenizer(target_path), tmp_path)
