"""The tokenised prompt set: every conversation is a row or is rejected by name; the cache knows what it depends on."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from torchspec.data.conversations import read_conversations
from torchspec.data.masks import unpack_mask
from torchspec.data.prompt_builder import RENAMED, load_or_build
from torchspec.data.prompt_set import PromptSet, TokenizeOptions, count_reasons
from torchspec.data.tokenize import ChatTokenizer

DATA = Path(__file__).parents[2] / "fixtures" / "data"
CHATS, MALFORMED = str(DATA / "chats.jsonl"), str(DATA / "malformed.jsonl")
OPTIONS = TokenizeOptions(
    columns={},
    chat_template=None,
    template_kwargs={},
    max_seq_length=256,
    too_long="reject",
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
    assert ("openai", f"longer than data.max_seq_length={limit}: {limit + 1} tokens") in prompts.rejected
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
    assert f"too little room for the answer: a prompt of {length} tokens leaves 5 " in rejected["7"]
    assert "data.min_loss_tokens=6" in rejected["7"]


def test_few_loss_tokens_are_rejected(build):
    prompts = build()
    count = sum(unpack_mask(prompts.loss_mask(1), len(prompts.input_ids(1))))
    assert "chats:2" in build(min_loss_tokens=count).ids
    rejected = dict(build(min_loss_tokens=count + 1).rejected)
    assert rejected["chats:2"] == f"fewer tokens to learn from than data.min_loss_tokens={count + 1}: {count}"


def test_last_turn_only_changes_masks_not_tokens(build):
    whole, last = build(), build(last_turn_only=True)
    assert np.array_equal(whole.token_ids, last.token_ids)
    masks = [np.array(unpack_mask(p.loss_mask(0), len(p.input_ids(0)))) for p in (whole, last)]
    assert 0 < masks[1].sum() < masks[0].sum()
    assert not (masks[1] & ~masks[0]).any()


def test_malformed_rows_stop_or_are_listed_and_odd_conversations_are_listed(build, tmp_path):
    with pytest.raises(ValueError, match=r"malformed\.jsonl:2: not valid JSON"):
        build(MALFORMED)
    assert not list((tmp_path / "cache" / "prompts").iterdir())
    prompts = build(MALFORMED, on_error="reject")
    assert prompts.ids == ["good", "malformed:8", "malformed:9", "good#2", "malformed:15"]
    assert prompts.changes[RENAMED] == 1
    assert [name for name, _ in prompts.rejected] == [
        *(f"malformed:{n}" for n in (2, 3, 4, 5, 6, 7, 10, 11, 12)),
        "half",
    ]
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"messages": [{"role": "wizard", "content": "Hi"}]}\n{"prompt": "Hi"}\n')
    assert build(str(odd)).ids == ["odd:2"]
    assert count_reasons(build(str(odd)).rejected) == {"unknown role": 1}


def test_what_was_changed_is_counted(build, tmp_path):
    rows = [
        {"conversations": [{"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "Hi"}]},
        {"conversations": [{"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "Ho"}], "source": "web"},
    ]
    file = tmp_path / "changed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert build(str(file)).changes == {"turns before the user's first are dropped": 2, "key not read: source": 1}


def test_too_long_is_cut_where_that_is_asked_for(build):
    whole = build()
    length, mask = len(whole.input_ids(0)), unpack_mask(whole.loss_mask(0), len(whole.input_ids(0)))
    cut = build(max_seq_length=length - 3, too_long="truncate", limit=1)
    assert cut.input_ids(0).tolist() == whole.input_ids(0)[:-3].tolist()
    assert unpack_mask(cut.loss_mask(0), length - 3) == mask[:-3]
    assert cut.changes == {f"cut to data.max_seq_length={length - 3} tokens": 1}
    prompt = build(max_seq_length=10, too_long="truncate")
    assert dict(prompt.rejected)["7"].startswith("longer than data.max_seq_length=10: ")


def test_a_row_may_be_tokenised_already(build, tmp_path):
    file = tmp_path / "ids.jsonl"
    rows = [
        {"id": "a", "input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]},
        {"id": "b", "input_ids": [5, 6], "loss_mask": [0, 1, 1]},
        {"id": "c", "input_ids": [49152], "loss_mask": [1]},
        {"id": "d", "input_ids": [1, 2]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = build(str(file))
    assert prompts.ids == ["a"]
    assert prompts.input_ids(0).tolist() == [5, 6, 7, 8]
    assert unpack_mask(prompts.loss_mask(0), 4) == [False, False, True, True]
    assert prompts.rejected == [
        ("b", "loss_mask does not fit input_ids: it needs a 0 or 1 for each"),
        ("c", "input_ids are not of this tokenizer: 49152 is none of its 49152 tokens"),
        ("d", "loss_mask is not a list of whole numbers"),
    ]


def test_template_arguments_and_columns_reach_the_rows(build, target_path, tmp_path):
    file = tmp_path / "renamed.jsonl"
    file.write_text(json.dumps({"uuid": "u", "chat": [{"role": "user", "content": "Hi"}]}) + "\n")
    template = str(DATA / "templates" / "qwen3.jinja")
    columns = {"messages": "chat", "id": "uuid"}
    ends = []
    for arguments in ({}, {"enable_thinking": False}):
        prompts = build(str(file), columns=columns, chat_template=template, template_kwargs=arguments)
        assert prompts.ids == ["u"]
        ends.append(ChatTokenizer(target_path).tokenizer.decode(prompts.input_ids(0)).partition("assistant\n")[2])
    assert ends == ["", "<think>\n\n</think>\n\n"]
    with pytest.raises(ValueError, match=r"data\.template_kwargs: tools cannot be set"):
        build(str(file), columns=columns, template_kwargs={"tools": []})


def test_a_set_travels_as_the_path_of_its_folder(build):
    prompts = build()
    text = pickle.dumps(prompts)
    assert len(text) < 300
    again = pickle.loads(text)
    assert again.ids == prompts.ids
    assert np.array_equal(again.token_ids, prompts.token_ids)
    assert isinstance(again.token_ids, np.memmap)
    in_memory = replace(prompts, folder=None)
    assert pickle.loads(pickle.dumps(in_memory)).token_ids.tolist() == prompts.token_ids.tolist()


def test_nothing_left_is_an_empty_set(build):
    prompts = build(max_seq_length=8)
    assert len(prompts) == 0
    assert len(prompts.rejected) == 4
    assert len(build(max_seq_length=8)) == 0  # from the cache


def test_the_cache_gives_back_the_same_set(build, tmp_path, monkeypatch):
    first = build(min_loss_tokens=8)
    (file,) = (tmp_path / "cache" / "prompts").iterdir()
    assert file.name == first.content_hash
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


@pytest.mark.parametrize("few", [1, 100], ids=["processes", "one process"])
def test_many_batches_report_progress(target_path, tmp_path, monkeypatch, few):
    """Whether other processes do it or this one: the same rows in the same order."""
    monkeypatch.setattr("torchspec.data.prompt_builder.FEW_BATCHES", few)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Count to {n:4}."}) + "\n" for n in range(1200)))
    others = set(multiprocessing.active_children())  # of tests that ran before in this process
    seen: list[tuple[int, float]] = []
    progress = lambda done, share: seen.append((done, round(share, 3)))  # noqa: E731
    prompts = load_or_build(str(file), target_path, OPTIONS, tmp_path, progress=progress)
    assert seen == [(512, 0.427), (1024, 0.853), (1200, 1.0)]
    assert prompts.ids == [f"many:{n}" for n in range(1, 1201)]
    tokenizer = ChatTokenizer(target_path).tokenizer
    for row in (0, 511, 512, 1199):
        assert f"Count to {row:4}.<|im_end|>" in tokenizer.decode(prompts.input_ids(row))
    assert set(multiprocessing.active_children()) <= others


def test_an_interrupted_build_leaves_nothing_behind(target_path, tmp_path):
    """Ctrl-C in a terminal reaches every process of the command."""
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Count to {n}."}) + "\n" for n in range(200_000)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"target: {{path: {target_path}}}\ndata: {{train: {file}, cache_dir: {tmp_path / 'cache'}}}\n")
    command = [sys.executable, "-m", "torchspec.cli.main", "data", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0)
    try:
        deadline = time.monotonic() + 240
        while not any(file.stat().st_size for file in tmp_path.glob("cache/prompts/.building-*/set/token_ids")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in output
    assert not list((tmp_path / "cache" / "prompts").iterdir())
    wait_until_ended(process.pid, deadline + 120)


def wait_until_ended(group: int, deadline: float) -> None:
    """One process tracks resources, and ends when it hears that all others have."""
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_missing_file_names_the_knob(target_path, tmp_path):
    with pytest.raises(ValueError, match=r"evaluation\.heldout nowhere\.jsonl: no such file"):
        load_or_build("nowhere.jsonl", target_path, OPTIONS, tmp_path, knob="evaluation.heldout")


def test_reading_a_set_needs_neither_torch_nor_transformers():
    code = "import sys, torchspec.data.prompt_set, torchspec.data.vocabulary, torchspec.data.order; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded
    assert not {"torch", "transformers", "ray"} & set(loaded)
