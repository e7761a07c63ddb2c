"""``torchspec data``: figures, the loss mask over the text, and what became of the rest."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.unit.cli.commands import rendered, run
from torchspec.cli.data import data_view

ROWS = [
    {"id": "a", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
    {"id": "b\x1b[2J", "prompt": "Say \x1b[2J", "source": "web"},
    {"id": "c", "messages": [{"role": "wizard", "content": "Hi"}]},
]


@pytest.fixture
def arguments(recipe: Path, target_path: Path) -> list[str]:
    data = recipe.with_name("rows.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {"target.path": target_path, "data.train": data, "data.cache_dir": recipe.parent}
    return [str(recipe), "data.min_loss_tokens=1", *(f"{knob}={value}" for knob, value in settings.items())]


def test_all_of_it_as_json(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "data", *arguments, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["conversations"], summary["to_answer"], summary["loss_tokens"]) == (2, 1, 3)
    assert summary["changes"] == {"key not read: source": 1}
    assert list(summary["rejected"]) == ["unknown role"]
    assert summary["rejected"]["unknown role"]["first"].startswith("c: unknown role: messages[0] has 'wizard'")
    assert sum(part["count"] for part in summary["histogram"]) == 2
    first, second = summary["samples"]
    assert [piece["text"] for piece in first["text"] if piece["learnt"]] == ["Hello!<|im_end|>"]
    assert "".join(piece["text"] for piece in first["text"]).endswith("assistant\nHello!<|im_end|>\n")
    assert second["id"] == "b\\x1b[2J" and second["max_answer_tokens"] == 512


def test_one_conversation_and_why_another_is_not_there(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "data", *arguments, "--id", "a") == 0
    text = capsys.readouterr().out
    assert "Hello!<|im_end|>" in text and "Say" not in text
    assert "1 rejected: unknown role; the first is c: unknown role" in text and "1 changed: key not read" in text
    assert run(monkeypatch, "data", *arguments, "--id", "c") == 2
    assert capsys.readouterr().err.startswith("error: c is rejected: unknown role: messages[0] has 'wizard'")
    assert run(monkeypatch, "data", *arguments, "--id", "d") == 2
    assert capsys.readouterr().err == "error: --id: no conversation is called d\n"


def test_the_mask_is_drawn_over_the_text_and_control_codes_are_escaped() -> None:
    pieces = [{"text": "Hi\x1b[2J\n", "learnt": False}, {"text": "Hello!", "learnt": True}]
    sample = {"id": "a", "tokens": 3, "loss_tokens": 1, "max_answer_tokens": 0, "text": pieces}
    figures = {"conversations": 1, "to_answer": 0, "tokens": 3, "loss_tokens": 1, "lengths": {"least": 3}}
    summary = {**figures, "histogram": [], "changes": {}, "rejected": {}, "samples": [sample]}
    assert "Hi\\x1b[2J\nHello!" in rendered(data_view(summary, "rows.jsonl"))
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(data_view(summary, "rows.jsonl"))
    assert "\x1b[30;42mHello!" in console.file.getvalue()  # type: ignore[attr-defined]
