"""Block-0 attention over a ring of ranks, exactly: partial softmaxes merged by their log-sum-exps.

Queries stay; keys and values of the other ranks come by (Ring Attention, arXiv 2310.01889). They do not change over the
positions of a chain, so there are two ways to have them:

    gathered      all-gathered once a micro-batch and kept; their gradients add up over the positions and are
                  reduce-scattered once. Costs the memory of all keys and values of this rank's heads.
    circulating   sent around once each position, and once more in its backward, where their gradients travel along.

Gradients of keys and values add up in float32 either way: autograd sees them through a *carrier*, a float32 tensor
without memory of its own that stands for them.

Which queries meet which keys is decided beforehand, as a list of tiles. A tile is one call of the flash kernel: queries
of one sample with keys that all come before them (full), or with the keys of their own positions (causal, square).
Later keys and padding are in no tile. The backward calls each tile's kernel with the output and log-sum-exp of the
whole softmax, diagonal terms included, as ``nn/chain_attention.py`` explains.

Shapes: R query rows, L query slots, G key/value slots, Q query heads, K key/value heads (those of this rank), E head
dimension. ``kv_GKX`` has a row's key and value side by side, X = 2E.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchspec.nn.flash import block_attention, block_attention_backward, merge_, scatter_rows
from torchspec.nn.losses import accumulating


class Run(NamedTuple):
    """Positions ``start`` to ``stop`` of a sample, at the slots from ``slot`` on."""

    sample: int
    start: int
    stop: int
    slot: int

    def slots(self, start: int, stop: int) -> slice:
        return slice(self.slot + start - self.start, self.slot + stop - self.start)


class Tile(NamedTuple):
    """Slots of the queries and of the keys that they meet in one call of the kernel."""

    queries: slice
    keys: slice
    causal: bool


def tiles(queries: Iterable[Run], keys: Collection[Run]) -> list[Tile]:
    """All causal pairs. A run of keys lies before a run of queries, or behind it, or covers it."""
    found = []
    for q in queries:
        for k in keys:
            if q.sample != k.sample or k.start >= q.stop or k.start == k.stop:
                continue
            before = min(k.stop, q.start)
            if k.start < before:
                found.append(Tile(q.slots(q.start, q.stop), k.slots(k.start, before), causal=False))
            if k.stop > q.start:
                assert k.start <= q.start and q.stop <= k.stop
                found.append(Tile(q.slots(q.start, q.stop), k.slots(q.start, q.stop), causal=True))
    return found


class RingKernel:
    """The kernel of :func:`chain_attention` over tiles.

    Its tensors: kv_GKX, its carrier, and slot_R, where each query goes among the L slots (L is the place of padding).

    Args:
        schedule: the tiles with this rank's own keys, with those of the rank before it in the ring, and so on; one
            entry where keys are gathered.
        query_slots: L.
        group: the ring that keys circulate in; None where they are gathered.
    """

    def __init__(self, schedule: Sequence[Sequence[Tile]], query_slots: int, group: dist.ProcessGroup | None):
        self.schedule, self.query_slots, self.group = schedule, query_slots, group

    def attend(self, q_RQE: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        kv_GKX, _, slot_R = tensors
        q_LQE = self._slotted(q_RQE, slot_R)
        o_LQE = torch.zeros_like(accumulating(q_LQE))
        lse_LQ = torch.full_like(o_LQE[..., 0], -torch.inf)
        for block, now in zip(self._blocks(kv_GKX), self.schedule, strict=True):
            for tile in now:
                k, v = block[tile.keys].unsqueeze(0).chunk(2, dim=-1)
                o, lse = block_attention(q_LQE[tile.queries].unsqueeze(0), k, v, tile.causal)
                merge_(o_LQE[tile.queries], lse_LQ[tile.queries], o[0], lse[0])
        return o_LQE[slot_R], lse_LQ[slot_R]

    def gradients(
        self, do_RQE: Tensor, q_RQE: Tensor, o_RQE: Tensor, lse_RQ: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        kv_GKX, _, slot_R = tensors
        slotted = [self._slotted(x, slot_R) for x in (do_RQE, q_RQE, o_RQE, lse_RQ)]
        dq_LQE = torch.zeros_like(accumulating(slotted[1]))
        travelling: _Transfer | None = None
        for block, now in zip(self._blocks(kv_GKX), self.schedule, strict=True):
            dblock = torch.zeros_like(accumulating(block))
            for tile in now:
                do, q, o, lse = (x[tile.queries].unsqueeze(0) for x in slotted)
                k, v = block[tile.keys].unsqueeze(0).chunk(2, dim=-1)
                dq, dk, dv = block_attention_backward(do, q, k, v, o, lse, tile.causal)
                dq_LQE[tile.queries] += dq[0]
                dblock[tile.keys] += torch.cat((dk[0], dv[0]), dim=-1)
            if travelling is not None:  # what the ranks before this one have added to the same block
                dblock += travelling.wait()
            if self.group is not None:
                travelling = _Transfer(dblock, self.group)
        dkv_GKX = dblock if travelling is None else travelling.wait()
        return dq_LQE[slot_R], (None, dkv_GKX, None)

    def _slotted(self, x_R: Tensor, slot_R: Tensor) -> Tensor:
        """Rows at their slots, zeros elsewhere; the padding is left behind the last slot."""
        return scatter_rows(x_R, slot_R, self.query_slots + 1)

    def _blocks(self, kv_GKX: Tensor) -> Iterator[Tensor]:
        """Keys and values in the order of the schedule; the next ones are on their way while these are worked on."""
        for _ in self.schedule[1:]:
            assert self.group is not None
            transfer = _Transfer(kv_GKX, self.group)
            yield kv_GKX
            kv_GKX = transfer.wait()
        yield kv_GKX


class _Transfer:
    """A tensor on its way to the next rank of a ring, while the previous rank's comes here."""

    def __init__(self, x: Tensor, group: dist.ProcessGroup):
        rank, size = group.rank(), group.size()
        self._sent, self._received = x, torch.empty_like(x)
        self._work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x, group=group, group_peer=(rank + 1) % size),
                dist.P2POp(dist.irecv, self._received, group=group, group_peer=(rank - 1) % size),
            ]
        )

    def wait(self) -> Tensor:
        for work in self._work:
            work.wait()
        return self._received


