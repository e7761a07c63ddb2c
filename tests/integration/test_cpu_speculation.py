"""EAGLE3 speculation on a CPU engine loses nothing: fp32 greedy text is the same with and without a draft."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from speculation_process import NEW_TOKENS, PROMPTS

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 576, 1536, 9, 3, 64, 49152


def write_random_draft(folder: Path, vocabulary: list[int]) -> None:
    """A draft of random weights that proposes tokens of ``vocabulary`` (sorted target ids)."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return 0.02 * torch.randn(*shape, generator=generator)

    ids = torch.tensor(vocabulary)
    tensors = {
        "fc.weight": random(HIDDEN, 3 * HIDDEN),
        "midlayer.self_attn.q_proj.weight": random(HEADS * HEAD_DIM, 2 * HIDDEN),
        "midlayer.self_attn.k_proj.weight": random(KV_HEADS * HEAD_DIM, 2 * HIDDEN),
        "midlayer.self_attn.v_proj.weight": random(KV_HEADS * HEAD_DIM, 2 * HIDDEN),
        "midlayer.self_attn.o_proj.weight": random(HIDDEN, HEADS * HEAD_DIM),
        "midlayer.mlp.gate_proj.weight": random(INTERMEDIATE, HIDDEN),
        "midlayer.mlp.up_proj.weight": random(INTERMEDIATE, HIDDEN),
        "midlayer.mlp.down_proj.weight": random(HIDDEN, INTERMEDIATE),
        "lm_head.weight": random(len(ids), HIDDEN),
        "d2t": ids - torch.arange(len(ids)),
        "t2d": torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, ids, True),
    }
    for norm in ("norm", "midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm"):
        tensors[f"{norm}.weight"] = torch.ones(HIDDEN)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "target_hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": 1,
        "vocab_size": VOCAB,
        "draft_vocab_size": len(ids),
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 14, 26], "use_aux_hidden_state": True},
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def outcome(target_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("speculation")
    # So few choices that a random draft is right now and then; both branches of the verification must run.
    write_random_draft(folder / "draft", [2, 28, 30, 198, 253, 260, 282, 284])
    script = Path(__file__).with_name("speculation_process.py")
    done = subprocess.run(
        [sys.executable, str(script), str(target_path), str(folder / "draft")],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def test_text_is_the_same_with_and_without_a_draft(outcome: dict) -> None:
    assert all(len(ids) == NEW_TOKENS for ids in outcome["plain"])
    assert len(Counter(map(tuple, outcome["plain"]))) == len(PROMPTS)
    assert outcome["speculative"] == outcome["plain"]


def test_some_draft_tokens_were_accepted_and_some_were_not(outcome: dict) -> None:
    assert 0 < outcome["accepted"] < 3 * outcome["verify_steps"]
    assert outcome["verify_steps"] + outcome["accepted"] >= len(PROMPTS) * (NEW_TOKENS - 1)
