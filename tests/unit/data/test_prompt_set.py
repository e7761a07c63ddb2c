"""The tokenised prompt set: every conversation is a row or is rejected by name; the cache knows what it depends on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from torchspec.data.conversations import read_conversations
from torchspec.data.masks import unpack_mask
from torchspec.data.prompt_builder import load_or_build
from torchspec.data.prompt_set import PromptSet, TokenizeOptions
from torchspec.data.tokenize import ChatTokenizer

DATA = Path(__file__).parents[2] / "fixtures" / "data"
CHATS, MALFORMED = str(DATA / "chats.jsonl"), str(DATA / "malformed.jsonl")
OPTIONS = TokenizeOptions(
    chat_template=None,
    max_seq_length=256,
    min_loss_tokens=1,
    last_turn_only=False,
    max_new_tokens=32,
    on_error="stop",
    limit=None,
    trust_remote_code=False,
)


@pytest.fixture
def build(target_path, tmp_path):
    def build(source: str = CHATS, **changes) -> PromptSet:
        return load_or_build(source, target_path, replace(OPTIONS, **changes), tmp_path / "cache")

    return build


def test_rows_are_what_the_tokenizer_says(build, target_path):
    prompts = build()
    expected = ChatTokenizer(target_path).encode(list(read_conversations([Path(CHATS)])))
    assert prompts.ids == ["openai", "chats:2", "7", "follow-up"]
    assert len(prompts) == 4
    assert prompts.rejected == []
    assert prompts.token_ids.dtype == np.int32
    for row, want in enumerate(expected):
        assert prompts.input_ids(row).tolist() == want.input_ids.tolist()
        if want.loss_mask is None:
            assert prompts.loss_mask(row) is None
            assert prompts.max_answer_tokens[row] == 32
        else:
            assert unpack_mask(prompts.loss_mask(row), len(want.input_ids)) == want.loss_mask.tolist()
            assert prompts.max_answer_tokens[row] == 0
    assert not prompts.fully_answered
    assert build(limit=2).fully_answered


def test_too_long_is_rejected_and_never_cut(build):
    lengths = dict(zip(build().ids, np.diff(build().offsets).tolist(), strict=True))
    limit = lengths["openai"] - 1
    prompts = build(max_seq_length=limit)
    assert ("openai", f"{limit + 1} tokens are more than data.max_seq_length={limit}") in prompts.rejected
    assert "openai" not in prompts.ids
    assert "openai" in build(max_seq_length=limit + 1).ids
    for row, name in enumerate(prompts.ids):
        assert len(prompts.input_ids(row)) == lengths[name]


def test_room_for_the_answer_is_clipped_then_rejected(build):
    whole = build()
    length = len(whole.input_ids(whole.ids.index("7")))
    tight = build(max_seq_length=length + 5)
    assert tight.max_answer_tokens[tight.ids.index("7")] == 5
    rejected = dict(build(max_seq_length=length + 5, min_loss_tokens=6).rejected)
    assert f"a prompt of {length} tokens leaves 5 for the answer" in rejected["7"]
    assert "data.min_loss_tokens=6" in rejected["7"]


def test_few_loss_tokens_are_rejected(build):
    prompts = build()
    count = sum(unpack_mask(prompts.loss_mask(1), len(prompts.input_ids(1))))
    assert "chats:2" in build(min_loss_tokens=count).ids
    rejected = dict(build(min_loss_tokens=count + 1).rejected)
    assert rejected["chats:2"] == f"{count} tokens to learn from are fewer than data.min_loss_tokens={count + 1}"


def test_last_turn_only_changes_masks_not_tokens(build):
    whole, last = build(), build(last_turn_only=True)
    assert np.array_equal(whole.token_ids, last.token_ids)
    masks = [np.array(unpack_mask(p.loss_mask(0), len(p.input_ids(0)))) for p in (whole, last)]
    assert 0 < masks[1].sum() < masks[0].sum()
    assert not (masks[1] & ~masks[0]).any()


def test_bad_lines_stop_or_are_listed(build, tmp_path):
    with pytest.raises(ValueError, match=r"malformed\.jsonl:2: not valid JSON"):
        build(MALFORMED)
    assert not list((tmp_path / "cache").rglob("*.npz"))
    prompts = build(MALFORMED, on_error="reject")
    assert prompts.ids == ["good"]
    assert [name for name, _ in prompts.rejected] == [f"malformed:{n}" for n in range(2, 16)]
    assert dict(prompts.rejected)["malformed:9"] == "starts with an assistant turn"


def test_nothing_left_is_an_empty_set(build):
    prompts = build(max_seq_length=8)
    assert len(prompts) == 0
    assert len(prompts.rejected) == 4
    assert len(build(max_seq_length=8)) == 0  # from the cache


def test_the_cache_gives_back_the_same_set(build, tmp_path, monkeypatch):
    first = build(min_loss_tokens=8)
    (file,) = (tmp_path / "cache" / "prompts").iterdir()
    assert file.name == f"{first.content_hash}.npz"
    written = file.stat().st_mtime_ns
    monkeypatch.setattr("torchspec.data.prompt_builder.ChatTokenizer", None)  # a second build would need it
    second = build(min_loss_tokens=8)
    assert file.stat().st_mtime_ns == written
    assert (second.ids, second.rejected, second.content_hash) == (first.ids, first.rejected, first.content_hash)
    for name in ("token_ids", "offsets", "packed_masks", "max_answer_tokens"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).dtype == getattr(second, name).dtype


def test_the_hash_follows_files_tokenizer_and_options(build, target_path, tmp_path):
    hashes = {build().content_hash, build(max_seq_length=255).content_hash, build(limit=3).content_hash}
    changed = tmp_path / "chats.jsonl"
    changed.write_text(Path(CHATS).read_text().replace("rivers", "lakes"))
    hashes.add(build(str(changed)).content_hash)
    template = tmp_path / "template.jinja"
    for text in ("markers", "strict"):
        shutil.copy(DATA / "templates" / f"{text}.jinja", template)
        hashes.add(build(chat_template=str(template)).content_hash)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        shutil.copy(target_path / name, tokenizer / name)
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<|endoftext|>"}))
    hashes.add(load_or_build(CHATS, tokenizer, OPTIONS, tmp_path / "cache").content_hash)
    assert len(hashes) == 7
    same = tmp_path / "moved" / "chats.jsonl"
    same.parent.mkdir()
    shutil.copy(CHATS, same)
    assert build(str(same)).content_hash == build().content_hash


def test_many_batches_report_progress(target_path, tmp_path):
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Count to {n}."}) + "\n" for n in range(1200)))
    seen: list[int] = []
    prompts = load_or_build(str(file), target_path, OPTIONS, tmp_path, progress=seen.append)
    assert seen == [512, 1024, 1200]
    assert prompts.ids == [f"many:{n}" for n in range(1, 1201)]
    tokenizer = ChatTokenizer(target_path).tokenizer
    for row in (0, 511, 512, 1199):
        assert f"Count to {row}.<|im_end|>" in tokenizer.decode(prompts.input_ids(row))


def test_a_missing_file_names_the_knob(target_path, tmp_path):
    with pytest.raises(ValueError, match=r"evaluation\.heldout nowhere\.jsonl: no such file"):
        load_or_build("nowhere.jsonl", target_path, OPTIONS, tmp_path, knob="evaluation.heldout")


def test_reading_a_set_needs_neither_torch_nor_transformers():
    code = "import sys, torchspec.data.prompt_set, torchspec.data.vocabulary, torchspec.data.order; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded
    assert not {"torch", "transformers", "ray"} & set(loaded)
