"""DFlash's draft and its training forward (arXiv 2602.06036): blocks of masked tokens, guessed in one pass.

    target states g_p --fc--> hidden_norm --> c_p: keys and values of every layer, at position p
    [x_a, MASK, .., MASK] --embedding--> layers --> norm --> target's head --> slot k guesses x_{a+k}
                                           | queries of a block see c_0 .. c_{a-1} and the whole block

A block starts at an *anchor* a, whose token is known and whose target state is not: so stands a server after each
verification. Hence the context ends strictly before the anchor, and slot 0 guesses nothing. Slot k is scored where
token a + k is one to be learnt; a block may reach beyond its sample, as it does in a server, and is not scored there.
(The paper's anchors end at S - B, which learns the ends of answers less, and short answers not at all.)

Anchors are drawn for each sample from its own seed, on the CPU. The embedding and the head are the target's and are not
trained. Which keys a query sees is decided by the kernel calls that it takes part in (:class:`Tile`): no mask is made.

Shapes: B samples, S padded length, A target states concatenated (features * H), H hidden size, C context rows,
N blocks, W slots of a block (``block_size``), R rows (N * W), P tokens that are guessed, M guesses, Q query heads,
K key/value heads, X queries of a block that share a key (W * Q / K), n blocks and L context rows of a tile, E head
dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torchspec.drafts.dflash.spec import DFlashSpec
from torchspec.drafts.draft import Batch, Draft, DraftOptions, DraftOutput
from torchspec.nn.flash import block_attention, block_attention_backward, merge_, scatter_rows
from torchspec.nn.layers import MLP, AttentionProjections, RMSNorm
from torchspec.nn.losses import HardTeacher, Students, Teacher, accumulating, compute_dtype, fused_cross_entropy
from torchspec.nn.rope import rotary_table, rotate
from torchspec.target.head import TargetHead
from torchspec.target.shape import TargetShape

TILE = 128
"""Positions from the first to the last anchor of a tile, at most."""


def draw_anchors(loss_mask_S: Tensor, seed: int, block_size: int, limit: int) -> Tensor:
    """Where the blocks of a sample start, increasing: ``limit`` of its loss tokens, or all if there are no more.

    Only those are drawn that have another loss token in the block behind them. The draw is without replacement and
    depends on the arguments alone.
    """
    count_S = loss_mask_S.long().cumsum(0)
    end_S = (torch.arange(len(count_S)) + block_size - 1).clamp(max=len(count_S) - 1)
    candidates = (loss_mask_S & (count_S[end_S] > count_S)).nonzero().squeeze(1)
    if len(candidates) <= limit:
        return candidates
    chosen = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))[:limit]
    return candidates[chosen.sort().values]


class Tile(NamedTuple):
    """Blocks and context rows of one sample that meet in one call of the flash kernel.

    Either each block sees all of the rows, or the call is causal: a block with its anchor d positions behind the first
    of the rows sees d of them, which are those that query d - 1 of a causal attention sees.
    """

    blocks: slice
    context: slice
    first: int | None
    """Position of the first context row in a causal call, else None."""

    def queries(self, x_NX: Tensor, anchor_N: Tensor) -> Tensor:
        """The blocks' part of a tensor [N, X, ..] as the kernel takes it: [1, n * X, ..], or causal [X, L, ..]."""
        x_nX = x_NX[self.blocks]
        if self.first is None:
            return x_nX.flatten(0, 1).unsqueeze(0)
        return scatter_rows(x_nX, self._rows(anchor_N), self.context.stop - self.context.start).transpose(0, 1)

    def results(self, y: Tensor, anchor_N: Tensor) -> Tensor:
        """Back from what the kernel made of the queries to [n, X, ..]."""
        if self.first is None:
            return y.squeeze(0).unflatten(0, (self.blocks.stop - self.blocks.start, -1))
        return y.transpose(0, 1)[self._rows(anchor_N)]

    def _rows(self, anchor_N: Tensor) -> Tensor:
        assert self.first is not None
        return anchor_N[self.blocks] - (self.first + 1)


