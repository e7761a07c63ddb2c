"""What a controller is made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchspec.config.schema import Config
from torchspec.data.prompt_set import PromptSet
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.geometry import SampleGeometry


@dataclass(frozen=True)
class ControllerSpec:
    """What a controller is made from."""

    config: Config
    train: PromptSet
    heldout: PromptSet | None
    geometry: SampleGeometry
    """Shapes and bytes of a sample of this target."""
    vocab_size: int
    end_token_ids: tuple[int, ...]
    """Tokens that end an answer: always in the draft's vocabulary."""
    endpoint: StoreEndpoint
    credit_bytes: int
    run_dir: Path
