"""Config in, config with every default filled in out: dtypes, sizes, paths. ``plan``, ``train`` and ``scale`` call it.

``training.device`` alone stays ``auto``: a run may be resumed on another machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torchspec.config.load import with_values
from torchspec.config.schema import Config
from torchspec.data.chat_template import template_file
from torchspec.data.prompt_sources import is_named
from torchspec.drafts.registry import KINDS
from torchspec.drafts.spec import DraftSpec
from torchspec.driver.sizes import find_sizes
from torchspec.hardware import fast_dtype, pick_device
from torchspec.inference.sglang_models import check_target
from torchspec.inference.sglang_process import check_engine_args
from torchspec.shards import key_value_repeats
from torchspec.store.geometry import SampleGeometry
from torchspec.target.checkpoint import TargetCheckpoint, find_checkpoint


@dataclass(frozen=True)
class Resolved:
    """A config without open ends, and what they were filled in from."""

    config: Config
    target: TargetCheckpoint
    draft: DraftSpec
    geometry: SampleGeometry
    """Of the samples that the run stores."""
    on_gpu: bool
    found: Mapping[str, int] = field(compare=False)
    """Sizes that were left open, by the knob's name."""


def resolve(config: Config) -> Resolved:
    """Fill in what ``config`` leaves open. A resolved config stays as it is.

    Raises:
        ValueError: the device, the target or a file is not there, or no draft could be trained for such a target.
    """
    on_gpu = computes_on_gpu(config)
    fast = fast_dtype("cuda" if on_gpu else "cpu")
    sections = [name for name in ("target", "training") if getattr(config, name).dtype == "auto"]
    config = with_values(config, {f"{name}.dtype": fast for name in sections})
    check_engine_args(config.inference.engine_args)
    target = TargetCheckpoint(find_checkpoint(config.target.path), config.target.trust_remote_code)
    draft = KINDS[config.draft.kind].of(config.draft, target, config.target.aux_layers)
    check_target(target, draft.layers, on_gpu)
    sharding = config.training.shard_formula(draft.halo)
    if sharding is not None:
        key_value_repeats(draft.target.num_heads, draft.target.num_kv_heads, sharding.ulysses_size)
    geometry = SampleGeometry(len(draft.layers), draft.target.hidden_size, config.target.dtype, sharding)
    sizes = find_sizes(config, draft.target, geometry, on_gpu)
    values = {**_absolute_paths(config, target), **sizes}
    return Resolved(with_values(config, values), target, draft, geometry, on_gpu, sizes)


def computes_on_gpu(config: Config) -> bool:
    """Raises ValueError: it is to, and cannot."""
    return pick_device(config.training.device, "training.device") == "cuda"


def _absolute_paths(config: Config, target: TargetCheckpoint) -> dict[str, str]:
    """Actors have another working directory, and a resume may have: every path is absolute."""
    data, heldout = config.data, config.evaluation.heldout
    paths = {
        "run.dir": config.run.dir,
        "data.cache_dir": data.cache_dir,
        "data.train": None if is_named(data.train) else Path(data.train),
        "data.chat_template": template_file(data.chat_template),
        "evaluation.heldout": None if heldout is None or is_named(heldout) else Path(heldout),
        "target.path": target.path,
        "draft.config": config.draft.config,
        "training.init_from": config.training.init_from,
        "answer.reuse": config.answer.reuse,
    }
    absolute = {knob: str(path.expanduser().absolute()) for knob, path in paths.items() if path is not None}
    if "answer.reuse" in absolute and not Path(absolute["answer.reuse"]).is_file():
        raise ValueError(f"answer.reuse: there is no file {absolute['answer.reuse']}")
    return absolute
