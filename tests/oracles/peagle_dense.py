"""A dense, plainly written P-EAGLE step: the answer that the fast code is compared with.

It shares no code with the product and takes no shortcut: one sample at a time, one list of all rows, one explicit mask
over all of them in every layer, full logits of both heads, full softmaxes, and gradients by torch's autograd.

The statement it makes, for a sample of tokens x_0 .. x_{n-1}, with rows (a, k) of anchor a and position k = 0 .. K-1:

- row (a, 0) reads the aux state g_a and the token x_{a+1}; row (a, k > 0) reads ``mask_hidden`` and the mask token;
- its rotary position is a + k;
- it attends to rows (b, 0) of b <= a, and to its own rows (a, j) of j <= k;
- it is compared with what the target computed at position a + 1 + k, if that position exists. Supervised, counted and
  the loss are as in ``eagle3_dense.py``.

:func:`served_logits` states the same a second time, in the way of a server: for one anchor, real rows and mask rows are
one sequence under a plain causal mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.oracles.eagle3_dense import DenseResult, normed_aux, rms, turn


def through_layers(
    weights: dict[str, Tensor],
    h: Tensor,
    embedded: Tensor,
    positions: Tensor,
    mask: Tensor,
    heads: int,
    kv_heads: int,
    theta: float,
    eps: float,
) -> Tensor:
    """What the head reads of rows [N, H], whose tokens are ``embedded`` [N, H]; ``mask`` [N, N] says who sees whom."""
    number = 0
    while f"layers.{number}.mlp.up_proj.weight" in weights:
        prefix = f"layers.{number}."
        w = {name.split(".")[-2]: value for name, value in weights.items() if name.startswith(prefix)}
        if number == 0:
            x = torch.cat([rms(embedded, w["input_layernorm"], eps), rms(h, w["hidden_norm"], eps)], dim=-1)
        else:
            x = rms(h, w["input_layernorm"], eps)
        q = turn((x @ w["q_proj"].T).view(len(x), heads, -1), positions, theta)
        k = turn((x @ w["k_proj"].T).view(len(x), kv_heads, -1), positions, theta)
        v = (x @ w["v_proj"].T).view(len(x), kv_heads, -1)
        out = torch.empty_like(q)
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = (q[:, head] @ k[:, group].T / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
            out[:, head] = torch.softmax(scores, dim=-1) @ v[:, group]
        h = h + out.flatten(1) @ w["o_proj"].T
        y = rms(h, w["post_attention_layernorm"], eps)
        h = h + (torch.nn.functional.silu(y @ w["gate_proj"].T) * (y @ w["up_proj"].T)) @ w["down_proj"].T
        number += 1
    return rms(h, weights["norm.weight"], eps)


def dense_sample(
    weights: dict[str, Tensor],
    embedding: Tensor,
    target_head: Tensor,
    draft_ids: Tensor,
    mask_token: int,
    aux: Tensor,
    last: Tensor,
    ids: Tensor,
    loss_mask: Tensor,
    position_weights: list[float],
    heads: int,
    kv_heads: int,
    theta: float,
    eps: float,
) -> DenseResult:
    """One sample without padding: aux [S, A], last [S, H] (after the target's final norm), ids [S], loss_mask [S]."""
    length, count = len(ids), len(position_weights)
    target_logits = last @ target_head.T
    in_vocabulary = torch.isin(target_logits.argmax(-1), draft_ids)
    target_probabilities = torch.softmax(target_logits[:, draft_ids], dim=-1)
    result = DenseResult(aux.new_zeros(()), [], [], [], [])

    rows = [(a, k) for k in range(count) for a in range(length)]
    anchor, depth = (torch.tensor(part) for part in zip(*rows, strict=True))
    tokens = [(int(ids[a + 1]) if a + 1 < length else 0) if k == 0 else mask_token for a, k in rows]
    states = torch.cat([aux, weights["mask_hidden"].view(1, -1).expand(length * (count - 1), -1)])
    h = normed_aux(weights, states, eps) @ weights["fc.weight"].T
    before = (depth[None] == 0) & (anchor[None] <= anchor[:, None])
    own = (anchor[None] == anchor[:, None]) & (depth[None] <= depth[:, None])
    embedded = embedding[torch.tensor(tokens)]
    read = through_layers(weights, h, embedded, anchor + depth, before | own, heads, kv_heads, theta, eps)
    logits = read @ weights["lm_head.weight"].T

    for k in range(count):
        supervised = [a for a in range(length) if a + 1 + k < length and loss_mask[a + 1 + k]]
        counted = [a for a in supervised if in_vocabulary[a + 1 + k]]
        loss, correct = aux.new_zeros(()), 0
        for a in counted:
            p, z = target_probabilities[a + 1 + k], logits[k * length + a]
            loss = loss - (p * torch.log_softmax(z, dim=-1)).sum()
            correct += int(z.argmax() == p.argmax())
        result.total = result.total + position_weights[k] * loss
        result.loss.append(loss)
        result.counted.append(len(counted))
        result.supervised.append(len(supervised))
        result.correct.append(correct)
    return result


def served_logits(
    weights: dict[str, Tensor],
    embedding: Tensor,
    mask_token: int,
    aux: Tensor,
    ids: Tensor,
    count: int,
    heads: int,
    kv_heads: int,
    theta: float,
    eps: float,
) -> Tensor:
    """[count, Vd] logits of all positions after the last of the aux states [n, A] of ``ids`` [n + 1]."""
    rows = len(aux) + count - 1
    states = torch.cat([aux, weights["mask_hidden"].view(1, -1).expand(count - 1, -1)])
    tokens = torch.cat([ids[1:].long(), torch.full((count - 1,), mask_token)])
    h = normed_aux(weights, states, eps) @ weights["fc.weight"].T
    causal = torch.ones(rows, rows).tril().bool()
    read = through_layers(weights, h, embedding[tokens], torch.arange(rows), causal, heads, kv_heads, theta, eps)
    return read[-count:] @ weights["lm_head.weight"].T
