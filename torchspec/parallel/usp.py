"""USP, Ulysses x ring (arXiv 2405.07719), as an attention backend: several ranks share every sample.

    rows of this rank  --RoPE at true positions-->  q, k, v of all heads
      --Ulysses all-to-all-->  this rank's heads of all rows of its ring rank  --ring-->  attention  --all-to-all-->  o

Only active rows send queries, and only context rows send keys (``nn/chain_rows.py``). Diagonal keys travel with
their queries, so the whole of :func:`chain_attention` runs between the two all-to-alls.

The plan is made on every rank from the same masks of whole samples. What the ranks must agree on, the number of rows of
an all-to-all and of slots in the ring, is the maximum over all of them, at least one. So whatever a mask holds, on one
rank or on all, they issue the same collectives with the same shapes, in the forward as in the backward.

Keys and values of a ring rank lie in *slots*: sample by sample and part by part, ``U * chunk`` each
(``shards.py``), of which those behind the end of the sample stay unused. Queries have slots of their own, from
the first to the last active row of each of those runs.

Shapes: B samples, S longest length, W windows of this rank (B times the parts of the layout), C context rows, R active
rows, U Ulysses ranks, M rows a rank sends, G key/value slots of a ring rank, L query slots, P gathered positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchspec.nn.chain_attention import Block0, chain_attention
from torchspec.nn.chain_rows import ChainRows, active_rows, context_lengths
from torchspec.nn.flash import scatter_rows
from torchspec.parallel.mesh import Sharing
from torchspec.parallel.ring import RingKernel, Run, circulating, gathered, tiles
from torchspec.parallel.ulysses import join_heads, split_heads
from torchspec.shards import ShardFormula, key_value_repeats

if TYPE_CHECKING:
    from torchspec.target.shape import TargetShape


class UspBackend:
    """See the module's docstring.

    Args:
        sharing: among whom.
        target: whose number of heads the draft has.

    Raises:
        ValueError: the query heads cannot be split over the Ulysses ranks.
    """

    def __init__(self, sharing: Sharing, target: TargetShape):
        mesh, self.formula = sharing.mesh, sharing.formula
        self.rank = mesh.get_local_rank("ring") * self.formula.ulysses_size + mesh.get_local_rank("ulysses")
        self.ulysses, self.ring = (mesh.get_group(n) if mesh[n].size() > 1 else None for n in ("ulysses", "ring"))
        self.circulates = self.ring is not None and not sharing.gather_once
        self.repeats = key_value_repeats(target.num_heads, target.num_kv_heads, self.formula.ulysses_size)

    def plan(self, loss_mask_BS: Tensor, lengths_B: Tensor, num_positions: int, device: torch.device) -> UspSequences:
        """Plan this rank's share of a micro-batch: a :data:`Planner`."""
        formula = self.formula
        assert num_positions == formula.halo
        samples = _Samples.of(loss_mask_BS, lengths_B, num_positions)
        slots = _Slots(formula, samples)
        ring_rank = self.rank // formula.ulysses_size
        keys, queries = slots.key_runs(ring_rank), slots.query_runs(ring_rank)
        query_slots = sum(run.stop - run.start for run in queries.values())
        if self.circulates:
            ranks = [(ring_rank - i) % formula.ring_size for i in range(formula.ring_size)]
            schedule = [tiles(queries.values(), slots.key_runs(rank).values()) for rank in ranks]
        else:
            schedule = [tiles(queries.values(), slots.gathered_runs())]
        return UspSequences(
            backend=self,
            rows=_local_rows(formula, self.rank, samples).to(device),
            shape_BS=formula.window_shape(samples.lengths),
            kernel=RingKernel(schedule, query_slots, self.ring if self.circulates else None),
            active=slots.sent(ring_rank, samples.active, queries, query_slots).to(device),
            context=slots.sent(ring_rank, samples.context, keys, slots.key_slots).to(device),
            key_slots=slots.key_slots,
            order_P=slots.gathered_order().to(device),
        )


