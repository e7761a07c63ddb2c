"""A draft's folder in Hugging Face format, the one that SGLang and vLLM serve: written, read back, checked.

The folder holds ``config.json`` and ``model.safetensors`` and nothing else. SGLang's loader *silently ignores*
tensors whose names it does not know, and serves a half-loaded draft that is merely never right; so what goes in is an
allow-list, and every name, shape, dtype and value is checked both when the folder is written and when it is read.
Drafts that others publish in this form are read, too; files beside these two are then of no interest.

Which kind of draft it is says the architecture that its config names. A vocabulary of its own comes as ``d2t`` and
``t2d``: the offset from each draft id to the target's, and which target ids the draft knows.

Shapes: V target vocabulary, D draft vocabulary (``Vd`` in the papers).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchspec.drafts.registry import KINDS
from torchspec.drafts.spec import DraftSpec

CONFIG, WEIGHTS = "config.json", "model.safetensors"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ARCHITECTURES = {spec.architecture: spec for spec in KINDS.values()}


@dataclass(frozen=True, slots=True)
class DraftExport:
    """A checked folder."""

    folder: Path
    spec: DraftSpec
    dtype: str


def export_draft(
    spec: DraftSpec,
    weights: Mapping[str, Tensor],
    draft_ids: Tensor,
    folder: str | Path,
    dtype: str = "bfloat16",
    fence: Callable[[], None] = lambda: None,
) -> Path:
    """Write ``folder``, atomically; an older export there is replaced.

    Args:
        weights: exactly the draft's trained tensors, under their exported names, in any float dtype. What is the
            target's is not among them: servers take it from there.
        draft_ids: [D] int64, the draft vocabulary as increasing target ids.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        fence: called before anything is put in place; raises where somebody else has taken over.

    Raises:
        ValueError: a tensor is missing, unknown, of the wrong shape, not finite (in ``dtype``) or all zero; or
            ``folder`` holds something else than an export.
        OSError: the folder cannot be written.
    """
    tensors = {name: value.detach().to("cpu", torch_dtype(dtype)).contiguous() for name, value in weights.items()}
    tensors |= _vocabulary_tensors(draft_ids, spec)
    check_tensors(tensors, spec, dtype)
    return _publish(Path(folder), spec.hf_config(dtype), tensors, fence)


def validate_export(folder: str | Path) -> DraftExport:
    """Read a folder back and check all of it.

    Raises:
        ValueError: it is not an exported draft, or one that a server would load in part only.
    """
    folder = Path(folder)
    config = read_config(folder)
    export = DraftExport(folder, read_spec(folder), config.get("torch_dtype", config.get("dtype", "absent")))
    try:
        check_tensors(read_weights(folder), export.spec, export.dtype)
        return export
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a folder that calls itself a draft of a kind that is known here.

    Raises:
        ValueError: it does not.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not an exported draft: it has no {name} (torchspec export writes one)")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / CONFIG} is not JSON: {error}") from None
    if config.get("architectures") not in [[name] for name in ARCHITECTURES]:
        raise ValueError(
            f"{folder} is not an exported draft: its architectures are {config.get('architectures')}, expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    return config


def read_spec(folder: Path) -> DraftSpec:
    """The draft that the folder's config describes. Raises ValueError: it does not describe all of one."""
    config = read_config(folder)
    (architecture,) = config["architectures"]
    try:
        return ARCHITECTURES[architecture].from_config(config)
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG} lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder but an embedding, in whose place servers take the target's.

    Raises:
        ValueError: the file is no safetensors file.
    """
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    tensors.pop("embed_tokens.weight", None)
    return tensors


def torch_dtype(name: str) -> torch.dtype:
    """Raises ValueError: servers do not load weights of such a type."""
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r} must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def check_tensors(tensors: Mapping[str, Tensor], spec: DraftSpec, dtype: str) -> None:
    """Check names, shapes, dtypes and values of a whole draft.

    Raises:
        ValueError: naming every tensor at fault.
    """
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]]
    expected = {name: (shape, torch_dtype(dtype)) for name, shape in spec.hf_tensors().items()}
    if spec.vocab_size is not None:
        expected |= {"d2t": ((spec.vocab_size,), torch.int64), "t2d": ((spec.target.vocab_size,), torch.bool)}
    if unknown := tensors.keys() - expected.keys():
        raise ValueError(f"unknown tensors {_names(unknown)}; a draft holds only {_names(expected)}")
    if missing := expected.keys() - tensors.keys():
        raise ValueError(f"missing tensors {_names(missing)}")
    for name, (shape, kind) in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != kind:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {kind} {list(shape)}")
        if tensor.is_floating_point() and not (tensor.isfinite().all() and tensor.any()):
            raise ValueError(f"{name} holds infinities or NaN, or nothing but zeros")
    if "d2t" in expected:
        draft_ids_D = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
        if not torch.equal(tensors["t2d"].nonzero().flatten(), draft_ids_D):
            raise ValueError("d2t and t2d name different draft vocabularies")


def _vocabulary_tensors(draft_ids_D: Tensor, spec: DraftSpec) -> dict[str, Tensor]:
    """``d2t[i] = id_i - i`` and the membership mask ``t2d``; nothing for the target's whole vocabulary."""
    vocab_size = spec.target.vocab_size
    ids_D = draft_ids_D.detach().to("cpu", torch.int64)
    if ids_D.dim() != 1 or ids_D[0] < 0 or ids_D[-1] >= vocab_size or not (ids_D.diff() > 0).all():
        raise ValueError(f"draft_ids must be increasing token ids from 0 to {vocab_size - 1}")
    if len(ids_D) == vocab_size:
        return {}
    t2d_V = torch.zeros(vocab_size, dtype=torch.bool)
    t2d_V[ids_D] = True
    return {"d2t": ids_D - torch.arange(len(ids_D)), "t2d": t2d_V}


def _publish(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], fence: Callable[[], None]) -> Path:
    """Write beside ``folder``, then rename into place."""
    _require_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        complete, old = Path(scratch, "new"), Path(scratch, "old")
        complete.mkdir()
        (complete / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        try:
            save_file(tensors, complete / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # how it says that a disk is full
            raise OSError(f"{complete / WEIGHTS} cannot be written: {error}") from None
        (complete / WEIGHTS).chmod((complete / CONFIG).stat().st_mode)  # safetensors lets nobody else read it
        fence()
        if folder.exists():
            os.rename(folder, old)
        os.rename(complete, folder)
    return folder


def _require_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    others = {entry.name for entry in folder.iterdir()} - {CONFIG, WEIGHTS}
    if others:
        raise ValueError(f"{folder} exists and is not an export (it holds {_names(others)}); choose another folder")
    read_config(folder)


def _names(names: Mapping[str, Any] | set[str]) -> str:
    return ", ".join(sorted(names))
