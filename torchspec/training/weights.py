"""The draft's weights apart from a run's other state: gathered, exported, read back, and a start for another run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchspec.config.load import load_config
from torchspec.drafts.export import export_draft, read_weights, validate_export
from torchspec.training.checkpoint import CONFIG_FILE, checkpoint_kind, load_weights, read_info

HEAD = "lm_head.weight"


def gather_weights(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The whole of every parameter on rank 0's CPU; empty on the other ranks. Every rank calls it."""
    weights = {}
    for name, parameter in parameters.items():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if dist.get_rank() == 0:
            weights[name] = whole.detach().cpu()
    return weights


def export_checkpoint(checkpoint: Path, folder: Path, dtype: str | None = None) -> Path:
    """Write the draft of a checkpoint as a Hugging Face folder; ``dtype`` by default as the run's config says.

    Raises:
        ValueError: ``checkpoint`` is none, or its draft is not fit to be served.
    """
    info = read_info(checkpoint)
    weights, draft_ids = load_weights(checkpoint)
    dtype = dtype or load_config(checkpoint / CONFIG_FILE).checkpoint.export_dtype
    return export_draft(info.draft, weights, draft_ids, folder, dtype)


def load_draft(folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """A draft's weights by parameter name (CPU, stored dtype) and its vocabulary as increasing target ids [Vd].

    Raises:
        ValueError: ``folder`` is neither a checkpoint nor a sound export.
    """
    if checkpoint_kind(folder) == "checkpoint":
        return load_weights(folder)
    export = validate_export(folder)
    weights = read_weights(folder)
    weights.pop("t2d", None)
    offsets = weights.pop("d2t", torch.zeros(export.spec.target.vocab_size, dtype=torch.int64))
    return weights, offsets + torch.arange(len(offsets))


def warm_start(draft: nn.Module, draft_ids: Tensor, folder: Path) -> None:
    """Copy the weights in ``folder`` into ``draft`` (whole, not yet sharded).

    Output rows go by token: a token that the other vocabulary lacks keeps the row it has now (the target's).

    Raises:
        ValueError: the folder holds no draft, or one of another shape.
    """
    weights, other_ids = load_draft(folder)
    parameters = dict(draft.named_parameters())
    if weights.keys() != parameters.keys():
        wrong = ", ".join(sorted(weights.keys() ^ parameters.keys()))
        raise ValueError(f"training.init_from {folder} is a draft of another kind: {wrong} on one side only")
    with torch.no_grad():
        for name, parameter in parameters.items():
            stored = weights[name]
            if stored.shape[1:] != parameter.shape[1:] or (name != HEAD and stored.shape != parameter.shape):
                raise ValueError(
                    f"training.init_from {folder} does not fit this draft: {name} is {list(stored.shape)} there and "
                    f"{list(parameter.shape)} here (draft.config={folder} gives a draft the shape of an exported one)"
                )
            if name == HEAD:
                here, there = _common_rows(draft_ids, other_ids)
                parameter[here] = stored[there].to(parameter.dtype)
            else:
                parameter.copy_(stored)


def _common_rows(ids: Tensor, other_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers, in either vocabulary, of the tokens that both have."""
    here = torch.isin(ids, other_ids).nonzero().flatten()
    return here, torch.searchsorted(other_ids, ids[here])
