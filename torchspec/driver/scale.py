"""Other sizes for a running run, checked before anything is changed: what ``torchspec scale`` asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Literal

import torch

from torchspec.config.load import load_config, with_values
from torchspec.config.schema import Config
from torchspec.driver.cluster import alive_nodes
from torchspec.driver.placement import check_pools, nodes_within
from torchspec.driver.plan import check_gpus, plan_threads, usable_cores
from torchspec.driver.resolve import computes_on_gpu, resolve
from torchspec.driver.sizes import check_sizes
from torchspec.run_folder import RunFolder

SIZES = ("dp_size", "attention_backend", "sp_ulysses_size", "sp_ring_size")
"""Knobs of ``training`` that can change while a run goes on."""


@dataclass(frozen=True)
class Change:
    """What is asked for; None where it stays as it is."""

    workers: int | Literal["auto"] | None
    sizes: dict[str, int | str] | None
    """:data:`SIZES` of the training group."""


def checked_change(
    run_dir: Path,
    inference: str | None = None,
    dp: int | None = None,
    sp: int | None = None,
    ulysses: int | None = None,
    ring: int | None = None,
) -> Change:
    """What the sizes that are asked for mean; those that are not stay as they are.

    Without a word on how to share samples among ``sp`` ranks, as many split the heads as can.

    Raises:
        ValueError: the run could not go on with them.
    """
    config, change = load_config(RunFolder(run_dir).config), Change(None, None)
    if inference is not None:
        if inference != "auto" and not (inference.isdecimal() and int(inference) > 0):
            raise ValueError(f"--inference {inference} must be a positive number or auto")
        workers: int | Literal["auto"] = "auto" if inference == "auto" else int(inference)
        config, change = with_values(config, {"inference.workers": workers}), replace(change, workers=workers)
    if {dp, sp, ulysses, ring} != {None}:
        sizes = _sizes(config, dp, sp, ulysses, ring)
        config = with_values(config, {f"training.{name}": size for name, size in sizes.items()})
        change = replace(change, sizes=sizes)
        resolved = resolve(config)
        check_sizes(resolved.config, resolved.draft.target, resolved.geometry)
    _check_machines(config, run_dir)
    return change


def sizes_so_far(run_dir: Path) -> list[str]:
    """What ``torchspec scale`` may have changed since a run began, as overrides of its first config."""
    config = load_config(RunFolder(run_dir).config)
    sizes = (f"training.{name}={getattr(config.training, name)}" for name in SIZES)
    return [f"inference.workers={config.inference.workers}", *sizes]


def _sizes(
    config: Config, dp: int | None, sp: int | None, ulysses: int | None, ring: int | None
) -> dict[str, int | str]:
    training = config.training
    heads = resolve(config).draft.target.num_heads
    if sp is None:
        ulysses, ring = ulysses or training.sp_ulysses_size, ring or training.sp_ring_size
    elif ulysses is None:
        ulysses = sp // ring if ring is not None else gcd(sp, heads)
    ring = ring or (sp or ulysses) // ulysses
    if sp is not None and ulysses * ring != sp:
        raise ValueError(f"--sp {sp} is not --sp-ulysses {ulysses} times --sp-ring {ring}")
    return {
        "dp_size": dp or training.dp_size,
        "attention_backend": "usp" if ulysses * ring > 1 else "flash",
        "sp_ulysses_size": ulysses,
        "sp_ring_size": ring,
    }


def _check_machines(config: Config, run_dir: Path) -> None:
    """Raises ValueError: the machine, or the cluster that this process is connected to, has no room for ``config``."""
    on_gpu = computes_on_gpu(config)
    if config.cluster.address is not None:
        nodes = nodes_within(alive_nodes(), RunFolder(run_dir).read_handle()["machine"])
        check_pools(nodes, config, plan_threads(config, usable_cores(config), on_gpu), on_gpu)
    elif on_gpu:
        check_gpus(config, torch.cuda.device_count())
