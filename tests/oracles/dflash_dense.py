"""A dense, plainly written DFlash step: the answer that the fast code is compared with.

It shares no code with the product and takes no shortcut: one block at a time, every query with every key it may see in
an explicit list, full logits, full softmaxes, and gradients by torch's autograd.

The statement it makes, for a sample of tokens x_0 .. x_{n-1} with target states g_p, and a block anchored at a:

- the context is c_p = rms(W_fc g_p) for p = 0 .. a - 1, at the rotary positions p; the same in all layers;
- slot k = 0 .. B - 1 starts as the target's embedding of x_a (k = 0) or of the mask token, at the position a + k;
- in a layer, every slot attends to the context's keys and to those of all slots, itself and later ones included;
- slot k > 0 is compared with token a + k, if that exists and is loss-masked: by the cross-entropy with the token, or
  with what the target computed at position a + k - 1, through the target's head either way;
- the loss is the sum over k of weight_k times the summed cross-entropies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class DenseResult:
    total: Tensor
    loss: list[Tensor]
    supervised: list[int]
    correct: list[int]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def turn(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary embedding of one head's x [E]: channels c and c + E/2 are a pair."""
    half = len(x) // 2
    angles = [position / theta ** (c / half) for c in range(half)]
    cos = torch.tensor([math.cos(angle) for angle in angles], dtype=x.dtype)
    sin = torch.tensor([math.sin(angle) for angle in angles], dtype=x.dtype)
    first, second = x[:half], x[half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


class Layer:
    def __init__(self, weights: dict[str, Tensor], number: int, heads: int, kv_heads: int, theta: float, eps: float):
        prefix = f"layers.{number}."
        self.w = {n.removeprefix(prefix).removesuffix(".weight"): x for n, x in weights.items() if n.startswith(prefix)}
        self.heads, self.kv_heads, self.theta, self.eps = heads, kv_heads, theta, eps

    def key_value(self, x: Tensor, position: int) -> tuple[list[Tensor], list[Tensor]]:
        """Of one row, by head."""
        keys = (self.w["self_attn.k_proj"] @ x).chunk(self.kv_heads)
        values = (self.w["self_attn.v_proj"] @ x).chunk(self.kv_heads)
        normed = [rms(k, self.w["self_attn.k_norm"], self.eps) for k in keys]
        return [turn(k, position, self.theta) for k in normed], list(values)

    def forward(self, rows: list[Tensor], positions: list[int], context: list[Tensor]) -> list[Tensor]:
        normed = [rms(x, self.w["input_layernorm"], self.eps) for x in rows]
        seen = [self.key_value(c, p) for p, c in enumerate(context)]
        seen += [self.key_value(x, p) for p, x in zip(positions, normed, strict=True)]
        outputs = []
        for row, x, position in zip(rows, normed, positions, strict=True):
            attended = []
            for head, q in enumerate((self.w["self_attn.q_proj"] @ x).chunk(self.heads)):
                shared = head // (self.heads // self.kv_heads)
                q = turn(rms(q, self.w["self_attn.q_norm"], self.eps), position, self.theta)
                scores = torch.stack([q @ keys[shared] for keys, _ in seen]) / math.sqrt(len(q))
                attended.append(torch.softmax(scores, 0) @ torch.stack([values[shared] for _, values in seen]))
            h = row + self.w["self_attn.o_proj"] @ torch.cat(attended)
            y = rms(h, self.w["post_attention_layernorm"], self.eps)
            gate = torch.nn.functional.silu(self.w["mlp.gate_proj"] @ y)
            outputs.append(h + self.w["mlp.down_proj"] @ (gate * (self.w["mlp.up_proj"] @ y)))
        return outputs


def dense_step(
    samples: list[dict],
    weights: dict[str, Tensor],
    embedding: Tensor,
    target_head: Tensor,
    mask_token: int,
    slot_weights: list[float],
    soft: bool,
    layers: int,
    heads: int,
    kv_heads: int,
    theta: float,
    eps: float,
) -> DenseResult:
    """The sum over samples, each a dict of aux [S, A], last [S, H] (after the target's final norm), ids [S], loss_mask
    [S], and the anchors of its blocks."""
    stack = [Layer(weights, i, heads, kv_heads, theta, eps) for i in range(layers)]
    slots = len(slot_weights)
    loss: list[list[Tensor]] = [[] for _ in range(slots)]
    supervised, correct = [0] * slots, [0] * slots
    for sample in samples:
        ids = sample["ids"].tolist()
        context = [rms(weights["fc.weight"] @ g, weights["hidden_norm.weight"], eps) for g in sample["aux"]]
        for anchor in sample["anchors"]:
            rows = [embedding[ids[anchor]]] + [embedding[mask_token]] * slots
            for layer in stack:
                rows = layer.forward(rows, list(range(anchor, anchor + slots + 1)), context[:anchor])
            for k in range(1, slots + 1):
                p = anchor + k
                if p >= len(ids) or not sample["loss_mask"][p]:
                    continue
                logits = target_head @ rms(rows[k], weights["norm.weight"], eps)
                target = torch.softmax(target_head @ sample["last"][p - 1], 0)
                if not soft:
                    target = torch.zeros_like(target)
                    target[ids[p]] = 1.0
                loss[k - 1].append(-(target * torch.log_softmax(logits, 0)).sum())
                supervised[k - 1] += 1
                correct[k - 1] += int(logits.argmax() == target.argmax())
    nothing = embedding.new_zeros(())
    sums = [torch.stack(terms).sum() if terms else nothing for terms in loss]
    total = torch.stack([w * x for w, x in zip(slot_weights, sums, strict=True)]).sum()
    return DenseResult(total, sums, supervised, correct)
