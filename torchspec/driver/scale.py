"""Other sizes for a running run, checked before anything is changed: what ``torchspec scale`` asks for."""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import Literal

import torch

from torchspec.config.load import load_config
from torchspec.config.schema import Config
from torchspec.controller.pools import with_sizes, with_workers
from torchspec.driver.cluster import alive_nodes
from torchspec.driver.placement import check_pools
from torchspec.driver.plan import check_gpus, check_room
from torchspec.driver.target import read_target
from torchspec.driver.threads import plan_threads, usable_cores
from torchspec.hardware import pick_device


def checked_workers(run_dir: Path, asked: str) -> int | Literal["auto"]:
    """How many inference workers ``asked`` means.

    Raises:
        ValueError: it is neither a number nor ``auto``, or more than there is room for.
    """
    if asked != "auto" and not (asked.isdecimal() and int(asked) > 0):
        raise ValueError(f"--inference {asked} must be a positive number or auto")
    workers: int | Literal["auto"] = "auto" if asked == "auto" else int(asked)
    _check_machines(with_workers(load_config(run_dir / "config.yaml"), workers))
    return workers


def checked_sizes(
    run_dir: Path, dp: int | None, sp: int | None, ulysses: int | None, ring: int | None
) -> dict[str, int | str]:
    """The sizes of the training group that are asked for; what is not stays as it is.

    Without a word on how to share samples among ``sp`` ranks, as many split the heads as can.

    Raises:
        ValueError: the run could not go on with them.
    """
    config = load_config(run_dir / "config.yaml")
    training = config.training
    heads = read_target(config.target).draft.num_heads
    if sp is None:
        ulysses, ring = ulysses or training.sp_ulysses_size, ring or training.sp_ring_size
    elif ulysses is None:
        ulysses = sp // ring if ring is not None else gcd(sp, heads)
    ring = ring or (sp or ulysses) // ulysses
    if sp is not None and ulysses * ring != sp:
        raise ValueError(f"--sp {sp} is not --sp-ulysses {ulysses} times --sp-ring {ring}")
    sizes: dict[str, int | str] = {
        "dp_size": dp or training.dp_size,
        "attention_backend": "usp" if ulysses * ring > 1 else "flash",
        "sp_ulysses_size": ulysses,
        "sp_ring_size": ring,
    }
    scaled = with_sizes(config, sizes)
    target = read_target(scaled.target, scaled.training.shard_formula)
    check_room(scaled, target)
    _check_machines(scaled)
    return sizes


def _check_machines(config: Config) -> None:
    """Raises ValueError: the machine, or the cluster that this process is connected to, has no room for ``config``."""
    on_gpu = pick_device(config.training.device, "training.device") == "cuda"
    if config.cluster.address is not None:
        check_pools(alive_nodes(), config, plan_threads(config, usable_cores(config), on_gpu), on_gpu)
    elif on_gpu:
        check_gpus(config, torch.cuda.device_count())
