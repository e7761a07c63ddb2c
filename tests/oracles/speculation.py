"""Greedy speculation with an EAGLE3 draft, plainly written: which drafts a server must find right.

It shares no code with the product or with SGLang. Nothing is cached: for every verify step, the draft runs over all
rows that it has seen.

Row ``i`` of the draft reads the target's aux state of token ``i`` (rows that the target has verified) or the draft's
own last hidden state (rows of tokens that it drafts itself; after its last norm with ``norm_output``), and the
embedding of token ``i + 1``; its output names token ``i + 2``.

Shapes: S rows, H hidden size, Q and K heads, E head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from tests.oracles.eagle3_dense import normed_aux, rms, turn


@dataclass
class Draft:
    """Tensors of an exported folder, in float32, with the target's embedding."""

    weights: dict[str, Tensor]
    embedding: Tensor
    heads: int
    kv_heads: int
    theta: float
    eps: float
    norm_output: bool = False

    def __post_init__(self) -> None:
        self.w = {name.removesuffix(".weight").split(".")[-1]: t for name, t in self.weights.items()}
        self.target_ids = self.weights["d2t"] + torch.arange(len(self.weights["d2t"]))

    def forward(self, states_SH: Tensor, tokens_S: Tensor) -> Tensor:
        """The residual stream after the draft's layer, [S, H]."""
        w, positions = self.w, torch.arange(len(tokens_S))
        x = torch.cat(
            [rms(self.embedding[tokens_S], w["input_layernorm"], self.eps), rms(states_SH, w["hidden_norm"], self.eps)],
            dim=-1,
        )
        q = turn((x @ w["q_proj"].T).unflatten(-1, (self.heads, -1)), positions, self.theta)
        k = turn((x @ w["k_proj"].T).unflatten(-1, (self.kv_heads, -1)), positions, self.theta)
        v = (x @ w["v_proj"].T).unflatten(-1, (self.kv_heads, -1))
        q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        attended = scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
        h_SH = states_SH + attended.transpose(0, 1).flatten(1) @ w["o_proj"].T
        y = rms(h_SH, w["post_attention_layernorm"], self.eps)
        return h_SH + (silu(y @ w["gate_proj"].T) * (y @ w["up_proj"].T)) @ w["down_proj"].T

    def propose(self, aux: Tensor, tokens: Tensor, count: int) -> list[int]:
        """Draft ``count`` tokens after ``tokens`` [n + 1], given the aux states of the first n of them."""
        states_SH, read, drafted = normed_aux(self.weights, aux, self.eps) @ self.w["fc"].T, tokens[1:], []
        for _ in range(count):
            last_H = self.forward(states_SH, read)[-1]
            normed_H = rms(last_H, self.w["norm"], self.eps)
            drafted.append(int(self.target_ids[(normed_H @ self.w["lm_head"].T).argmax()]))
            next_H = normed_H if self.norm_output else last_H
            states_SH, read = torch.cat([states_SH, next_H[None]]), torch.cat([read, torch.tensor(drafted[-1:])])
        return drafted


def right_drafts(draft: Draft, aux: Tensor, text: Tensor, prompt: int, output: int, count: int) -> list[int]:
    """``histogram[k]``: verify steps in which exactly ``k`` drafts were right.

    Args:
        aux: the target's concatenated aux states of ``text``.
        text: prompt, the target's greedy answer, and at least ``count`` more greedy tokens: a last step may accept
            tokens beyond the answer's end.
        prompt: tokens of the prompt.
        output: tokens of the answer.
        count: tokens drafted for each step.
    """
    histogram = [0] * (count + 1)
    verified = prompt  # tokens whose states are known; one more is written already
    while verified + 1 < prompt + output:
        drafted = draft.propose(aux[:verified], text[: verified + 1], count)
        right = 0
        while right < count and drafted[right] == text[verified + 1 + right]:
            right += 1
        histogram[right] += 1
        verified += right + 1
    return histogram
