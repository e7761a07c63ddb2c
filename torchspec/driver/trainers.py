"""The driver's half of the training group: starts a generation of ranks, and the next one when it has ended or broken.

Ranks form one process group, so the loss of one is the end of all: the next generation goes on from the last
checkpoint. That is also how the group changes its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from torchspec.config.schema import RecoveryConfig
from torchspec.controller.steps import GroupPlan
from torchspec.data.draft_vocab import DraftVocab
from torchspec.driver.actors import ActorFactory
from torchspec.driver.controller import ControllerLine
from torchspec.driver.failure import RunFailed, root_cause
from torchspec.driver.supervise import Pulse
from torchspec.driver.view import View
from torchspec.training.checkpoint import CheckpointError
from torchspec.training.trainer import TrainingDiverged

FATAL = (TrainingDiverged, CheckpointError)
"""What would only happen again."""
_END_SECONDS = 30.0


class RankLost(Exception):
    """A rank died, failed or hangs; the message says which and why."""


@dataclass
class Rank:
    number: int
    actor: Any
    pulse: Pulse


class Trainers:
    """The actors of one generation at a time."""

    def __init__(self, actors: ActorFactory, controller: ControllerLine, recovery: RecoveryConfig, view: View):
        self._actors, self._controller, self._recovery, self._view = actors, controller, recovery, view
        self._ranks: dict[ray.ObjectRef, Rank] = {}
        self.vocabulary: DraftVocab | None = None

    @property
    def futures(self) -> list[ray.ObjectRef]:
        return list(self._ranks)

    def start(self) -> None:
        """Start the next generation, once there is a vocabulary. The one before must have ended, or been killed.

        Raises:
            RankLost: there is no room for it now.
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
        try:
            actors = self._actors.trainers(self.vocabulary, plan)
        except ValueError as error:  # a node may be on its way back
            raise RankLost(str(error)) from None
        for number, actor in enumerate(actors):
            pulse = Pulse(_ping(actor), self._recovery.hang_seconds, self._recovery.start_seconds)
            self._ranks[actor.run.remote(self._controller.actor)] = Rank(number, actor, pulse)

    def ended(self, ref: ray.ObjectRef) -> bool:
        """The rank of a future has ended; whether it was the last of its generation.

        Raises:
            RankLost: it broke.
            RunFailed: it broke in a way that would only happen again.
        """
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

    def check(self, elapsed: float) -> None:
        """Raises RankLost: a rank gives no sign of life."""
        for rank in self._ranks.values():
            if rank.pulse.hangs(elapsed):
                raise RankLost(f"trainer rank {rank.number} gave no sign of life (log: {self._log(rank)})")

    def kill(self) -> None:
        """End the generation, whatever it does."""
        for rank in self._ranks.values():
            ray.kill(rank.actor)
        if self._ranks:
            ray.wait(self.futures, num_returns=len(self._ranks), timeout=_END_SECONDS)
        self._ranks.clear()

    def _log(self, rank: Rank) -> Any:
        return self._actors.log_path(f"trainer-{rank.number}")


def _ping(actor: Any) -> Any:
    return lambda: actor.ping.remote().future()
