"""The driver's half of the training group: starts a generation of ranks, and the next one when it has ended or broken.

Ranks form one process group, so the loss of one is the end of all: the next generation goes on from the last
checkpoint. That is also how the group changes its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from torchspec.config.schema import RecoveryConfig
from torchspec.contracts import RunStatus
from torchspec.controller.steps import GroupPlan
from torchspec.data.vocabulary import DraftVocab
from torchspec.driver.actors import ActorFactory
from torchspec.driver.console import View
from torchspec.driver.controller_client import ControllerClient
from torchspec.driver.placement import RankSlots
from torchspec.driver.supervise import Pulse, RunFailed, actor_pulse, root_cause
from torchspec.training.checkpoint import CheckpointError
from torchspec.training.learner import TrainingDiverged

FATAL = (TrainingDiverged, CheckpointError)
"""What would only happen again."""
_END_SECONDS = 30.0
SLOT_SECONDS = 120.0
"""How long ranks wait for slots on their nodes: engines of a run before may just be leaving, a node coming back."""


class RankLost(Exception):
    """A rank died, failed or hangs; the message says which and why."""


@dataclass
class Rank:
    number: int
    actor: Any
    pulse: Pulse


@dataclass
class Waiting:
    """A generation that starts when it has its slots."""

    plan: GroupPlan
    slots: RankSlots
    seconds: float = 0.0
    """So long, so far."""


class Trainers:
    """The actors of one generation at a time."""

    def __init__(self, actors: ActorFactory, controller: ControllerClient, recovery: RecoveryConfig, view: View):
        self._actors, self._controller, self._recovery, self._view = actors, controller, recovery, view
        self._ranks: dict[ray.ObjectRef, Rank] = {}
        self._waiting: Waiting | None = None
        self.vocabulary: DraftVocab | None = None

    @property
    def futures(self) -> list[ray.ObjectRef]:
        return [*self._ranks, *([] if self._waiting is None else [self._waiting.slots.meeting])]

    @property
    def at_work(self) -> bool:
        """Whether there are ranks; not while they wait for a vocabulary or for slots."""
        return bool(self._ranks)

    def start(self) -> None:
        """Let the next generation start, once there are a vocabulary and slots for it.

        The one before must have ended, or been killed.
        """
        if self.vocabulary is None:
            return
        plan: GroupPlan = self._controller.ask("open_group")
        training = plan.training
        where = "from the beginning" if plan.resume is None else f"from {plan.resume.name}"
        self._view.message(
            f"starting {training.world_size} training rank{'s' if training.world_size > 1 else ''} "
            f"(dp_size {training.dp_size}, sp_size {training.sp_size}) {where}"
        )
        self._waiting = Waiting(plan, self._actors.rank_slots(plan))

    def done(self, ref: ray.ObjectRef) -> bool:
        """One of the futures is done: there are slots, or a rank has ended. Whether it was the last of its generation.

        Raises:
            RankLost: it broke.
            RunFailed: it broke in a way that would only happen again.
        """
        waiting = self._waiting
        if waiting is not None and ref == waiting.slots.meeting:
            self._waiting = None
            self._move_in(waiting.plan, waiting.slots)
            return False
        rank = self._ranks[ref]
        try:
            ray.get(ref)
        except ray.exceptions.RayError as error:
            what = f"trainer rank {rank.number} failed: {root_cause(error)} (log: {self._log(rank)})"
            if isinstance(getattr(error, "cause", None), FATAL):
                raise RunFailed(what) from None
            raise RankLost(what) from None
        ray.kill(rank.actor)
        del self._ranks[ref]
        return not self._ranks

    def follow(self, status: RunStatus) -> None:
        """Ranks that still wait for slots when another size is asked for are not needed any more."""
        waiting = self._waiting
        if waiting is not None and status.closing and status.generation == waiting.plan.generation:
            self.start()

    def _move_in(self, plan: GroupPlan, slots: RankSlots) -> None:
        """Start the ranks that have their slots now."""
        assert self.vocabulary is not None
        try:
            actors = self._actors.trainers(self.vocabulary, plan, slots)
        except ray.exceptions.RayError as error:  # the node that had them has just been lost
            raise RankLost(f"{slots.wanted} found no place: {root_cause(error)}") from None
        for number, actor in enumerate(actors):
            pulse = actor_pulse(actor, self._recovery.hang_seconds, self._recovery.start_seconds)
            self._ranks[actor.run.remote(self._controller.actor)] = Rank(number, actor, pulse)

    def check(self, elapsed: float) -> None:
        """Raises RankLost: a rank gives no sign of life, or there have been no slots for too long."""
        if self._waiting is not None:
            self._waiting.seconds += elapsed
            if self._waiting.seconds > SLOT_SECONDS:
                raise RankLost(f"the cluster has had no room for {self._waiting.slots.wanted} in {SLOT_SECONDS:.0f} s")
        for rank in self._ranks.values():
            if rank.pulse.hangs(elapsed):
                raise RankLost(f"trainer rank {rank.number} gave no sign of life (log: {self._log(rank)})")

    def kill(self) -> None:
        """End the generation, whatever it does."""
        for rank in self._ranks.values():
            ray.kill(rank.actor)
        if self.at_work:
            ray.wait(list(self._ranks), num_returns=len(self._ranks), timeout=_END_SECONDS)
        self._ranks.clear()
        self._waiting = None

    def _log(self, rank: Rank) -> Any:
        return self._actors.log_path(f"trainer-{rank.number}")
