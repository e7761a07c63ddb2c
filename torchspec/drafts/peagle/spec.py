"""P-EAGLE in numbers (arXiv 2602.01469): its knobs, its mask token, its folder, and who serves it.

An EAGLE3 draft of several layers that guesses all its tokens in one pass: where EAGLE3 would read the token that it has
guessed, and its own state, this one reads a mask token and a learnt vector. vLLM 0.32 serves it, as method ``eagle3``
with ``parallel_drafting``. SGLang 0.5.23 does not know it, and would take the folder for an EAGLE3 draft if it were
called one; under the name that only vLLM has for the architecture, it refuses.

vLLM counts target layers by their inputs, so it is told ``k + 1`` for the output of the 0-based layer ``k``, and it
wants no ``d2t`` and ``t2d`` where the draft's vocabulary is the target's.

Shapes: H hidden size (draft and target), F aux layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from torchspec.drafts.peagle import costs
from torchspec.drafts.shape import DraftKnobs
from torchspec.drafts.spec import ChainKnobs, ChainSpec, check_mask_token
from torchspec.target.shape import TargetShape

if TYPE_CHECKING:
    from torchspec.drafts.draft import DraftOptions
    from torchspec.drafts.peagle.model import PEagleDraft
    from torchspec.target.checkpoint import TargetCheckpoint
    from torchspec.target.head import TargetHead


class PEagleKnobs(ChainKnobs):
    kind: Literal["peagle"] = "peagle"
    """Which kind of draft is trained."""
    num_layers: int = Field(default=4, ge=1)
    """Decoder layers of the draft."""
    num_positions: int = Field(default=8, ge=2, le=16)
    """How many tokens ahead the draft learns to guess; a server may ask for fewer."""
    position_decay: float = Field(default=0.8, gt=0, le=1)
    """Position k weighs ``position_decay ** k`` in the loss: as often as the paper's sampling would keep it."""
    fc_norm: bool = False
    """Norm each of the target's states by itself before they are mixed."""
    mask_token_id: int | None = Field(default=None, ge=0)
    """Token that stands for those to be guessed. Default: the tokenizer's own, else one that no text holds."""


@dataclass(frozen=True)
class PEagleSpec(ChainSpec):
    kind: ClassVar[str] = "peagle"
    architecture: ClassVar[str] = "Eagle3LlamaForCausalLM"
    Knobs: ClassVar[type[DraftKnobs]] = PEagleKnobs

    mask_token_id: int
    num_layers: int
    num_positions: int
    fc_norm: bool = False
    position_decay: float = PEagleKnobs.model_fields["position_decay"].default

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mask_token(self.mask_token_id, self.target)

    @classmethod
    def of(cls, knobs: PEagleKnobs, target: TargetCheckpoint, layers: Sequence[int] | None) -> Self:
        count = target.num_layers
        if knobs.init == "target" and knobs.num_layers > count:
            raise ValueError(
                f"draft.num_layers={knobs.num_layers} must be at most the target's {count} to start as those"
            )
        return super().of(knobs, target, layers)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(
            target=TargetShape.from_config(config),
            layers=tuple(k - 1 for k in config["eagle_aux_hidden_state_layer_ids"]),
            draft_vocab_size=config["draft_vocab_size"],
            window=cls.window_in(config),
            mask_token_id=config["ptd_token_id"],
            num_layers=config["num_hidden_layers"],
            num_positions=config["num_positions"],
            fc_norm=config["fc_norm"],
        )

    @staticmethod
    def layers_in(config: Mapping[str, Any]) -> Sequence[int] | None:
        ids = config.get("eagle_aux_hidden_state_layer_ids")
        return None if ids is None else [k - 1 for k in ids]

    @property
    def positions(self) -> int:
        return self.num_positions

    @property
    def draft_tokens(self) -> int:
        """All of them, which cost one pass whatever their number."""
        return self.num_positions

    @property
    def position_weights(self) -> list[float]:
        return [self.position_decay**k for k in range(self.num_positions)]

    flops = costs.flops
    rank_bytes = costs.rank_bytes

    def build(self, head: TargetHead, target: TargetCheckpoint, options: DraftOptions) -> PEagleDraft:
        from torchspec.drafts.peagle.model import PEagleDraft

        return PEagleDraft(self, options).initialise(head, target)

    def hf_config(self, dtype: str) -> dict[str, Any]:
        return {
            **self.llama_config(dtype, self.num_layers),
            "fc_norm": self.fc_norm,
            "ptd_token_id": self.mask_token_id,
            "num_positions": self.num_positions,  # for us: servers are told when they start
        }

    def hf_tensors(self) -> dict[str, tuple[int, ...]]:
        H, F = self.target.hidden_size, len(self.layers)
        tensors: dict[str, tuple[int, ...]] = {"mask_hidden": (1, 1, F * H)}
        if self.fc_norm:
            tensors |= {f"fc_norm.{i}.weight": (H,) for i in range(F)}
        tensors |= {"fc.weight": (H, F * H), "layers.0.hidden_norm.weight": (H,)}
        for i in range(self.num_layers):
            layer = self.target.layer_tensors(H if i else 2 * H)
            tensors |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        return tensors | {"norm.weight": (H,), "lm_head.weight": (self.draft_vocab_size, H)}

    def server_args(self, num_draft_tokens: int) -> dict[str, Any]:
        raise ValueError(
            "SGLang cannot serve a P-EAGLE draft; vLLM can (method eagle3 with parallel_drafting), and "
            "benchmarks/vllm_accept.py measures it there"
        )

    def served_as(self) -> dict[str, tuple[str, ...]]:
        """Nothing: SGLang never holds it."""
        return {}