def circulating(kv_GKX: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's keys and values, and their carrier."""
    return kv_GKX.detach(), _Carried.apply(kv_GKX)


def gathered(kv_GKX: Tensor, order_P: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Keys and values of all ranks of a ring, in an order of one's own, and their carrier.

    Args:
        order_P: for each row of the result, its rank times G plus its slot there.
        group: None for a ring of one rank.
    """
    return _Gathered.apply(kv_GKX, order_P, group)


class _Carried(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv_GKX: Tensor) -> Tensor:
        ctx.dtype = kv_GKX.dtype
        return _carrier(kv_GKX)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dcarrier_GKX: Tensor) -> Tensor:
        return dcarrier_GKX.to(ctx.dtype)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv_GKX: Tensor, order_P: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        all_kv = kv_GKX
        if group is not None:
            all_kv = kv_GKX.new_empty(group.size() * len(kv_GKX), *kv_GKX.shape[1:])
            dist.all_gather_single(all_kv, kv_GKX.contiguous(), group=group)
        kv_PKX = all_kv[order_P]
        ctx.save_for_backward(order_P)
        ctx.group, ctx.slots, ctx.dtype = group, len(kv_GKX), kv_GKX.dtype
        ctx.mark_non_differentiable(kv_PKX)
        return kv_PKX, _carrier(kv_PKX)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, dcarrier_PKX: Tensor) -> tuple[Tensor, None, None]:
        (order_P,) = ctx.saved_tensors
        ranks = 1 if ctx.group is None else ctx.group.size()
        dall = scatter_rows(dcarrier_PKX, order_P, ranks * ctx.slots)
        dkv_GKX = dall
        if ctx.group is not None:
            dkv_GKX = dall.new_empty(ctx.slots, *dall.shape[1:])
            dist.reduce_scatter_single(dkv_GKX, dall, group=ctx.group)
        return dkv_GKX.to(ctx.dtype), None, None


def _carrier(kv: Tensor) -> Tensor:
    return accumulating(kv.new_zeros(())).expand(kv.shape)
