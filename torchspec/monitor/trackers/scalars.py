"""What trackers are given, by tag."""

from __future__ import annotations

from torchspec.contracts import RunStatus, StepReport


def report_scalars(report: StepReport) -> dict[str, float]:
    """Tag to value. Positions count from 1, the first token that the draft guesses."""
    split = report.split
    scalars = {f"{split}/loss": report.loss, f"{split}/accept_length": report.accept_length}
    for position, (loss, accuracy) in enumerate(
        zip(report.loss_per_position, report.full_accuracy, strict=True), start=1
    ):
        scalars[f"{split}_position/loss_{position}"] = loss
        scalars[f"{split}_position/accuracy_{position}"] = accuracy
    if split == "train":
        scalars |= {
            "optimizer/learning_rate": report.learning_rate,
            "optimizer/grad_norm": report.grad_norm,
            "step/tokens": report.tokens,
            "step/wait_seconds": report.wait_seconds,
            "step/fetch_seconds": report.fetch_seconds,
            "step/compute_seconds": report.compute_seconds,
            "step/optimizer_seconds": report.optimizer_seconds,
        }
    return scalars


def status_scalars(status: RunStatus) -> dict[str, float]:
    """Tag to value: what flows between the two pools."""
    return {
        "pools/inference_tokens_per_s": status.inference_tokens_per_s,
        "pools/inference_samples_per_s": status.inference_samples_per_s,
        "pools/training_tokens_per_s": status.training_tokens_per_s,
        "pools/training_samples_per_s": status.training_samples_per_s,
        "pools/queue_depth": status.queue_depth,
        "pools/rejected": status.samples.get("rejected", 0),
        "store/bytes": status.store_bytes,
        "store/credit_bytes": status.credit_bytes,
    }
