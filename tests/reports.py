"""A report of a training step, for tests that only hand it on."""

from __future__ import annotations

from torchspec.contracts import StepReport

REPORT = StepReport(
    step=1,
    loss=3.5,
    loss_per_position=(3.0, 4.0),
    accuracy=(0.5, 0.25),
    full_accuracy=(0.4, 0.2),
    accept_length=1.48,
    learning_rate=1e-3,
    grad_norm=0.5,
    tokens=640,
    loss_tokens=300,
    wait_seconds=0.25,
    fetch_seconds=0.125,
    compute_seconds=2.0,
    optimizer_seconds=0.0625,
)
