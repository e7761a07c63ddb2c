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


def test_a_malformed_row_stops_and_an_odd_conversation_is_left_out(target_path: Path, tmp_path: Path) -> None:
    chat, told = ChatTokenizer(target_path), list[str]()
    odd = [{"prompt": 7}, {"input_ids": [1], "loss_mask": [1]}, {"prompt": "Hi", "tools": [{"type": "function"}]}]
    lines = [{"prompt": "fine", "category": "chat"}, *odd, {"prompt": "fine, too"}]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fine = load_prompts(str(tmp_path / "odd.jsonl"), chat, tmp_path, told=told.append)
    assert [prompt.id for prompt in fine] == ["odd:1", "odd:5"]
    reasons = ["content is not text", "tokenised already", "the chat template leaves out tools"]
    assert told == [f"prompts {tmp_path / 'odd.jsonl'}: 1 left out: {reason}" for reason in reasons]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "fine", "category": "chat"}\nno JSON\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: not valid JSON"):
        load_prompts(str(tmp_path / "bad.jsonl"), chat, tmp_path)
    (first,) = load_prompts(str(tmp_path / "bad.jsonl"), chat, tmp_path, limit=1)
    assert first.category == "chat", "what lies behind the limit is not read"


def test_a_set_without_a_prompt_to_ask_says_why(target_path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no conversation to ask; it is empty"):
        load_prompts(str(tmp_path / "empty.jsonl"), ChatTokenizer(target_path), tmp_path)
    (tmp_path / "odd.jsonl").write_text('{"prompt": 7}\n' * 2)
    with pytest.raises(ValueError, match="to ask; 2 left out: content is not text"):
        load_prompts(str(tmp_path / "odd.jsonl"), ChatTokenizer(target_path), tmp_path)


def test_rows_with_keys_of_their_own(target_path: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "Hi"}\n')
    (prompt,) = load_prompts(
        str(tmp_path / "q.jsonl"), ChatTokenizer(target_path), tmp_path, columns={"prompt": "question"}
    )
    assert len(prompt.input_ids) > 5
