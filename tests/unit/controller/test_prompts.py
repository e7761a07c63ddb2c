"""The book of answers."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from torchspec.config.schema import AnswerConfig
from torchspec.contracts import Answer, SampleId
from torchspec.controller.prompts import AnswerBook, Prompts, Writer, check_reuse
from torchspec.data.masks import unpack_mask
from torchspec.data.prompt_set import PromptSet
from torchspec.files import JsonLines, read_lines

WRITER = Writer.of(AnswerConfig(), "weights")


def test_answers_belong_to_the_exact_prompt_and_survive(tmp_path):
    path = tmp_path / "answers.jsonl"
    prompt, other = np.array([1, 2, 3]), np.array([1, 2, 4])
    book = AnswerBook(path, WRITER)
    book.add("p", prompt, Answer(0, (7, 8), "hi", "stop"))
    book.add("p", prompt, Answer(0, (9, 9), "again", "stop"))
    assert book.get(prompt).tolist() == [7, 8] and book.get(other) is None
    assert AnswerBook(path, WRITER).get(prompt).tolist() == [7, 8]
    assert len(list(read_lines(path))) == 1
    elsewhere = AnswerBook(tmp_path / "new.jsonl", WRITER, reuse=path)
    assert elsewhere.get(prompt).tolist() == [7, 8]
    elsewhere.add("p", prompt, Answer(0, (7, 8), "hi", "stop"))  # a book of its own in the end
    again = AnswerBook(tmp_path / "new.jsonl", WRITER)
    again.add("p", prompt, Answer(0, (9, 9), "again", "stop"))
    assert again.get(prompt).tolist() == [7, 8] and len(list(read_lines(tmp_path / "new.jsonl"))) == 1


def test_answers_stay_on_the_disk(tmp_path):
    book, ids = AnswerBook(tmp_path / "answers.jsonl", WRITER), list(range(100_000, 110_000))
    book.add("p", np.array([1]), Answer(0, tuple(ids), "text", "stop"))
    book.add("q", np.array([2]), Answer(1, (5,), "🦜", "stop"))
    assert len(pickle.dumps([(key, *line) for key, (_, *line) in book._lines.items()])) < 200
    assert book.get(np.array([1])).tolist() == ids and book.get(np.array([2])).tolist() == [5]
    assert book.get(np.array([1])).dtype == np.int32


def test_a_torn_last_line_is_no_answer(tmp_path):
    path = tmp_path / "answers.jsonl"
    AnswerBook(path, WRITER).add("p", np.array([1]), Answer(0, (7,), "hi", "stop"))
    with path.open("a") as file:
        file.write('{"id": "q", "prompt_hash"')
    for book in (AnswerBook(tmp_path / "new.jsonl", WRITER, reuse=path), AnswerBook(path, WRITER)):
        assert book.get(np.array([1])).tolist() == [7]
        book.add("q", np.array([2]), Answer(1, (8,), "ho", "stop"))
        assert book.get(np.array([2])).tolist() == [8]


@pytest.mark.parametrize(
    ("sampling", "fingerprint", "reason"),
    [
        ({}, "weights", None),
        ({"top_p": 0.9}, "weights", None),  # nothing is sampled
        ({"temperature": 0.7}, "weights", r"was written with answer\.temperature=0\.0, which is 0\.7 here"),
        ({}, "others", r"was written by another target than target\.path"),
    ],
)
def test_answers_are_those_of_their_target_and_its_sampling(tmp_path, sampling, fingerprint, reason):
    """Public bug reports 23: they were taken for those of any."""
    path, prompt = tmp_path / "answers.jsonl", np.array([1, 2, 3])
    AnswerBook(path, WRITER).add("p", prompt, Answer(0, (7, 8), "hi", "stop"))
    writer = Writer.of(AnswerConfig(**sampling), fingerprint)
    book = AnswerBook(tmp_path / "new.jsonl", writer, reuse=path)
    if reason is None:
        check_reuse(path, writer)
        assert book.get(prompt).tolist() == [7, 8]
    else:
        with pytest.raises(ValueError, match=rf"^answer\.reuse: {path} {reason}"):
            check_reuse(path, writer)
        assert book.get(prompt) is None, "nor is it taken from among others"
    again = AnswerBook(path, writer)  # the run itself goes on as another writer
    again.add("p", prompt, Answer(0, (9,), "ho", "stop"))
    check_reuse(path, writer)
    assert AnswerBook(path, writer).get(prompt).tolist() == ([7, 8] if reason is None else [9])


def test_a_file_that_does_not_say_who_wrote_it_is_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    file = JsonLines(path)
    with pytest.raises(ValueError, match="holds no answer"):
        check_reuse(path, WRITER)
    file.write({"id": "p", "prompt_hash": "00", "token_ids": [1]})
    with pytest.raises(ValueError, match="does not say which target wrote it, and how"):
        check_reuse(path, WRITER)


def test_an_answer_is_cut_to_the_room_that_this_run_has(tmp_path):
    path, ids = tmp_path / "answers.jsonl", np.array([1, 2, 3], dtype=np.int32)
    AnswerBook(path, WRITER).add("p", ids, Answer(0, (7, 8, 9, 10), "hi", "stop"))
    for room, read in ((9, [7, 8, 9]), (4, [7, 8, 9]), (3, [7, 8])):
        train = PromptSet(
            ids=["p"],
            token_ids=ids,
            offsets=np.array([0, 3]),
            packed_masks=np.zeros(0, dtype=np.uint8),
            max_answer_tokens=np.array([room], dtype=np.int32),
            rejected=[],
            content_hash="one",
        )
        prompts = Prompts(train, None, AnswerBook(tmp_path / f"{room}.jsonl", WRITER, path), 0)
        lease = prompts.describe(SampleId(0, 0))
        assert np.frombuffer(lease.input_ids, dtype="<i4").tolist() == [1, 2, 3, *read] and lease.max_new_tokens == 0
        assert prompts.max_tokens(SampleId(0, 0)) == lease.max_tokens and not prompts.to_answer(SampleId(0, 0))


def test_how_long_a_sample_can_be_is_known_without_its_answer(tmp_path, monkeypatch):
    """It is asked whenever anything changes; reading the answer each time would be most of what the controller does."""
    train = PromptSet(
        ids=["answered", "known", "open"],
        token_ids=np.arange(9, dtype=np.int32),
        offsets=np.array([0, 3, 6, 9]),
        packed_masks=np.array([0b00100000], dtype=np.uint8),
        max_answer_tokens=np.array([0, 5, 5], dtype=np.int32),
        rejected=[],
        content_hash="one",
    )
    book = AnswerBook(tmp_path / "answers.jsonl", WRITER)
    book.add("known", train.input_ids(1), Answer(1, (7, 8, 9), "hi", "stop"))
    prompts, samples = Prompts(train, None, book, 0), [SampleId(0, row) for row in range(3)]
    described = [prompts.describe(sample) for sample in samples]
    assert unpack_mask(described[1].loss_mask, 5) == [False] * 3 + [True] * 2
    monkeypatch.delattr(AnswerBook, "get")
    assert [prompts.max_tokens(s) for s in samples] == [3, 5, 8] == [lease.max_tokens for lease in described]
    assert [prompts.to_answer(s) for s in samples] == [False, False, True]
    assert prompts.being_answered(SampleId(2, 2), {SampleId(1, 2)}.__contains__)
    assert not prompts.being_answered(SampleId(2, 1), {SampleId(1, 1)}.__contains__)
