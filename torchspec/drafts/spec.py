"""A kind of draft in numbers: the half of the seam that plans, exports and serves without a tensor in memory.

Whoever must know something of a draft - which layers to capture, what a step costs, what a server is told - asks its
:class:`DraftSpec`. Nobody above this package knows a kind by name, and nothing here needs torch or transformers:
:meth:`DraftSpec.build` alone imports a kind's model (``drafts/draft.py`` is the other half).
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field

from torchspec.contracts import ITEM_BYTES
from torchspec.drafts.shape import DraftKnobs, draft_shape, read_draft_config, stretched
from torchspec.shards import ShardFormula
from torchspec.target.shape import TargetShape, check_layers, early_middle_late

if TYPE_CHECKING:
    from torchspec.drafts.draft import Draft, DraftOptions
    from torchspec.target.checkpoint import TargetCheckpoint
    from torchspec.target.head import TargetHead

DRAFT_VOCAB = 32_000
"""Default size of a draft's own vocabulary: that of the drafts which EAGLE-3 and SpecForge publish."""
FLOATS = ("BF16", "F16", "F32")
"""Types, in safetensors' words, whose weights are the numbers themselves."""
SLIDING = "sliding_attention"
"""What a ``config.json`` calls a layer with a window."""
MASTER = 4
"""Bytes of an element of gradients and of all sums: float32."""


class Work(NamedTuple):
    """One micro-batch of a training rank, as far as memory is concerned. Every token of it has a loss."""

    samples: int
    num_tokens: int
    """Of each sample."""
    sharding: ShardFormula | None
    """None: the rank has the samples for itself."""
    gather_once: bool
    """Where samples are shared: their keys and values are gathered once, rather than sent around in each step."""
    dtype: str
    """Of activations."""
    recompute: bool
    loss_chunk_tokens: int


class RankBytes(NamedTuple):
    """What the forward and backward of a draft keep in memory at their peak."""

    activations: int
    """What the forward keeps of each row for the backward."""
    keys_values: int
    temporaries: int
    """Logits, gradients under way, and what the kernels take while they run."""


