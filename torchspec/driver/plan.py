"""The dry run: what a config needs, said before anything starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from torchspec.config.schema import Config
from torchspec.contracts import ITEM_BYTES
from torchspec.driver.memory import MemoryBudget, Split, host_bytes, possible_splits
from torchspec.driver.resolve import Resolved
from torchspec.hardware import device_memory, usable_memory
from torchspec.inference.sglang_models import check_served
from torchspec.knobs import found
from torchspec.store.geometry import USABLE_SHARE

ENGINE_OVERHEAD_BYTES = 3 << 29
"""Measured on a CPU: both processes of one engine, beside weights and KV cache."""
BASE_BYTES = 2 << 30
"""Ray's own processes, the controller, the driver."""


@dataclass(frozen=True, slots=True)
class ThreadPlan:
    """Threads of one inference engine and of one training rank."""

    inference: int
    training: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Figures of a run; bytes unless said otherwise."""

    target: Mapping[str, str]
    """What was found of it, by name."""
    actors: tuple[tuple[str, int, str], ...]
    """Role, count, and what each one uses."""
    threads: ThreadPlan
    cores: int
    tokens_per_sample: int
    """The most one sample can have."""
    sample_bytes: int
    credit_bytes: int
    store_samples: int
    """Samples of the largest size that the store holds at once."""
    draft_parameters: int
    draft: str
    """Its kind and shape in words."""
    memory_bytes: int
    """Expected on this machine, all processes together; not what lies on GPUs."""
    memory_available: int
    splits: tuple[Split, ...]
    """Ways to share the largest sample among ranks."""
    found: Mapping[str, int] = field(default_factory=dict)
    """Sizes that the config had left open, by the knob's name."""


def make_plan(resolved: Resolved, heldout_samples: int) -> Plan:
    """Work out what a run needs."""
    config, draft, on_gpu = resolved.config, resolved.draft, resolved.on_gpu
    training, longest, dtype = config.training, config.data.max_seq_length, resolved.geometry.dtype
    cores = usable_cores(config)
    threads = plan_threads(config, cores, on_gpu)
    sample_bytes = resolved.geometry.stored_bytes(longest)
    segment_bytes = found(config.store.segment_bytes)
    credit_bytes = int(segment_bytes * USABLE_SHARE)
    others = BASE_BYTES + segment_bytes + config.inference.most_workers * _engine_bytes(resolved)
    steps = max(2, config.controller.prefetch_steps)  # the one in training, and at least one that is being fetched
    kept = steps * training.batch_size + heldout_samples
    splits = possible_splits(draft, training, longest, kept, dtype, _budget(resolved, others))
    (configured,) = (split for split in splits if split.configured)
    rank_bytes = host_bytes(draft, training, longest, kept, dtype) if on_gpu else configured.rank_bytes
    actors = (
        ("controller", 1, "metadata only"),
        ("store node", 1, f"{segment_bytes / 2**20:.0f} MiB of memory"),
        ("inference worker", config.inference.most_workers, _uses(threads.inference, config.inference.tp_size, on_gpu)),
        ("trainer rank", training.world_size, _uses(threads.training, 1, on_gpu)),
    )
    return Plan(
        target={**resolved.target.facts(), **_not_served(resolved)},
        actors=actors,
        threads=threads,
        cores=cores,
        tokens_per_sample=longest,
        sample_bytes=sample_bytes,
        credit_bytes=credit_bytes,
        store_samples=credit_bytes // sample_bytes,
        draft_parameters=draft.parameters(),
        draft=draft.describe(),
        memory_bytes=others + configured.ranks * rank_bytes,
        memory_available=usable_memory(),
        splits=splits,
        found=resolved.found,
    )


def _not_served(resolved: Resolved) -> dict[str, str]:
    """What keeps SGLang from serving target and draft together; another server may."""
    try:
        arguments = resolved.draft.server_args(resolved.draft.draft_tokens)
        check_served(resolved.target, arguments["speculative_algorithm"])
    except ValueError as error:
        return {"serving": str(error)}
    return {}


def usable_cores(config: Config) -> int:
    """Of this machine."""
    cores = os.cpu_count() or 1
    return cores if config.cluster.num_cpus is None else min(cores, config.cluster.num_cpus)


def plan_threads(config: Config, cores: int, on_gpu: bool) -> ThreadPlan:
    """Share ``cores`` among the processes of both pools; numbers in the config are taken as they are.

    Two OpenMP pools on the same cores wait for each other's threads: measured, an engine with two threads beside a busy
    trainer is 5 to 15 times slower than one with a single thread. So ``auto`` never gives out more threads than cores,
    unless there are more processes than cores, and then each gets one.
    """
    processes = config.inference.most_workers + config.training.world_size
    fair = max(1, cores // processes)
    if on_gpu:
        fair = min(fair, 8)  # a GPU process needs its cores for launching and copying only
    inference, training = config.inference.threads, config.training.threads
    return ThreadPlan(fair if inference == "auto" else inference, fair if training == "auto" else training)


def _budget(resolved: Resolved, others: int) -> MemoryBudget:
    """Of the training ranks. ``others``: bytes of host memory of everything else."""
    inference, budget = resolved.config.inference, MemoryBudget(usable_memory() - others)
    if not resolved.on_gpu:
        return budget
    gpus = torch.cuda.device_count() - inference.most_workers * inference.tp_size
    return replace(budget, gpus=gpus, gpu_bytes=device_memory("cuda"))


def _engine_bytes(resolved: Resolved) -> int:
    """Host memory of one engine: on a GPU, its buffer and its processes; on a CPU, weights and KV cache as well."""
    inference, target, item = resolved.config.inference, resolved.target, ITEM_BYTES[resolved.config.target.dtype]
    weights, outside = target.num_parameters * item, ENGINE_OVERHEAD_BYTES + found(inference.buffer_bytes)
    if resolved.on_gpu:
        return outside
    _, keys = target.shape.widths
    return outside + weights + found(inference.max_total_tokens) * target.num_layers * 2 * keys * item


def _uses(threads: int, gpus: int, on_gpu: bool) -> str:
    return f"{gpus} GPU" if on_gpu else f"{threads} CPU threads"


def check_gpus(config: Config, gpus: int) -> None:
    """Refuse pools that ask for more GPUs than this machine has. Raises ValueError: names both pools' knobs."""
    training, inference = config.training, config.inference
    engines = inference.most_workers * inference.tp_size
    if config.cluster.address is None and training.world_size + engines > gpus:
        raise ValueError(
            f"training.dp_size ({training.dp_size}) x training.sp_ulysses_size ({training.sp_ulysses_size}) x "
            f"training.sp_ring_size ({training.sp_ring_size}) and inference.workers ({inference.most_workers}) x "
            f"inference.tp_size ({inference.tp_size}) ask for {training.world_size} + {engines} GPUs; "
            f"this machine has {gpus}"
        )


def check_memory(plan: Plan) -> None:
    """Refuse a run that would take more memory than this machine has. Raises ValueError: how much, and what to do."""
    if plan.memory_bytes > plan.memory_available:
        needed, there = (f"{size / 2**30:.1f} GiB" for size in (plan.memory_bytes, plan.memory_available))
        raise ValueError(
            f"the run would take about {needed} of memory, of {there} that this machine has, and be killed on the way: "
            "lower data.max_seq_length, training.batch_size or inference.workers, or use a larger machine (torchspec "
            "plan shows what takes how much)"
        )
