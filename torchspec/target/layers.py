"""Which target layers feed the draft: the one formula that capture, trainer and export share.

An id ``k`` is the *output* of the 0-based target layer ``k`` (SGLang's convention), that is transformers'
``hidden_states[k + 1]``. An off-by-one here trains a draft that looks healthy and is useless, so nobody else
spells this formula out. Imports neither torch nor sglang.
"""

from __future__ import annotations

from collections.abc import Sequence

MIN_LAYERS = 7
"""Fewest target layers for which the default ids are distinct and in order."""


def default_aux_layers(num_layers: int) -> tuple[int, int, int]:
    """EAGLE3's early, middle and late layer: ``(1, L//2 - 1, L - 4)``, the inputs of layers 2, L//2 and L-3.

    Source: EAGLE-3 (arXiv 2503.01840) and its reference implementation.

    Raises:
        ValueError: the target has fewer than ``MIN_LAYERS`` layers; name the ids yourself.
    """
    if num_layers < MIN_LAYERS:
        raise ValueError(
            f"aux_layers has no default for a target of {num_layers} layers (needs {MIN_LAYERS}); "
            f"name ids from 0 to {num_layers - 1}"
        )
    return 1, num_layers // 2 - 1, num_layers - 4


def resolve_aux_layers(num_layers: int, aux_layers: Sequence[int] | None = None) -> tuple[int, ...]:
    """The configured ids, checked, or the default when none are configured.

    Raises:
        ValueError: an id is out of range, repeated, or out of order.
    """
    if aux_layers is None:
        return default_aux_layers(num_layers)
    ids = tuple(aux_layers)
    if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= num_layers:
        raise ValueError(
            f"aux_layers={list(ids)} must be increasing layer ids from 0 to {num_layers - 1} "
            f"(an id is the output of that 0-based layer)"
        )
    return ids
