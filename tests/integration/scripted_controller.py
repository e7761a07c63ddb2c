"""A controller that hands out steps from a script. Loads no torch, so that its process is there at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchspec.contracts import RankBatch, RankId, RankReport, SampleId, SampleRef, StepReport
from torchspec.controller.steps import split_batch


@dataclass(frozen=True)
class Step:
    """One scripted step."""

    refs: Sequence[SampleRef]
    checkpoint: bool = False
    evaluate: bool = False
    replacement: Sequence[SampleRef] | None = None
    """Handed out when a rank misses a sample of ``refs``."""


class ScriptedController:
    """Hands out a fixed script of steps and records what it is told."""

    def __init__(self, steps: Sequence[Step], world: int, first_step: int, heldout: Sequence[SampleRef], sp: int = 1):
        self.world, self.sp, self.heldout = world, sp, heldout
        self.steps = dict(enumerate(steps, start=first_step))
        self.with_heldout: set[int] = set()
        self.rounds: dict[int, list[set[SampleId]]] = {}
        self.decisions: dict[int, asyncio.Event] = {}
        self.log: list[tuple[Any, ...]] = []
        self.reports: list[StepReport] = []
        self.ranks: dict[int, RankReport] = {}

    def _batch(self, rank: int, number: int, refs: Sequence[SampleRef]) -> RankBatch:
        step = self.steps[number]
        micro_batches = split_batch(refs, self.world // self.sp, micro_batch_size=2)[rank // self.sp]
        return RankBatch(number, micro_batches, step.checkpoint, step.evaluate)

    async def next_batch(self, member: RankId, number: int) -> RankBatch | None:
        return self._batch(member.rank, number, self.steps[number].refs) if number in self.steps else None

    async def fetched(self, member: RankId, step: int, attempt: int, missing: tuple[SampleId, ...]) -> RankBatch | None:
        rank = member.rank
        self.log.append(("fetched", rank, step, missing))
        reports = self.rounds.setdefault(step, [])
        decision = self.decisions.setdefault(step, asyncio.Event())
        reports.append(set(missing))
        if len(reports) == self.world:
            del self.rounds[step], self.decisions[step]
            decision.set()
        await decision.wait()
        replacement = self.steps[step].replacement
        return self._batch(rank, step, replacement) if any(reports) and replacement is not None else None

    async def step_done(self, member: RankId, step: int, report: StepReport | None) -> None:
        self.log.append(("done", member.rank, step))
        self.reports += [report] if report is not None else []

    async def ledger_snapshot(self, _: RankId, step: int) -> str:
        return f'{{"step": {step}}}'

    async def require_current(self, _: RankId) -> None:
        pass

    async def committed(self, _: RankId, step: int, folder: str, best: bool, failure: str) -> None:
        self.log.append(("committed", step, Path(folder).name, best))

    async def exported(self, _: RankId, step: int, failure: str) -> None:
        self.log.append(("exported", step, failure))

    async def heldout_batches(self, member: RankId, part: int) -> tuple[tuple[SampleRef, ...], ...]:
        rank = member.rank
        if rank in self.with_heldout:
            return ()
        return split_batch(self.heldout, self.world // self.sp, micro_batch_size=2)[rank // self.sp]

    async def heldout_fetched(self, member: RankId, part: int, attempt: int, missing: tuple[SampleId, ...]) -> bool:
        self.log.append(("heldout", member.rank, missing))
        if not missing:
            self.with_heldout.add(member.rank)
        return not missing

    async def heldout_done(self, _: RankId, report: StepReport) -> None:
        self.reports.append(report)

    async def rank_report(self, _: RankId, report: RankReport) -> None:
        self.ranks[report.rank] = report

    async def told(self) -> tuple[list[tuple[Any, ...]], list[StepReport], dict[int, RankReport]]:
        return self.log, self.reports, self.ranks
