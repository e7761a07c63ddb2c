"""What a controller is made from: config, prompts, and figures of target and draft."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchspec.config.schema import Config
from torchspec.data.prompt_set import PromptSet
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.geometry import SampleGeometry


@dataclass(frozen=True)
class ControllerSpec:
    """See the module's docstring."""

    config: Config
    train: PromptSet
    heldout: PromptSet | None
    geometry: SampleGeometry
    """Shapes and bytes of a sample of this target."""
    halo: int | None
    """Of the draft: how far a shard reads beyond its rows."""
    vocab_size: int
    """Of the target."""
    target_fingerprint: str
    """Of its weights."""
    draft_vocab_size: int | None
    """None: the draft has the target's, and nothing is counted."""
    end_token_ids: tuple[int, ...]
    """Tokens that end an answer: always in the draft's vocabulary."""
    endpoint: StoreEndpoint
    credit_bytes: int
    run_dir: Path

    @property
    def room_beside_a_batch(self) -> int:
        """Samples of the largest size that the store holds beside those of a step; at least one."""
        longest = max(prompts.longest for prompts in (self.train, self.heldout) if prompts)
        return max(1, self.credit_bytes // self.geometry.stored_bytes(longest) - self.config.training.batch_size)
