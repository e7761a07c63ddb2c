"""Counts the draft's vocabulary while the target answers: training starts once enough has been seen.

Answered prompts are counted at once; of the others, the first ``draft.vocab_prompts`` in the run's order. Which samples
count depends on the seed alone, so the vocabulary does too, whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from pathlib import Path

import numpy as np

from torchspec.contracts import SampleId
from torchspec.data.prompt_set import PromptSet
from torchspec.data.vocabulary import DraftVocab, VocabCounter, load_or_count


class TokenCounts:
    """``ready`` once :attr:`vocab` is known; it is kept in the run's folder and read back on a resume."""

    def __init__(
        self,
        path: Path,
        prompts: PromptSet,
        first: list[SampleId],
        draft_size: int | None,
        vocab_size: int,
        always: tuple[int, ...],
        cache_dir: Path,
    ):
        self.vocab: DraftVocab | None = None
        self._path, self._prompts, self._always = path, prompts, always
        self._size = vocab_size if draft_size is None else draft_size
        self._waiting = [s for s in first if prompts.loss_mask(s.prompt) is None]
        self._unknown = list(self._waiting)
        if path.exists():
            self.vocab = DraftVocab.load(path)
            return
        if prompts.fully_answered:
            self.vocab = load_or_count(prompts, self._size, vocab_size, always, cache_dir)
            self.vocab.save(path)
            return
        self._counter = VocabCounter(vocab_size)
        self._counter.add_answered(prompts)

    def update(self, answer: Callable[[SampleId], np.ndarray | None], rejected: Container[SampleId]) -> bool:
        """Build the vocabulary if every sample it waits for is answered or rejected; whether it was built just now."""
        assert self.vocab is None
        while self._unknown and (self._unknown[-1] in rejected or answer(self._unknown[-1]) is not None):
            self._unknown.pop()
        if self._unknown:
            return False
        for ids in map(answer, self._waiting):
            if ids is not None:
                self._counter.add(ids)
        # What the answers have not shown yet is taken from what the prompts talk about.
        prior = np.bincount(self._prompts.token_ids, minlength=len(self._counter.counts))
        self.vocab = self._counter.build(self._size, self._always, prior)
        self.vocab.save(self._path)
        return True
