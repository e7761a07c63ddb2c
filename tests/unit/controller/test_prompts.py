"""The book of answers."""

from __future__ import annotations

import sys

import numpy as np

from torchspec.contracts import Answer
from torchspec.controller.prompts import AnswerBook
from torchspec.files import read_lines


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
