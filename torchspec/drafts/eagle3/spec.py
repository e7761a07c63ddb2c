"""The shape of an EAGLE3 draft, derived from its target. Needs neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SUPPORTED_LAYERS = 1
"""Decoder layers that the export format (one ``midlayer``) can express."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the sequence's length."""

NEEDED = ("hidden_size", "num_attention_heads", "intermediate_size", "rms_norm_eps", "max_position_embeddings")
"""What a target's config must hold for a draft to be derived from it."""


@dataclass(frozen=True, slots=True)
class Eagle3Spec:
    """Sizes and constants of a draft."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    vocab_size: int
    draft_vocab_size: int
    max_position_embeddings: int
    rope_parameters: Mapping[str, Any]
    """``rope_type``, ``rope_theta`` and what else the type asks for, as in transformers 5."""
    num_aux: int = 3
    """Target layers whose outputs are concatenated."""
    num_layers: int = 1

    def __post_init__(self) -> None:
        if self.num_layers != SUPPORTED_LAYERS:
            raise ValueError(f"num_layers={self.num_layers}: the export format holds {SUPPORTED_LAYERS} layer")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            raise ValueError(f"draft.vocab_size={self.draft_vocab_size} must be from 1 to {self.vocab_size}")
        rope_type = self.rope_parameters.get("rope_type")
        if rope_type not in ROPE_TYPES or self.rope_parameters.get("rope_theta") is None:
            raise ValueError(
                f"rope_parameters={dict(self.rope_parameters)} must hold a rope_theta and a rope_type among "
                f"{', '.join(ROPE_TYPES)}"
            )
        if self.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"the target rotates a share of each head only (partial_rotary_factor="
                f"{self.rope_parameters['partial_rotary_factor']}); an EAGLE3 draft, as it is served, rotates all of "
                "it: choose another target"
            )

    @classmethod
    def from_target(
        cls, target: Any, draft_vocab_size: int | None = None, num_aux: int = 3, num_layers: int = 1
    ) -> Eagle3Spec:
        """Derive a draft from a target's HF config (a ``PretrainedConfig``, as ``AutoConfig`` returns it).

        Args:
            draft_vocab_size: all of the target's vocabulary by default.

        Raises:
            ValueError: the target has a size or a RoPE that a draft cannot have.
        """
        text = target.get_text_config()
        if missing := [name for name in NEEDED if getattr(text, name, None) is None]:
            raise ValueError(f"the target's config has no {', '.join(missing)}: it is not a Llama-like model")
        heads = text.num_attention_heads
        kv_heads, head_dim = (getattr(text, name, None) for name in ("num_key_value_heads", "head_dim"))
        return cls(
            hidden_size=text.hidden_size,
            num_heads=heads,
            num_kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=text.hidden_size // heads if head_dim is None else head_dim,
            intermediate_size=text.intermediate_size,
            rms_norm_eps=text.rms_norm_eps,
            vocab_size=text.vocab_size,
            draft_vocab_size=text.vocab_size if draft_vocab_size is None else draft_vocab_size,
            max_position_embeddings=text.max_position_embeddings,
            rope_parameters=text.rope_parameters or {},
            num_aux=num_aux,
            num_layers=num_layers,
        )
