"""Who gets which sample: what inference workers are given when they ask.

Leases are given out from the front of the order, as far as window and credits reach. A worker that holds a suspect (see
``ledger.py``) gets nothing else.
"""

from __future__ import annotations

from torchspec.contracts import Lease
from torchspec.controller.buffer import SampleBuffer
from torchspec.monitor.record.observer import Observer


class Leases:
    """See the module's docstring."""

    def __init__(self, buffer: SampleBuffer, observer: Observer):
        self._buffer, self._observer = buffer, observer
        self.of_steps_only = False
        """Lease only what formed steps wait for: the run is stopping."""

    def busy(self, worker: str) -> bool:
        """Whether ``worker`` holds leases."""
        return any(ledger.leased_to(worker) for ledger in self._buffer.ledgers)

    def anything(self) -> bool:
        """Whether there is something to lease, or to make room for."""
        buffer = self._buffer
        for ledger in buffer.ledgers:
            record = ledger.next_to_lease(self.of_steps_only)
            if record is not None:
                fits = buffer.credits.fits(record.sample, buffer.lease_bytes(record))
                return fits or buffer.displaces(ledger, record)
        return False

    def grant(self, worker: str, max_count: int) -> list[Lease]:
        """Up to ``max_count`` leases; none if there is nothing to do now."""
        buffer, leases = self._buffer, list[Lease]()
        held = [(ledger, record) for ledger in buffer.ledgers for record in ledger.leased_to(worker)]
        if buffer.store_away or any(ledger.is_suspect(record) for ledger, record in held):
            return leases
        for ledger in buffer.ledgers:
            while len(leases) < max_count:
                record = ledger.next_to_lease(self.of_steps_only)
                if record is None or buffer.prompts.being_answered(record.sample, buffer.ledger.is_leased):
                    break
                suspect = ledger.is_suspect(record)
                if suspect and (held or leases):
                    return leases
                lease = buffer.lease(ledger, record, worker)
                if lease is None:
                    buffer.make_room(ledger, record)
                    self._observer.blocked(by_credits=True)
                    return leases
                leases.append(lease)
                if suspect:
                    return leases
        self._observer.blocked(by_window=len(leases) < max_count and buffer.ledger.window_full)
        return leases
