"""Greedy speculation with a DFlash draft, plainly written: which drafts a server must find right.

It shares no code with the product or with SGLang. Nothing is cached: for every verify step, keys and values of the
whole context are made anew.

With tokens 0..a-1 read by the target and token ``a``, the anchor, written but not read, the draft fills a block of
positions a..a+B-1 with [anchor, mask, mask, ...]. Each slot attends to the context 0..a-1, whose keys and values come
from the target's states, and to every slot of the block, whichever side it is on. Slot ``k`` names token ``a + k``.

Shapes: S context tokens, B slots, n features, H hidden size, Q and K heads, E head dimension, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu
from transformers import PreTrainedModel


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def turn(x: Tensor, first: int, theta: float) -> Tensor:
    """Rotary embedding of x [S, heads, E], whose rows stand at the positions from ``first`` on: pairs (c, c + E/2)."""
    half = x.shape[-1] // 2
    positions_S, rates_C = torch.arange(first, first + len(x)), theta ** (-torch.arange(half).double() / half)
    angles = (positions_S[:, None] * rates_C)[:, None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@dataclass
class Draft:
    """An exported folder's tensors and sizes, and the target's embedding and head, all in one dtype."""

    weights: dict[str, Tensor]
    config: dict
    embedding_VH: Tensor
    head_VH: Tensor

    @classmethod
    def load(cls, folder: Path, target: PreTrainedModel) -> Draft:
        embedding, head = target.get_input_embeddings().weight, target.get_output_embeddings().weight
        weights = {name: tensor.to(head.dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
        return cls(weights, json.loads((folder / "config.json").read_text()), embedding.detach(), head.detach())

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms(x, self.weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def heads(self, x: Tensor, name: str) -> Tensor:
        return (x @ self.weights[f"{name}.weight"].T).unflatten(-1, (-1, self.config["head_dim"]))

    def turned(self, x: Tensor, attention: str, part: str, first: int) -> Tensor:
        """Queries or keys [S, heads, E] of the positions from ``first`` on: normed for each head, then turned."""
        y = self.norm(self.heads(x, f"{attention}.{part}_proj"), f"{attention}.{part}_norm")
        return turn(y, first, self.config["rope_parameters"]["rope_theta"])

    def block(self, features_SA: Tensor, anchor: int | Tensor, size: int) -> Tensor:
        """Hidden states [B, H] of the block at position S, after the last norm."""
        S, w = len(features_SA), self.weights
        context_SH = self.norm(features_SA @ w["fc.weight"].T, "hidden_norm")
        tokens = torch.full((size,), self.config["dflash_config"]["mask_token_id"])
        tokens[0] = anchor
        x_BH = self.embedding_VH[tokens]
        for i in range(self.config["num_hidden_layers"]):
            layer, attention = f"layers.{i}", f"layers.{i}.self_attn"
            y_BH = self.norm(x_BH, f"{layer}.input_layernorm")
            q_BQE = self.turned(y_BH, attention, "q", S)
            k_LKE = torch.cat(
                [self.turned(context_SH, attention, "k", 0), self.turned(y_BH, attention, "k", S)],
            )
            v_LKE = torch.cat([self.heads(part, f"{attention}.v_proj") for part in (context_SH, y_BH)])
            group = q_BQE.shape[1] // k_LKE.shape[1]
            k_LQE, v_LQE = (part.repeat_interleave(group, dim=1) for part in (k_LKE, v_LKE))
            scores_QBL = torch.einsum("bqe,lqe->qbl", q_BQE, k_LQE) * self.config["head_dim"] ** -0.5
            attended = torch.einsum("qbl,lqe->bqe", scores_QBL.softmax(-1), v_LQE).flatten(1)
            x_BH = x_BH + attended @ w[f"{attention}.o_proj.weight"].T
            y_BH, mlp = self.norm(x_BH, f"{layer}.post_attention_layernorm"), f"{layer}.mlp"
            gated = silu(y_BH @ w[f"{mlp}.gate_proj.weight"].T) * (y_BH @ w[f"{mlp}.up_proj.weight"].T)
            x_BH = x_BH + gated @ w[f"{mlp}.down_proj.weight"].T
        return self.norm(x_BH, "norm")

    def propose(self, features_SA: Tensor, anchor: int, size: int) -> list[int]:
        """The tokens of slots 1..B-1."""
        return (self.block(features_SA, anchor, size)[1:] @ self.head_VH.T).argmax(-1).tolist()


def target_features(target: PreTrainedModel, layers: list[int], text: Tensor) -> Tensor:
    """Outputs of the target's layers, side by side, [S, n * H]."""
    with torch.no_grad():
        hidden = target(text[None], output_hidden_states=True).hidden_states
    return torch.cat([hidden[layer + 1][0] for layer in layers], dim=-1)


def right_drafts(draft: Draft, features: Tensor, text: Tensor, prompt: int, output: int, size: int) -> list[int]:
    """``histogram[k]``: verify steps in which exactly ``k`` drafts were right.

    Args:
        features: the target's, of ``text``.
        text: prompt, the target's greedy answer, and at least ``size`` more greedy tokens: a last step may accept
            tokens beyond the answer's end.
        prompt: tokens of the prompt.
        output: tokens of the answer.
        size: slots of a block, the anchor's included.
    """
    histogram = [0] * size
    anchor = prompt
    while anchor + 1 < prompt + output:
        drafted = draft.propose(features[:anchor], int(text[anchor]), size)
        right = 0
        while right < size - 1 and drafted[right] == text[anchor + 1 + right]:
            right += 1
        histogram[right] += 1
        anchor += right + 1
    return histogram