@dataclass(frozen=True)
class DraftSpec(ABC):
    """A draft of one kind for one target. A checkpoint keeps it, so that nothing else is needed to export."""

    kind: ClassVar[str]
    architecture: ClassVar[str]
    """What ``config.json`` of an exported folder calls it."""
    Knobs: ClassVar[type[DraftKnobs]]

    target: TargetShape
    """What it takes over of its target; heads, widths and rotary embedding are the draft's own where they differ."""
    layers: tuple[int, ...]
    """Target layers whose outputs it reads, 0-based, increasing."""
    export_yarn_factor: float | None = field(default=None, kw_only=True)
    export_yarn_length: int | None = field(default=None, kw_only=True)
    window: int | None = field(default=None, kw_only=True)
    """Tokens that it looks back at when it is served; None: all."""

    def __post_init__(self) -> None:
        if self.export_yarn_length is not None and self.export_yarn_factor is None:
            raise ValueError(
                f"draft.export_yarn_length={self.export_yarn_length} says what draft.export_yarn_factor stretches: set "
                "both, or none"
            )
        _ = self.exported_shape  # refuses what cannot be stretched

    @classmethod
    @abstractmethod
    def of(cls, knobs: Any, target: TargetCheckpoint, layers: Sequence[int] | None) -> Self:
        """The draft that ``knobs`` ask for.

        Args:
            layers: ``target.aux_layers``; None for those of ``draft.config``, else the kind's own choice.

        Raises:
            ValueError: in one line, why this target cannot have it.
        """

    @classmethod
    def kept(cls, knobs: DraftKnobs, target: TargetCheckpoint, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that are knobs of the same name, and its shape. A mask token that is not named is the target's.

        Args:
            config: what ``draft.config`` names.

        Raises:
            ValueError: ``config`` is of another kind or says otherwise, or no draft can have such a shape.
        """
        values = {f.name: getattr(knobs, f.name) for f in fields(cls) if hasattr(knobs, f.name)}
        here = {"architectures": [cls.architecture], "num_hidden_layers": values.get("num_layers", 1), **values}
        for key, value in here.items():
            if config.get(key, value) != value:
                raise ValueError(f"draft.config: {key} is {config[key]} there, and {value} of the draft asked for")
        if "mask_token_id" in values and values["mask_token_id"] is None:
            values["mask_token_id"] = target.mask_token_id
        return values | {"target": draft_shape(knobs, config, target.shape)}

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Back from the ``config.json`` of an exported folder; what only training knows has its default.

        Raises:
            KeyError: a field is missing.
            ValueError: this is no such draft as can be trained here.
        """

    @staticmethod
    @abstractmethod
    def layers_in(config: Mapping[str, Any]) -> Sequence[int] | None:
        """The target layers that a ``config.json`` names; None where it leaves them to the server."""

    @property
    def exported_shape(self) -> TargetShape:
        """What ``config.json`` says of it: with YaRN where that is wanted."""
        factor = self.export_yarn_factor
        return self.target if factor is None else stretched(self.target, factor, self.export_yarn_length)

    @property
    def window_args(self) -> dict[str, int]:
        """The window among SGLang's arguments."""
        return {} if self.window is None else {"speculative_draft_window_size": self.window}

    def describe(self) -> str:
        """Its shape in a few words."""
        shape, known = self.target, self.vocab_size
        words = f"all {shape.vocab_size:,} tokens" if known is None else f"{known:,} of {shape.vocab_size:,} tokens"
        layers = ", ".join(map(str, self.layers))
        window = f", looks back at {self.window:,} tokens" if self.window else ""
        return (
            f"{self.kind}: {shape.num_heads} heads ({shape.num_kv_heads} key/value) of {shape.head_dim}, MLP "
            f"{shape.intermediate_size:,}, {words}, RoPE {self.exported_shape.rope_parameters['rope_type']} (theta "
            f"{shape.rope_parameters['rope_theta']:,.10g}), reads target layers {layers}{window}"
        )

    @property
    @abstractmethod
    def positions(self) -> int:
        """K: drafted tokens that training scores. Every report has as many entries."""

    @property
    @abstractmethod
    def position_weights(self) -> list[float]:
        """Of each of those positions in the loss."""

    @property
    @abstractmethod
    def draft_tokens(self) -> int:
        """Tokens that a server is asked to draft at a time, unless its user wants another number."""

    @property
    def vocab_size(self) -> int | None:
        """Tokens of the draft's own vocabulary; None where it is the target's, so that nothing is counted."""
        return None

    @property
    def halo(self) -> int | None:
        """Positions behind its own rows that a shard reads; None: samples cannot be shared among ranks."""
        return None

    def check_answers(self, longest: int) -> None:  # noqa: B027 (most kinds learn from any)
        """Raises ValueError: answers of so many tokens at most leave some of the draft untrained."""

    def parameters(self) -> int:
        """Trained ones."""
        return sum(math.prod(shape) for shape in self.hf_tensors().values())

    @abstractmethod
    def flops(self, tokens: int, scored: int) -> float:
        """Operations that forward and backward of one sample need; a multiply-add counts as two."""

    @abstractmethod
    def rank_bytes(self, work: Work) -> RankBytes:
        """Raises ValueError: its heads cannot be split as ``work.sharding`` wants it."""

    @abstractmethod
    def build(self, head: TargetHead, target: TargetCheckpoint, options: DraftOptions) -> Draft:
        """The module with its start weights, float32 and whole, on the CPU. Random weights come from torch's generator.

        Args:
            head: the target's frozen pieces, loaded for the draft's vocabulary.
        """

    @abstractmethod
    def hf_config(self, dtype: str) -> dict[str, Any]:
        """``config.json`` of the exported folder."""

    @abstractmethod
    def hf_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight that the exported folder holds: the parameters, under the same names."""

    @abstractmethod
    def server_args(self, num_draft_tokens: int) -> dict[str, Any]:
        """Arguments of ``sglang.Engine``, beside the draft's path, that let it draft so many tokens at a time.

        Raises:
            ValueError: this draft cannot draft as many.
        """

    @abstractmethod
    def served_as(self) -> dict[str, tuple[str, ...]]:
        """SGLang's parameter to the exported tensors that it is made of, one below the other."""


class ChainKnobs(DraftKnobs):
    """What EAGLE3 and P-EAGLE share."""

    vocab_size: Annotated[int, Field(ge=2)] | Literal["all"] | None = None
    """Size of the draft's vocabulary, the target's most frequent tokens; ``all`` is the target's own. Default: that of
    ``config``, else 32,000, or all where the target has no more."""
    init: Literal["default", "target"] = "default"
    """``target`` starts the decoder layers as the target's last ones, which learns much faster in a short run. Those
    must be Llama's: no biases, no norms of queries and keys, no latent attention, no experts, not quantised."""


@dataclass(frozen=True)
class ChainSpec(DraftSpec):
    """A draft that guesses a chain of tokens with a head of its own, in the words of Llama: EAGLE3, P-EAGLE."""

    draft_vocab_size: int
    """D; as large as the target's where the draft has no vocabulary of its own."""
    init: Literal["default", "target"] = field(default="default", kw_only=True)
    """Where the decoder layers start: ``drafts/chain_draft.py``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.draft_vocab_size <= self.target.vocab_size:
            raise ValueError(f"draft.vocab_size={self.draft_vocab_size} must be from 1 to {self.target.vocab_size}")

    @classmethod
    def of(cls, knobs: Any, target: TargetCheckpoint, layers: Sequence[int] | None) -> Self:
        count, whole, config = target.num_layers, target.shape.vocab_size, read_draft_config(knobs)
        layers = cls.layers_in(config) if layers is None else layers
        size = knobs.vocab_size or config.get("draft_vocab_size") or min(DRAFT_VOCAB, whole)
        spec = cls(
            layers=check_layers(count, early_middle_late(count) if layers is None else layers),
            draft_vocab_size=whole if size == "all" else size,
            **cls.kept(knobs, target, config),
        )
        if spec.init == "target":
            spec.check_start(target, getattr(knobs, "num_layers", 1))
        return spec

    def check_start(self, target: TargetCheckpoint, layers: int) -> None:
        """Raises ValueError: the target's last ``layers`` are not such as the draft could start as."""
        expected = self.target.layer_tensors(self.target.hidden_size)
        for number in range(target.num_layers - layers, target.num_layers):
            held = target.weights.layer_tensors(number)
            odd = [f"no {name}" for name in expected if name not in held]
            odd += [name for name in held if name not in expected]
            for name in expected.keys() & held.keys():
                dtype, shape = held[name]
                if shape != expected[name]:
                    odd.append(f"{name} of {list(shape)} instead of {list(expected[name])}")
                elif dtype not in FLOATS:
                    odd.append(f"{name} as {dtype}")
            if odd:
                more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
                raise ValueError(
                    f"draft.init=target: layer {number} of the target is not one that this draft could start as: it "
                    f"has {', '.join(sorted(odd)[:4])}{more}; use draft.init=default"
                )

    @property
    def vocab_size(self) -> int | None:
        return self.draft_vocab_size if self.draft_vocab_size < self.target.vocab_size else None

    def llama_config(self, dtype: str, num_layers: int) -> dict[str, Any]:
        """What ``config.json`` of either kind holds. vLLM counts layers by their inputs: it wants ``k + 1``."""
        return {
            "architectures": [self.architecture],
            "model_type": "llama",
            "torch_dtype": dtype,
            "num_hidden_layers": num_layers,
            "target_hidden_size": self.target.hidden_size,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            **self.exported_shape.hf_config(),
            "draft_vocab_size": self.draft_vocab_size,
            "tie_word_embeddings": False,
            "num_aux_hidden_states": len(self.layers),
            "eagle_aux_hidden_state_layer_ids": [k + 1 for k in self.layers],
            **({"sliding_window": self.window, "layer_types": [SLIDING] * num_layers} if self.window else {}),
        }

    @staticmethod
    def window_in(config: Mapping[str, Any]) -> int | None:
        """That of a ``config.json``, if all its layers have it."""
        return config["sliding_window"] if {*config.get("layer_types", ())} == {SLIDING} else None

    def logits_bytes(self, work: Work, rows: int) -> int:
        """Logits of a chunk and of its teachers, the gradient of the draft's head, and under autocast their copies."""
        item, vocab, hidden = ITEM_BYTES[work.dtype], self.draft_vocab_size, self.target.hidden_size
        chunk = min(work.loss_chunk_tokens, rows * self.positions)
        teachers = -(-chunk // self.positions)
        student, head = vocab * item, vocab * hidden * MASTER
        if item != MASTER:
            student, head = student + vocab * MASTER, head + vocab * hidden * item
        return chunk * student + teachers * (vocab * MASTER + (self.target.vocab_size - vocab) * item) + head


def check_mask_token(token: int, target: TargetShape) -> None:
    """Raises ValueError: the target has no such token."""
    if token >= target.vocab_size:
        raise ValueError(f"draft.mask_token_id={token} must be below the target's {target.vocab_size} tokens")


def fused(tensors: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """SGLang's parameters for exported ``tensors``: it holds q, k and v of a layer as one, and gate and up."""
    names: dict[str, tuple[str, ...]] = {}
    for tensor in tensors:
        name = re.sub(r"\b(gate|up)_proj\b", "gate_up_proj", re.sub(r"\b[qkv]_proj\b", "qkv_proj", tensor))
        names[name] = (*names.get(name, ()), tensor)
    return names
