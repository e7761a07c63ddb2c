"""The order of an epoch and the seed of a sampled answer: functions of the run's seed and nothing else.

A resumed run must see the same order, whatever numpy it runs with by then. numpy keeps the raw streams of its bit
generators fixed (NEP 19) but not what ``Generator.permutation`` makes of them, so the order is the stable argsort of
raw Philox words.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Permutation of ``range(n)``, int64 [n], for 0 <= ``seed`` < 2**64 and any ``epoch``."""
    key = np.array([seed, epoch % 2**64], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(n)
    return np.argsort(words, kind="stable")


def sample_seed(seed: int, epoch: int, prompt: int) -> int:
    """Seed of the answer to one prompt in one epoch: 31 bits, which is what SGLang's sampler takes."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, epoch, prompt), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
