"""The ledger as a checkpoint keeps it: one number, the cursor, and what was rejected before it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from torchspec.config.schema import Config
from torchspec.contracts import SampleId
from torchspec.data.prompt_set import PromptSet

VERSION = 1


@dataclass(frozen=True, slots=True)
class LedgerShape:
    """What the order of positions is made of. Two ledgers with equal shapes have equal batches."""

    dataset: str
    """Content hash of the prompt set."""
    prompts: int
    epochs: int
    batch_size: int
    seed: int


def ledger_shape(config: Config, train: PromptSet) -> LedgerShape:
    """Of the samples that a run trains."""
    training = config.training
    return LedgerShape(train.content_hash, len(train), training.epochs, training.batch_size, config.run.seed)


def heldout_shape(config: Config, heldout: PromptSet | None, room: int) -> LedgerShape:
    """Of the held-out samples: a step of them is what all ranks take out of the store at a time, ``room`` at most."""
    content, count = (heldout.content_hash, len(heldout)) if heldout else ("", 0)
    return LedgerShape(content, count, 1, max(1, min(count, room)), config.run.seed)


@dataclass(frozen=True, slots=True)
class Rejection:
    sample: SampleId
    reason: str


KNOBS = {"dataset": "data.train", "prompts": "data.train", "batch_size": "training.batch_size", "seed": "run.seed"}
"""Fields of the shape that a resume must not change, and what sets them."""


@dataclass(frozen=True, slots=True)
class LedgerSnapshot:
    """``ledger.json``: the steps up to ``step`` have consumed every position before ``cursor``."""

    shape: LedgerShape
    step: int = 0
    cursor: int = 0
    rejected: tuple[tuple[int, Rejection], ...] = ()
    """Positions before the cursor that no step has consumed."""

    def to_json(self) -> str:
        rejected = [[position, *r.sample, r.reason] for position, r in self.rejected]
        fields = {"shape": asdict(self.shape), "step": self.step, "cursor": self.cursor, "rejected": rejected}
        return json.dumps({"version": VERSION} | fields, indent=1)

    @classmethod
    def from_json(cls, text: str, shape: LedgerShape) -> LedgerSnapshot:
        """Read what a run of ``shape`` has saved.

        Raises:
            ValueError: the snapshot is of other data, another seed or another batch size, or of another version.
        """
        saved = json.loads(text)
        if saved["version"] != VERSION:
            raise ValueError(f"the checkpoint's ledger has version {saved['version']}, this torchspec reads {VERSION}")
        for name, knob in KNOBS.items():
            if saved["shape"][name] != getattr(shape, name):
                raise ValueError(
                    f"cannot resume: {knob} is not what the checkpoint was trained with ({name} "
                    f"{saved['shape'][name]!r} then, {getattr(shape, name)!r} now); restore it, or start a new "
                    "run from the weights alone with training.init_from"
                )
        rejected = tuple((p, Rejection(SampleId(e, i), reason)) for p, e, i, reason in saved["rejected"])
        return cls(shape, saved["step"], saved["cursor"], rejected)
