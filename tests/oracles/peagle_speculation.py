"""Greedy speculation with a P-EAGLE draft, plainly written: which drafts a server must find right.

It shares no code with the product or with vLLM. Nothing is cached: for every verify step, the draft runs over all rows
that the target has verified, and the masks behind them (:func:`served_logits`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.oracles.peagle_dense import served_logits


@dataclass
class Draft:
    """Tensors and config of an exported folder, with the target's embedding."""

    weights: dict[str, Tensor]
    config: dict
    embedding: Tensor

    @classmethod
    def load(cls, folder: Path, target: PreTrainedModel) -> Draft:
        config = json.loads((folder / "config.json").read_text())
        return cls(load_file(folder / "model.safetensors"), config, target.get_input_embeddings().weight.detach())

    def propose(self, aux: Tensor, tokens: Tensor, count: int) -> list[int]:
        """Draft ``count`` tokens after ``tokens`` [n + 1], given the aux states of the first n of them."""
        logits = served_logits(
            self.weights,
            self.embedding,
            self.config["ptd_token_id"],
            aux,
            tokens,
            count,
            self.config["num_attention_heads"],
            self.config["num_key_value_heads"],
            self.config["rope_parameters"]["rope_theta"],
            self.config["rms_norm_eps"],
        )
        offsets = self.weights["d2t"]
        return [int(i + offsets[i]) for i in logits.argmax(-1)]
