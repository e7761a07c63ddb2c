"""The dry run: what a config needs, said before anything starts, and refused where it cannot work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import psutil
import torch

from torchspec.config.schema import Config, TrainingConfig
from torchspec.contracts import ITEM_BYTES
from torchspec.driver.memory import MemoryBudget, Split, possible_splits
from torchspec.driver.resolve import Resolved
from torchspec.store.geometry import USABLE_SHARE, stored_bytes

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
    memory_bytes: int
    """Expected on this machine, all processes together (CPU runs)."""
    memory_available: int
    splits: tuple[Split, ...]
    """Ways to share the largest sample among ranks."""


def make_plan(resolved: Resolved, heldout_samples: int, vocab_prompts: int) -> Plan:
    """Work out what a run needs.

    Args:
        vocab_prompts: samples that are stored before training starts, because their answers are counted first.

    Raises:
        ValueError: the store cannot hold what the run must have in it at the same time.
    """
    config, target, on_gpu = resolved.config, resolved.target, resolved.on_gpu
    if on_gpu:
        check_gpus(config, torch.cuda.device_count())
    cores = usable_cores(config)
    threads = plan_threads(config, cores, on_gpu)
    sample_bytes = resolved.geometry.stored_bytes(config.data.max_seq_length)
    credit_bytes = int(config.store.segment_bytes * USABLE_SHARE)
    buffer_bytes = check_buffers(resolved, heldout_samples, vocab_prompts)
    weights = target.num_parameters * ITEM_BYTES[config.target.dtype]
    kv_cache = config.inference.max_total_tokens * target.num_layers * target.shape.hidden_size * 2
    engine = weights + kv_cache + ENGINE_OVERHEAD_BYTES + buffer_bytes
    others = BASE_BYTES + config.store.segment_bytes + config.inference.most_workers * engine
    splits = _splits(resolved, heldout_samples, others)
    (configured,) = (split for split in splits if split.configured)
    training = config.training
    actors = (
        ("controller", 1, "metadata only"),
        ("store node", 1, f"{config.store.segment_bytes / 2**20:.0f} MiB of memory"),
        ("inference worker", config.inference.most_workers, _uses(threads.inference, config.inference.tp_size, on_gpu)),
        ("trainer rank", training.world_size, _uses(threads.training, 1, on_gpu)),
    )
    return Plan(
        target=target.facts(),
        actors=actors,
        threads=threads,
        cores=cores,
        tokens_per_sample=config.data.max_seq_length,
        sample_bytes=sample_bytes,
        credit_bytes=credit_bytes,
        store_samples=credit_bytes // sample_bytes,
        draft_parameters=resolved.draft.parameters(),
        memory_bytes=others + configured.ranks * configured.rank_bytes,
        memory_available=psutil.virtual_memory().total,
        splits=splits,
    )


def check_buffers(resolved: Resolved, heldout_samples: int = 0, vocab_prompts: int = 0) -> int:
    """Refuse a store or buffers that are too small for samples split as the config says; returns the engines' buffer.

    Raises:
        ValueError: names the knob, and what it must be at least.
    """
    config, geometry = resolved.config, resolved.geometry
    assert config.inference.buffer_bytes is not None
    longest = config.data.max_seq_length
    sample_bytes = geometry.stored_bytes(longest)
    credit_bytes = int(config.store.segment_bytes * USABLE_SHARE)
    _check_store(config, sample_bytes, credit_bytes, heldout_samples, vocab_prompts)
    shards = [stored_bytes(geometry.shard(longest, rank)) for rank in range(config.training.sp_size)]
    _check_buffer("inference", config.inference.buffer_bytes, sample_bytes)
    _check_buffer("training", config.training.buffer_bytes, max(shards))
    return config.inference.buffer_bytes


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


def total_steps(training: TrainingConfig, prompts: int) -> int:
    """Optimizer steps of a run over so many prompts, none of them rejected."""
    steps = -(-prompts * training.epochs // training.batch_size)
    return min(steps, training.max_steps) if training.max_steps is not None else steps


def _splits(resolved: Resolved, heldout_samples: int, others: int) -> tuple[Split, ...]:
    """Args: ``others``, bytes of host memory of everything but the training ranks."""
    config, budget = resolved.config, MemoryBudget(psutil.virtual_memory().total - others)
    if resolved.on_gpu:
        gpus = torch.cuda.device_count() - config.inference.most_workers * config.inference.tp_size
        budget = replace(budget, gpus=gpus, gpu_bytes=torch.cuda.get_device_properties(0).total_memory)
    steps = max(2, config.controller.prefetch_steps)  # the one in training, and at least one that is being fetched
    kept = steps * config.training.batch_size + heldout_samples
    length, dtype = config.data.max_seq_length, resolved.geometry.dtype
    return possible_splits(resolved.draft, config.training, length, kept, dtype, budget)


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


def _check_store(
    config: Config, sample_bytes: int, credit_bytes: int, heldout_samples: int, vocab_prompts: int
) -> None:
    batch = config.training.batch_size
    needs = {
        "one sample": 1,
        f"one batch of training.batch_size ({batch}) samples": batch,
        f"the {heldout_samples} held-out samples (evaluation.samples) and one batch": heldout_samples + batch,
        f"the {heldout_samples} held-out samples (evaluation.samples) and the {vocab_prompts} whose answers the "
        "vocabulary is counted over (data.vocab_prompts)": heldout_samples + vocab_prompts,
    }
    for what, samples in needs.items():
        if samples * sample_bytes > credit_bytes:
            least = int(samples * sample_bytes / USABLE_SHARE) + 1
            raise ValueError(
                f"store.segment_bytes ({config.store.segment_bytes}) is too small for {what} of up to "
                f"{config.data.max_seq_length} tokens (data.max_seq_length): at least {least} bytes"
            )


def _check_buffer(pool: str, buffer_bytes: int, sample_bytes: int) -> None:
    if buffer_bytes < 2 * sample_bytes:
        raise ValueError(
            f"{pool}.buffer_bytes ({buffer_bytes}) must hold two samples of the largest size: "
            f"at least {2 * sample_bytes} bytes, or lower data.max_seq_length"
        )
