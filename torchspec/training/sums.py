"""From a step's un-normalised sums to its report.

Sums are added over micro-batches and ranks, and divided once: never a mean of means, which weighs a rank with two
loss tokens like one with two thousand.

T TTT steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchspec.drafts.eagle3.model import DraftOutput

ROWS = 4


class StepSums:
    """Sums of one optimizer step (or one evaluation), in one float64 tensor on the device: one collective, one sync."""

    def __init__(self, ttt_length: int, device: torch.device):
        self.length = ttt_length
        self.flat = torch.zeros(ROWS * ttt_length + 1, dtype=torch.float64, device=device)

    def add(self, output: DraftOutput, tokens: int) -> None:
        rows = (output.loss_sum_T, output.counted_T, output.supervised_T, output.correct_T)
        self.flat[:-1] += torch.cat([row.detach().double() for row in rows])
        self.flat[-1] += tokens

    @property
    def counted(self) -> Tensor:
        """0-dim: positions counted in TTT step 0, what the loss is divided by."""
        return self.flat[self.length]


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """The fields of ``StepReport`` that come out of the sums; see there."""

    loss: float
    loss_per_position: tuple[float, ...]
    accuracy: tuple[float, ...]
    full_accuracy: tuple[float, ...]
    accept_length: float
    tokens: int
    loss_tokens: int


def summarise(sums: list[float], step_weights: list[float]) -> StepMetrics:
    """Divide the host copy of ``StepSums.flat``.

    ``accept_length`` is ``1 + sum_t prod_{s<=t} full_accuracy_s``: what a chain of T drafted tokens would yield.
    A sum over no positions counts as 0.
    """
    length = len(step_weights)
    loss_sum, counted, supervised, correct = (sums[i * length : (i + 1) * length] for i in range(ROWS))
    full_accuracy = tuple(c / max(n, 1.0) for c, n in zip(correct, supervised, strict=True))
    accept_length, chain = 1.0, 1.0
    for accuracy in full_accuracy:
        chain *= accuracy
        accept_length += chain
    return StepMetrics(
        loss=sum(w * s for w, s in zip(step_weights, loss_sum, strict=True)) / max(counted[0], 1.0),
        loss_per_position=tuple(s / max(n, 1.0) for s, n in zip(loss_sum, counted, strict=True)),
        accuracy=tuple(c / max(n, 1.0) for c, n in zip(correct, counted, strict=True)),
        full_accuracy=full_accuracy,
        accept_length=accept_length,
        tokens=int(sums[-1]),
        loss_tokens=int(supervised[0]),
    )
