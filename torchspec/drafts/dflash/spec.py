"""DFlash in numbers (arXiv 2602.06036): its knobs, the layers it reads, its mask token, its folder, how it is served.

The names and the meaning of what the folder holds are those of SGLang 0.5.23 and vLLM 0.32, which agree: a layer id k
is the *output* of the 0-based target layer k, and the last layer's is never captured. Both take the embedding and the
head from the target.

Shapes: H hidden size (draft and target), E head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from torchspec.drafts.dflash import costs
from torchspec.drafts.shape import DraftKnobs, read_draft_config
from torchspec.drafts.spec import DraftSpec, check_mask_token, fused
from torchspec.target.shape import TargetShape, check_layers

if TYPE_CHECKING:
    from torchspec.drafts.dflash.model import DFlashDraft
    from torchspec.drafts.draft import DraftOptions
    from torchspec.target.checkpoint import TargetCheckpoint
    from torchspec.target.head import TargetHead


class DFlashKnobs(DraftKnobs):
    kind: Literal["dflash"] = "dflash"
    """Which kind of draft is trained."""
    num_layers: int = Field(default=5, ge=1)
    """Decoder layers of the draft."""
    num_features: int = Field(default=5, ge=1)
    """How many of the target's layers it reads, spread evenly, where ``target.aux_layers`` names none."""
    block_size: int = Field(default=16, ge=2, le=64)
    """Slots of a block: the last known token, and the tokens that are guessed after it in one pass."""
    num_anchors: int = Field(default=512, ge=1)
    """Most blocks of one sample in a step, drawn among the tokens that are learnt; memory and time grow with it."""
    gamma: float | None = Field(default=None, gt=0)
    """Slot k weighs ``exp(-(k - 1) / gamma)`` in the loss. Default: 7, 5, 4 for blocks of 16, 10, 8, else 7/16 of the
    block, rounded up."""
    loss: Literal["ce", "soft_ce"] = "ce"
    """``ce`` learns the tokens themselves, as the paper does; ``soft_ce`` the target's distributions over them."""
    mask_token_id: int | None = Field(default=None, ge=0)
    """Token that stands for those to be guessed. Default: the tokenizer's own, else one that no text holds."""


@dataclass(frozen=True)
class DFlashSpec(DraftSpec):
    kind: ClassVar[str] = "dflash"
    architecture: ClassVar[str] = "DFlashDraftModel"
    Knobs: ClassVar[type[DraftKnobs]] = DFlashKnobs

    num_target_layers: int
    num_layers: int
    block_size: int
    mask_token_id: int
    num_anchors: int = DFlashKnobs.model_fields["num_anchors"].default
    gamma: float | None = None
    loss: Literal["ce", "soft_ce"] = "ce"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mask_token(self.mask_token_id, self.target)
        check_layers(self.num_target_layers, self.layers)

    @classmethod
    def of(cls, knobs: DFlashKnobs, target: TargetCheckpoint, layers: Sequence[int] | None) -> Self:
        count, config = target.num_layers, read_draft_config(knobs)
        layers = cls.layers_in(config) if layers is None else layers
        chosen = default_layers(count, knobs.num_features) if layers is None else layers
        return cls(layers=tuple(chosen), num_target_layers=count, **cls.kept(knobs, target, config))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(
            target=TargetShape.from_config(config),
            layers=tuple(config["dflash_config"]["target_layer_ids"]),
            num_target_layers=config["num_target_layers"],
            num_layers=config["num_hidden_layers"],
            block_size=config["block_size"],
            mask_token_id=config["dflash_config"]["mask_token_id"],
            window=config["dflash_config"].get("window"),
        )

    @staticmethod
    def layers_in(config: Mapping[str, Any]) -> Sequence[int] | None:
        return (config.get("dflash_config") or {}).get("target_layer_ids")

    @property
    def positions(self) -> int:
        return self.block_size - 1

    @property
    def draft_tokens(self) -> int:
        """The whole block, which costs one pass whatever its size."""
        return self.positions

    @property
    def position_weights(self) -> list[float]:
        """Of slots 1 .. B - 1."""
        gamma = math.ceil(7 * self.block_size / 16) if self.gamma is None else self.gamma
        return [math.exp(-k / gamma) for k in range(self.positions)]

    def check_answers(self, longest: int) -> None:
        if longest < self.block_size:
            raise ValueError(
                f"draft.block_size ({self.block_size}) is longer than any answer (answer.max_tokens is {longest}): its "
                "last slots would never be trained; lower the one or raise the other"
            )

    flops = costs.flops
    rank_bytes = costs.rank_bytes

    def build(self, head: TargetHead, target: TargetCheckpoint, options: DraftOptions) -> DFlashDraft:
        from torchspec.drafts.dflash.model import DFlashDraft

        return DFlashDraft(self, options)

    def hf_config(self, dtype: str) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "model_type": "qwen3",
            "torch_dtype": dtype,
            "num_hidden_layers": self.num_layers,
            "layer_types": ["full_attention"] * self.num_layers,
            "hidden_act": "silu",
            "attention_bias": False,
            **self.exported_shape.hf_config(),
            "tie_word_embeddings": False,
            "block_size": self.block_size,
            "num_target_layers": self.num_target_layers,
            "dflash_config": {
                "target_layer_ids": list(self.layers),
                "mask_token_id": self.mask_token_id,
                **({"window": self.window} if self.window else {}),  # for us: layers that slide would be causal
            },
        }

    def hf_tensors(self) -> dict[str, tuple[int, ...]]:
        H, E = self.target.hidden_size, self.target.head_dim
        tensors: dict[str, tuple[int, ...]] = {"fc.weight": (H, len(self.layers) * H), "hidden_norm.weight": (H,)}
        layer = self.target.layer_tensors(H) | {"self_attn.q_norm.weight": (E,), "self_attn.k_norm.weight": (E,)}
        for i in range(self.num_layers):
            tensors |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        return tensors | {"norm.weight": (H,)}

    def server_args(self, num_draft_tokens: int) -> dict[str, Any]:
        """The server's block may be smaller than the trained one, though every slot then sees fewer masks."""
        if not 1 <= num_draft_tokens < self.block_size:
            raise ValueError(
                f"num_draft_tokens={num_draft_tokens} must be from 1 to {self.block_size - 1}: the draft was trained "
                f"with draft.block_size={self.block_size}, of which the first is the token before"
            )
        arguments = {"speculative_algorithm": "DFLASH", "speculative_num_draft_tokens": num_draft_tokens + 1}
        return arguments | self.window_args

    def served_as(self) -> dict[str, tuple[str, ...]]:
        return fused(self.hf_tensors())


def default_layers(num_layers: int, features: int) -> list[int]:
    """``features`` layers of a target of L layers, evenly from 1 to L - 3; one alone is ``L // 2``.

    Source: DFlash (arXiv 2602.06036), and the default of SGLang.

    Raises:
        ValueError: there are not so many.
    """
    ids = [num_layers // 2]
    if features > 1:
        ids = [round(1 + i * (num_layers - 4) / (features - 1)) for i in range(features)]
    if ids != sorted(set(ids)) or ids[-1] > num_layers - 2:
        raise ValueError(
            f"draft.num_features={features} has no default layers in a target of {num_layers}: lower it, or name ids "
            f"from 0 to {num_layers - 2} in target.aux_layers"
        )
    return ids
