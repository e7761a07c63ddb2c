"""Asks a running SGLang engine whether it really holds a draft, tensor by tensor.

SGLang passes over tensors that it has no place for, and leaves parameters that found no tensor at whatever they were
initialised to. The server runs, and the draft is never right. Its own weight checker hashes what each runner holds;
here the same hashes are made from the file, under the names and in the fused shapes that SGLang uses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from torchspec.drafts.export import WEIGHTS

_FUSED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
_VOCAB_MULTIPLE = 64
"""SGLang pads the rows of an ``lm_head`` to a multiple of this, with zeros."""


def require_loaded(engine: Any, draft: Path, dtype: torch.dtype) -> None:
    """Check every parameter of the engine's draft runner against the folder (one tensor-parallel rank only).

    Raises:
        ValueError: naming the parameters that are not what the file says.
    """
    from sglang.srt.managers.io_struct import CheckWeightsReqInput

    request = engine.tokenizer_manager.check_weights(CheckWeightsReqInput(action="checksum", selector="all"), None)
    success, message, ranks, _ = engine.loop.run_until_complete(request)
    if not success:
        raise ValueError(f"SGLang could not hash its weights: {message}")
    held = ranks[0]["checksums"]
    expected = draft_checksums(load_file(draft / WEIGHTS), dtype)
    expected["model.embed_tokens.weight"] = held["model.embed_tokens.weight"]  # the target's, shared
    found = {name.removeprefix("draft."): value for name, value in held.items() if name.startswith("draft.")}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"SGLang did not load all of {draft}: {', '.join(wrong)} differ from the file")


def draft_checksums(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, str]:
    """SGLang's name and hash of every parameter of the draft, from the tensors of an exported folder."""
    from sglang.srt.managers.mm_utils import tensor_hash

    weights = {n.replace("midlayer", "layers.0"): t.to(dtype) for n, t in tensors.items() if t.is_floating_point()}
    for fused, parts in _FUSED.items():
        parent = f"layers.0.{fused.partition('.')[0]}"
        pieces = [weights.pop(f"{parent}.{part}.weight") for part in parts]
        weights[f"layers.0.{fused}.weight"] = torch.cat(pieces)
    head_DH = weights.pop("lm_head.weight")
    padding = -len(head_DH) % _VOCAB_MULTIPLE
    hashes = {f"model.{name}": tensor_hash(weight) for name, weight in weights.items()}
    hashes["lm_head.weight"] = tensor_hash(torch.nn.functional.pad(head_DH, (0, 0, 0, padding)))
    return {name: f"{value:016x}" for name, value in hashes.items()}
