"""What a draft of any kind takes over from its target: sizes, and which layers it may read. Needs no library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

MIN_LAYERS = 7
"""Fewest layers of a target of which :func:`early_middle_late` are distinct and in order."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the sequence's length."""

UNSERVED_ROPE = ("partial_rotary_factor", "mrope_section", "mrope_interleaved", "mscale", "mscale_all_dim")

RENAMED = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class TargetShape:
    """Sizes and constants of a Llama-like target.

    Raises:
        ValueError: it has heads or a rotary embedding that a draft cannot have.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    vocab_size: int
    max_position_embeddings: int
    rope_parameters: Mapping[str, Any]
    """``rope_type``, ``rope_theta`` and what else the type asks for, as in transformers 5."""
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        rope_type = self.rope_parameters.get("rope_type")
        if rope_type not in ROPE_TYPES or self.rope_parameters.get("rope_theta") is None:
            raise ValueError(
                f"rope_parameters={dict(self.rope_parameters)} must hold a rope_theta and a rope_type among "
                f"{', '.join(ROPE_TYPES)}"
            )

    @property
    def widths(self) -> tuple[int, int]:
        """Of the queries of a row, all heads together, and of its keys."""
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim

    def layer_tensors(self, inputs: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of the weights of a decoder layer whose attention reads ``inputs`` features."""
        hidden, wide, (queries, keys) = self.hidden_size, self.intermediate_size, self.widths
        return {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (queries, inputs),
            "self_attn.k_proj.weight": (keys, inputs),
            "self_attn.v_proj.weight": (keys, inputs),
            "self_attn.o_proj.weight": (hidden, queries),
            "mlp.gate_proj.weight": (wide, hidden),
            "mlp.up_proj.weight": (wide, hidden),
            "mlp.down_proj.weight": (hidden, wide),
        }

    @classmethod
    def names(cls) -> dict[str, str]:
        """Our names to those of a ``config.json``."""
        return {f.name: RENAMED.get(f.name, f.name) for f in fields(cls)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Back from :meth:`hf_config`; token ids may be left out. Raises KeyError: another field is missing."""
        given: dict[str, Any] = dict.fromkeys(TOKENS) | dict(config)
        return cls(**{ours: given[theirs] for ours, theirs in cls.names().items()})

    def hf_config(self) -> dict[str, Any]:
        """The fields of a ``config.json`` that follow from the target.

        RoPE is written in the form of transformers 5 (``rope_parameters``) and in the older one (``rope_theta``,
        ``rope_scaling``), for servers that read either.
        """
        config = {theirs: getattr(self, ours) for ours, theirs in self.names().items()}
        rope = config["rope_parameters"] = dict(self.rope_parameters)
        config["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        return config


def draft_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding of a draft whose target has ``parameters``: all of each head is rotated, by one type.

    It is that of the layers with full attention where each type of layer has its own. What a served draft does not
    know (shares of a head, sections for images, YaRN's ``mscale``) is left out, and a type whose frequencies depend on
    the sequence's length becomes the plain one: the draft learns its own attention, so its angles need not be the
    target's.
    """
    of_layer = parameters.get("full_attention", parameters)
    known = {key: value for key, value in of_layer.items() if key not in UNSERVED_ROPE}
    if known.get("rope_type") in ROPE_TYPES:
        return known
    return {"rope_type": "default", "rope_theta": known.get("rope_theta")}


def check_layers(num_layers: int, layers: Sequence[int]) -> tuple[int, ...]:
    """``layers``, if servers capture them of a target of ``num_layers``: all but the output of its last layer.

    An id ``k`` is the *output* of the 0-based target layer ``k`` (SGLang's convention), that is transformers'
    ``hidden_states[k + 1]``. An off-by-one here trains a draft that looks healthy and is useless.

    Raises:
        ValueError: an id is out of range, repeated, or out of order.
    """
    ids = tuple(layers)
    if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= num_layers - 1:
        raise ValueError(
            f"target.aux_layers={list(ids)} must be increasing layer ids from 0 to {num_layers - 2} "
            "(an id is the output of that 0-based layer; servers do not capture the last one's)"
        )
    return ids


def early_middle_late(num_layers: int) -> tuple[int, int, int]:
    """What EAGLE3 reads of a target of L layers: ``(1, L//2 - 1, L - 4)``, the inputs of layers 2, L//2 and L-3.

    Source: EAGLE-3 (arXiv 2503.01840) and its reference implementation.

    Raises:
        ValueError: the target has fewer than ``MIN_LAYERS`` layers; name the ids yourself.
    """
    if num_layers < MIN_LAYERS:
        raise ValueError(
            f"target.aux_layers has no default for a target of {num_layers} layers (needs {MIN_LAYERS}); "
            f"name ids from 0 to {num_layers - 2}"
        )
    return 1, num_layers // 2 - 1, num_layers - 4
