"""The knobs that all kinds of drafts share, and the shape that they make: heads, widths and rotary embedding.

Hidden size and vocabulary are always the target's, whose states and embedding a draft reads. What is left open comes
from ``draft.config``, the ``config.json`` of another draft, and else from the target (:meth:`TargetShape.of_target`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from torchspec.knobs import Section
from torchspec.target.shape import ROPE_NEEDS, ROPE_TYPES, TargetShape

SIZES = ("num_heads", "num_kv_heads", "head_dim", "intermediate_size")
OF_A_CONFIG = (*SIZES, "rms_norm_eps", "rope_parameters")
"""What another draft's ``config.json`` decides."""


class DraftKnobs(Section):
    """Section ``draft``: each kind has a class of its own, with this one's keys and more."""

    kind: str
    """Which kind of draft is trained."""
    config: Path | None = None
    """``config.json`` of a draft, or its folder: what is not said here of heads, widths, rotary embedding, vocabulary
    and target layers is taken from it. SpecForge's configs and published drafts have the form."""
    num_heads: int | None = Field(default=None, ge=1)
    """Query heads of the draft. Default: the target's; with latent attention (MLA) the hidden size over 128."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key/value heads of the draft; must divide ``num_heads``. Default: the target's; with MLA 8."""
    head_dim: int | None = Field(default=None, ge=2, multiple_of=2)
    """Width of a head of the draft. Default: the target's; with MLA 128."""
    intermediate_size: int | None = Field(default=None, ge=32, multiple_of=32)
    """Width of the draft's MLP, a multiple of 32, up to which SGLang fills it on a CPU. Default: the target's; where
    that is an expert's, 3 times the hidden size."""
    rope: float | dict[str, Any] | None = None
    """Rotary embedding of the draft: a theta, or ``rope_parameters`` as in a ``config.json`` (``rope_type`` default,
    linear, llama3 or yarn). Default: the target's; a plain one with its theta where the target's is unusual."""
    export_yarn_factor: float | None = Field(default=None, gt=1)
    """Stretch the rotary embedding of the exported draft with YaRN by this factor, to be served longer than trained."""
    export_yarn_length: int | None = Field(default=None, ge=1)
    """Length that is stretched: that of the samples, if they are short. Default: the target's context."""
    window: int | None = Field(default=None, ge=1)
    """Tokens that the served draft looks back at, for prompts longer than the samples it was trained on: at least
    ``data.max_seq_length``, all of which it sees in training. SGLang is told when it starts, as eval does; vLLM reads
    it from the config of an EAGLE3 or P-EAGLE draft. Default: all."""

    @field_validator("rope")
    @classmethod
    def check_rope(cls, rope: float | dict[str, Any] | None) -> float | dict[str, Any] | None:
        """A type that servers and training know, with all that it needs."""
        if isinstance(rope, Mapping):
            kind = rope.get("rope_type", "default")
            if kind not in ROPE_TYPES:
                raise ValueError(f"draft.rope: rope_type {kind!r} must be one of {', '.join(ROPE_TYPES)}")
            if missing := [name for name in ROPE_NEEDS[kind] if name not in rope]:
                raise ValueError(f"draft.rope: rope_type {kind} needs {', '.join(missing)}, too")
        return rope


def read_draft_config(knobs: DraftKnobs) -> dict[str, Any]:
    """What ``draft.config`` names; nothing where it names none. Raises ValueError: it is no such file."""
    if knobs.config is None:
        return {}
    path = knobs.config.expanduser()
    file = path / "config.json" if path.is_dir() else path
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"draft.config: {file} is no draft's config.json ({error})") from None


def draft_shape(knobs: DraftKnobs, config: Mapping[str, Any], target: TargetShape) -> TargetShape:
    """The target's shape with what is the draft's own.

    Args:
        config: as :func:`read_draft_config` says.

    Raises:
        ValueError: the two do not fit together, or no draft can have such a shape.
    """
    shape = _as_in(config, target) if config else target
    own: dict[str, Any] = {name: value for name in SIZES if (value := getattr(knobs, name)) is not None}
    if knobs.rope is not None:
        rope = knobs.rope if isinstance(knobs.rope, Mapping) else {"rope_theta": knobs.rope}
        theta = shape.rope_parameters["rope_theta"]
        own["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, **rope}
    try:
        return replace(shape, **own)
    except ValueError as error:
        raise ValueError(f"draft.{error}") from None


def _as_in(config: Mapping[str, Any], target: TargetShape) -> TargetShape:
    try:
        given = TargetShape.from_config({"max_position_embeddings": target.max_position_embeddings, **config})
    except KeyError as error:
        raise ValueError(f"draft.config lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"draft.config: {error}") from None
    for name in ("hidden_size", "vocab_size"):
        if getattr(given, name) != getattr(target, name):
            raise ValueError(
                f"draft.config is for another target: its {name} is {getattr(given, name)}, the target's "
                f"{getattr(target, name)}"
            )
    return replace(target, **{name: getattr(given, name) for name in OF_A_CONFIG})


def stretched(shape: TargetShape, factor: float, length: int | None) -> TargetShape:
    """``shape`` with YaRN (arXiv 2309.00071), so that it serves ``factor`` times ``length`` tokens.

    Raises:
        ValueError: its rotary embedding is stretched already, or would not reach as far as the target's.
    """
    kind, theta = shape.rope_parameters["rope_type"], shape.rope_parameters["rope_theta"]
    if kind != "default":
        raise ValueError(
            f"draft.export_yarn_factor={factor}: the rotary embedding of the draft is stretched already (rope_type "
            f"{kind}); leave the knob out, or train with a plain one (draft.rope={theta:g})"
        )
    context = shape.max_position_embeddings
    length = context if length is None else length
    if int(length * factor) < context:  # SGLang starts no engine with it
        raise ValueError(
            f"draft.export_yarn_factor={factor:g} times draft.export_yarn_length={length} must reach the target's "
            f"context of {context}: raise the factor to {-(-context // length)}"
        )
    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": length}
    return replace(shape, rope_parameters=rope, max_position_embeddings=int(length * factor))
