"""The draft's vocabulary: the target tokens that occur most often where the loss is (EAGLE3).

numpy only, so that the controller can count while answers arrive. The result depends on what was counted, not on the
order of counting.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torchspec.data.prompt_set import PromptSet
from torchspec.files import write_atomically

_PART = 1 << 24
"""Tokens."""


@dataclass(frozen=True, eq=False)
class DraftVocab:
    """``target_ids`` int64 [Vd], sorted: draft token ``i`` is target token ``target_ids[i]``."""

    target_ids: np.ndarray
    vocab_size: int
    """V, the target's."""
    coverage: float
    """Share of the counted tokens that lie in the draft's vocabulary."""

    def __len__(self) -> int:
        return len(self.target_ids)

    @property
    def d2t(self) -> np.ndarray:
        """int64 [Vd]: what SGLang and vLLM add to a draft id to get the target id."""
        return self.target_ids - np.arange(len(self.target_ids))

    @property
    def t2d(self) -> np.ndarray:
        """bool [V]: whether the draft knows a target id."""
        known = np.zeros(self.vocab_size, dtype=bool)
        known[self.target_ids] = True
        return known

    @classmethod
    def whole(cls, vocab_size: int) -> DraftVocab:
        """The target's own."""
        return cls(np.arange(vocab_size), vocab_size, 1.0)

    def save(self, path: Path) -> None:
        """Write JSON, complete or not at all: without it no checkpoint can be resumed."""
        ids = self.target_ids.tolist()
        content = {"vocab_size": self.vocab_size, "coverage": self.coverage, "target_ids": ids}
        write_atomically(path, lambda file: file.write(json.dumps(content).encode()), durable=True)

    @classmethod
    def load(cls, path: Path) -> DraftVocab:
        content = json.loads(path.read_text())
        return cls(np.array(content["target_ids"], dtype=np.int64), content["vocab_size"], content["coverage"])


class VocabCounter:
    """Counts target ids, all of them in [0, ``vocab_size``)."""

    def __init__(self, vocab_size: int):
        self.counts = np.zeros(vocab_size, dtype=np.int64)

    def add(self, token_ids: np.ndarray) -> None:
        np.add.at(self.counts, token_ids, 1)

    def add_answered(self, prompts: PromptSet) -> None:
        """Count the loss tokens of every answered conversation."""
        for row in range(len(prompts)):
            packed = prompts.loss_mask(row)
            if packed is not None:
                ids = prompts.input_ids(row)
                mask = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=len(ids))
                self.add(ids[mask.view(bool)])

    def add_all(self, prompts: PromptSet) -> None:
        """Count all tokens, whoever wrote them, a part at a time: they may be more than the memory holds."""
        for begin in range(0, len(prompts.token_ids), _PART):
            part = prompts.token_ids[begin : begin + _PART]
            self.counts += np.bincount(part, minlength=len(self.counts))

    def build(self, size: int, always: Collection[int] = (), prior: np.ndarray | None = None) -> DraftVocab:
        """The ``size`` most frequent ids.

        Args:
            always: ids taken whatever their count: those that end an answer, above all.
            prior: counts [V] that decide among ids of equal count, such as those that were never seen. Then the lower
                id wins: byte-pair merges are numbered by frequency.

        Raises:
            ValueError: ``draft.vocab_size`` does not fit the target or ``always``.
        """
        vocab_size = len(self.counts)
        always = sorted(set(always))
        if not len(always) < size <= vocab_size:
            raise ValueError(
                f"draft.vocab_size is {size}: it must be at most {vocab_size}, the target's vocabulary, and more than "
                f"{len(always)}, the special tokens that are always in it"
            )
        wanted = np.zeros(vocab_size, dtype=bool)
        wanted[always] = True
        second = np.zeros_like(self.counts) if prior is None else prior
        order = np.lexsort((-second, -self.counts, ~wanted))  # the last key is the first to decide; stable
        target_ids = np.sort(order[:size]).astype(np.int64)
        covered = int(self.counts[target_ids].sum()) / max(1, int(self.counts.sum()))
        return DraftVocab(target_ids, vocab_size, covered)


def load_or_count(
    prompts: PromptSet, size: int, vocab_size: int, always: Collection[int], cache_dir: Path
) -> DraftVocab:
    """Vocabulary of a fully answered prompt set, kept under the hash of what it was counted from.

    Raises:
        ValueError: as :meth:`VocabCounter.build`.
    """
    key = json.dumps([prompts.content_hash, size, vocab_size, sorted(always)])
    path = cache_dir.expanduser() / "draft_vocab" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if path.exists():
        return DraftVocab.load(path)
    counter = VocabCounter(vocab_size)
    counter.add_answered(prompts)
    vocab = counter.build(size, always)
    vocab.save(path)
    return vocab
