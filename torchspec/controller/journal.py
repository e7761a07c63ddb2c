"""What a run's journal, ``ledger.jsonl``, says to whoever takes the run up again. ``verify.py`` reads all of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchspec.files import Damage, read_lines

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JournalSoFar:
    started: bool
    """There has been a controller before."""
    generation: int
    """No training group has had a higher one."""
    committed_step: int
    """The last step that the run has a checkpoint of, or has gone back to."""


def read_journal(path: Path, told: Callable[[Damage], None] = log.warning) -> JournalSoFar:
    """As far as it can be read; ``told`` of the lines that cannot. Each may have been of another group."""
    generation = committed_step = 0
    started, damage = False, list[Damage]()
    for record in read_lines(path, damage.append):
        started = True
        match record["event"]:
            case "group":
                generation = max(generation, record["generation"])
            case "resumed" | "committed":
                committed_step = record["step"]
    for one in damage:
        told(one)
        generation += len(one.lines)
    return JournalSoFar(started or bool(damage), generation, committed_step)
