"""Brings samples from the store to the step loop, ahead of it.

    controller --next_batch--> refs --store.get--> padded micro-batches --fetched--> "go" --> step loop
                                 ^------------- the same step with new refs <---- (some rank missed a sample)

One thread does all of it, a bounded number of steps ahead; it blocks in the controller's long-polls and never polls
itself. Whether a step goes ahead is decided by the controller for all ranks at once, so a lost object never lets one
rank train what another skips. A store that does not answer may have lost what it held: that is the same. Errors reach
the step loop with the future of the step they belong to.

Where samples are split among ranks that share them, each rank reads the objects of its own shard and no other, and
lays its segments out as the windows that the attention backend plans for (``shards.py``). Masks and lengths
are those of the whole samples, from the metadata.

Shapes: B samples, W windows of this rank (a sample each, where samples are whole), S columns, A aux states concatenated
(F*H), H hidden size.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchspec.contracts import MicroBatches, RankBatch, RankId, SampleId, SampleRef
from torchspec.data.order import sample_seed
from torchspec.drafts.draft import Batch
from torchspec.insist import insist_and_wait
from torchspec.instruments import EMPTY, observe
from torchspec.shards import Segment
from torchspec.store.errors import MissingObject, SizeMismatch, StoreUnavailable
from torchspec.store.geometry import SampleGeometry, segment_rows, shard_suffix, shard_tensors
from torchspec.store.hidden_state_store import HiddenStateStore

IDLE_TOKENS = 8
"""Length of the one all-padding row that a rank without samples trains on, to take part in the collectives."""

MAX_ROUNDS = 10
"""A step whose samples are lost so often in a row has ranks that cannot reach the store."""

Windows = dict[str, list[Tensor]]
"""Object suffix to the rows of the padded batch that it fills, one view for each segment."""
Rows = dict[str, Windows]
"""Store key to where a sample has been copied to."""


@dataclass(frozen=True)
class FetchedStep:
    """One step's work, in host memory."""

    batch: RankBatch
    micro_batches: list[Batch]
    fetch_seconds: float
    """Time spent on the store, without waiting for the controller."""


class SampleFetcher:
    """Copies samples out of the store into padded batches; the store's buffers are free again at once.

    Args:
        rank: this rank's number among those that share its samples.
        seed: the run's.
    """

    def __init__(self, store: HiddenStateStore, geometry: SampleGeometry, rank: int, seed: int, pin_memory: bool):
        self.store, self.geometry, self.rank, self.seed, self.pin_memory = store, geometry, rank, seed, pin_memory
        self.bytes_read = 0
        self.get_seconds, self.get_histogram = 0.0, EMPTY

    def fetch(self, micro_batches: MicroBatches, held: Rows) -> tuple[list[Batch], set[SampleId]]:
        """Build every micro-batch, from ``held`` where a sample is there and from the store where not.

        ``held`` is brought up to date. Also returns the samples whose objects are missing or damaged: their rows are
        not to be used.
        """
        missing: set[SampleId] = set()
        batches = []
        for refs in micro_batches:
            batch, places = self._padded(refs)
            for ref, views in zip(refs, places, strict=True):
                try:
                    self._copy(ref, views, held)
                except (MissingObject, SizeMismatch, StoreUnavailable):
                    missing.add(ref.sample)
            batches.append(batch)
        return batches, missing

    def _copy(self, ref: SampleRef, views: Windows, held: Rows) -> None:
        """Fill ``views``. A shard that has no rows of a tensor has no object for it."""
        sharding = self.geometry.sharding
        specs = ref.tensors if sharding is None else shard_tensors(ref.tensors, sharding, ref.num_tokens, self.rank)
        if ref.key in held:
            for suffix, source in held[ref.key].items():
                for window, rows in zip(views[suffix], source, strict=True):
                    window.copy_(rows)
        elif specs:
            started = time.perf_counter()
            buffer = self.store.get(ref.key, specs)
            for suffix, stored in buffer.views.items():
                windows = views[suffix]
                for window, rows in zip(windows, stored.split([len(w) for w in windows]), strict=True):
                    window.copy_(rows)
                self.bytes_read += stored.nbytes
            self.store.release(buffer)
            seconds = time.perf_counter() - started
            self.get_seconds += seconds
            self.get_histogram = observe(self.get_histogram, seconds)
        held[ref.key] = views

    def _padded(self, refs: tuple[SampleRef, ...]) -> tuple[Batch, list[Windows]]:
        """Room for ``refs``, and where each goes: zeros, and no loss, beyond the end of each sample."""
        lengths = [ref.num_tokens for ref in refs] or [0]
        windows, columns = self._layout(lengths)
        tensors = {
            suffix: torch.empty(
                (len(windows), *spec.shape), dtype=getattr(torch, spec.dtype), pin_memory=self.pin_memory
            )
            for suffix, spec in self.geometry.tensors(columns).items()
        }
        places: list[Windows] = [{} for _ in lengths]
        for row, (sample, segment) in enumerate(windows):
            for suffix, tensor in tensors.items():
                rows = segment_rows(suffix, segment)
                filled = rows.stop - rows.start
                tensor[row, filled:].zero_()
                name = suffix if self.geometry.sharding is None else shard_suffix(self.rank, suffix)
                places[sample].setdefault(name, []).append(tensor[row, :filled])
        loss_mask_BS = torch.zeros(len(lengths), max(lengths) or IDLE_TOKENS, dtype=torch.bool)
        for sample, ref in enumerate(refs):
            loss_mask_BS[sample, : ref.num_tokens] = _mask(ref)
        (norm_state,) = {ref.norm_state for ref in refs} or {"post_norm"}
        batch = Batch(
            hs_BSA=tensors["hs"],
            lhs_BSH=tensors["lhs"],
            ids_BS=tensors["ids"],
            loss_mask_BS=loss_mask_BS.pin_memory() if self.pin_memory else loss_mask_BS,
            lengths_B=torch.tensor(lengths),
            seeds_B=torch.tensor([sample_seed(self.seed, *ref.sample) for ref in refs] or [0]),
            norm_state=norm_state,
        )
        return batch, places[: len(refs)]

    def _layout(self, lengths: list[int]) -> tuple[list[tuple[int, Segment]], int]:
        """The rows of the padded batch, for each the number of its sample and the positions it holds; its columns."""
        sharding = self.geometry.sharding
        if sharding is None:
            whole = [(sample, Segment(0, length, length)) for sample, length in enumerate(lengths)]
            return whole, max(lengths) or IDLE_TOKENS
        return list(sharding.windows(lengths, self.rank)), sharding.window_shape(lengths)[1]


