"""Gives samples to inference workers, and takes what they bring back.

Leases are given out from the front of the line, as far as window and credits reach. A worker that holds a suspect (see
``ledger.py``) gets nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

from torchspec.contracts import Answer, FailureKind, Lease, SampleId, SampleRef, SampleTiming
from torchspec.controller.buffer import SampleBuffer
from torchspec.controller.ledger import Ledger, Record

log = logging.getLogger(__name__)


class Leases:
    """See the module's docstring."""

    def __init__(self, buffer: SampleBuffer):
        self._buffer = buffer
        self.store_away = False
        """Nothing is leased, and nothing that fails is held against a sample."""
        self.of_steps_only = False
        """Lease only what formed steps wait for: the run is stopping."""
        self._making_room = False

    def busy(self, worker: str) -> bool:
        """Whether ``worker`` has leases in hand."""
        return any(ledger.leased_to(worker) for ledger in self._buffer.ledgers)

    def anything(self) -> bool:
        """Whether there is something to lease, or to make room for."""
        buffer = self._buffer
        for ledger in buffer.ledgers:
            record = ledger.next_to_lease(self.of_steps_only)
            if record is not None:
                return record.attempts > 0 or buffer.credits.fits(record.sample, self._size(record)[0])
        return False

    def grant(self, worker: str, max_count: int) -> list[Lease]:
        """Up to ``max_count`` leases; none if there is nothing to do now."""
        buffer, leases = self._buffer, list[Lease]()
        in_hand = [(ledger, record) for ledger in buffer.ledgers for record in ledger.leased_to(worker)]
        if self.store_away or any(ledger.is_suspect(record) for ledger, record in in_hand):
            return leases
        for ledger in buffer.ledgers:
            while len(leases) < max_count:
                record = ledger.next_to_lease(self.of_steps_only)
                if record is None or buffer.samples.being_answered(record.sample, buffer.ledger.is_leased):
                    break
                suspect = ledger.is_suspect(record)
                if suspect and (in_hand or leases):
                    return leases
                lease = self._lease(ledger, record, worker)
                if lease is None:
                    buffer.observer.blocked(by_credits=True)
                    return leases
                leases.append(lease)
                if suspect:
                    return leases
        buffer.observer.blocked(by_window=len(leases) < max_count and buffer.ledger.window_full)
        return leases

    def take_back(self, worker: str, in_hand: Iterable[str]) -> None:
        """Leases that ``worker`` was given and never got are pending again. ``in_hand``: the keys of the others."""
        kept = set(in_hand)
        for ledger in self._buffer.ledgers:
            for record in [r for r in ledger.leased_to(worker) if r.key not in kept]:
                ledger.give_back(record.sample, record.key)

    async def publish(self, ref: SampleRef, answer: Answer | None, timing: SampleTiming | None) -> None:
        """A sample is in the store. Hearing of it twice does no harm."""
        buffer, ledger = self._buffer, self._buffer.of(ref.sample)
        if ledger.is_stored(ref.sample, ref.key):
            return
        record = ledger.leased(ref.sample, ref.key)
        if answer is not None:
            buffer.samples.add_answer(ref.sample, answer)
        if record is None or ref.sharding != buffer.sharding(record):
            log.info("discarding %s: its lease had been given to somebody else, or the layout has changed", ref.key)
            await buffer.objects.remove([ref.key])
            ledger.give_back(ref.sample, ref.key)
        else:
            ledger.store(ref)
            buffer.observer.stored(ref, timing)
            geometry = replace(buffer.geometry, sharding=ref.sharding)
            fits = buffer.credits.reserve(ref.sample, geometry.stored_bytes(ref.num_tokens))
            assert fits, f"{ref.key} is larger than its lease allowed"
        buffer.settle(ledger, ())

    async def fail(self, worker: str, sample: SampleId, key: str, reason: str, kind: FailureKind) -> None:
        """A lease came to nothing. What may be stored under its key is of no use any more."""
        buffer, ledger = self._buffer, self._buffer.of(sample)
        await buffer.objects.remove([key])
        if ledger.leased(sample, key) is None:
            return
        if kind == "no_store" or (kind == "no_room" and self.store_away):
            ledger.give_back(sample, key)
        elif kind == "no_room":
            displaced = ledger.defer(sample, key)
            if displaced is not None:
                await buffer.objects.remove([displaced])
        else:
            ledger.fail(sample, key, reason, final=kind == "final")
            buffer.observer.failed(worker, sample, buffer.samples.name(sample), reason)
        buffer.settle(ledger, [sample])

    def lost(self, worker: str) -> int:
        """A worker died: its leases go back. Returns how many."""
        buffer = self._buffer
        held = [record for ledger in buffer.ledgers for record in ledger.leased_to(worker)]
        buffer.observer.mark(held, "failed", f"{worker} died")
        keys = [record.key for record in held]
        buffer.objects.remove_twice(keys)
        for ledger in buffer.ledgers:
            records = ledger.worker_lost(worker, alone=len(keys) == 1)
            buffer.settle(ledger, [r.sample for r in records])
        return len(keys)

    def _lease(self, ledger: Ledger, record: Record, worker: str) -> Lease | None:
        """Lease ``record``, if there is room for it."""
        buffer = self._buffer
        size, lease = self._size(record)
        if not buffer.credits.reserve(record.sample, size):
            self._make_room(ledger, record)
            return None
        ledger.lease(record, worker, buffer.key_prefix)
        buffer.observer.timelines.leased(record.sample, worker)
        return replace(lease, key=record.key)

    def _size(self, record: Record) -> tuple[int, Lease]:
        """What the sample may occupy in the store, and its lease without a key."""
        buffer, sharding = self._buffer, self._buffer.sharding(record)
        tokens, lease = buffer.samples.describe(record.sample)
        size = replace(buffer.geometry, sharding=sharding).stored_bytes(tokens)
        return size, replace(lease, credit_bytes=size, sharding=sharding)

    def _make_room(self, ledger: Ledger, record: Record) -> None:
        """Let the sample furthest behind ``record`` give up its room, one at a time.

        Leases are given out from the front of the line, so nothing behind holds room that the front needs; but after a
        rewind the front has lost its own.
        """
        buffer = self._buffer
        in_line = ledger is buffer.ledger
        if self._making_room or (in_line and not record.attempts):
            return
        victim = buffer.ledger.furthest_behind(record.position if in_line else -1, buffer.credits.held.__contains__)
        if victim is None:
            return

        def made() -> None:
            self._making_room = False

        self._making_room = True
        buffer.ledger.forget_objects(lambda ref: ref.key != victim.key)
        buffer.drop([victim], made)
