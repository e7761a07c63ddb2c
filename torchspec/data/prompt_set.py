"""The tokenised prompt set that a run works through: compact, immutable, a folder of flat arrays.

Rows lie end to end (4 bytes and 1 bit a token) in files that are mapped into memory, so that a million conversations
cost a process their names and nothing else. To another process on the machine a set travels as the path of its folder,
which is named by the hash of all that its content depends on.

Every conversation of the files ends up as a row or in ``rejected``, with its reason, and what was changed is counted:
nothing is truncated or dropped in silence.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

ARRAYS = {"token_ids": np.int32, "offsets": np.int64, "packed_masks": np.uint8, "max_answer_tokens": np.int32}
"""Files of a set, each the bytes of an array; the rest is in :data:`ABOUT`."""
ABOUT = "about.json"


@dataclass(frozen=True, slots=True)
class TokenizeOptions:
    """What ``data.*`` and ``answer.max_tokens`` say about tokenising; see the config for each."""

    columns: dict[str, str]
    chat_template: str | None
    template_kwargs: dict[str, Any]
    max_seq_length: int
    too_long: Literal["reject", "truncate"]
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
    changes: dict[str, int] = field(default_factory=dict)
    """What was changed in conversations, and in how many."""
    folder: Path | None = None
    """Where it lies; None if it does so in memory alone."""

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

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is not None:
            return PromptSet.load, (self.folder,)
        return PromptSet, tuple(getattr(self, one.name) for one in fields(self))

    @classmethod
    def load(cls, folder: Path) -> PromptSet:
        """What a :class:`PromptWriter` has written."""
        about = json.loads((folder / ABOUT).read_text())
        rejected = [(name, reason) for name, reason in about.pop("rejected")]
        arrays: dict[str, Any] = {name: _mapped(folder / name, dtype) for name, dtype in ARRAYS.items()}
        return cls(**arrays, **about, rejected=rejected, folder=folder)


class PromptWriter:
    """Writes a set into ``folder``, row by row; it is complete when the ``with`` block ends."""

    def __init__(self, folder: Path, content_hash: str):
        self.changes: Counter[str] = Counter()
        self.rejected: list[tuple[str, str]] = []
        self._folder, self._content_hash = folder, content_hash
        self._ids: list[str] = []
        self._end = 0

    def __enter__(self) -> PromptWriter:
        with ExitStack() as stack:
            self._files = {name: stack.enter_context((self._folder / name).open("wb")) for name in ARRAYS}
            self._stack = stack.pop_all()
        self._write("offsets", [0])
        return self

    def add(self, name: str, input_ids: np.ndarray, loss_mask: np.ndarray | None, max_answer_tokens: int) -> None:
        self._ids.append(name)
        self._end += len(input_ids)
        self._write("token_ids", input_ids)
        self._write("offsets", [self._end])
        self._write("max_answer_tokens", [max_answer_tokens])
        if loss_mask is not None:
            self._write("packed_masks", np.packbits(loss_mask))

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        about = {
            "ids": self._ids,
            "rejected": self.rejected,
            "changes": self.changes,
            "content_hash": self._content_hash,
        }
        (self._folder / ABOUT).write_text(json.dumps(about))

    def _write(self, name: str, values: Any) -> None:
        self._files[name].write(np.asarray(values, dtype=ARRAYS[name]).tobytes())


def count_reasons(rejected: Iterable[tuple[str, str]]) -> Counter[str]:
    """Kinds of reasons, which is what stands before the colon, the most frequent first."""
    return Counter(dict(Counter(reason.partition(": ")[0] for _, reason in rejected).most_common()))


def _mapped(path: Path, dtype: type) -> np.ndarray:
    """The array of a file, read when it is looked at; nothing cannot be mapped."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
