"""What a run tells about itself: rates, reports, recent events; the metrics file."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path

from torchspec.config.schema import Config
from torchspec.contracts import RunStatus, StepReport, WorkerReport
from torchspec.controller.credits import Credits
from torchspec.controller.journal import JsonLines
from torchspec.controller.ledger import Ledger
from torchspec.controller.rates import Rate

log = logging.getLogger(__name__)

RECENT_MESSAGES = 20


class Observer:
    """Takes note of what happens and sums it up in a :class:`RunStatus`."""

    def __init__(self, run_dir: Path):
        self.workers: dict[str, WorkerReport] = {}
        self.steps: list[StepReport] = []
        self._last: dict[str, StepReport] = {}
        self._messages: list[str] = []
        self._metrics = JsonLines(run_dir / "metrics.jsonl")
        self._inference, self._training = Rate(), Rate()
        self._started = time.monotonic()

    def note(self, message: str) -> None:
        """An event worth a person's attention."""
        log.info(message)
        self._messages.append(message)
        del self._messages[:-RECENT_MESSAGES]

    def stored(self, tokens: int) -> None:
        self._inference.add(1, tokens)

    def trained(self, samples: int, tokens: int) -> None:
        self._training.add(samples, tokens)

    def report(self, report: StepReport) -> None:
        """An optimizer step or a held-out evaluation."""
        self._last[report.split] = report
        self.steps.append(report)
        self._metrics.write({"time": time.time(), **asdict(report)})

    def status(self, config: Config, phase: str, ledger: Ledger, heldout: Ledger, credit: Credits) -> RunStatus:
        total, counts = ledger.total_steps, ledger.counts()
        left = counts.total() - counts["trained"] - counts["committed"] - counts["rejected"]
        left = min(left, (total - ledger.trained_step) * config.training.batch_size)
        rate = self._training.samples_per_s
        return RunStatus(
            run=config.run.name,
            phase=phase,
            step=ledger.trained_step,
            total_steps=total,
            epoch=min(ledger.trained_cursor // ledger.shape.prompts, config.training.epochs - 1),
            epochs=config.training.epochs,
            samples=dict(counts),
            store_bytes=ledger.stored_bytes() + heldout.stored_bytes(),
            store_capacity=credit.capacity,
            credit_bytes=credit.used,
            queue_depth=ledger.ready(),
            workers=tuple(self.workers[name] for name in sorted(self.workers)),
            last_step=self._last.get("train"),
            last_heldout=self._last.get("heldout"),
            inference_tokens_per_s=self._inference.tokens_per_s,
            inference_samples_per_s=self._inference.samples_per_s,
            training_tokens_per_s=self._training.tokens_per_s,
            training_samples_per_s=rate,
            eta_seconds=left / rate if rate else None,
            uptime_seconds=time.monotonic() - self._started,
            messages=tuple(self._messages),
        )

    def close(self) -> None:
        self._metrics.close()
