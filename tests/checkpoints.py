"""Targets of any size whose weights take no room on the disk: a file's header, and a hole behind it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
PARAMETERS = 8_190_735_360
"""Of Qwen3-8B."""


def hollow_checkpoint(folder: Path, tokenizer: Path) -> Path:
    """Qwen3-8B in ``folder``, with the tokenizer of another checkpoint: all its sizes, and zeros for weights."""
    folder.mkdir()
    for file in tokenizer.iterdir():
        if "token" in file.name or file.suffix == ".jinja" or file.name == "generation_config.json":
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    hidden, vocab = QWEN3_8B["hidden_size"], QWEN3_8B["vocab_size"]
    shapes = {
        "model.embed_tokens.weight": [vocab, hidden],
        "model.norm.weight": [hidden],
        "lm_head.weight": [vocab, hidden],
        "model.layers": [PARAMETERS - 2 * vocab * hidden - hidden],
    }
    header, end = dict[str, Any](), 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        os.truncate(file.fileno(), 8 + len(text) + end)
    return folder
