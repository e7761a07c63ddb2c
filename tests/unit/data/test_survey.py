"""A survey agrees with the prompt set: exactly where the sample holds all lines, nearly where it does not."""

from __future__ import annotations

import json

import pytest

from torchspec.data import survey as module
from torchspec.data.prompt_builder import load_or_build
from torchspec.data.prompt_set import TokenizeOptions
from torchspec.data.survey import survey

OPTIONS = TokenizeOptions(
    columns={},
    chat_template=None,
    template_kwargs={},
    max_seq_length=64,
    too_long="reject",
    min_loss_tokens=4,
    last_turn_only=False,
    max_new_tokens=16,
    on_error="reject",
    limit=None,
    trust_remote_code=False,
)


@pytest.fixture
def both(target_path, tmp_path):
    """Survey and prompt set of 300 prompts of every length, each fifteenth too long and each hundredth broken."""
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": "word " * (90 if i % 15 == 14 else i % 13 + 1)} for i in range(300)]
    path.write_text("".join("{\n" if i % 100 == 99 else json.dumps(row) + "\n" for i, row in enumerate(rows)))
    arguments = (str(path), target_path, OPTIONS, tmp_path / "cache")
    return lambda: (survey(*arguments, knob="data.train"), load_or_build(*arguments))


def test_a_small_file_is_counted_exactly(both):
    counts, prompts = both()
    assert counts.exact and counts.rows == len(prompts)
    assert counts.tokens == len(prompts.token_ids) and counts.answer_tokens == prompts.max_answer_tokens.sum()
    assert list(counts.rejected) == prompts.rejected and 20 <= len(prompts.rejected) <= 23


def test_a_large_file_is_estimated(both, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 30)
    counts, prompts = both()
    assert not counts.exact
    assert 0 < len(counts.rejected) < len(prompts.rejected)
    assert counts.rows == pytest.approx(len(prompts), rel=0.1)
    assert counts.tokens == pytest.approx(len(prompts.token_ids), rel=0.1)
    assert counts.answer_tokens == pytest.approx(prompts.max_answer_tokens.sum(), rel=0.1)
