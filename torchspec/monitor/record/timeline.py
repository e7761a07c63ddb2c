"""How single samples go through the whole system: ``metrics/samples.jsonl``, the inspector's and the trace's source.

    leased -> computing -> computed -> putting -> stored -> assigned -> fetched -> trained -> freed
       ^---- failed / lost: the sample goes back, and is leased again under another key

Not every sample is kept: about :data:`PER_SECOND`, and of those the newest and some of the older ones.
"""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torchspec.contracts import HELDOUT_EPOCH, SampleId, SampleRef, SampleTiming
from torchspec.files import at_once
from torchspec.monitor.series import Series
from torchspec.monitor.snapshot import to_line
from torchspec.run_folder import RunFolder

PER_SECOND = 1.0
SAMPLE_LINES, SAMPLE_RECENT = 1200, 500
TOKENS_KEPT = 4096
"""Of each sample, from its beginning. A multiple of 8: masks are packed."""

Moment = Literal[
    "leased",
    "computing",
    "computed",
    "putting",
    "stored",
    "assigned",
    "fetched",
    "trained",
    "freed",
    "failed",
    "lost",
]
Happening = tuple[Moment, float, str]
"""What happened, when, and to whom or why (worker, step or reason; else empty)."""


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One sample from its first lease to its end."""

    time: float
    """When it was freed."""
    sample: str
    """``e{epoch}p{prompt}``"""
    id: str
    """Its conversation's name in the data."""
    worker: str
    step: int
    attempts: int
    tokens: int
    prompt_tokens: int | None
    """Of the prompt that the target answered; None where the conversation came with its answers."""
    num_bytes: int
    timeline: tuple[Happening, ...]
    token_ids: str
    """base64 of little-endian int32, of the first :data:`TOKENS_KEPT` tokens."""
    loss_mask: str
    """base64 of their packed mask (``data.masks.pack_mask``)."""


class Timelines:
    """Follows ``per_second`` samples at most, and writes each down once it is freed. Times: seconds since the epoch.

    Args:
        put: makes the calls that touch the disk.
    """

    def __init__(
        self,
        run_dir: Path,
        per_second: float,
        clock: Callable[[], float] = time.time,
        put: Callable[..., Any] = at_once,
    ):
        self._clock, self._spacing, self._put = clock, 1 / per_second if per_second else float("inf"), put
        self._file = Series(RunFolder(run_dir).samples, SAMPLE_LINES, SAMPLE_RECENT)
        self._open: dict[SampleId, list[Happening]] = {}
        self._due = clock() if per_second else float("inf")

    def moved(self, sample: SampleId, before: str, state: str, why: str) -> None:
        """It has gone from state to state of the ledger. What has gone back for no fault of anybody's says nothing."""
        if state == "leased":
            self._leased(sample, why)
        elif state == "rejected":
            self._open.pop(sample, None)
        elif state == "assigned" and before == "stored":
            self.mark([sample], "assigned", why)
        elif state == "trained":
            self.mark([sample], "trained")
        elif state == "pending" and why:
            self.mark([sample], "failed" if before == "leased" else "lost", why)

    def published(self, sample: SampleId, timing: SampleTiming | None) -> None:
        """It is in the store. What its worker measured is laid out backwards from now."""
        if sample not in self._open:
            return
        now, timeline = self._clock(), self._open[sample]
        if timing is not None:
            putting = now - timing.put_seconds
            computed = putting - timing.hold_seconds
            computing = computed - timing.compute_seconds
            timeline += [("computing", computing, ""), ("computed", computed, ""), ("putting", putting, "")]
        timeline.append(("stored", now, ""))

    def mark(self, samples: Iterable[SampleId], moment: Moment, detail: str = "") -> None:
        """The same happened to all of ``samples``."""
        for sample in samples:
            if sample in self._open:
                self._open[sample].append((moment, self._clock(), detail))

    def follows(self, sample: SampleId) -> bool:
        """Whether :meth:`finish` is to be told of it."""
        return sample in self._open

    def finish(self, ref: SampleRef, name: str, step: int, token_ids: bytes, prompt_tokens: int | None) -> None:
        """It has left the store: write it down. ``prompt_tokens``: of the prompt that the target has answered."""
        now, timeline = self._clock(), self._open.pop(ref.sample)
        workers = [worker for moment, _, worker in timeline if moment == "leased"]
        record = SampleRecord(
            time=now,
            sample=str(ref.sample),
            id=name,
            worker=workers[-1],
            step=step,
            attempts=len(workers),
            tokens=ref.num_tokens,
            prompt_tokens=prompt_tokens,
            num_bytes=ref.num_bytes,
            timeline=(*timeline, ("freed", now, "")),
            token_ids=b64encode(token_ids[: 4 * TOKENS_KEPT]).decode(),
            loss_mask=b64encode(ref.loss_mask[: TOKENS_KEPT // 8]).decode(),
        )
        self._put(self._file.append, to_line(record))

    def _leased(self, sample: SampleId, worker: str) -> None:
        """Follow ``sample`` from here on, if it is time for another one. Held-out samples are not followed."""
        now = self._clock()
        if sample not in self._open:
            if sample.epoch == HELDOUT_EPOCH or now < self._due:
                return
            self._due = now + self._spacing
            self._open[sample] = []
        self._open[sample].append(("leased", now, worker))
