"""A dense, plainly written EAGLE3 step: the answer that the fast code is compared with.

It shares no code with the product and takes no shortcut: one sample at a time, full [S, S + t*S] attention with an
explicit mask, full logits of both heads, full softmaxes, and gradients by torch's autograd.

The statement it makes, for a sample of tokens x_0 .. x_{n-1} and TTT step t = 0 .. T-1:

- row i starts from the aux state g_i and reads the token x_{i+1+t} at rotary position i + t;
- row i attends to the keys of step 0 of rows 0..i, and to its own key of each of the steps 1..t;
- row i is compared with what the target computed at position i + 1 + t, if that position exists;
- the comparison is *supervised* if token x_{i+1+t} is loss-masked, and *counted* if, besides, the token that the
  target likes best there belongs to the draft vocabulary;
- the loss is the sum over t of weight_t times the summed cross-entropies of the counted rows, between the target's
  softmax over the draft vocabulary and the draft's.

Norms: g_i is normed as one vector where there is an ``input_norm``, and each of its layers by itself where there are
``fc_norm``s. With ``norm_output``, step t + 1 starts from what the head has read in step t.
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
    counted: list[int]
    supervised: list[int]
    correct: list[int]

    @classmethod
    def sum(cls, parts: list[DenseResult]) -> DenseResult:
        steps = range(len(parts[0].loss))
        return cls(
            total=torch.stack([p.total for p in parts]).sum(),
            loss=[torch.stack([p.loss[t] for p in parts]).sum() for t in steps],
            counted=[sum(p.counted[t] for p in parts) for t in steps],
            supervised=[sum(p.supervised[t] for p in parts) for t in steps],
            correct=[sum(p.correct[t] for p in parts) for t in steps],
        )


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def normed_aux(weights: dict[str, Tensor], aux: Tensor, eps: float) -> Tensor:
    """Aux states [S, A] after the norms that the draft has, if it has any."""
    if "input_norm.weight" in weights:
        aux = rms(aux, weights["input_norm.weight"], eps)
    if "fc_norm.0.weight" in weights:
        size = len(weights["fc_norm.0.weight"])
        parts = [aux[:, start : start + size] for start in range(0, aux.shape[1], size)]
        aux = torch.cat([rms(part, weights[f"fc_norm.{i}.weight"], eps) for i, part in enumerate(parts)], dim=1)
    return aux


def turn(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding of x [S, heads, E], one channel pair (c, c + E/2) at a time."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for c in range(half):
        angle = positions.double() / theta ** (2 * c / x.shape[-1])
        cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
        out[..., c] = x[..., c] * cos - x[..., c + half] * sin
        out[..., c + half] = x[..., c + half] * cos + x[..., c] * sin
    return out


def attend(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """q [S, Q, E] over step 0 (causal) and later steps (own row only); keys [S, K, E] each, a list over steps."""
    length, heads, width = q.shape
    group = heads // keys[0].shape[1]
    causal = torch.ones(length, length).tril().bool()
    diagonal = torch.eye(length).bool()
    mask = torch.cat([causal] + [diagonal] * (len(keys) - 1), dim=1)
    out = torch.empty_like(q)
    for head in range(heads):
        k = torch.cat([x[:, head // group] for x in keys])
        v = torch.cat([x[:, head // group] for x in values])
        scores = (q[:, head] @ k.T / math.sqrt(width)).masked_fill(~mask, -math.inf)
        out[:, head] = torch.softmax(scores, dim=-1) @ v
    return out


def dense_sample(
    weights: dict[str, Tensor],
    embedding: Tensor,
    target_head: Tensor,
    draft_ids: Tensor,
    aux: Tensor,
    last: Tensor,
    ids: Tensor,
    loss_mask: Tensor,
    step_weights: list[float],
    heads: int,
    kv_heads: int,
    theta: float,
    eps: float,
    norm_output: bool = False,
) -> DenseResult:
    """One sample without padding: aux [S, A], last [S, H] (after the target's final norm), ids [S], loss_mask [S]."""
    length, steps = len(ids), len(step_weights)
    w = {name.removesuffix(".weight").split(".")[-1]: value for name, value in weights.items()}
    target_logits = last @ target_head.T
    in_vocabulary = torch.isin(target_logits.argmax(-1), draft_ids)
    target_probabilities = torch.softmax(target_logits[:, draft_ids], dim=-1)
    result = DenseResult(aux.new_zeros(()), [], [], [], [])
    h = normed_aux(weights, aux, eps) @ w["fc"].T
    keys, values = [], []
    for t in range(steps):
        token = torch.tensor([ids[i + 1 + t] if i + 1 + t < length else 0 for i in range(length)], dtype=torch.long)
        positions = torch.arange(length) + t
        x = torch.cat([rms(embedding[token], w["input_layernorm"], eps), rms(h, w["hidden_norm"], eps)], dim=-1)
        q = turn((x @ w["q_proj"].T).view(length, heads, -1), positions, theta)
        keys.append(turn((x @ w["k_proj"].T).view(length, kv_heads, -1), positions, theta))
        values.append((x @ w["v_proj"].T).view(length, kv_heads, -1))
        h = h + attend(q, keys, values).flatten(1) @ w["o_proj"].T
        y = rms(h, w["post_attention_layernorm"], eps)
        h = h + (torch.nn.functional.silu(y @ w["gate_proj"].T) * (y @ w["up_proj"].T)) @ w["down_proj"].T
        read = rms(h, w["norm"], eps)
        logits = read @ w["lm_head"].T
        h = read if norm_output else h

        supervised = [i for i in range(length) if i + 1 + t < length and loss_mask[i + 1 + t]]
        counted = [i for i in supervised if in_vocabulary[i + 1 + t]]
        loss, correct = aux.new_zeros(()), 0
        for i in counted:
            p = target_probabilities[i + 1 + t]
            loss = loss - (p * torch.log_softmax(logits[i], dim=-1)).sum()
            correct += int(logits[i].argmax() == p.argmax())
        result.total = result.total + step_weights[t] * loss
        result.loss.append(loss)
        result.counted.append(len(counted))
        result.supervised.append(len(supervised))
        result.correct.append(correct)
    return result


def dense_step(samples: list[dict], **common) -> DenseResult:
    """The sum over samples, each a dict of aux, last, ids and loss_mask."""
    return DenseResult.sum([dense_sample(**sample, **common) for sample in samples])
