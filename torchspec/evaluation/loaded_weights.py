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

from torchspec.drafts.export import WEIGHTS, read_spec
from torchspec.drafts.spec import DraftSpec

_HEAD, _VOCAB_MULTIPLE = "lm_head.weight", 64
"""SGLang pads the rows of a head to a multiple of this, with zeros."""


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
    expected = draft_checksums(read_spec(draft), load_file(draft / WEIGHTS), dtype)
    found = {name.removeprefix("draft."): value for name, value in held.items() if name.startswith("draft.")}
    targets = {name for name, value in found.items() if name not in expected and value == held.get(name)}
    names = (expected.keys() | found.keys()) - targets
    wrong = sorted(name for name in names if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"SGLang did not load all of {draft}: {', '.join(wrong)} differ from the file")


def draft_checksums(spec: DraftSpec, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, str]:
    """SGLang's name and hash of every parameter whose tensors an exported folder holds."""
    from sglang.srt.managers.mm_utils import tensor_hash

    hashes = {}
    for name, parts in spec.served_as().items():
        if not tensors.keys() >= set(parts):
            continue
        weight = torch.cat([tensors[part].to(dtype) for part in parts])
        if name == _HEAD:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % _VOCAB_MULTIPLE))
        hashes[name] = f"{tensor_hash(weight):016x}"
    return hashes
