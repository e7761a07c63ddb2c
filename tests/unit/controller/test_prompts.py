"""The book of answers."""

from __future__ import annotations

import pickle

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


def test_answers_stay_on_the_disk(tmp_path):
    book, ids = AnswerBook(tmp_path / "answers.jsonl"), list(range(100_000, 110_000))
    book.add("p", np.array([1]), Answer(0, tuple(ids), "text", "stop"))
    book.add("q", np.array([2]), Answer(1, (5,), "🦜", "stop"))
    assert len(pickle.dumps([(key, begin) for key, (_, begin) in book._lines.items()])) < 200
    assert book.get(np.array([1])).tolist() == ids and book.get(np.array([2])).tolist() == [5]
    assert book.get(np.array([1])).dtype == np.int32


def test_a_torn_last_line_is_no_answer(tmp_path):
    path = tmp_path / "answers.jsonl"
    AnswerBook(path).add("p", np.array([1]), Answer(0, (7,), "hi", "stop"))
    with path.open("a") as file:
        file.write('{"id": "q", "prompt_hash"')
    for book in (AnswerBook(tmp_path / "new.jsonl", reuse=path), AnswerBook(path)):
        assert book.get(np.array([1])).tolist() == [7]
        book.add("q", np.array([2]), Answer(1, (8,), "ho", "stop"))
        assert book.get(np.array([2])).tolist() == [8]
