"""One generation of training ranks on its way through the steps.

    ledger --assign--> step --split--> a batch for each rank --fetched?--> go --step_done--> trained

A group forms steps a little ahead of its ranks. Whether a step goes ahead is decided once for all ranks, when each has
said what it could not fetch. A group that is closing forms no more steps: every rank ends after the same one, saves,
and the next generation, of whatever size, goes on from there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path

from torchspec.config.schema import Config, TrainingConfig
from torchspec.contracts import MicroBatches, RankBatch, SampleId, SampleRef
from torchspec.controller.buffer import SampleBuffer
from torchspec.controller.ledger import Ledger
from torchspec.controller.sync import Signal


@dataclass(frozen=True)
class GroupPlan:
    """What the driver starts a generation of ranks from."""

    generation: int
    training: TrainingConfig
    """With the sizes of this group."""
    resume: Path | None
    """The checkpoint to go on from; None: the beginning."""


class GroupEnded(Exception):
    """A rank of an earlier generation has called; it is no longer needed."""


@dataclass
class FetchRound:
    """One attempt of all ranks to fetch a step. It is decided once, for all of them, when the last has reported."""

    silent: set[int]
    """Ranks that have not reported yet."""
    missing: set[SampleId] = field(default_factory=set)
    decided: bool = False
    outcome: list[RankBatch] | None = None
    """None: every rank has everything. Otherwise what all ranks fetch next for the same step."""


class TrainingGroup:
    """See the module's docstring.

    Args:
        config: the run's, with the sizes of this group.
        closing: end as soon as the ranks ask for a step.
    """

    def __init__(self, buffer: SampleBuffer, config: Config, closing: bool) -> None:
        self.generation, self.training, self.closing = buffer.generation, config.training, closing
        self._buffer, self._config, self._ledger, self._heldout = buffer, config, buffer.ledger, buffer.heldout
        self._next_step = [self._ledger.trained_step + 1] * self.training.world_size
        self._batches: dict[int, list[RankBatch]] = {}
        self._rounds: dict[tuple[bool, int, int], FetchRound] = {}
        """By whether it is of held-out samples, step and attempt: an answer that was lost is given again."""
        self._acks: defaultdict[int, set[int]] = defaultdict(set)
        self._asking = 0  # ranks that wait for a step
        self._over = False
        self._first = self._ledger.trained_step
        self._seen = self._first, False
        self._changed = Signal()

    def close(self) -> None:
        """Form no more steps: ranks end after those they already have."""
        self.closing = True
        self._changed.fire()

    def end(self) -> None:
        """The group is gone: whatever its ranks still wait for ends with :class:`GroupEnded`."""
        self._over = True
        self._changed.fire()

    @property
    def at_work(self) -> bool:
        """Whether it has made a step, or waits for its first, and goes on."""
        return not self.closing and (self._asking > 0 or self._ledger.trained_step > self._first)

    @property
    def starved(self) -> bool:
        """Whether training waits for samples: some rank asks for a step, and there is none formed and untrained."""
        return self._asking > 0 and not self._batches

    def advance(self) -> None:
        """Form every step that can be formed, complete every round that waits for lost samples, and tell the ranks of
        that: of a sample alone nobody is told, there may be many ranks."""
        assert not self._over, "steps of a group that has ended would reach nobody"
        news = False
        if not self.closing:  # some ranks may already have been told that there will be no held-out batches
            news = self._heldout.assign() is not None
        seen = self._ledger.trained_step, self._heldout.exhausted
        news |= seen != self._seen or self._ledger.exhausted
        self._seen = seen
        # until all held-out samples have been in the store, a single batch is all that surely fits beside them
        prefetch = self._config.controller.prefetch_steps if self._heldout.exhausted else 1
        # and while answers are counted, one that nobody may train yet would keep the room of those to come
        ahead = self._ledger.trained_step + (0 if self._buffer.counted_first else prefetch)
        while not self.closing and max(self._batches, default=self._ledger.trained_step) < ahead:
            step = self._ledger.assign()
            if step is None:
                break
            self._batches[step] = self._rank_batches(step)
            news = True
        for (heldout, step, _), round_ in self._rounds.items():
            if round_.decided or round_.silent:
                continue
            ledger = self._heldout if heldout else self._ledger
            if all(r.state == "assigned" for r in ledger.step_records(step)):
                if ledger is self._ledger:
                    self._batches[step] = self._rank_batches(step)
                round_.decided, round_.outcome = True, self._batches.get(step, [])
                news = True
        if news:
            self._changed.fire()

    async def next_batch(self, rank: int, step: int) -> RankBatch | None:
        """What ``rank`` has to do in ``step``, the one after its last, as soon as it is complete. None: it never will.

        Raises:
            ValueError: the ledger goes on with another step.
        """
        expected = self._next_step[rank]
        if not self._first < step <= expected:
            raise ValueError(
                f"rank {rank} asks for step {step} where the ledger goes on with step {expected}: it has started from "
                "another checkpoint"
            )
        while step not in self._batches:
            if self.closing or self._ledger.exhausted:
                return None
            self._asking += 1
            try:
                await self._wait()
            finally:
                self._asking -= 1
        self._next_step[rank] = max(step + 1, self._next_step[rank])
        return self._batches[step][self._group(rank)]

    async def fetched(self, rank: int, step: int, attempt: int, missing: Iterable[SampleId]) -> RankBatch | None:
        """See ``Controller.fetched``."""
        outcome = await self._report(rank, self._ledger, step, attempt, missing)
        return None if outcome is None else outcome[self._group(rank)]

    def done(self, rank: int, step: int) -> bool:
        """``rank`` has made ``step``; whether it was the last of them. Hearing of it twice does no harm."""
        if step not in self._batches:
            return False
        acks = self._acks[step]
        acks.add(rank)
        if len(acks) < self.training.world_size:
            return False
        del self._acks[step], self._batches[step]
        self._rounds = {key: round_ for key, round_ in self._rounds.items() if key[:2] != (False, step)}
        return True

    async def trained(self, step: int) -> None:
        """Returns when all ranks have made ``step``."""
        while self._ledger.trained_step < step:
            await self._wait()

    async def heldout_batches(self, rank: int, part: int) -> MicroBatches | None:
        """See ``Controller.heldout_batches``."""
        while part not in self._heldout.steps:
            if self._heldout.exhausted:
                return ()
            if self.closing:
                return None
            await self._wait()
        return self._split(self._heldout, part)[self._group(rank)]

    async def heldout_fetched(self, rank: int, part: int, attempt: int, missing: Iterable[SampleId]) -> bool:
        """Whether all ranks hold these held-out samples now."""
        complete = await self._report(rank, self._heldout, part, attempt, missing) is None
        if complete and self._heldout.trained_step < part:
            self._buffer.hold_heldout(part)
        return complete

    async def _report(
        self, rank: int, ledger: Ledger, step: int, attempt: int, missing: Iterable[SampleId]
    ) -> list[RankBatch] | None:
        key = ledger is self._heldout, step, attempt
        round_ = self._rounds.setdefault(key, FetchRound(set(range(self.training.world_size))))
        if rank in round_.silent:
            round_.silent.discard(rank)
            round_.missing.update(missing)
            if not round_.silent and round_.missing:
                self._buffer.lose(ledger, step, round_.missing)  # sooner or later `advance` sees new references
            elif not round_.silent:
                round_.decided = True
                self._changed.fire()
        while not round_.decided:
            await self._wait()
        return round_.outcome

    async def _wait(self) -> None:
        await self._changed.wait()
        if self._over:
            raise GroupEnded(f"generation {self.generation} of the training group has ended")

    def _rank_batches(self, step: int) -> list[RankBatch]:
        evaluation = self._config.evaluation
        last = self._ledger.is_last(step)
        checkpoint = last or step % self._config.checkpoint.every_steps == 0
        evaluate = evaluation.heldout is not None and (checkpoint or step % evaluation.every_steps == 0)
        return [
            RankBatch(step=step, micro_batches=micro_batches, checkpoint=checkpoint, evaluate=evaluate, last=last)
            for micro_batches in self._split(self._ledger, step)
        ]

    def _split(self, ledger: Ledger, step: int) -> list[MicroBatches]:
        refs = [r.ref for r in ledger.step_records(step) if r.ref is not None]
        return split_batch(refs, self.training.dp_size, self.training.micro_batch_size)

    def _group(self, rank: int) -> int:
        """The data-parallel group of ``rank``: the ranks that share its samples, neighbours in number."""
        return rank // self.training.sp_size


def split_batch(refs: Sequence[SampleRef], dp_size: int, micro_batch_size: int) -> list[MicroBatches]:
    """Micro-batches for each data-parallel rank, as many on every rank (empty tuples where a rank has no more).

    Longest first to the rank with the fewest tokens, so ranks finish together and a micro-batch holds samples of like
    length (padding is wasted work). Depends on the refs alone: the same step always splits the same way.
    """
    share = -(-len(refs) // dp_size)
    ranks: list[list[SampleRef]] = [[] for _ in range(dp_size)]
    loads = [(0, rank) for rank in range(dp_size)]  # a heap: tokens of the ranks that are not full
    for ref in sorted(refs, key=lambda r: (-r.num_tokens, r.sample)):
        tokens, rank = heappop(loads)
        ranks[rank].append(ref)
        if len(ranks[rank]) < share:
            heappush(loads, (tokens + ref.num_tokens, rank))
    count = max(1, -(-max(len(r) for r in ranks) // micro_batch_size))
    return [
        tuple(tuple(rank[i * micro_batch_size : (i + 1) * micro_batch_size]) for i in range(count)) for rank in ranks
    ]
