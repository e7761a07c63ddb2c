"""How many CPU threads each process gets.

Two OpenMP pools on the same cores wait for each other's threads: measured, an engine with two threads beside a busy
trainer is 5 to 15 times slower than one with a single thread. So ``auto`` never gives out more threads than cores,
unless there are more processes than cores, and then each gets one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from torchspec.config.schema import Config


@dataclass(frozen=True, slots=True)
class ThreadPlan:
    """Threads of one inference engine and of one training rank."""

    inference: int
    training: int


def usable_cores(config: Config) -> int:
    """Of this machine."""
    cores = os.cpu_count() or 1
    return cores if config.cluster.num_cpus is None else min(cores, config.cluster.num_cpus)


def plan_threads(config: Config, cores: int, on_gpu: bool) -> ThreadPlan:
    """Share ``cores`` among the processes of both pools; numbers in the config are taken as they are."""
    processes = config.inference.most_workers + config.training.world_size
    fair = max(1, cores // processes)
    if on_gpu:
        fair = min(fair, 8)  # a GPU process needs its cores for launching and copying only
    inference, training = config.inference.threads, config.training.threads
    return ThreadPlan(fair if inference == "auto" else inference, fair if training == "auto" else training)
