"""Sizes that a config leaves open, found from target, samples and machine; and whether those that it has can work.

What is found is never less than the least that works, so a config without sizes starts wherever the machine is large
enough. On a GPU, what SGLang chooses well by itself stays open.
"""

from __future__ import annotations

from typing import Any

from torchspec.config.schema import Config
from torchspec.hardware import device_memory, usable_memory
from torchspec.knobs import found
from torchspec.store.geometry import USABLE_SHARE, SampleGeometry
from torchspec.store.slot_pool import align
from torchspec.target.shape import TargetShape

RESERVED_TOKENS = 7
"""SGLang admits an input only below ``min(context, pool) - 1 - 5`` tokens (``managers/tp_worker.py``)."""
CPU_SAMPLES, GPU_SAMPLES = 32, 128
"""What keeps an engine busy; SGLang's own choice for EAGLE3, whose capture convention we use, would be 48."""
CPU_POOL_TOKENS, CPU_CHUNK_TOKENS = 1 << 15, 2048
MOST_BUFFER, LEAST_RANK_BUFFER = 4 << 30, 64 << 20
LEAST_SEGMENT, SEGMENT_SHARE = 1 << 30, 4
"""Smallest store, and the part of the memory that the largest takes, as a divisor."""
MOST_LOSS_TOKENS, LEAST_LOSS_TOKENS, LOGITS_SHARE = 1024, 64, 32
LOGIT = 4
"""Bytes: float32."""


def find_sizes(config: Config, target: TargetShape, geometry: SampleGeometry, on_gpu: bool) -> dict[str, int]:
    """What ``config`` leaves open, by the knob's name."""
    inference, window, longest = config.inference, config.controller.reorder_window, config.data.max_seq_length
    most = GPU_SAMPLES if on_gpu else CPU_SAMPLES
    samples = inference.max_concurrency or max(1, min(most, window // inference.most_workers))
    slot, sample = geometry.slot_bytes(longest), geometry.stored_bytes(longest)
    segment = min(segment_for(window, sample), usable_memory() // SEGMENT_SHARE)
    logits = device_memory("cuda" if on_gpu else "cpu") // LOGITS_SHARE // (LOGIT * target.vocab_size)
    sizes = {
        "store.segment_bytes": max(segment, LEAST_SEGMENT, segment_for(_stored_at_once(config), sample)),
        "inference.max_concurrency": samples,
        "inference.buffer_bytes": max(2 * slot, min((samples + 2) * sample, MOST_BUFFER), 1 << 20),
        "training.buffer_bytes": max(2 * slot, LEAST_RANK_BUFFER),
        "training.loss_chunk_tokens": min(1 << (max(logits, LEAST_LOSS_TOKENS).bit_length() - 1), MOST_LOSS_TOKENS),
    }
    if not on_gpu:
        one = longest + RESERVED_TOKENS
        all_of_them = 1 << (samples * one).bit_length()
        sizes |= {
            "inference.max_total_tokens": max(one, min(all_of_them, CPU_POOL_TOKENS)),
            "inference.chunked_prefill_size": CPU_CHUNK_TOKENS,
        }
    return {knob: size for knob, size in sizes.items() if _value(config, knob) is None}


def check_sizes(config: Config, target: TargetShape, geometry: SampleGeometry) -> None:
    """Hold the sizes of a resolved config against its longest sample and what must be there at the same time.

    Raises:
        ValueError: a line for each that is too small, with the knob and the least that works.
    """
    longest = config.data.max_seq_length
    wrong, sample = _length_complaints(config, target), geometry.stored_bytes(longest)
    needed = segment_for(_stored_at_once(config), sample)
    if found(config.store.segment_bytes) < needed:
        heldout = ", and one held-out sample beside it" if config.evaluation.heldout else ""
        wrong.append(
            f"store.segment_bytes ({config.store.segment_bytes}) is too small for a batch of training.batch_size "
            f"({config.training.batch_size}) samples of up to {longest} tokens (data.max_seq_length){heldout}: "
            f"at least {_mib(needed)}"
        )
    shards = [geometry.shard(longest, rank).values() for rank in range(config.training.sp_size)]
    read = max(sum(align(tensor.num_bytes) for tensor in shard) for shard in shards)
    slots = {"inference": geometry.slot_bytes(longest), "training": read}
    for pool, slot in slots.items():
        size = found(_value(config, f"{pool}.buffer_bytes"))
        if size < 2 * slot:
            wrong.append(
                f"{pool}.buffer_bytes ({size}) must hold two samples of the largest size: at least {_mib(2 * slot)}, "
                "or lower data.max_seq_length"
            )
    if wrong:
        raise ValueError("\n".join(wrong))


def segment_for(samples: int, sample_bytes: int) -> int:
    """Least ``store.segment_bytes`` for so many samples at once."""
    return int(samples * sample_bytes / USABLE_SHARE) + 2  # whatever is rounded, here and where credits are counted


def _length_complaints(config: Config, target: TargetShape) -> list[str]:
    """A sample is an input as a whole in a later epoch, so prompt and answer count together."""
    longest, inference, own = config.data.max_seq_length, config.inference, config.inference.engine_args
    context = own.get("context_length") or _context(target)
    pool = own.get("max_total_tokens") or inference.max_total_tokens
    wrong = []
    if longest + RESERVED_TOKENS > context:
        wrong.append(
            f"data.max_seq_length ({longest}) is too long for a target with a context of {context} tokens "
            f"(max_position_embeddings): at most {context - RESERVED_TOKENS}"
        )
    if pool is not None and longest + RESERVED_TOKENS > pool:
        wrong.append(
            f"inference.max_total_tokens ({pool}) is too small for a sample of up to {longest} tokens "
            f"(data.max_seq_length): at least {longest + RESERVED_TOKENS}"
        )
    window = config.draft.window
    if window is not None and window < longest:
        wrong.append(
            f"draft.window ({window}) is too small for a draft that sees samples of up to {longest} tokens "
            f"(data.max_seq_length) in training: at least {longest}"
        )
    return wrong


def _context(target: TargetShape) -> int:
    """As SGLang works it out (``get_context_length``)."""
    rope = target.rope_parameters
    stretched = rope["rope_type"] != "llama3" and "original_max_position_embeddings" not in rope
    return int(target.max_position_embeddings * (rope.get("factor", 1) if stretched else 1))


def _stored_at_once(config: Config) -> int:
    """Samples: held-out ones come first, as many at a time as fit beside a batch."""
    return config.training.batch_size + (config.evaluation.heldout is not None)


def _mib(size: int) -> str:
    """As a recipe can have it, rounded up."""
    return f"{-(-size >> 20)}MiB"


def _value(config: Config, knob: str) -> Any:
    section, name = knob.split(".")
    return getattr(getattr(config, section), name)
