"""Config in, config with every default filled in out: dtypes, sizes, paths. ``plan``, ``train`` and ``scale`` call it.

``training.device`` alone stays ``auto``: a run may be resumed on another machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchspec.config.schema import Config
from torchspec.hardware import fast_dtype, pick_device
from torchspec.target.checkpoint import TargetInfo, read_target

MAX_DEFAULT_BUFFER = 4 << 30


@dataclass(frozen=True)
class Resolved:
    """A config without open ends, and what they were filled in from."""

    config: Config
    target: TargetInfo
    on_gpu: bool


def resolve(config: Config) -> Resolved:
    """Fill in what ``config`` leaves open. A resolved config stays as it is.

    Raises:
        ValueError: the device, the target or a file is not there, or no draft could be trained for such a target.
    """
    on_gpu = computes_on_gpu(config)
    fast = fast_dtype("cuda" if on_gpu else "cpu")
    for name in ("target", "training"):
        if getattr(config, name).dtype == "auto":
            config = _with(config, name, dtype=fast)
    target = read_target(config.target, config.training.shard_formula)
    if config.inference.buffer_bytes is None:
        config = _with(config, "inference", buffer_bytes=_buffer_bytes(config, target))
    return Resolved(_absolute(config), target, on_gpu)


def computes_on_gpu(config: Config) -> bool:
    """Raises ValueError: it is to, and cannot."""
    return pick_device(config.training.device, "training.device") == "cuda"


def _buffer_bytes(config: Config, target: TargetInfo) -> int:
    """For as many samples as an engine works on and two on their way; where they are large, fewer will do."""
    sample = target.geometry.stored_bytes(config.data.max_seq_length)
    return max(2 * sample, min((config.inference.max_concurrency + 2) * sample, MAX_DEFAULT_BUFFER))


def _absolute(config: Config) -> Config:
    """Actors have another working directory, so every path they see is absolute."""
    config = _with(config, "run", dir=_path(config.run.dir))
    config = _with(config, "data", cache_dir=_path(config.data.cache_dir))
    config = _with(config, "target", path=str(_path(Path(config.target.path))))
    if config.training.init_from is not None:
        config = _with(config, "training", init_from=_path(config.training.init_from))
    if config.answer.reuse is not None:
        reuse = _path(config.answer.reuse)
        if not reuse.is_file():
            raise ValueError(f"answer.reuse: there is no file {reuse}")
        config = _with(config, "answer", reuse=reuse)
    return config


def _path(path: Path) -> Path:
    return path.expanduser().absolute()


def _with(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