def tiles_of(anchors: Tensor, block: int, row: int) -> Iterator[Tile]:
    """Tiles of a sample, whose blocks and context rows are numbered from ``block`` and ``row`` on.

    Anchors that are close together share what lies before the first of them; the rest is a causal call.
    """
    start = 0
    while start < len(anchors):
        first = int(anchors[start])
        stop = int(torch.searchsorted(anchors, first + TILE, right=True))
        last = int(anchors[stop - 1])
        if first > 0:
            yield Tile(slice(block + start, block + stop), slice(row, row + first), None)
        if last > first:
            yield Tile(slice(block + start + 1, block + stop), slice(row + first, row + last), first)
        start = stop


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a micro-batch. ``*_flat`` index the flattened [B * S]. N, and so all the others, may be 0."""

    size: int
    """W."""
    anchor_N: Tensor
    anchor_flat_N: Tensor
    context_C: Tensor
    """Positions of the context: of each sample those before its last anchor."""
    context_flat_C: Tensor
    tiles: tuple[Tile, ...]
    token_flat_P: Tensor
    """Tokens that at least one block guesses."""
    students: Students
    """Row n * W + k is slot k of block n, and its guess is position k - 1. Stays on the CPU."""

    @classmethod
    def plan(cls, loss_mask_BS: Tensor, seeds_B: Tensor, block_size: int, limit: int) -> Blocks:
        """Plan a batch on the CPU; the mask is False on padding."""
        assert loss_mask_BS.device.type == seeds_B.device.type == "cpu"
        length = loss_mask_BS.shape[1]
        anchors = [
            draw_anchors(mask_S, seed, block_size, limit)
            for mask_S, seed in zip(loss_mask_BS, seeds_B.tolist(), strict=True)
        ]
        tiles: list[Tile] = []
        contexts = []
        block = row = 0
        for anchor_n in anchors:
            tiles += tiles_of(anchor_n, block, row)
            contexts.append(torch.arange(int(anchor_n[-1]) if len(anchor_n) else 0))
            block, row = block + len(anchor_n), row + len(contexts[-1])

        def flat(positions: list[Tensor]) -> Tensor:
            return torch.cat([b * length + x for b, x in enumerate(positions)])

        anchor_N, anchor_flat_N = torch.cat(anchors), flat(anchors)
        step_k = torch.arange(1, block_size)
        reached_Nk = anchor_N.unsqueeze(1) + step_k < length
        flat_Nk = (anchor_flat_N.unsqueeze(1) + step_k).where(reached_Nk, 0)
        block_M, position_M = (reached_Nk & loss_mask_BS.flatten()[flat_Nk]).nonzero().unbind(1)
        token_flat_P, teacher_M = flat_Nk[block_M, position_M].unique(return_inverse=True)
        row_M = block_M * block_size + position_M + 1
        order_M = teacher_M.argsort(stable=True)
        students = Students(row_M[order_M], teacher_M[order_M], position_M[order_M])
        context_C, context_flat_C = torch.cat(contexts), flat(contexts)
        return cls(block_size, anchor_N, anchor_flat_N, context_C, context_flat_C, tuple(tiles), token_flat_P, students)

    def to(self, device: torch.device) -> Blocks:
        names = "anchor_N", "anchor_flat_N", "context_C", "context_flat_C", "token_flat_P"
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


class BlockAttention(torch.autograd.Function):
    """Softmax attention of each block over its own keys and those of the context before its anchor.

    The parts of a softmax are merged by their log-sum-exps, and the backward of each is the kernel's, called with the
    merged output and log-sum-exp (see ``nn/flash.py``). Queries that share a key/value head lie side by side in X.
    """

    @staticmethod
    def forward(
        ctx: Any, blocks: Blocks, q_NXKE: Tensor, k_NWKE: Tensor, v_NWKE: Tensor, k_CKE: Tensor, v_CKE: Tensor
    ) -> Tensor:
        anchor_N = blocks.anchor_N
        o, lse_NXK = block_attention(q_NXKE, k_NWKE, v_NWKE, causal=False)
        o_NXKE = accumulating(o)
        for tile in blocks.tiles:
            q = tile.queries(q_NXKE, anchor_N)
            k, v = (x[tile.context].expand(len(q), -1, -1, -1) for x in (k_CKE, v_CKE))
            part = block_attention(q, k, v, causal=tile.first is not None)
            merge_(o_NXKE[tile.blocks], lse_NXK[tile.blocks], *(tile.results(x, anchor_N) for x in part))
        o_NXKE = o_NXKE.to(q_NXKE.dtype)
        ctx.save_for_backward(q_NXKE, k_NWKE, v_NWKE, k_CKE, v_CKE, o_NXKE, lse_NXK)
        ctx.blocks = blocks
        return o_NXKE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_NXKE: Tensor) -> tuple[Tensor | None, ...]:
        q_NXKE, k_NWKE, v_NWKE, k_CKE, v_CKE, o_NXKE, lse_NXK = ctx.saved_tensors
        blocks = ctx.blocks
        softmax = do_NXKE, q_NXKE, o_NXKE, lse_NXK
        dq, dk_NWKE, dv_NWKE = block_attention_backward(do_NXKE, q_NXKE, k_NWKE, v_NWKE, o_NXKE, lse_NXK, False)
        dq_NXKE = accumulating(dq)
        dk_CKE, dv_CKE = (torch.zeros_like(accumulating(x)) for x in (k_CKE, v_CKE))
        for tile in blocks.tiles:
            do, q, o, lse = (tile.queries(x, blocks.anchor_N) for x in softmax)
            k, v = (x[tile.context].expand(len(q), -1, -1, -1) for x in (k_CKE, v_CKE))
            dq, dk, dv = block_attention_backward(do, q, k, v, o, lse, causal=tile.first is not None)
            dq_NXKE[tile.blocks] += tile.results(dq, blocks.anchor_N)
            dk_CKE[tile.context] += dk.sum(0)
            dv_CKE[tile.context] += dv.sum(0)
        return None, dq_NXKE.to(q_NXKE.dtype), dk_NWKE, dv_NWKE, dk_CKE.to(k_CKE.dtype), dv_CKE.to(v_CKE.dtype)


class Rotations(NamedTuple):
    """Cosines and sines of the rows of the blocks and of the context."""

    block_RE: tuple[Tensor, Tensor]
    context_CE: tuple[Tensor, Tensor]


class Attention(AttentionProjections):
    """The projections around :class:`BlockAttention`, with a norm of each query and key head as in Qwen3."""

    def __init__(self, target: TargetShape):
        super().__init__(target, target.hidden_size)
        self.q_norm = RMSNorm(target.head_dim, target.rms_norm_eps)
        self.k_norm = RMSNorm(target.head_dim, target.rms_norm_eps)

    def forward(self, x_RH: Tensor, context_CH: Tensor, blocks: Blocks, rotations: Rotations) -> Tensor:
        q_RQE = rotate(self.q_norm(self.heads(self.q_proj, x_RH)), *rotations.block_RE)
        own = (x.unflatten(0, (-1, blocks.size)) for x in self._keys_values(x_RH, rotations.block_RE))
        grouped = q_RQE.unflatten(1, (self.num_kv_heads, -1)).unflatten(0, (-1, blocks.size)).transpose(2, 3)
        context = self._keys_values(context_CH, rotations.context_CE)
        o_NXKE: Tensor = BlockAttention.apply(blocks, grouped.flatten(1, 2), *own, *context)
        return self.o_proj(o_NXKE.view(grouped.shape).transpose(2, 3).reshape(len(x_RH), self.o_proj.in_features))

    def _keys_values(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        k, v = (self.heads(projection, x) for projection in (self.k_proj, self.v_proj))
        return rotate(self.k_norm(k), *rotation), v


class DecoderLayer(nn.Module):
    def __init__(self, target: TargetShape):
        super().__init__()
        self.self_attn = Attention(target)
        self.mlp = MLP(target.hidden_size, target.intermediate_size)
        self.input_layernorm = RMSNorm(target.hidden_size, target.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(target.hidden_size, target.rms_norm_eps)

    def forward(self, x_RH: Tensor, context_CH: Tensor, blocks: Blocks, rotations: Rotations) -> Tensor:
        """The residual stream of the blocks. The context is the same in all layers, and not normed again."""
        x_RH = x_RH + self.self_attn(self.input_layernorm(x_RH), context_CH, blocks, rotations)
        return x_RH + self.mlp(self.post_attention_layernorm(x_RH))


class DFlashDraft(Draft):
    spec: DFlashSpec

    def __init__(self, spec: DFlashSpec, options: DraftOptions | None = None):
        super().__init__(spec, options)
        target = spec.target
        self.fc = nn.Linear(len(spec.layers) * target.hidden_size, target.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(target.hidden_size, target.rms_norm_eps)
        self.layers = nn.ModuleList(DecoderLayer(target) for _ in range(spec.num_layers))
        self.norm = RMSNorm(target.hidden_size, target.rms_norm_eps)

    def units(self) -> list[nn.Module]:
        return list(self.layers)

    def compile(self) -> None:
        """The part of a layer that does not depend on where the blocks are."""
        for module in self.modules():
            if isinstance(module, MLP):
                module.compile(dynamic=True)

    def forward(self, batch: Batch, head: TargetHead) -> DraftOutput:
        """All blocks of a micro-batch and their loss, which is divided by the weights of the slots that are scored."""
        self.check(batch, head)
        spec = self.spec
        blocks = Blocks.plan(batch.loss_mask_BS, batch.seeds_B, spec.block_size, spec.num_anchors)
        blocks = blocks.to(batch.hs_BSA.device)
        sums = fused_cross_entropy(
            self.norm(self._residual(batch, head, blocks)),
            head.draft_head_DH,
            self._teacher(batch, head, blocks),
            blocks.students,
            spec.position_weights,
            self.options.loss_chunk_tokens,
        )
        denominator = (sums.counted_K * sums.counted_K.new_tensor(spec.position_weights)).sum()
        return DraftOutput(sums.total, denominator, *sums[1:])

    def _residual(self, batch: Batch, head: TargetHead, blocks: Blocks) -> Tensor:
        """What leaves the last layer, [R, H]."""
        dtype, slots = compute_dtype(self.fc.weight), self.spec.block_size
        ids_NW = batch.ids_BS.new_full((len(blocks.anchor_N), slots), self.spec.mask_token_id)
        ids_NW[:, 0] = batch.ids_BS.flatten()[blocks.anchor_flat_N]
        x_RH = (head.embed(ids_NW.flatten()) * head.embedding_scale).to(dtype)
        context_CH = self.hidden_norm(self.fc(batch.hs_BSA.flatten(0, 1)[blocks.context_flat_C].to(dtype)))
        rotations = self._rotations(batch, blocks, dtype)
        for layer in self.layers:
            x_RH = self.run(layer, x_RH, context_CH, blocks, rotations)
        return x_RH

    def _rotations(self, batch: Batch, blocks: Blocks, dtype: torch.dtype) -> Rotations:
        slots = self.spec.block_size
        positions = torch.arange(batch.ids_BS.shape[1] + slots, device=blocks.anchor_N.device)
        table = rotary_table(self.spec.target, positions, dtype)
        position_R = (blocks.anchor_N.unsqueeze(1) + positions[:slots]).flatten()
        cos_RE, sin_RE = (x[position_R] for x in table)
        cos_CE, sin_CE = (x[blocks.context_C] for x in table)
        return Rotations((cos_RE, sin_RE), (cos_CE, sin_CE))

    def _teacher(self, batch: Batch, head: TargetHead, blocks: Blocks) -> Teacher:
        """The tokens themselves, or what the target thought of them one position before."""
        if self.spec.loss == "ce":
            return HardTeacher(batch.ids_BS.flatten()[blocks.token_flat_P].long(), self.spec.target.vocab_size)
        return head.teacher(batch.lhs_BSH.flatten(0, 1)[blocks.token_flat_P - 1], batch.norm_state)
