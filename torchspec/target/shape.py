"""What a draft of any kind takes over from its target: sizes, and which layers it may read. Needs no library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

MIN_LAYERS = 7
"""Fewest layers of a target of which :func:`early_middle_late` are distinct and in order."""
ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
ROPE_TYPES = tuple(ROPE_NEEDS)
"""Rotary embeddings whose frequencies do not depend on the sequence's length; and what each needs beside a theta."""
THETA = 10_000.0
"""Of a config that names none, as in RoFormer (arXiv 2104.09864) and transformers."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
UNLIKE_LLAMA = ("rope_theta", "rope_scaling", "partial_rotary_factor", "kv_lora_rank", *EXPERTS)
"""Of a target's config: what :meth:`TargetShape.of_target` reads beside the fields."""

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
        if self.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"rope_parameters={dict(self.rope_parameters)} rotate a share of each head only; a draft, as it is "
                "served, rotates all of it"
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
        """From a ``config.json``, :meth:`hf_config`'s or an older one, which may leave out what is usual.

        Raises:
            KeyError: a field is missing.
            ValueError: no draft can have such a shape.
        """
        given: dict[str, Any] = {name: value for name, value in config.items() if value is not None}
        heads = given["num_attention_heads"]
        usual: dict[str, Any] = {"num_key_value_heads": heads, "head_dim": given["hidden_size"] // heads}
        given = dict.fromkeys(TOKENS) | usual | given | {"rope_parameters": rope_of(given)}
        return cls(**{ours: given[theirs] for ours, theirs in cls.names().items()})

    @classmethod
    def of_target(cls, config: Mapping[str, Any]) -> Self:
        """What a draft has by default, from its target's config.

        A draft is a dense Llama layer or a few. What a target has that such a layer cannot have is replaced:

        - a rotary embedding of a share of each head, of several kinds of positions, or one that depends on the length:
          a plain one, with the same theta (where each kind of layer has its own, that of full attention);
        - multi-head latent attention: heads 128 wide that make up the hidden size, in 8 groups, as SpecForge's draft
          for DeepSeek-V3 has them;
        - experts, where the config has no width but theirs (missing, or below twice the hidden size): an MLP of three
          times the hidden size, up to a multiple of 256, as SpecForge's draft for Qwen3-30B-A3B has it.

        Raises:
            KeyError, ValueError: see :meth:`from_config`.
        """
        rope, hidden = rope_of(config), config["hidden_size"]
        if rope["rope_type"] not in ROPE_TYPES[1:] or _rotates_a_share(rope, config):
            rope = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        given = {**config, "rope_parameters": rope}
        if config.get("kv_lora_rank"):
            heads = max(1, hidden // 128)
            given |= {"num_attention_heads": heads, "num_key_value_heads": math.gcd(heads, 8), "head_dim": 128}
        if any(config.get(name) for name in EXPERTS) and (config.get("intermediate_size") or 0) < 2 * hidden:
            given["intermediate_size"] = -(-3 * hidden // 256) * 256
        return cls.from_config(given)

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


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` of a ``config.json`` of any age: older ones have ``rope_theta`` and ``rope_scaling``.

    Where each kind of layer has its own, those of the layers with full attention.
    """
    rope: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = {kind: of_kind for kind, of_kind in rope.items() if isinstance(of_kind, Mapping)}
    if kinds:
        rope = kinds.get("full_attention", next(iter(kinds.values())))
    theta = next((x for x in (rope.get("rope_theta"), config.get("rope_theta")) if x is not None), THETA)
    kind = rope.get("rope_type", rope.get("type", "default"))
    return {**{name: value for name, value in rope.items() if name != "type"}, "rope_type": kind, "rope_theta": theta}


def _rotates_a_share(rope: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    return any(each.get("partial_rotary_factor") not in (None, 1.0) for each in (rope, config))


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
