"""The tokenised prompt set that a run works through: compact, immutable, cached on disk.

Rows lie end to end in flat arrays (4 bytes and 1 bit a token), so that a hundred thousand conversations cost the
controller no more than their tokens. The cache file is an npz without pickle, named by the hash of all that its
content depends on.

Every conversation of the files ends up as a row or in ``rejected``, with its reason: nothing is truncated or dropped
in silence.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torchspec.files import write_atomically


@dataclass(frozen=True, slots=True)
class TokenizeOptions:
    """What ``data.*`` and ``answer.max_tokens`` say about tokenising; see the config for each."""

    chat_template: str | None
    max_seq_length: int
    min_loss_tokens: int
    last_turn_only: bool
    max_new_tokens: int
    on_error: Literal["stop", "reject"]
    limit: int | None
    trust_remote_code: bool


@dataclass(frozen=True, eq=False)
class PromptSet:
    """Rows of token ids, with a loss mask or to be answered. ``len()`` is the number of rows."""

    ids: list[str]
    """Name of each row."""
    token_ids: np.ndarray
    """int32, all rows end to end."""
    offsets: np.ndarray
    """int64 [rows + 1], bounds of the rows in ``token_ids``."""
    packed_masks: np.ndarray
    """uint8, the packed masks of the answered rows end to end; each starts on a byte of its own."""
    max_answer_tokens: np.ndarray
    """int32 [rows], of the answer that is to be written; 0 for answered rows."""
    rejected: list[tuple[str, str]]
    """Name and reason of every conversation that is not a row."""
    content_hash: str
    """Of all that the rows depend on: files, tokenizer, options."""

    def __len__(self) -> int:
        return len(self.ids)

    def input_ids(self, row: int) -> np.ndarray:
        """int32 [S], a view: the prompt with its generation prompt, or the whole conversation if it is answered."""
        return self.token_ids[self.offsets[row] : self.offsets[row + 1]]

    def loss_mask(self, row: int) -> bytes | None:
        """Packed mask over ``input_ids(row)`` (``data/masks.py``); None where the target has yet to answer."""
        if self.max_answer_tokens[row]:
            return None
        return self.packed_masks[self._mask_offsets[row] : self._mask_offsets[row + 1]].tobytes()

    @cached_property
    def fully_answered(self) -> bool:
        return not self.max_answer_tokens.any()

    @property
    def longest(self) -> int:
        """Most tokens that a row may have, its answer included."""
        return int((np.diff(self.offsets) + self.max_answer_tokens).max(initial=0))

    @cached_property
    def _mask_offsets(self) -> np.ndarray:
        sizes = np.where(self.max_answer_tokens > 0, 0, (np.diff(self.offsets) + 7) // 8)
        return np.concatenate([[0], np.cumsum(sizes)])

    def save(self, path: Path) -> None:
        """Write an npz without pickle, complete or not at all."""
        names = {"ids": self.ids, "rejected": self.rejected, "content_hash": self.content_hash}
        arrays: dict[str, Any] = {
            "token_ids": self.token_ids,
            "offsets": self.offsets,
            "packed_masks": self.packed_masks,
            "room": self.max_answer_tokens,
            "names": np.frombuffer(json.dumps(names).encode(), dtype=np.uint8),
        }
        write_atomically(path, lambda file: np.savez(file, **arrays))

    @classmethod
    def load(cls, path: Path) -> PromptSet:
        with np.load(path, allow_pickle=False) as arrays:
            names = json.loads(arrays["names"].tobytes())
            return cls(
                ids=names["ids"],
                token_ids=arrays["token_ids"],
                offsets=arrays["offsets"],
                packed_masks=arrays["packed_masks"],
                max_answer_tokens=arrays["room"],
                rejected=[(name, reason) for name, reason in names["rejected"]],
                content_hash=names["content_hash"],
            )
