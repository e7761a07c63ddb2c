"""The files that a run appends to."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from torchspec.contracts import Answer, SampleId
from torchspec.controller.journal import AnswerBook, JsonLines, read_lines, trained_batches


def test_a_torn_last_line_is_dropped_and_written_over(tmp_path):
    path = tmp_path / "x.jsonl"
    JsonLines(path).write({"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2, "b"')
    assert list(read_lines(path)) == [{"a": 1}]
    JsonLines(path).write({"a": 3})
    assert list(read_lines(path)) == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize("size", [0, 1, (1 << 16) - 1, 1 << 16, 200_000])
@pytest.mark.parametrize("whole", ["", '{"a": 1}\n'])
def test_a_torn_line_of_any_size_goes(tmp_path, whole, size):
    path = tmp_path / "x.jsonl"
    path.write_text(whole + "x" * size)
    JsonLines(path).close()
    assert path.read_text() == whole


def test_a_resume_undoes_later_steps(tmp_path):
    journal = JsonLines(tmp_path / "ledger.jsonl")
    for step in (1, 2, 3):
        journal.write({"event": "trained", "step": step, "samples": [[0, step]]})
    journal.write({"event": "resumed", "step": 1})
    journal.write({"event": "trained", "step": 2, "samples": [[0, 2]]})
    assert trained_batches(tmp_path / "ledger.jsonl") == {1: [SampleId(0, 1)], 2: [SampleId(0, 2)]}


def test_answers_belong_to_the_exact_prompt_and_survive(tmp_path):
    path = tmp_path / "answers.jsonl"
    prompt, other = np.array([1, 2, 3]), np.array([1, 2, 4])
    book = AnswerBook(path)
    book.add("p", prompt, Answer(0, (7, 8), "hi", "stop"))
    book.add("p", prompt, Answer(0, (9, 9), "again", "stop"))
    assert book.get(prompt).tolist() == [7, 8] and book.get(other) is None
    assert AnswerBook(path).get(prompt).tolist() == [7, 8]
    assert len(list(read_lines(path))) == 1
    elsewhere = AnswerBook(tmp_path / "new.jsonl", reuse=path)
    assert elsewhere.get(prompt).tolist() == [7, 8]
    elsewhere.add("p", prompt, Answer(0, (7, 8), "hi", "stop"))  # a book of its own in the end
    again = AnswerBook(tmp_path / "new.jsonl")
    again.add("p", prompt, Answer(0, (9, 9), "again", "stop"))
    assert again.get(prompt).tolist() == [7, 8] and len(list(read_lines(tmp_path / "new.jsonl"))) == 1


def test_a_long_answer_is_kept_in_four_bytes_a_token(tmp_path):
    book, ids = AnswerBook(tmp_path / "answers.jsonl"), tuple(range(100_000, 110_000))
    book.add("p", np.array([1]), Answer(0, ids, "text", "stop"))
    (kept,) = book._answers.values()
    assert sys.getsizeof(kept) < 4 * len(ids) + 100 and tuple(book.get(np.array([1])).tolist()) == ids
