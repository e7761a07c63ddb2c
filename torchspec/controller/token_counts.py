"""Counts the draft's vocabulary while the target answers: training starts once enough has been seen.

A draft over the target's whole vocabulary waits for nothing.

Answered prompts are counted at once; of the others, the first ``data.vocab_prompts`` in the run's order. Which samples
count depends on the seed alone, so the vocabulary does too, whatever the number of workers. Where the store has no
room for all of them, those that are answered leave it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchspec.controller.buffer import SampleBuffer
from torchspec.controller.spec import ControllerSpec
from torchspec.controller.sync import Signal
from torchspec.data.vocabulary import DraftVocab, VocabCounter, load_or_count
from torchspec.run_folder import RunFolder


class TokenCounts:
    """The vocabulary once it is known; it is kept in the run's folder and read back on a resume.

    Args:
        put: makes the call that writes it.
    """

    def __init__(self, spec: ControllerSpec, buffer: SampleBuffer, put: Callable[..., Any]):
        self.vocab: DraftVocab | None = None
        self._put, self._buffer, self._always = put, buffer, spec.end_token_ids
        self._path, data = RunFolder(spec.run_dir).draft_vocab, spec.config.data
        self._known = Signal()
        first = [(p, buffer.ledger.sample_at(p)) for p in range(min(data.vocab_prompts, len(spec.train)))]
        self._waiting = {p: sample for p, sample in first if spec.train.max_answer_tokens[sample.prompt]}
        self._unknown = list(self._waiting)
        self._size = spec.draft_vocab_size or spec.vocab_size
        if self._path.exists():
            self.vocab = DraftVocab.load(self._path)
        elif spec.draft_vocab_size is None:
            self.vocab = DraftVocab.whole(spec.vocab_size)
            self.vocab.save(self._path)
        elif spec.train.fully_answered:
            self.vocab = load_or_count(spec.train, self._size, spec.vocab_size, self._always, data.cache_dir)
            self.vocab.save(self._path)
        else:
            self._counter, self._prior = VocabCounter(spec.vocab_size), VocabCounter(spec.vocab_size)
            self._counter.add_answered(spec.train)
            self._prior.add_all(spec.train)
            buffer.counted_first = min(data.vocab_prompts, len(spec.train))

    async def vocabulary(self) -> DraftVocab:
        """As soon as enough answers have been counted."""
        while self.vocab is None:
            await self._known.wait()
        return self.vocab

    def update(self) -> None:
        """Build the vocabulary as soon as every sample that it waits for is answered or rejected."""
        if self.vocab is not None:
            return
        prompts, rejected = self._buffer.prompts, self._buffer.ledger.rejected
        while self._unknown:
            position = self._unknown[-1]
            if position not in rejected and prompts.to_answer(self._waiting[position]):
                return
            self._unknown.pop()
        for ids in map(prompts.answer, self._waiting.values()):
            if ids is not None:
                self._counter.add(ids)
        # What the answers have not shown yet is taken from what the prompts talk about.
        self.vocab = self._counter.build(self._size, self._always, self._prior.counts)
        self._put(self.vocab.save, self._path)
        self._buffer.all_counted()
        self._known.fire()
