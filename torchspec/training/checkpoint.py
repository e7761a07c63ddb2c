"""A checkpoint: everything that makes ``k`` steps, a crash and a resume equal to no crash at all.

    step_000123/
      state/*.safetensors   torch DCP shards: draft weights, AdamW state, RNG states of all ranks, draft vocabulary ids
      checkpoint.json       step, learning-rate schedule, the draft's spec, held-out score
      ledger.json           which samples those steps have consumed
      config.yaml           the resolved config

A folder of that name is complete: it was written as ``step_000123.g4.tmp``, by the ranks of generation 4, and renamed;
ranks of an earlier generation, which may only be cut off, put nothing in place any more. The pointers ``latest`` and
``best`` are relative symbolic links, replaced in one system call, so at every moment they name a complete folder; also
after the machine's sudden end, if what is in the files was on the disk.

DCP writes safetensors here, not its default format: that one is pickled, and nothing is unpickled from disk. Shapes
and dtypes are read from the shards, so a checkpoint loads into any number of ranks and never takes on the dtype of a
freshly made model.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from torchspec.drafts.registry import KINDS
from torchspec.drafts.spec import DraftSpec
from torchspec.files import sync_folder
from torchspec.training.schedule import Schedule

INFO_FILE, CONFIG_FILE, STATE_FOLDER, PARTIAL = "checkpoint.json", "config.yaml", "state", ".tmp"
VERSION = 3

Parameters = Mapping[str, nn.Parameter]
"""The draft's parameters by name, taken once after sharding: during a forward FSDP2 shows others in their place."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved; the ones before it are intact."""


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """``checkpoint.json``."""

    step: int
    schedule: Schedule
    draft: DraftSpec
    accept_length: float | None
    """Simulated, on held-out samples, after this very step; None where no evaluation fell on it."""
    version: int = VERSION


def checkpoint_kind(folder: Path) -> Literal["checkpoint", "huggingface"]:
    """Whether ``folder`` is one of our sharded checkpoints or a draft exported in Hugging Face format.

    Raises:
        ValueError: it is neither.
    """
    if (folder / INFO_FILE).is_file():
        return "checkpoint"
    if (folder / "config.json").is_file():
        return "huggingface"
    hint = f"; {folder / 'latest'} is one" if (folder / "latest" / INFO_FILE).is_file() else ""
    raise ValueError(f"{folder} is neither a checkpoint (no {INFO_FILE}) nor an exported draft (no config.json){hint}")


def read_info(folder: Path) -> CheckpointInfo:
    """Read ``checkpoint.json``.

    Raises:
        ValueError: ``folder`` is an exported draft, no checkpoint at all, or of another version.
    """
    if checkpoint_kind(folder) == "huggingface":
        raise ValueError(
            f"{folder} is a draft exported in Hugging Face format, with weights only; a checkpoint of a run is needed "
            "here (an exported draft can start a new run, with training.init_from)"
        )
    fields = json.loads((folder / INFO_FILE).read_text())
    if fields["version"] != VERSION:
        raise ValueError(f"{folder} has version {fields['version']}, this torchspec reads version {VERSION}")
    kind, draft = fields["draft"]["kind"], fields["draft"]["spec"]
    if kind not in KINDS:
        raise ValueError(f"{folder} holds a draft of kind {kind!r}, this torchspec knows {', '.join(KINDS)}")
    schedule = TypeAdapter(Schedule).validate_python(fields["schedule"])
    return CheckpointInfo(**fields | {"draft": TypeAdapter(KINDS[kind]).validate_python(draft), "schedule": schedule})


