"""What is told of the data before a run starts, and what its folder keeps of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from torchspec.data.prompt_set import PromptSet
from torchspec.driver import prepare
from torchspec.run_folder import RunFolder

NOTHING = np.zeros(0, dtype=np.int32)
TRAIN = PromptSet(
    ids=[],
    token_ids=NOTHING,
    offsets=np.zeros(1, dtype=np.int64),
    packed_masks=NOTHING,
    max_answer_tokens=NOTHING,
    rejected=[("a", "too long: 9"), ("b", "too long: 8"), ("c", "odd")],
    content_hash="",
    changes={"joined": 2},
)


def test_changes_and_rejections_are_told_by_reason_and_listed_by_name(tmp_path: Path) -> None:
    told: list[str] = []
    prepare._tell_changes(TRAIN, told.append)
    assert told == [
        "data.train: 2 changed: joined",
        "data.train: 2 rejected: too long",
        "data.train: 1 rejected: odd",
    ]
    folder = RunFolder(tmp_path)
    prepare._list_rejected(folder, TRAIN, None)
    assert [json.loads(line) for line in folder.rejected.read_text().splitlines()] == [
        {"id": "a", "reason": "too long: 9"},
        {"id": "b", "reason": "too long: 8"},
        {"id": "c", "reason": "odd"},
        {"changed": "joined", "count": 2},
    ]


def test_tokenising_is_told_a_twentieth_at_a_time() -> None:
    told: list[str] = []
    progress = prepare._told(told.append)
    for done in range(0, 1001, 10):
        progress(done, done / 1000)
    assert len(told) == 19
    assert told[0] == "tokenised 50 conversations, 5%" and told[-1] == "tokenised 950 conversations, 95%"