class StepStream:
    """The steps of a run for one rank, in order, fetched ahead of the step loop."""

    def __init__(
        self,
        controller: Any,
        rank: RankId,
        fetcher: SampleFetcher,
        first_step: int,
        prefetch_steps: int,
        heldout: bool,
    ):
        self._controller, self._rank, self._fetcher, self._step = controller, rank, fetcher, first_step
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

    @property
    def depth(self) -> int:
        """Steps that are fetched and wait for the step loop."""
        return sum(future.done() for future in tuple(self._ahead))

    def heldout(self) -> list[Batch]:
        """This rank's held-out micro-batches, fetched once and kept in memory; empty where there are none."""
        return self._heldout.result() if self._heldout is not None else []

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _fetch_step(self) -> FetchedStep | None:
        batch: RankBatch | None = insist_and_wait(self._controller.next_batch, self._rank, self._step)
        if batch is None:
            return None
        self._step += 1
        held: Rows = {}
        seconds = 0.0
        missing: set[SampleId] = set()
        for attempt in range(MAX_ROUNDS):
            started = time.perf_counter()
            micro_batches, missing = self._fetcher.fetch(batch.micro_batches, held)
            seconds += time.perf_counter() - started
            said = self._rank, batch.step, attempt, tuple(missing)
            replacement: RankBatch | None = insist_and_wait(self._controller.fetched, *said)
            if replacement is None:
                return FetchedStep(batch, micro_batches, seconds)
            batch = replacement
        names = ", ".join(map(str, sorted(missing)))
        raise MissingObject(f"step {batch.step}: samples were lost {MAX_ROUNDS} times in a row, here {names or 'none'}")

    def _fetch_heldout(self) -> list[Batch]:
        kept: list[Batch] = []
        part = 1
        while micro_batches := self._fetch_part(part):
            kept += micro_batches
            part += 1
        return kept if micro_batches is not None else []  # a part's score could not be compared with the whole's

    def _fetch_part(self, part: int) -> list[Batch] | None:
        """Of the held-out samples; nothing where there are no more, None where they will not all be captured."""
        held: Rows = {}
        attempt = 0
        refs: MicroBatches | None
        while refs := insist_and_wait(self._controller.heldout_batches, self._rank, part):
            micro_batches, missing = self._fetcher.fetch(refs, held)
            if insist_and_wait(self._controller.heldout_fetched, self._rank, part, attempt, tuple(missing)):
                return micro_batches
            attempt += 1
        return None if refs is None else []


def _mask(ref: SampleRef) -> Tensor:
    bits = np.frombuffer(ref.loss_mask, dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(bits, count=ref.num_tokens).astype(np.bool_))
