"""The draft's vocabulary: most frequent first, the same whatever the order of counting, kept by content hash."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchspec.data import vocabulary
from torchspec.data.masks import unpack_mask
from torchspec.data.prompt_builder import load_or_build
from torchspec.data.prompt_set import TokenizeOptions
from torchspec.data.vocabulary import DraftVocab, VocabCounter, load_or_count

CHATS = Path(__file__).parents[2] / "fixtures" / "data" / "chats.jsonl"


def counter(ids: list[int], vocab_size: int = 10) -> VocabCounter:
    made = VocabCounter(vocab_size)
    made.add(np.array(ids, dtype=np.int32))
    return made


def test_most_frequent_then_lowest():
    vocab = counter([9, 9, 9, 4, 4, 7, 7, 5]).build(3)
    assert vocab.target_ids.tolist() == [4, 7, 9]
    assert vocab.target_ids.dtype == np.int64
    assert vocab.coverage == 7 / 8
    assert counter([9, 4]).build(5).target_ids.tolist() == [0, 1, 2, 4, 9]


def test_a_prior_decides_among_equals_only():
    prior = np.zeros(10, dtype=np.int64)
    prior[[8, 3]] = [5, 2]
    assert counter([9, 4, 4]).build(4, prior=prior).target_ids.tolist() == [3, 4, 8, 9]
    assert counter([9, 4, 4]).build(2, prior=prior).target_ids.tolist() == [4, 9]


def test_special_tokens_are_always_in():
    vocab = counter([5] * 9 + [6] * 8 + [7]).build(3, always=(2, 2, 0))
    assert vocab.target_ids.tolist() == [0, 2, 5]
    assert vocab.coverage == 9 / 18


def test_the_whole_vocabulary_is_the_identity():
    vocab = counter([3]).build(10)
    assert vocab.target_ids.tolist() == list(range(10))
    assert not vocab.d2t.any()
    assert vocab.t2d.all()
    assert vocab.coverage == 1


@pytest.mark.parametrize("size", [0, 1, 11])
def test_sizes_that_do_not_fit(size):
    with pytest.raises(ValueError, match=rf"draft\.vocab_size is {size}: it must be at most 10"):
        counter([3]).build(size, always=(1,))


@settings(deadline=None)
@given(st.lists(st.integers(0, 49), min_size=1, max_size=300), st.integers(1, 50), st.randoms())
def test_maps_and_order_of_counting(ids, size, random):
    vocab = counter(ids, 50).build(size)
    assert vocab.t2d.sum() == size == len(vocab)
    assert np.flatnonzero(vocab.t2d).tolist() == vocab.target_ids.tolist()
    assert (np.arange(size) + vocab.d2t).tolist() == vocab.target_ids.tolist()
    expected = sorted(range(50), key=lambda i: (-Counter(ids)[i], i))[:size]
    assert set(vocab.target_ids.tolist()) == set(expected)
    shuffled = ids.copy()
    random.shuffle(shuffled)
    parts = VocabCounter(50)
    for part in np.array_split(np.array(shuffled), 3):
        parts.add(part)
    assert parts.build(size).target_ids.tolist() == vocab.target_ids.tolist()


def test_ids_outside_the_vocabulary_are_an_error():
    with pytest.raises(IndexError):
        counter([10])


def test_saved_and_read_back(tmp_path):
    vocab = counter([9, 9, 4, 1]).build(2)
    vocab.save(tmp_path / "deep" / "vocab.json")
    again = DraftVocab.load(tmp_path / "deep" / "vocab.json")
    assert again.target_ids.tolist() == vocab.target_ids.tolist()
    assert again.target_ids.dtype == np.int64
    assert (again.vocab_size, again.coverage) == (10, 0.75)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["vocab.json"]


def test_an_answered_set_is_counted_on_its_loss_tokens_and_kept(target_path, tmp_path):
    options = TokenizeOptions({}, None, {}, 256, "reject", 1, False, 32, "stop", 2, False)
    prompts = load_or_build(str(CHATS), target_path, options, tmp_path)
    expected = Counter[int]()
    for row in range(len(prompts)):
        ids = prompts.input_ids(row).tolist()
        expected.update(i for i, keep in zip(ids, unpack_mask(prompts.loss_mask(row), len(ids)), strict=True) if keep)
    assert expected[2] == 3  # <|im_end|> of three assistant turns
    size = len(expected) + 1
    vocab = load_or_count(prompts, size, 49152, always=(0,), cache_dir=tmp_path)
    assert set(vocab.target_ids.tolist()) == {0, *expected}
    assert vocab.coverage == 1
    (file,) = (tmp_path / "draft_vocab").iterdir()
    written = file.stat().st_mtime_ns
    assert load_or_count(prompts, size, 49152, (0,), tmp_path).target_ids.tolist() == vocab.target_ids.tolist()
    assert file.stat().st_mtime_ns == written
    load_or_count(prompts, size, 49152, (0, 1), tmp_path)
    assert len(list((tmp_path / "draft_vocab").iterdir())) == 2


def test_all_tokens_are_counted_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_PART", 3)
    prompts = SimpleNamespace(token_ids=np.array([3, 3, 1, 0, 3, 9, 9], dtype=np.int32))
    made = counter([3])
    made.add_all(prompts)  # type: ignore[arg-type]
    assert made.counts.tolist() == [1, 1, 0, 4, 0, 0, 0, 0, 0, 2]
