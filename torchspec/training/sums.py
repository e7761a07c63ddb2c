"""From a step's un-normalised sums to its report.

Sums are added over micro-batches and ranks, and divided once: never a mean of means, which weighs a rank with two
loss tokens like one with two thousand.

K positions that are scored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchspec.contracts import StepReport
from torchspec.drafts.draft import DraftOutput

ROWS = 4
"""Of figures for each position: loss, counted, supervised, correct."""


class StepSums:
    """Sums of one optimizer step (or one evaluation), in one float64 tensor on the device: one collective, one sync."""

    def __init__(self, positions: int, device: torch.device):
        self.positions = positions
        self.flat = torch.zeros(ROWS * positions + 3, dtype=torch.float64, device=device)

    def add(self, output: DraftOutput, tokens: int) -> None:
        rows = (output.loss_K, output.counted_K, output.supervised_K, output.correct_K)
        single = (output.total.view(1), output.denominator.view(1))
        self.flat[:-1] += torch.cat([row.detach().double() for row in (*rows, *single)])
        self.flat[-1] += tokens

    @property
    def denominator(self) -> Tensor:
        """0-dim: what the loss and its gradients are divided by."""
        return self.flat[-2]


def summarise(sums: list[float], positions: int, step: int) -> StepReport:
    """Divide the host copy of ``StepSums.flat``. What the sums do not tell is 0 in the report.

    ``accept_length`` is ``1 + sum_k prod_{j<=k} full_accuracy_j``: what a chain of K drafted tokens would yield.
    A sum over no positions counts as 0.
    """
    loss_sum, counted, supervised, correct = (sums[i * positions : (i + 1) * positions] for i in range(ROWS))
    total, denominator, tokens = sums[ROWS * positions :]
    full_accuracy = tuple(c / max(n, 1.0) for c, n in zip(correct, supervised, strict=True))
    accept_length, chain = 1.0, 1.0
    for accuracy in full_accuracy:
        chain *= accuracy
        accept_length += chain
    return StepReport(
        step=step,
        loss=total / denominator if denominator else 0.0,
        loss_per_position=tuple(s / max(n, 1.0) for s, n in zip(loss_sum, counted, strict=True)),
        accuracy=tuple(c / max(n, 1.0) for c, n in zip(correct, counted, strict=True)),
        full_accuracy=full_accuracy,
        accept_length=accept_length,
        tokens=int(tokens),
        loss_tokens=int(supervised[0]),
        learning_rate=0.0,
        grad_norm=0.0,
        wait_seconds=0.0,
        fetch_seconds=0.0,
        compute_seconds=0.0,
        optimizer_seconds=0.0,
    )
