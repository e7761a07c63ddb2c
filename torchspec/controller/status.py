"""A run's status, put together of all that the controller consists of: what every view shows."""

from __future__ import annotations

import time

from torchspec.config.schema import Config
from torchspec.contracts import RunStatus
from torchspec.controller.buffer import SampleBuffer
from torchspec.controller.inference_pool import InferencePool
from torchspec.controller.steps import TrainingGroup
from torchspec.monitor.record.observer import Observer


def run_status(
    config: Config,
    phase: str,
    buffer: SampleBuffer,
    pool: InferencePool,
    group: TrainingGroup | None,
    observer: Observer,
) -> RunStatus:
    """How things are now. ``group``: of ranks, the present one or the last."""
    ledger, rate = buffer.ledger, observer.training.samples_per_s
    total = config.training.total_steps(ledger.shape.prompts, len(ledger.rejected))
    counts = ledger.counts()
    left = sum(counts[state] for state in ("pending", "leased", "stored", "assigned"))
    left = min(left, (total - ledger.trained_step) * config.training.batch_size)
    training = config.training if group is None else group.training
    return RunStatus(
        run=config.run.name,
        phase=phase,
        step=ledger.trained_step,
        total_steps=total,
        epoch=min(ledger.trained_cursor // ledger.shape.prompts, config.training.epochs - 1),
        epochs=config.training.epochs,
        samples=counts,
        store_bytes=sum(ledger.stored_bytes for ledger in buffer.ledgers),
        store_capacity=buffer.credits.capacity,
        credit_bytes=buffer.credits.used,
        queue_depth=ledger.ready(),
        workers=tuple(observer.workers[name] for name in sorted(observer.workers)),
        last_step=observer.last.get("train"),
        last_heldout=observer.last.get("heldout"),
        inference_tokens_per_s=observer.inference.tokens_per_s,
        inference_samples_per_s=observer.inference.samples_per_s,
        training_tokens_per_s=observer.training.tokens_per_s,
        training_samples_per_s=rate,
        eta_seconds=left / rate if rate else None,
        uptime_seconds=time.monotonic() - observer.started,
        messages=tuple(observer.messages),
        export_failure=observer.export_failure,
        workers_wanted=pool.wanted,
        generation=buffer.generation,
        dp_size=training.dp_size,
        sp_size=training.sp_size,
        closing=group is not None and group.closing,
    )
