"""Runs at several stages."""

from __future__ import annotations

from dataclasses import replace

from tests.reports import REPORT
from torchspec.contracts import RunStatus, WorkerReport

ACCURACY = (0.62, 0.45, 0.32, 0.23, 0.17)
TRAIN = replace(
    REPORT,
    step=620,
    loss=3.412,
    loss_per_position=(3.4, 3.7, 4.0, 4.3, 4.6),
    accuracy=ACCURACY,
    full_accuracy=ACCURACY,
    accept_length=2.01,
    learning_rate=1.83e-3,
    grad_norm=0.4123,
)
HELDOUT = replace(
    TRAIN, step=600, loss=3.777, full_accuracy=(0.58, 0.42, 0.30, 0.22, 0.15), accept_length=1.91, split="heldout"
)
TRAINING = RunStatus(
    run="smollm2",
    phase="training",
    step=620,
    total_steps=1000,
    epoch=1,
    epochs=3,
    samples={
        "pending": 2480,
        "leased": 32,
        "stored": 41,
        "assigned": 16,
        "trained": 160,
        "committed": 4800,
        "rejected": 3,
    },
    store_bytes=412 << 20,
    store_capacity=920 << 20,
    credit_bytes=610 << 20,
    queue_depth=38,
    workers=tuple(
        WorkerReport(f"worker-{i}", 2410 + i, 1_234_567, 456_789, 12 << 30, 9.1, 812.0, seconds=1324.0)
        for i in range(2)
    ),
    last_step=TRAIN,
    last_heldout=HELDOUT,
    inference_tokens_per_s=3912.0,
    inference_samples_per_s=8.12,
    training_tokens_per_s=1204.0,
    training_samples_per_s=3.97,
    eta_seconds=432.0,
    uptime_seconds=1324.0,
)
COUNTING = replace(
    TRAINING,
    phase="counting-vocabulary",
    step=0,
    samples={"pending": 400, "leased": 32, "stored": 37},
    last_step=None,
    last_heldout=None,
    eta_seconds=None,
)
STARTING = replace(COUNTING, phase="counting-vocabulary", total_steps=0, samples={}, workers=(), store_bytes=0)
