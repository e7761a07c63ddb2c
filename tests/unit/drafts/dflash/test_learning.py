"""Sixteen answers learnt by heart: of a block of eight nearly all tokens are guessed, and in a row."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from torchspec.drafts.dflash.model import DFlashDraft
from torchspec.drafts.dflash.spec import DFlashSpec
from torchspec.drafts.draft import Batch
from torchspec.target.head import TargetHead
from torchspec.target.shape import TargetShape

SAMPLES, PROMPT, LENGTH = 16, 8, 32
H, V, LAYERS = 64, 200, (1, 3, 5)
STEPS, WARMUP, RATE = 80, 10, 4e-3


def test_answers_are_learnt_by_heart() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": H, "intermediate_size": 128, "vocab_size": V, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=8, **sizes, **heads))
    ids_BS = torch.randint(V - 1, (SAMPLES, LENGTH))
    with torch.no_grad():
        states = model(ids_BS, output_hidden_states=True).hidden_states
    batch = Batch(
        hs_BSA=torch.cat([states[layer + 1] for layer in LAYERS], dim=-1),
        lhs_BSH=states[-1],
        ids_BS=ids_BS,
        loss_mask_BS=(torch.arange(LENGTH) >= PROMPT).expand(SAMPLES, -1),
        lengths_B=torch.full((SAMPLES,), LENGTH),
        seeds_B=torch.arange(SAMPLES),
    )
    head_VH = model.lm_head.weight.detach()
    head = TargetHead(model.model.embed_tokens.weight.detach(), head_VH, head_VH[:0], torch.ones(H), 1e-6)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    spec = DFlashSpec(TargetShape(H, 4, 2, 16, 128, 1e-6, V, 64, rope), LAYERS, 8, 2, 8, mask_token_id=V - 1)
    draft = DFlashDraft(spec)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / STEPS)
    )
    for _ in range(STEPS):
        output = draft(batch, head)
        (output.total / output.denominator).backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        output = draft(batch, head)
    accuracy_K = output.correct_K / output.supervised_K
    assert len(accuracy_K) == 7 and output.supervised_K.min() == SAMPLES * (LENGTH - PROMPT - 7)
    assert accuracy_K.cumprod(0).sum() >= 5
