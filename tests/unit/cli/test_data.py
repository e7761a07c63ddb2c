"""``torchspec data``: figures, the loss mask over the text, and what became of the rest."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from tests.unit.cli.commands import rendered, run
from torchspec.cli.data import _histogram, _samples, data_view
from torchspec.config.load import parse_config
from torchspec.data.masks import pack_mask

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
    unknown = summary["rejected"]["unknown role"]
    assert (unknown["count"], unknown["first"]) == (1, "c")
    assert unknown["why"].startswith("unknown role: messages[0] has 'wizard'")
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
    assert "1 rejected: unknown role: messages[0] has 'wizard'" in text and "1 changed: key not read" in text
    assert run(monkeypatch, "data", *arguments, "--id", "c") == 2
    assert capsys.readouterr().err.startswith("error: c is rejected: unknown role: messages[0] has 'wizard'")
    assert run(monkeypatch, "data", *arguments, "--id", "d") == 2
    assert capsys.readouterr().err == "error: --id: no conversation is called d\n"


def test_ranges_of_the_histogram_are_whole_and_no_two_hold_the_same_length() -> None:
    def ranges(*lengths: int) -> list[tuple[int, int, int]]:
        return [(part["from"], part["to"], part["count"]) for part in _histogram(np.array(lengths))]

    assert ranges() == []
    assert ranges(7, 7) == [(7, 7, 2)]
    assert ranges(19, 20, 20, 23) == [(19, 19, 1), (20, 20, 2), (21, 21, 0), (22, 22, 0), (23, 23, 1)]
    wide = ranges(1, 2, 3, 30)
    assert wide[0] == (1, 3, 3) and wide[-1] == (28, 30, 1) and len(wide) == 10


def test_pieces_of_text_keep_the_space_they_begin_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Words:
        """A tokenizer that, like SentencePiece's, drops a space in front of what it decodes."""

        def decode(self, ids: Sequence[int], **_: object) -> str:
            return " ".join(str(i) for i in ids)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: Words())
    prompts = SimpleNamespace(
        ids=["a"],
        input_ids=lambda row: [1, 2, 3],
        loss_mask=lambda row: pack_mask([0, 1, 0]),
        max_answer_tokens=[0],
    )
    (sample,) = _samples(parse_config({"target": {"path": "x"}}), prompts, [0])  # type: ignore[arg-type]
    assert [piece["text"] for piece in sample["text"]] == ["1", " 2", " 3"]
    assert [piece["learnt"] for piece in sample["text"]] == [False, True, False]


def test_the_mask_is_drawn_over_the_text_and_control_codes_are_escaped() -> None:
    pieces = [{"text": "Hi\x1b[2J\n", "learnt": False}, {"text": "Hello!", "learnt": True}]
    sample = {"id": "a", "tokens": 3, "loss_tokens": 1, "max_answer_tokens": 0, "text": pieces}
    figures = {"conversations": 1, "to_answer": 0, "tokens": 3, "loss_tokens": 1, "lengths": {"least": 3}}
    summary = {**figures, "histogram": [], "changes": {}, "rejected": {}, "samples": [sample]}
    assert "Hi\\x1b[2J\nHello!" in rendered(data_view(summary, "rows.jsonl"))
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(data_view(summary, "rows.jsonl"))
    assert "\x1b[30;42mHello!" in console.file.getvalue()  # type: ignore[attr-defined]
