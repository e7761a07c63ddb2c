"""What the ledger keeps of a sample that is on its way, and of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torchspec.contracts import SampleId, SampleRef

State = Literal["pending", "leased", "stored", "assigned", "trained", "committed", "rejected"]
IN_STORE = ("stored", "assigned")
Moved = Callable[[SampleId, State, State, str], None]
"""Told of a sample, the state before and after, and why: the worker's name, the step's, what went wrong, or nothing."""


@dataclass(slots=True)
class Record:
    """A sample in the making: leased at least once, and neither committed nor rejected."""

    position: int
    sample: SampleId
    state: State = "pending"
    attempts: int = 0
    """Leases given out; makes the key of each unique."""
    failures: int = 0
    """Leases that came to nothing, for which the prompt itself may be to blame."""
    deaths: int = 0
    """Workers that died while they held it."""
    key: str = ""
    worker: str = ""
    ref: SampleRef | None = None
    step: int = 0
    """The step that consumes it, once assigned; kept when its object is lost and captured again."""


@dataclass(slots=True)
class Step:
    """Positions that one optimizer step consumes; ``end`` is the cursor once it is trained."""

    positions: list[int]
    end: int