@dataclass(frozen=True)
class UspSequences:
    """One micro-batch; see ``nn/sequences.py`` for what each method is for."""

    backend: UspBackend
    rows: ChainRows
    shape_BS: tuple[int, int]
    kernel: RingKernel
    active: _Sent
    context: _Sent
    key_slots: int
    order_P: Tensor
    """See :func:`gathered`."""

    def block0(self, k_CKE: Tensor, v_CKE: Tensor) -> Block0:
        kv = self._split_key_values(k_CKE, v_CKE, self.context)
        kv_GKX = scatter_rows(kv, self.context.slot, self.key_slots + 1)[:-1]
        if self.backend.circulates:
            kv_GKX, carrier = circulating(kv_GKX)
        else:
            kv_GKX, carrier = gathered(kv_GKX, self.order_P, self.backend.ring)
        return Block0(self.kernel, (kv_GKX, carrier, self.active.slot))

    def later_keys_values(self, k_RKE: Tensor, v_RKE: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._split_key_values(k_RKE, v_RKE, self.active).chunk(2, dim=-1)
        return k, v

    @torch.compiler.disable  # a compiled layer ends here and goes on behind it: collectives stay as they are written
    def attend(self, q_RQE: Tensor, block0: Block0, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        o = chain_attention(self._split(q_RQE, self.active), block0, keys, values)
        group = self.backend.ulysses
        return o if group is None else join_heads(o, len(q_RQE), group)

    def _split_key_values(self, k: Tensor, v: Tensor, sent: _Sent) -> Tensor:
        """Key and value side by side, of as many heads as the Ulysses ranks need."""
        kv = torch.cat((k, v), dim=-1)
        return self._split(kv if self.backend.repeats == 1 else kv.repeat_interleave(self.backend.repeats, 1), sent)

    def _split(self, x: Tensor, sent: _Sent) -> Tensor:
        group = self.backend.ulysses
        return x if group is None else split_heads(x, sent.rows, group)


Positions = Callable[[int, int, int], Tensor]
"""Sample, start and stop to some of the positions between them."""


class _Sent(NamedTuple):
    """Rows that every rank sends in an all-to-all, M, and the slots of those that arrive; padding goes to the last."""

    rows: int
    slot: Tensor

    def to(self, device: torch.device) -> _Sent:
        return _Sent(self.rows, self.slot.to(device, non_blocking=True))


class _Samples(NamedTuple):
    """The whole samples of a micro-batch, on the CPU."""

    lengths: list[int]
    loss_mask_BS: Tensor
    active_BS: Tensor
    contexts: list[int]
    """Context rows of each sample."""

    @classmethod
    def of(cls, loss_mask_BS: Tensor, lengths_B: Tensor, num_positions: int) -> _Samples:
        active_BS = active_rows(loss_mask_BS, num_positions)
        return cls(lengths_B.tolist(), loss_mask_BS, active_BS, context_lengths(active_BS).tolist())

    def active(self, sample: int, start: int, stop: int) -> Tensor:
        """Active positions from ``start`` to ``stop``."""
        return self.active_BS[sample, start:stop].nonzero().squeeze(1) + start

    def context(self, sample: int, start: int, stop: int) -> Tensor:
        """Context positions from ``start`` to ``stop``."""
        return torch.arange(start, max(start, min(stop, self.contexts[sample])))


class _Slots:
    """Where rows lie in the buffers of each ring rank. Runs are known by the window (of any member) that they hold."""

    def __init__(self, formula: ShardFormula, samples: _Samples):
        self.formula, self.samples = formula, samples
        sizes = [formula.ulysses_size * formula.chunk(n) for n in samples.lengths for _ in range(formula.parts)]
        *self._starts, self.key_slots = accumulate(sizes, initial=0)

    def key_runs(self, ring_rank: int) -> dict[int, Run]:
        runs = {}
        for window, slot in enumerate(self._starts):
            sample, part = divmod(window, self.formula.parts)
            start, stop = self.formula.ring_segment(self.samples.lengths[sample], ring_rank, part)
            runs[window] = Run(sample, start, stop, slot)
        return runs

    def query_runs(self, ring_rank: int) -> dict[int, Run]:
        runs, slot = {}, 0
        for window, (sample, start, stop, _) in self.key_runs(ring_rank).items():
            active = self.samples.active(sample, start, stop)
            if len(active):
                first, end = int(active[0]), int(active[-1]) + 1
                runs[window] = Run(sample, first, end, slot)
                slot += end - first
        return runs

    def gathered_runs(self) -> list[Run]:
        ends = accumulate(self.samples.contexts)
        return [Run(b, 0, n, end - n) for b, (n, end) in enumerate(zip(self.samples.contexts, ends, strict=True))]

    def gathered_order(self) -> Tensor:
        """For each position of :meth:`gathered_runs`, where it lies in the buffers of all ring ranks together."""
        wholes = self.gathered_runs()
        order_P = torch.empty(sum(self.samples.contexts), dtype=torch.int64)
        for ring_rank in range(self.formula.ring_size):
            for sample, start, stop, slot in self.key_runs(ring_rank).values():
                positions = self.samples.context(sample, start, stop)
                order_P[wholes[sample].slot + positions] = ring_rank * self.key_slots + slot + positions - start
        return order_P

    def sent(self, ring_rank: int, positions: Positions, runs: dict[int, Run], last: int) -> _Sent:
        """What the members of a ring rank exchange.

        Args:
            positions: those that their owner sends.
            runs: where they go.
            last: the slot for padding.
        """
        size = self.formula.ulysses_size
        members = range(ring_rank * size, (ring_rank + 1) * size)
        arriving = [self._arriving(rank, positions, runs) for rank in members]
        if size == 1:  # nothing is exchanged, so nothing is padded
            return _Sent(len(arriving[0]), arriving[0])
        rows = max(1, *(self._count(rank, positions) for rank in range(self.formula.size)))
        return _Sent(rows, torch.cat([F.pad(slot, (0, rows - len(slot)), value=last) for slot in arriving]))

    def _arriving(self, rank: int, positions: Positions, runs: dict[int, Run]) -> Tensor:
        """Slots of a rank's rows, in the order of its windows."""
        slots = [torch.empty(0, dtype=torch.int64)]
        for window, (sample, segment) in enumerate(self.formula.windows(self.samples.lengths, rank)):
            if window in runs:
                run = runs[window]
                slots.append(run.slot + positions(sample, segment.start, segment.stop) - run.start)
        return torch.cat(slots)

    def _count(self, rank: int, positions: Positions) -> int:
        windows = self.formula.windows(self.samples.lengths, rank)
        return sum(len(positions(sample, segment.start, segment.stop)) for sample, segment in windows)


def _local_rows(formula: ShardFormula, rank: int, samples: _Samples) -> ChainRows:
    """The rows of a rank's windows."""
    shape = formula.window_shape(samples.lengths)
    mask_WS, active_WS = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    context, starts = [], []
    for row, (sample, (start, stop, halo_stop)) in enumerate(formula.windows(samples.lengths, rank)):
        mask_WS[row, : halo_stop - start] = samples.loss_mask_BS[sample, start:halo_stop]
        active_WS[row, : stop - start] = samples.active_BS[sample, start:stop]
        context.append(len(samples.context(sample, start, stop)))
        starts.append(start)
    return ChainRows.of_windows(mask_WS, active_WS, torch.tensor(context), torch.tensor(starts), formula.halo)
