"""The draft's weights apart from a run's other state: gathered, exported, read back, and a start for another run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchspec.config.load import load_config
from torchspec.drafts.export import export_draft, read_spec, read_weights, validate_export
from torchspec.drafts.spec import DraftSpec
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


def check_start(folder: Path, spec: DraftSpec) -> None:
    """Whether a draft can start from the weights in ``folder``, by the two drafts' figures alone.

    Raises:
        ValueError: the folder holds no draft, or one of another shape.
    """
    try:
        other = read_info(folder).draft if checkpoint_kind(folder) == "checkpoint" else read_spec(folder)
    except ValueError as error:
        raise ValueError(f"training.init_from: {error}") from None
    there, here = other.hf_tensors(), spec.hf_tensors()
    if there.keys() != here.keys():
        wrong = ", ".join(sorted(there.keys() ^ here.keys()))
        raise ValueError(f"training.init_from {folder} is a draft of another kind: {wrong} on one side only")
    for name, shape in here.items():
        if there[name][1:] != shape[1:] or (name != HEAD and there[name] != shape):
            raise ValueError(
                f"training.init_from {folder} does not fit this draft: {name} is {list(there[name])} there and "
                f"{list(shape)} here (draft.config={folder} gives a draft the shape of an exported one)"
            )


def warm_start(draft: nn.Module, draft_ids: Tensor, folder: Path) -> None:
    """Copy the weights in ``folder`` (:func:`check_start`) into ``draft`` (whole, not yet sharded).

    Output rows go by token: a token that the other vocabulary lacks keeps the row it has now (the target's).

    Raises:
        ValueError: the folder holds no sound draft.
    """
    weights, other_ids = load_draft(folder)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if name == HEAD:
                here, there = _common_rows(draft_ids, other_ids)
                parameter[here] = weights[name][there].to(parameter.dtype)
            else:
                parameter.copy_(weights[name])


def _common_rows(ids: Tensor, other_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers, in either vocabulary, of the tokens that both have."""
    here = torch.isin(ids, other_ids).nonzero().flatten()
    return here, torch.searchsorted(other_ids, ids[here])
