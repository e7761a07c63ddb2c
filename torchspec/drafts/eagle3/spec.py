"""EAGLE3 in numbers (arXiv 2503.01840): its knobs, the layers it reads, its folder, and how it is served.

Both servers load the same folder although they number layers differently. With ``k`` the 0-based target layer whose
*output* feeds the draft:

- SGLang 0.5.23 reads ``eagle_config.eagle_aux_hidden_state_layer_ids`` and adds one itself: it wants ``k``.
- vLLM 0.32 reads the top-level ``eagle_aux_hidden_state_layer_ids`` first and takes it as it is: it wants ``k + 1``.

EAGLE-3.1 (2026) adds norms against a drift of the attention from step to step: ``fc_norm`` before ``fc``, and
``norm_output`` behind the layer. ``norm_before_fc`` is an older variant of the first. A server is told by keys of the
same names, and takes each for off where it is missing.

There is one decoder layer: of a second one SGLang reads the norm of the input as ``hidden_norm``, vLLM as
``input_layernorm``. A published draft (SpecForge's, the paper's) may leave out what servers take for granted, such as
the target's layers: then they are the early, middle and late ones of whatever target it is served with.

A draft over the target's whole vocabulary has no ``d2t`` and ``t2d``: SGLang needs none, and vLLM refuses them.

Shapes: H hidden size (draft and target), F aux layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from torchspec.drafts.eagle3 import costs
from torchspec.drafts.shape import DraftKnobs
from torchspec.drafts.spec import ChainKnobs, ChainSpec, fused
from torchspec.target.shape import MIN_LAYERS, TargetShape, early_middle_late

if TYPE_CHECKING:
    from torchspec.drafts.draft import DraftOptions
    from torchspec.drafts.eagle3.model import Eagle3Draft
    from torchspec.target.checkpoint import TargetCheckpoint
    from torchspec.target.head import TargetHead

NORMS = ("fc_norm", "norm_before_fc", "norm_output")
"""Knobs, and keys of ``config.json``."""


class Eagle3Knobs(ChainKnobs):
    kind: Literal["eagle3"] = "eagle3"
    """Which kind of draft is trained."""
    ttt_length: int = Field(default=7, ge=1, le=16)
    """Training-time-test steps: how many tokens ahead the draft learns to go."""
    step_decay: float = Field(default=0.8, gt=0, le=1)
    """TTT step t weighs ``step_decay ** t`` in the loss."""
    fc_norm: bool = False
    """EAGLE-3.1: norm each of the target's states by itself before they are mixed."""
    norm_before_fc: bool = False
    """Norm the target's states together, as one vector, before they are mixed; excludes ``fc_norm``."""
    norm_output: bool = False
    """EAGLE-3.1: the next TTT step starts from the draft's output after its final norm."""


@dataclass(frozen=True)
class Eagle3Spec(ChainSpec):
    kind: ClassVar[str] = "eagle3"
    architecture: ClassVar[str] = "LlamaForCausalLMEagle3"
    Knobs: ClassVar[type[DraftKnobs]] = Eagle3Knobs

    ttt_length: int = Eagle3Knobs.model_fields["ttt_length"].default
    step_decay: float = Eagle3Knobs.model_fields["step_decay"].default
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) < 2:  # SGLang tells the target's states from the draft's own by their width
            raise ValueError(
                f"target.aux_layers={list(self.layers)} must name two layers or more for an EAGLE3 draft: SGLang would "
                "take the states of a single one for the draft's own"
            )
        if self.fc_norm and self.norm_before_fc:
            raise ValueError("draft.fc_norm and draft.norm_before_fc exclude each other: set one of them, or none")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        if config.get("num_hidden_layers", 1) != 1:
            raise ValueError(f"num_hidden_layers is {config['num_hidden_layers']}; an EAGLE3 draft here has one")
        layers = cls.layers_in(config)
        return cls(
            target=TargetShape.from_config(config),
            layers=early_middle_late(MIN_LAYERS) if layers is None else tuple(layers),
            draft_vocab_size=config["draft_vocab_size"],
            window=cls.window_in(config),
            **{name: config.get(name, False) for name in NORMS},
        )

    @staticmethod
    def layers_in(config: Mapping[str, Any]) -> Sequence[int] | None:
        return (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")

    @property
    def positions(self) -> int:
        return self.ttt_length

    @property
    def draft_tokens(self) -> int:
        """Every one costs a pass of the draft, so a few."""
        return 3

    @property
    def position_weights(self) -> list[float]:
        return [self.step_decay**t for t in range(self.ttt_length)]

    @property
    def norms_aux(self) -> bool:
        """Whether aux states are normed before ``fc``, together or each by itself."""
        return self.fc_norm or self.norm_before_fc

    @property
    def halo(self) -> int:
        """Row i reads tokens, and is compared with the target's states, of the positions i + 1 .. i + ttt_length."""
        return self.ttt_length

    flops = costs.flops
    rank_bytes = costs.rank_bytes

    def build(self, head: TargetHead, target: TargetCheckpoint, options: DraftOptions) -> Eagle3Draft:
        from torchspec.drafts.eagle3.model import Eagle3Draft

        return Eagle3Draft(self, options).initialise(head, target)

    def hf_config(self, dtype: str) -> dict[str, Any]:
        return {
            **self.llama_config(dtype, num_layers=1),
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(self.layers), "use_aux_hidden_state": True},
            **{name: getattr(self, name) for name in NORMS},
        }

    def hf_tensors(self) -> dict[str, tuple[int, ...]]:
        H, F = self.target.hidden_size, len(self.layers)
        tensors: dict[str, tuple[int, ...]] = {"fc.weight": (H, F * H)}
        if self.norm_before_fc:
            tensors["input_norm.weight"] = (F * H,)
        if self.fc_norm:
            tensors |= {f"fc_norm.{i}.weight": (H,) for i in range(F)}
        layer = self.target.layer_tensors(2 * H) | {"hidden_norm.weight": (H,)}
        tensors |= {f"midlayer.{name}": shape for name, shape in layer.items()}
        return tensors | {"norm.weight": (H,), "lm_head.weight": (self.draft_vocab_size, H)}

    def server_args(self, num_draft_tokens: int) -> dict[str, Any]:
        """Chains: SGLang's trees need kernels that a CPU does not have."""
        return {
            "speculative_algorithm": "EAGLE3",
            "speculative_num_steps": num_draft_tokens,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": num_draft_tokens + 1,
            **self.window_args,
        }

    def served_as(self) -> dict[str, tuple[str, ...]]:
        names = fused(name for name in self.hf_tensors() if name != "lm_head.weight")
        renamed = {f"model.{name.replace('midlayer', 'layers.0')}": parts for name, parts in names.items()}
        return renamed | {"lm_head.weight": ("lm_head.weight",)}