def save_checkpoint(
    folder: Path,
    state: dict[str, Tensor],
    info: CheckpointInfo,
    files: Mapping[str, str],
    generation: int,
    fence: Callable[[], None],
) -> None:
    """Save ``state`` (from :func:`training_state`) and the small files of rank 0 as ``folder``, atomically; then
    ``latest`` names it.

    Every rank calls it, and it raises on every rank or on none.

    Args:
        generation: of these ranks.
        fence: called on rank 0 before anything is put in place; raises where another generation has taken over.

    Raises:
        CheckpointError: the disk is full, or will not be written to for another reason. The partial folder is gone.
    """
    partial = partial_folder(folder, generation)
    outcome: list[str | None] = [None]
    if dist.get_rank() == 0:
        draft = {"kind": info.draft.kind, "spec": asdict(info.draft)}
        texts = {**files, INFO_FILE: json.dumps(asdict(info) | {"draft": draft}, indent=1)}
        outcome = [_start_folder(partial, texts)]
    dist.broadcast_object_list(outcome)
    failure = outcome[0]
    if failure is None:
        try:
            save(state, storage_writer=HuggingFaceStorageWriter(str(partial / STATE_FOLDER), save_distributed=True))
        except CheckpointException as error:  # raised on every rank when any rank fails
            failure = "; ".join(sorted({_reason(e) for e, _ in error.failures.values()}))
    if dist.get_rank() == 0:
        if failure is None:
            failure = _put_in_place(folder, generation, fence)
        if failure is not None:
            shutil.rmtree(partial, ignore_errors=True)
        outcome = [failure]
    dist.broadcast_object_list(outcome)
    failure = outcome[0]
    if failure is not None:
        free = shutil.disk_usage(folder.parent).free
        raise CheckpointError(
            f"cannot save {folder}: {failure} ({free / 2**20:.0f} MiB free on its disk). Checkpoints saved before it "
            "are intact: make room (or lower checkpoint.keep), then resume"
        )


def _put_in_place(folder: Path, generation: int, fence: Callable[[], None]) -> str | None:
    """What is complete gets its name, and ``latest`` names it. Returns what went wrong, if anything did."""
    try:
        fence()
        publish(folder, generation)
        fence()  # the disk may have let it wait for long
        point(folder.parent, "latest", folder)
    except OSError as error:
        return _reason(error)
    return None


def training_state(parameters: Parameters, optimizer: Optimizer, draft_ids: Tensor) -> dict[str, Tensor]:
    """What a checkpoint holds, by name. Sharded parameters stay sharded."""
    state: dict[str, Tensor] = {"draft_ids": draft_ids}
    for name, parameter in parameters.items():
        state[f"draft.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            state[f"optimizer.{name}.{key}"] = value
    return state | {f"rng.{dist.get_rank()}.{device}": rng for device, rng in _rng_states().items()}


def restore_checkpoint(folder: Path, parameters: Parameters, optimizer: Optimizer, draft_ids: Tensor) -> CheckpointInfo:
    """Load ``folder`` into ``parameters``, ``optimizer`` and this rank's random generators. Every rank calls it.

    A rank that the saved run did not have keeps its generators as they are.

    Raises:
        ValueError: not a checkpoint, of a draft with other shapes, or of another draft vocabulary.
    """
    info = read_info(folder)
    reader = HuggingFaceStorageReader(str(folder / STATE_FOLDER))
    stored = _stored_tensors(reader)
    _check_shapes(folder, {f"draft.{n}": p.shape for n, p in parameters.items()}, stored)

    state = {"draft_ids": torch.empty(stored["draft_ids"].size, dtype=torch.int64)}
    for name, parameter in parameters.items():
        for key in (k for k in stored if k == f"draft.{name}" or k.rpartition(".")[0] == f"optimizer.{name}"):
            state[key] = _like(parameter, stored[key])
    rng_keys = [k for k in stored if k.startswith(f"rng.{dist.get_rank()}.")]
    state |= {key: torch.empty(stored[key].size, dtype=torch.uint8) for key in rng_keys}
    load(state, storage_reader=reader)

    if not torch.equal(state["draft_ids"], draft_ids.cpu()):
        raise ValueError(f"{folder} was trained with another draft vocabulary; resume with the run's own")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[f"draft.{name}"])
            prefix = f"optimizer.{name}."
            optimizer.state[parameter] = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    _set_rng_states({key.rpartition(".")[2]: state[key] for key in rng_keys})
    return info


