"""What an inference worker needs of whoever makes the states: one lease in, one sample in the store out.

The worker, the controller and the ledger do not know who that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torchspec.contracts import Answer, FailureKind, Lease, SampleRef, SampleTiming
from torchspec.instruments import Stopwatch


class SourceFailed(Exception):
    """A lease came to nothing. ``kind`` says what that calls for."""

    def __init__(self, kind: FailureKind, reason: str):
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Produced:
    """A sample that lies in the store, what the target wrote if it was asked, and how long all of it took."""

    ref: SampleRef
    answer: Answer | None
    timing: SampleTiming


class SampleSource(Protocol):
    """Makes samples, several at a time; used on one event loop."""

    computing: Stopwatch
    """Runs while it computes states for anybody."""

    async def produce(self, lease: Lease) -> Produced:
        """The sample of ``lease``; its states are in the store when this returns.

        Raises:
            SourceFailed: there are none. Any other exception is the end of the source.
        """
        ...

    def stop(self) -> None:
        """Give back whatever it holds. Await what is being produced first, or it is lost."""
        ...
