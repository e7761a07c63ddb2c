"""The decoder layer of a draft that guesses a chain of tokens, with the parameter names of Llama checkpoints.

The first layer of a draft reads a token's embedding beside the hidden state, so its queries, keys and values are
projected from both: they see an input twice as wide as the model. Any other one is Llama's own.

Shapes: R packed rows, H hidden size, X width of the attention's input (2H in the first layer, else H), Q query heads,
K key/value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torchspec.nn.chain_attention import Block0
from torchspec.nn.layers import MLP, AttentionProjections, RMSNorm
from torchspec.nn.rope import rotate
from torchspec.nn.sequences import Sequences

if TYPE_CHECKING:
    from torchspec.target.shape import TargetShape


class Attention(AttentionProjections):
    """The projections around :func:`chain_attention`. One row of input stands for as many as it has angles."""

    def queries(self, x_RX: Tensor, cos_RE: Tensor, sin_RE: Tensor) -> Tensor:
        return rotate(self.heads(self.q_proj, x_RX), cos_RE, sin_RE)

    def keys_values(self, x_RX: Tensor, cos_RE: Tensor, sin_RE: Tensor) -> tuple[Tensor, Tensor]:
        k_RKE, v_RKE = (self.heads(projection, x_RX) for projection in (self.k_proj, self.v_proj))
        return rotate(k_RKE, cos_RE, sin_RE), v_RKE.expand(len(cos_RE), -1, -1)


class DecoderLayer(nn.Module):
    """See the module's docstring.

    Args:
        target: whose sizes it has.
        first: whether it reads an embedding, too.
    """

    def __init__(self, target: TargetShape, first: bool):
        super().__init__()
        self.first = first
        hidden, eps = target.hidden_size, target.rms_norm_eps
        self.self_attn = Attention(target, 2 * hidden if first else hidden)
        self.mlp = MLP(hidden, target.intermediate_size)
        self.input_layernorm = RMSNorm(hidden, eps)
        if first:
            self.hidden_norm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)

    def attention_input(self, embedding_RH: Tensor, residual_RH: Tensor) -> Tensor:
        """What the first layer's q, k and v are projected from, [R, 2H]."""
        return torch.cat((self.input_layernorm(embedding_RH), self.hidden_norm(residual_RH)), dim=-1)

    def forward(
        self,
        residual_RH: Tensor,
        x_RX: Tensor,
        rotary: tuple[Tensor, Tensor],
        sequences: Sequences,
        block0: Block0,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> Tensor:
        """The residual stream for one position, from its attention input; see :func:`chain_attention`."""
        attended_RQE = sequences.attend(self.self_attn.queries(x_RX, *rotary), block0, keys, values)
        residual_RH = residual_RH + self.self_attn.o_proj(attended_RQE.flatten(1))
        return residual_RH + self.mlp(self.post_attention_layernorm(residual_RH))