def load_weights(folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """The draft's full weights by parameter name, on the CPU in their stored dtype, and the draft vocabulary ids.

    Needs no process group.
    """
    read_info(folder)
    reader = HuggingFaceStorageReader(str(folder / STATE_FOLDER))
    state = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in _stored_tensors(reader).items()
        if name == "draft_ids" or name.startswith("draft.")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is, on purpose
        load(state, storage_reader=reader, no_dist=True)
    draft_ids = state.pop("draft_ids")
    return {name.removeprefix("draft."): tensor for name, tensor in state.items()}, draft_ids


def _start_folder(partial: Path, texts: Mapping[str, str]) -> str | None:
    """Make the folder with its small files. Returns what went wrong, if anything did."""
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, text in texts.items():
            with open(partial / name, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        return _reason(error)
    return None


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"


def _stored_tensors(reader: HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    stored = reader.read_metadata().state_dict_metadata
    return {name: tensor for name, tensor in stored.items() if isinstance(tensor, TensorStorageMetadata)}


def _like(parameter: nn.Parameter, stored: TensorStorageMetadata) -> Tensor:
    """Room for a stored tensor: sharded like ``parameter`` where it has its shape; the dtype is the stored one."""
    dtype = stored.properties.dtype
    if stored.size == parameter.shape:
        return torch.empty_like(parameter.detach(), dtype=dtype)
    return torch.empty(stored.size, dtype=dtype, device=parameter.device)


def _check_shapes(
    folder: Path, expected: Mapping[str, torch.Size], stored: Mapping[str, TensorStorageMetadata]
) -> None:
    found = {name: tensor.size for name, tensor in stored.items() if name.startswith("draft.")}
    if found != expected:
        wrong = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        name = wrong[0]
        raise ValueError(
            f"{folder} holds another draft than this config describes: {name.removeprefix('draft.')} is "
            f"{_shape(found.get(name))} there and {_shape(expected.get(name))} here"
            + (f" (and {len(wrong) - 1} more differ)" if len(wrong) > 1 else "")
        )


def _shape(size: torch.Size | None) -> str:
    return "absent" if size is None else str(list(size))


def _rng_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_rng_states(states: Mapping[str, Tensor]) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def partial_folder(folder: Path, generation: int) -> Path:
    """Where ranks of ``generation`` write ``folder`` until it is complete: those of another may still be at work."""
    return folder.with_name(f"{folder.name}.g{generation}{PARTIAL}")


def publish(folder: Path, generation: int) -> None:
    """Turn the partial folder into ``folder``, replacing what an abandoned run left there."""
    discard(folder, generation)
    partial = partial_folder(folder, generation)
    for inside in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        sync_folder(inside)
    partial.rename(folder)
    sync_folder(folder.parent)


def discard(folder: Path, generation: int) -> None:
    """Remove ``folder``; a crash in the middle leaves a partial name, never half of a complete one."""
    if folder.exists():
        doomed = partial_folder(folder.with_name(f"{folder.name}.old"), generation)
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def point(root: Path, pointer: str, folder: Path) -> None:
    """Let ``root/pointer`` name ``folder``, atomically."""
    link = root / f"{pointer}{PARTIAL}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, root / pointer)
    sync_folder(root)


def prune(root: Path, keep: int, generation: int) -> None:
    """Remove all complete folders but the ``keep`` newest and those that a pointer names, and every partial one that
    ranks of ``generation`` or an earlier one have left.

    Newest by time of writing: after a resume from an older checkpoint, a higher step number may be an abandoned one.
    """
    for partial in root.glob(f"step_*.g*{PARTIAL}"):
        if int(partial.stem.rpartition(".g")[2]) <= generation:
            shutil.rmtree(partial)
    folders = [folder for folder in root.glob("step_*") if not folder.suffix]
    folders.sort(key=lambda folder: folder.stat().st_mtime_ns, reverse=True)
    pointed = {link.resolve().name for link in root.iterdir() if link.is_symlink()}
    for folder in folders[keep:]:
        if folder.name not in pointed:
            discard(folder, generation)
