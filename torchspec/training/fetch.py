"""Brings samples from the store to the step loop, ahead of it.

    controller --next_batch--> refs --store.get--> padded micro-batches --fetched--> "go" --> step loop
                                 ^------------- the same step with new refs <---- (some rank missed a sample)

One thread does all of it, a bounded number of steps ahead; it blocks in the controller's long-polls and never polls
itself. Whether a step goes ahead is decided by the controller for all ranks at once, so a lost object never lets one
rank train what another skips. Errors reach the step loop with the future of the step they belong to.

Shapes: B rows, S longest sample of the micro-batch, A aux states concatenated (F*H), H hidden size.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from torchspec.contracts import RankBatch, SampleId, SampleRef
from torchspec.models.eagle3 import Eagle3Batch
from torchspec.store.errors import MissingObject, SizeMismatch
from torchspec.store.geometry import SampleGeometry
from torchspec.store.hidden_state_store import HiddenStateStore

IDLE_TOKENS = 8
"""Length of the one all-padding row that a rank without samples trains on, to take part in the collectives."""

MicroBatches = tuple[tuple[SampleRef, ...], ...]
Rows = dict[str, dict[str, Tensor]]
"""Store key to the sample's tensors (by suffix), as views into the padded batch they were copied to."""


@dataclass(frozen=True)
class FetchedStep:
    """One step's work, in host memory."""

    batch: RankBatch
    micro_batches: list[Eagle3Batch]
    fetch_seconds: float
    """Time spent on the store, without waiting for the controller."""


class SampleFetcher:
    """Copies samples out of the store into padded batches; the store's buffers are free again at once."""

    def __init__(self, store: HiddenStateStore, geometry: SampleGeometry, pin_memory: bool):
        self.store, self.geometry, self.pin_memory = store, geometry, pin_memory

    def fetch(self, micro_batches: MicroBatches, held: Rows) -> tuple[list[Eagle3Batch], set[SampleId]]:
        """Build every micro-batch, from ``held`` where a sample is there and from the store where not.

        ``held`` is brought up to date. Also returns the samples whose objects are missing or damaged: their rows are
        not to be used.
        """
        missing: set[SampleId] = set()
        batches = []
        for refs in micro_batches:
            batch = self._padded(refs)
            for row, ref in enumerate(refs):
                rows = {"hs": batch.hs_BSA, "lhs": batch.lhs_BSH, "ids": batch.ids_BS}
                views = {suffix: tensor[row, : ref.num_tokens] for suffix, tensor in rows.items()}
                try:
                    self._copy(ref, views, held)
                except (MissingObject, SizeMismatch):
                    missing.add(ref.sample)
            batches.append(batch)
        return batches, missing

    def _copy(self, ref: SampleRef, views: dict[str, Tensor], held: Rows) -> None:
        if ref.key in held:
            _copy_all(held[ref.key], views)
        else:
            buffer = self.store.get(ref.key, ref.tensors)
            _copy_all(buffer.views, views)
            self.store.release(buffer)
        held[ref.key] = views

    def _padded(self, refs: tuple[SampleRef, ...]) -> Eagle3Batch:
        """Room for ``refs``: zeros, and no loss, beyond the end of each sample."""
        used = [ref.num_tokens for ref in refs] or [0]
        shape = len(used), max(used) or IDLE_TOKENS
        specs = self.geometry.tensors(shape[1])
        tensors = {
            suffix: torch.empty((shape[0], *spec.shape), dtype=getattr(torch, spec.dtype), pin_memory=self.pin_memory)
            for suffix, spec in specs.items()
        }
        loss_mask_BS = torch.zeros(shape, dtype=torch.bool, pin_memory=self.pin_memory)
        for row, length in enumerate(used):
            for tensor in tensors.values():
                tensor[row, length:].zero_()
        for row, ref in enumerate(refs):
            loss_mask_BS[row, : ref.num_tokens] = _mask(ref)
        (norm_state,) = {ref.norm_state for ref in refs} or {"post_norm"}
        return Eagle3Batch(
            hs_BSA=tensors["hs"],
            lhs_BSH=tensors["lhs"],
            ids_BS=tensors["ids"],
            loss_mask_BS=loss_mask_BS,
            lengths_B=torch.tensor(used),
            norm_state=norm_state,
        )


class StepStream:
    """The steps of a run for one rank, in order, fetched ahead of the step loop."""

    def __init__(self, controller: Any, rank: int, fetcher: SampleFetcher, prefetch_steps: int, heldout: bool):
        self._controller, self._rank, self._fetcher = controller, rank, fetcher
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        # held-out samples are captured before all others: taking them first frees the store for training
        self._heldout = self._thread.submit(self._fetch_heldout) if heldout else None
        ahead = max(1, prefetch_steps - 1)  # the step in training is one of them
        self._ahead: deque[Future[FetchedStep | None]] = deque(
            self._thread.submit(self._fetch_step) for _ in range(ahead)
        )

    def next(self) -> FetchedStep | None:
        """The next step, or None when the run ends. Raises what fetching it raised."""
        step = self._ahead.popleft().result()
        if step is not None:
            self._ahead.append(self._thread.submit(self._fetch_step))
        return step

    def heldout(self) -> list[Eagle3Batch]:
        """This rank's held-out micro-batches, fetched once and kept in memory; empty where there are none."""
        return self._heldout.result() if self._heldout is not None else []

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _fetch_step(self) -> FetchedStep | None:
        batch: RankBatch | None = ray.get(self._controller.next_batch.remote(self._rank))
        if batch is None:
            return None
        held: Rows = {}
        seconds = 0.0
        while True:
            started = time.perf_counter()
            micro_batches, missing = self._fetcher.fetch(batch.micro_batches, held)
            seconds += time.perf_counter() - started
            replacement = ray.get(self._controller.fetched.remote(self._rank, batch.step, tuple(missing)))
            if replacement is None:
                return FetchedStep(batch, micro_batches, seconds)
            batch = replacement

    def _fetch_heldout(self) -> list[Eagle3Batch]:
        held: Rows = {}
        complete = False
        micro_batches: list[Eagle3Batch] = []
        while not complete:
            refs: MicroBatches = ray.get(self._controller.heldout_batches.remote(self._rank))
            if not refs:
                return []
            micro_batches, missing = self._fetcher.fetch(refs, held)
            complete = ray.get(self._controller.heldout_fetched.remote(self._rank, tuple(missing)))
        return micro_batches


def _copy_all(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for suffix, tensor in target.items():
        tensor.copy_(source[suffix])


def _mask(ref: SampleRef) -> Tensor:
    bits = np.frombuffer(ref.loss_mask, dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(bits, count=ref.num_tokens).astype(np.bool_))
